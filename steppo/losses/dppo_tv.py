"""DPPO with total variation: a trust region of probabilities instead of ratios (arXiv 2602.04879)."""

from __future__ import annotations

from steppo.errors import require_at_least
from steppo.losses.base import LossInputs, LossOutput, PolicyLoss
from steppo.losses.functional import log_ratios


class DPPOTV(PolicyLoss):
    """``- m w A + penalty (log w)^2`` with ``w = pi / behaviour`` of each token.

    ``m`` drops a token whose probability has already gone further than ``max_shift`` from the behaviour policy's where its
    advantage would push it: above it with ``A > 0``, below it with ``A < 0``. A ratio says little of a rare token: from
    1e-4 to 3e-4 it is 3, and the policy is hardly another. As ``w`` is of the policy that sampled, it wants no correction
    beside it.

    Args:
        max_shift: Largest change of a token's probability.
        penalty: Weight of the squared log-ratio.
    """

    def __init__(self, max_shift: float = 0.2, penalty: float = 1e-3) -> None:
        require_at_least(0, self, max_shift=max_shift, penalty=penalty)
        self.max_shift = max_shift
        self.penalty = penalty

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantage_A = inputs.advantage_A
        log_ratio_A = log_ratios(inputs.logprobs_A, inputs.behaviour_logprobs_A, inputs.step_of_A, inputs.num_steps, "token")
        shift_A = inputs.logprobs_A.detach().exp() - inputs.behaviour_logprobs_A.exp()
        dropped_A = ((advantage_A > 0) & (shift_A > self.max_shift)) | ((advantage_A < 0) & (shift_A < -self.max_shift))
        ratio_A = log_ratio_A.exp()
        surrogate_A = (ratio_A * advantage_A).masked_fill(dropped_A, 0.0)
        return LossOutput(-surrogate_A + self.penalty * log_ratio_A.square(), ratio_A.detach(), dropped_A)

    def __str__(self) -> str:
        return f"DPPO, probabilities within {self.max_shift:g} of the behaviour policy's"
