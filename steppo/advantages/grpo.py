"""GRPO's credit: an episode's return against those of its group. GSPO's too, whose ratio is per step."""

from __future__ import annotations

from typing import ClassVar

from steppo.advantages.base import Advantage, episode_returns, standardised_within
from steppo.batch import Credit, CreditBatch


class GRPO(Advantage):
    """``A = (R - mean of the group) / (std of the group + 1e-6)``, the same for all steps of an episode; no critic.

    ``R`` is the episode's undiscounted return, whichever agent earned it. A group of one episode, or of equal returns, gives
    0. A KL penalty in the reward is no part of ``R``: its sum, minus the mean of the group, is added, over the same divisor,
    or over 1 where the returns are equal.

    Args:
        scale_by_std: Divide by the group's standard deviation; without it, hard and easy tasks keep their own scale.
    """

    needs_groups: ClassVar[bool] = True

    def __init__(self, scale_by_std: bool = True) -> None:
        self.scale_by_std = scale_by_std

    def __call__(self, batch: CreditBatch) -> Credit:
        advantage_E = standardised_within(episode_returns(batch), batch.group_E, self.scale_by_std)
        return Credit(advantage_N=advantage_E[batch.episode_N])
