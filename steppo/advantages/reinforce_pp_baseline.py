"""REINFORCE++-baseline's credit: an episode's return minus its group's mean, whitened over tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from steppo.advantages.base import Advantage, episode_returns, standardised_within, whiten
from steppo.types import Credit, CreditBatch


class ReinforcePPBaseline(Advantage):
    """``A = R - mean of the group``, given to all tokens of an episode, then whitened over the tokens of the iteration.

    ``R`` is the episode's undiscounted return. A group of one episode, or of equal returns, has nothing to compare: its
    tokens get 0 and are left out of the whitening, whose mean would otherwise push all of them one way. No critic.
    """

    needs_groups: ClassVar[bool] = True

    def __call__(self, batch: CreditBatch) -> Credit:
        centred_E = standardised_within(episode_returns(batch), batch.group_E, scale_by_std=False)
        compared_E = torch.isin(batch.group_E, batch.group_E[centred_E != 0])
        advantage_A = centred_E[batch.episode_N].index_select(0, batch.step_of_A)
        compared_A = compared_E[batch.episode_N].index_select(0, batch.step_of_A)
        advantage_A[compared_A] = whiten(advantage_A[compared_A])
        return Credit(advantage_A=advantage_A)
