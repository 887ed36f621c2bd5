"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | os.PathLike[str]) -> Path:
    """With ``~`` as the home folder: no shell has seen what stands in a config or behind ``--option=``."""
    return Path(os.path.expanduser(text))
