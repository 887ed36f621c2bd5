"""A corridor whose expert does not always know."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from steppo.types import Task, Turn
from tests.toy_env import CorridorEnv

Knows = Literal["always", "never", "first", "near", "some", "raises"]


class ExpertEnv(CorridorEnv):
    """Where the expert has no action no commands are shown either.

    Args:
        knows: When the expert has an action: always, never, at the first step, next to the goal and there, or for some
            tasks; or it raises at its second.
    """

    def __init__(self, knows: Knows = "always") -> None:
        super().__init__()
        self.knows = knows

    def reset(self, task: Task) -> Turn:
        return self._shown(super().reset(task))

    def command(self, command: str) -> Turn:
        return self._shown(super().command(command))

    def expert_action(self) -> str | None:
        if self.knows == "raises" and self._steps:
            raise RuntimeError("lost")
        return super().expert_action() if self._knows_here() else None

    def _knows_here(self) -> bool:
        return {
            "always": True,
            "raises": True,
            "never": False,
            "first": self._steps == 0,
            "near": abs(self._goal - self._room) < 2,
            "some": int(self._task.id.rpartition("/")[2]) % 2 == 0,
        }[self.knows]

    def _shown(self, turn: Turn) -> Turn:
        return turn if self._knows_here() else replace(turn, commands=None)
