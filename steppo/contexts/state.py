"""A prompt of bounded size, rendered anew at each step: task, past actions, current observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steppo.contexts.base import ContextPolicy
from steppo.errors import ConfigError
from steppo.types import Observation, Step


class StateContext(ContextPolicy):
    """``s_t`` = instructions, goal, past actions, current observation: what does not change comes first.

    Args:
        max_past_actions: Show only the last so many actions; all unless given.
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.
    """

    def __init__(
        self,
        max_past_actions: int | None = None,
        instructions: str = "Solve the task. Answer with one command and nothing else.",
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(instructions, template_kwargs)
        if max_past_actions is not None and max_past_actions < 0:
            raise ConfigError(f"StateContext: max_past_actions must be at least 0, not {max_past_actions}")
        self.max_past_actions = max_past_actions

    def prompt_ids(self, observations: Sequence[Observation], steps: Sequence[Step]) -> np.ndarray:
        shown = len(steps) if self.max_past_actions is None else min(self.max_past_actions, len(steps))
        past = [step.action for step in steps[len(steps) - shown :]]
        current = observations[-1]
        lines = [current.goal] if current.goal else []
        if past:
            lines.append("Done: " + ", ".join(past))
        lines.append(self.render_observation(current, with_goal=False))
        return self.first_turn("\n".join(lines))
