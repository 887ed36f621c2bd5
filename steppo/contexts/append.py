"""The whole dialogue, token-exact: each prompt is the last one, the sampled action and the new observation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steppo.contexts.base import ContextPolicy
from steppo.types import Observation, Step


class AppendContext(ContextPolicy):
    """``s_{t+1} = s_t + a_t + observation``. Nothing is tokenised twice, so each prompt is a prefix of the next."""

    def prompt_ids(self, observations: Sequence[Observation], steps: Sequence[Step]) -> np.ndarray:
        if not steps:
            return self.first_turn(self.render_observation(observations[0]))
        last = steps[-1]
        turn = self.next_turn(
            self.render_observation(observations[-1], with_goal=False), stopped=last.finish_reason == "stop"
        )
        return np.concatenate([last.prompt_ids, last.action_ids, turn])
