"""The clipped surrogate, with one importance ratio per step (StepPO, GSPO) or per token (PPO)."""

from __future__ import annotations

import torch

from steppo.errors import ConfigError, require_at_least
from steppo.losses.base import LossInputs, LossOutput, PolicyLoss
from steppo.losses.functional import Ratio, log_ratios


class ClippedLoss(PolicyLoss):
    """``- min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)`` (paper, section on step-level importance sampling).

    With token ratios and a dual clip ``c`` the objective is at least ``c A`` where ``A < 0``: a token that has become much
    more likely although it was bad does not dominate the update.

    Args:
        ratio: One length-normalised importance ratio per step (StepPO, GSPO), or one per token (PPO).
        clip_low: Trust region of the ratio below 1.
        clip_high: Trust region of the ratio above 1.
        dual_clip: ``c``, for token ratios only; 0 for none.
    """

    def __init__(
        self, ratio: Ratio = "step", clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 10.0
    ) -> None:
        require_at_least(0, self, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        if clip_low > 1:
            raise ConfigError(f"ClippedLoss: clip_low must be at most 1, not {clip_low}: a ratio is never below 0")
        if ratio == "token" and 0 < dual_clip <= 1 + clip_high:
            raise ConfigError(f"ClippedLoss: dual_clip must be 0, or above 1 + clip_high, not {dual_clip}")
        self.ratio = ratio
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    @property
    def clip_range(self) -> float:
        return min(self.clip_low, self.clip_high)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantage_A = inputs.advantage_A
        low, high = 1 - self.clip_low, 1 + self.clip_high
        log_ratio_A = log_ratios(inputs.logprobs_A, inputs.old_logprobs_A, inputs.step_of_A, inputs.num_steps, self.ratio)
        ratio_A = log_ratio_A.exp()
        objective_A = torch.minimum(ratio_A * advantage_A, ratio_A.clamp(low, high) * advantage_A)
        if self.dual_clip and self.ratio == "token":
            objective_A = torch.where(advantage_A < 0, torch.maximum(objective_A, self.dual_clip * advantage_A), objective_A)
        detached_A = ratio_A.detach()
        return LossOutput(-objective_A, detached_A, (detached_A < low) | (detached_A > high))

    def __str__(self) -> str:
        return f"{self.ratio} ratio clipped at -{self.clip_low:g} / +{self.clip_high:g}"
