"""Off-policy corrections: weights for actions that another policy sampled than the one the iteration starts from.

They differ where sampling ran ahead of learning, and a little wherever an engine computes in other numbers than the learner.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steppo.errors import ConfigError
from steppo.losses import log_ratios


class Weights(NamedTuple):
    """``weight_A``: float, multiplies a token's loss. ``keep_A``: bool, whether it is learned from at all."""

    weight_A: Tensor
    keep_A: Tensor


class Correction(ABC):
    """Log-probabilities of two policies -> weights. Pure.

    What is not kept has weight 0 in the losses of policy and critic. It stays in credit, in whitening and group statistics,
    and in the number that losses are divided by, so that the other steps weigh what they would weigh without it.

    Attributes:
        needs_old_logprobs: Whether weights depend on them; else they may be NaN, where they are not known yet.
    """

    needs_old_logprobs: bool = True

    @abstractmethod
    def __call__(self, behaviour_logprobs_A: Tensor, old_logprobs_A: Tensor, step_of_A: Tensor, num_steps: int) -> Weights:
        """The weights of action tokens.

        Args:
            behaviour_logprobs_A: float, of the policy that sampled, as its engine computed them.
            old_logprobs_A: float, of the policy when the iteration starts.
            step_of_A: int64 in [0, num_steps), the step of each token; those of a step stand together.
            num_steps: N.
        """


class NoCorrection(Correction):
    """Weight 1 for all: the policies are taken for one."""

    needs_old_logprobs = False

    def __call__(self, behaviour_logprobs_A: Tensor, old_logprobs_A: Tensor, step_of_A: Tensor, num_steps: int) -> Weights:
        ones_A = torch.ones_like(old_logprobs_A)
        return Weights(ones_A, ones_A.bool())


class ImportanceCorrection(Correction):
    """Truncated importance weights ``min(w, cap)``, ``w = pi_old / behaviour``; what is too far off is not kept.

    With ``level: step`` all tokens of a step have the geometric mean of their ratios, as in StepPO's own ratio: it does not
    grow with the length of an action, is biased, and corrects mildly. With ``token`` each has its own.

    Args:
        level: One weight per step, or one per token.
        cap: Largest weight.
        keep_low: Steps (tokens) whose ratio is below this are not kept.
        keep_high: Nor those above this.
    """

    def __init__(
        self, level: Literal["step", "token"] = "step", cap: float = 2.0, keep_low: float = 0.0, keep_high: float = math.inf
    ) -> None:
        if not 0 < cap < math.inf:
            raise ConfigError(f"ImportanceCorrection: cap must be above 0 and finite, not {cap}")
        if not 0 <= keep_low <= 1 <= keep_high:
            raise ConfigError(
                f"ImportanceCorrection: keep_low must be from 0 to 1, and keep_high at least 1, not {keep_low}, {keep_high}"
            )
        self.level = level
        self.cap = cap
        self.keep_low = keep_low
        self.keep_high = keep_high

    def __call__(self, behaviour_logprobs_A: Tensor, old_logprobs_A: Tensor, step_of_A: Tensor, num_steps: int) -> Weights:
        ratio_A = log_ratios(old_logprobs_A, behaviour_logprobs_A, step_of_A, num_steps, self.level).exp()
        return Weights(ratio_A.clamp(max=self.cap), (ratio_A >= self.keep_low) & (ratio_A <= self.keep_high))
