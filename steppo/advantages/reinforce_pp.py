"""REINFORCE++'s credit: discounted token returns over the whole episode."""

from __future__ import annotations

from steppo.advantages.base import (
    Advantage,
    centre_,
    check_decays,
    discounted_suffix_sums_,
    episode_returns,
    token_time_order,
    unsort,
)
from steppo.batch import Credit, CreditBatch


class ReinforcePP(Advantage):
    """``A_i = r_i + gamma * A_{i+1}`` over the generated tokens of an episode, across its steps; whitened over tokens.

    With several agents, over the tokens of each one's steps. A step's reward sits on its last token, a KL penalty
    (``objective.kl: reward``) on each. Mean and deviation are of the task's returns; the penalty is summed up by itself, and
    its sums, minus their mean, are added over the same deviation (over 1 where all task returns are equal). No critic.

    Args:
        gamma: Discount per generated token: 0.99 a token leaves nothing of a reward 500 tokens on, hence the default 1.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        check_decays(self, gamma=gamma)
        self.gamma = gamma

    def __call__(self, batch: CreditBatch) -> Credit:
        order, end = token_time_order(batch)
        advantage_A = unsort(discounted_suffix_sums_(batch.task_reward_A[order].clone(), self.gamma, end), order)
        spread = centre_(advantage_A, summed=episode_returns(batch).summed.max())
        penalty_A = (batch.reward_A - batch.task_reward_A)[order]
        if penalty_A.any():  # else it would cost as much as the rewards
            penalty_A = unsort(discounted_suffix_sums_(penalty_A, self.gamma, end), order)
            advantage_A += penalty_A - penalty_A.mean()
        return Credit(advantage_A=advantage_A.div_(spread))
