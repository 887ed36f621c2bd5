"""A corridor that says more than its reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from steppo.types import Task, Turn
from tests.toy_env import FaultyEnv


class InfoEnv(FaultyEnv):
    """Says figures and labels with the start and with steps; some tasks have names that others do not.

    Args:
        says: Everything, nothing, or ``None`` under each name.
        fail_tasks: Ids of tasks that raise in their second step.
    """

    def __init__(self, says: Literal["all", "nothing", "none"] = "all", fail_tasks: list[str] | None = None) -> None:
        super().__init__(fail_tasks=fail_tasks)
        self.says = says

    def reset(self, task: Task) -> Turn:
        turn = super().reset(task)
        distance = abs(self._goal - self._room)
        said: dict[str, Any] = {"type": "near" if distance == 1 else "far", "distance": np.int64(distance), "left": distance}
        if int(task.id.rpartition("/")[2]) % 2:
            said |= {"odd one/s": np.float32(0.5), "kind \u00e9": np.str_("odd")}
        return replace(turn, info=self._told(said))

    def command(self, command: str) -> Turn:
        turn = super().command(command)
        said = {"left": abs(self._goal - self._room), "moved": np.bool_(command != "take"), "last": command}
        return replace(turn, info=self._told(said))

    def _told(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"all": said, "nothing": {}, "none": dict.fromkeys(said)}[self.says]
