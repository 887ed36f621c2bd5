"""Words for the games of TextArena, which would fetch some."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def write_words(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Writes some where NLTK looks for them, in this process and in those that it starts."""
    words = folder / "nltk" / "corpora" / "words"
    words.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (words / name).write_text("lamp\nstone\ncandle\nlantern\n")
    monkeypatch.setenv("NLTK_DATA", str(folder / "nltk"))
    if "nltk" in sys.modules:
        monkeypatch.setattr(sys.modules["nltk"].data, "path", [str(folder / "nltk")])
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no way out
