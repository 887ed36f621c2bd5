"""A corridor whose expert does not always know."""

from __future__ import annotations

from typing import Any, Literal

from steppo.types import Observation, Task
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

    def reset(self, task: Task) -> tuple[Observation, dict[str, Any]]:
        observation, info = super().reset(task)
        return self._shown(observation), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, *rest = super().step(action)
        return self._shown(observation), *rest  # type: ignore[return-value]

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

    def _shown(self, observation: Observation) -> Observation:
        return observation if self._knows_here() else Observation(observation.text, observation.goal)
