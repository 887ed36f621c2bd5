"""REINFORCE++-baseline's credit: an episode's return minus its group's mean, whitened over tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from steppo.advantages.base import Advantage, episode_returns, standardised_within
from steppo.types import Credit, CreditBatch


class ReinforcePPBaseline(Advantage):
    """``A = R - mean of the group``, the same for all tokens of an episode, whitened over the tokens of the iteration.

    ``R`` is the episode's undiscounted return. A group of one episode, or of equal returns, has nothing to compare: its
    steps get 0 and are left out of the whitening, whose mean would otherwise push all of them one way. No critic.
    """

    needs_groups: ClassVar[bool] = True

    def __call__(self, batch: CreditBatch) -> Credit:
        centred_E = standardised_within(episode_returns(batch), batch.group_E, scale_by_std=False)
        compared_E = torch.isin(batch.group_E, batch.group_E[centred_E != 0])
        # Over tokens: each episode counts as often as it has tokens.
        tokens_E = torch.zeros_like(batch.group_E).index_add(0, batch.episode_N, batch.length_N) * compared_E
        tokens = tokens_E.sum().clamp(min=2)
        centred_E = centred_E - (centred_E * tokens_E).sum() / tokens
        deviation = ((centred_E.square() * tokens_E).sum() / (tokens - 1)).sqrt()
        advantage_E = torch.where(compared_E, centred_E / (deviation + 1e-8), 0.0)
        return Credit(advantage_N=advantage_E[batch.episode_N])
