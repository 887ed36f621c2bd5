"""CISPO: the importance ratio is clipped, and no token loses its gradient (MiniMax-M1, arXiv 2506.13585, section 3.1)."""

from __future__ import annotations

from steppo.errors import ConfigError, require_at_least
from steppo.losses.base import LossInputs, LossOutput, PolicyLoss
from steppo.losses.functional import Ratio, log_ratios


class CISPO(PolicyLoss):
    """``- sg(clip(w, 1 - clip_low, 1 + clip_high)) A log pi``: REINFORCE, weighted by a bounded ratio.

    Where the clipped surrogate drops a token that has moved too far, here it goes on learning with the bound as its weight.

    Args:
        clip_low: Bound of the ratio below 1; 1 is no bound.
        clip_high: Bound of the ratio above 1.
        ratio: One per token, as in the paper, or one per step.
    """

    def __init__(self, clip_low: float = 1.0, clip_high: float = 4.0, ratio: Ratio = "token") -> None:
        require_at_least(0, self, clip_low=clip_low, clip_high=clip_high)
        if clip_low > 1:
            raise ConfigError(f"CISPO: clip_low must be at most 1, not {clip_low}: a ratio is never below 0")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.ratio = ratio

    @property
    def clip_range(self) -> float:
        return min(self.clip_low, self.clip_high)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        log_ratio_A = log_ratios(inputs.logprobs_A, inputs.old_logprobs_A, inputs.step_of_A, inputs.num_steps, self.ratio)
        ratio_A = log_ratio_A.detach().exp()
        bounded_A = ratio_A.clamp(1 - self.clip_low, 1 + self.clip_high)
        return LossOutput(-bounded_A * inputs.advantage_A * inputs.logprobs_A, ratio_A, bounded_A != ratio_A)

    def __str__(self) -> str:
        return f"CISPO, {self.ratio} ratio bounded by {1 - self.clip_low:g} and {1 + self.clip_high:g}"
