"""An environment whose every method can be made to raise, as a user's may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from steppo.types import Task, Turn
from tests.toy_env import CorridorEnv


class BrokenEnv(CorridorEnv):
    """A corridor that raises in one of its methods.

    Args:
        where: Which.
    """

    def __init__(self, where: Literal["constructor", "tasks", "prepare", "reset"] = "reset") -> None:
        self.where = where
        self._pass("constructor")
        super().__init__()

    def _pass(self, method: str) -> None:
        if method == self.where:
            raise KeyError(f"broken in {method}")

    def tasks(self, split: str) -> list[Task]:
        self._pass("tasks")
        return super().tasks(split)

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        self._pass("prepare")

    def reset(self, task: Task) -> Turn:
        self._pass("reset")
        return super().reset(task)
