"""``python -m steppo.data``: checks, prepares, counts and hashes what an environment plays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steppo.data.command import main as data
from steppo.panel.command import main as panel
from tests.cli_helpers import TOY
from tests.folder_env import FolderEnv, write_tasks

NAME = "tests.folder_env.FolderEnv"


def said(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    capsys.readouterr()
    data(args)
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[str], str]:
    """What was found, and what was wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        data(args)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return out.splitlines(), line


def test_counts_and_hashes_are_those_of_panels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the data lie; what is prepared is left alone."""
    here, there = write_tasks(tmp_path / "here"), write_tasks(tmp_path / "there")
    version, *lines = said(capsys, NAME, f"--data={here}")
    assert version == "version: 1"
    assert [line.partition(",")[0] for line in lines] == ["train: 4 tasks", "valid: 4 tasks", "test: 4 tasks"]
    marks = sorted(here.rglob("*.ready"))
    assert len(marks) == 12
    marks[0].write_text("older")
    marks[1].unlink()  # as after an interrupt
    assert said(capsys, NAME, f"--data={here}") == [version, *lines] == said(capsys, NAME, "--data", str(there))
    assert (marks[0].read_text(), marks[1].read_text()) == ("older", "made")
    panel(["make", f"--config={TOY}", f"--data.source.env={NAME}", f"--data.source.env.data={here}", f"--out={here}/x.json"])
    assert lines[1].endswith(json.loads((here / "x.json").read_text())["sha256"])


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, and the other splits are done all the same."""
    folder = write_tasks(tmp_path / "data")
    for name in "ac":
        (folder / "valid" / f"{name}.json").write_text("{")
    (folder / "test").rename(folder / "gone")
    out, line = refused(capsys, NAME, f"--data={folder}")
    assert [text.partition(":")[0] for text in out] == ["version", "train"]
    assert f"2 of 4 tasks of valid: FolderEnv: {folder}/valid/a.json is damaged; FolderEnv: {folder}/valid/c.json" in line
    assert f"there is no {folder}/test; write it" in line
    assert len(said(capsys, NAME, f"--data={folder}", "--split", "train")) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give an environment, such as textworld"),
        (["textwrld"], "did you mean 'TextWorldEnv'?"),
        (["nowhere.Env"], "cannot import nowhere.Env"),
        ([NAME], "the following arguments are required: data"),
        ([NAME, "--dat=x"], "--dat=x"),
        ([NAME, "--data=x", "--reverse=much"], "reverse"),
        (["textworld", "--challenge=chess"], "challenge"),
        (["textworld", "--split=dev", "--cache_dir={tmp}"], "TextWorldEnv has no split 'dev'"),
    ],
)
def test_mistakes(args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *(arg.format(tmp=tmp_path) for arg in args))[1]


def test_an_interrupt_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderEnv, "prepare", interrupted)
    with pytest.raises(SystemExit) as stopped:
        data([NAME, f"--data={write_tasks(tmp_path / 'data')}"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"


def test_help_says_where_data_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert "TextWorldEnv" in "\n".join(said(capsys, "--help"))
    with pytest.raises(SystemExit) as stopped:
        data([NAME, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Get its data nowhere: tests write them." in text
    assert "Folder with a folder of each split" in text
