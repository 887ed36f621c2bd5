"""RLOO's credit: an episode's return against the mean of the others of its group."""

from __future__ import annotations

from typing import ClassVar

import torch

from steppo.advantages.base import Advantage, episode_returns, standardised_within
from steppo.batch import Credit, CreditBatch


class RLOO(Advantage):
    """``A = R - mean return of the group's other episodes``, the same for all steps of an episode; no critic.

    ``R`` is the episode's undiscounted return, whichever agent earned it, with the KL penalty if the reward carries it:
    nothing is divided, so that a little of it stays little. A group of one episode gives 0.
    """

    needs_groups: ClassVar[bool] = True

    def __call__(self, batch: CreditBatch) -> Credit:
        centred_E = standardised_within(episode_returns(batch), batch.group_E, scale_by_std=False)
        _, group_E, sizes = torch.unique(batch.group_E, return_inverse=True, return_counts=True)
        size_E = sizes[group_E]
        # With K episodes, R - (sum - R) / (K - 1) is K / (K - 1) times R - sum / K.
        advantage_E = centred_E * size_E / (size_E - 1).clamp(min=1)
        return Credit(advantage_N=advantage_E[batch.episode_N])
