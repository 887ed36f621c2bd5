"""REINFORCE++-baseline's credit: an episode's return minus its group's mean, whitened over tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from steppo.advantages.base import Advantage, centred_within, episode_returns
from steppo.batch import Credit, CreditBatch


class ReinforcePPBaseline(Advantage):
    """``A = R - mean of the group``, the same for all tokens of an episode, whitened over the tokens of the iteration.

    ``R`` is the episode's undiscounted return, whichever agent earned it. A group of one episode, or of equal returns, has
    nothing to compare: its steps get 0 and are left out of the whitening, whose mean would otherwise push all of them one
    way. A KL penalty in the reward is no part of ``R``: its sum, minus the mean of the group, is added in every group, over
    the same deviation (over 1 where no group has anything to compare). No critic.
    """

    needs_groups: ClassVar[bool] = True

    def __call__(self, batch: CreditBatch) -> Credit:
        centred_E, penalty_E, equal_E = centred_within(episode_returns(batch), batch.group_E)
        compared_E = ~equal_E
        # Over tokens: each episode counts as often as it has tokens.
        tokens_E = torch.zeros_like(batch.group_E).index_add(0, batch.episode_N, batch.length_N) * compared_E
        tokens = tokens_E.sum().clamp(min=2)
        centred_E = centred_E - (centred_E * tokens_E).sum() / tokens
        deviation = ((centred_E.square() * tokens_E).sum() / (tokens - 1)).sqrt()
        spread = torch.where(compared_E.any(), deviation + 1e-8, 1.0)
        advantage_E = (torch.where(compared_E, centred_E, 0.0) + penalty_E) / spread
        return Credit(advantage_N=advantage_E[batch.episode_N])
