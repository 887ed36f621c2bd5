"""REINFORCE++'s credit: discounted token returns over the whole episode."""

from __future__ import annotations

from steppo.advantages.base import (
    Advantage,
    check_decays,
    discounted_suffix_sums_,
    token_time_order,
    unsort,
    whiten_,
)
from steppo.types import Credit, CreditBatch


class ReinforcePP(Advantage):
    """``A_i = r_i + gamma * A_{i+1}`` over the generated tokens of an episode, across its steps; whitened over tokens.

    A step's reward sits on its last token, a KL penalty (``loss.kl: reward``) on each. No critic.

    Args:
        gamma: Discount per generated token: 0.99 a token leaves nothing of a reward 500 tokens on, hence the default 1.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        check_decays(self, gamma=gamma)
        self.gamma = gamma

    def __call__(self, batch: CreditBatch) -> Credit:
        order, end = token_time_order(batch)
        return_A = unsort(discounted_suffix_sums_(batch.reward_A[order].clone(), self.gamma, end), order)
        return Credit(advantage_A=whiten_(return_A))
