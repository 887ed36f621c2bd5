"""A corridor whose tasks are files of a folder, as benchmarks have them: for tests of panels and data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from steppo.errors import ConfigError
from steppo.types import Task, Turn
from tests.toy_env import CorridorEnv


class FolderEnv(CorridorEnv):
    """Get its data nowhere: tests write them.

    Args:
        data: Folder with a folder of each split, in which each file is a task.
        reverse: List files the other way round.
        version: Of the data.
        max_steps: Steps that a task allows.
    """

    splits = ("train", "valid", "test")

    def __init__(self, data: str, reverse: bool = False, version: str = "1", max_steps: int = 8) -> None:
        super().__init__(max_steps=max_steps)
        self.data = data
        self.reverse = reverse
        self.version = version

    def tasks(self, split: str) -> list[Task]:
        folder = Path(self.data, split)
        if not folder.is_dir():
            raise ConfigError(f"FolderEnv: there is no {folder}; write it")
        names = sorted(os.listdir(folder), reverse=self.reverse)
        return [Task(f"{split}/{name}", {"file": str(folder / name)}) for name in names if name.endswith(".json")]

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Marks each task; one that is marked is left alone."""
        for done, task in enumerate(tasks, start=1):
            mark = Path(task.data["file"]).with_suffix(".ready")
            if not mark.exists():
                mark.write_text("made")
            progress(done, len(tasks))

    def content(self, task: Task) -> str:
        game = self._game(task)
        return f"{game['start']} {game['goal']}"

    def reset(self, task: Task) -> Turn:
        game = self._game(task)
        turn = super().reset(Task(task.id, game))
        way = abs(game["start"] - game["goal"]) + 1
        return replace(turn, info={"task_type": "left" if game["goal"] < game["start"] else "right", "golden_steps": way})

    @staticmethod
    def _game(task: Task) -> dict[str, int]:
        file = Path(task.data["file"])
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):
            raise ConfigError(f"FolderEnv: {file} is damaged") from None


def write_tasks(folder: Path) -> Path:
    """Four tasks in each split."""
    for split in FolderEnv.splits:
        (folder / split).mkdir(parents=True)
        for name, (start, goal) in {"a": (0, 3), "b": (2, 1), "c": (1, 3), "d": (3, 0)}.items():
            (folder / split / f"{name}.json").write_text(json.dumps({"start": start, "goal": goal}))
    return folder
