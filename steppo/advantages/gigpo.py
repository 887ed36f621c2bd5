"""GiGPO's credit: groups in groups, of episodes and of the steps that start from the same state."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import ClassVar

import torch
from torch import Tensor

from steppo.advantages.base import (
    Advantage,
    Returns,
    check_decays,
    discounted_suffix_sums_,
    ends_of_runs,
    episode_returns,
    given,
    standardised_within,
    time_order,
    unsort,
)
from steppo.batch import Credit, CreditBatch
from steppo.errors import ConfigError, require_at_least


class GiGPO(Advantage):
    """``A_t = A_episode + step_weight * A_step``; no critic.

    ``A_episode`` is GRPO's. ``A_step`` compares the discounted return ``G_t = r_t + gamma * G_{t+1}`` with those of all
    steps of the group's episodes in which the same agent was in the same state, the anchor: the environment's
    ``state_key``, or else the observation. ``t + 1`` is the agent's own next step. A state met once adds 0, and so does a
    group of one episode. What is equal, means and deviations are of the task's rewards; a KL penalty in the reward is added
    by its difference from its mean, over the same deviations, or as it is where the task's returns are equal.

    Args:
        gamma: Discount per step, of ``G_t``.
        step_weight: Weight of the comparison of steps.
        scale_by_std: Divide both parts by the standard deviation of their group, or only centre them.
        similarity: Observations at least so alike are one anchor (``difflib``'s ratio, compared with the first text of each
            anchor, in the order of episodes and steps), whatever their states' keys; 1 asks for the same state.
    """

    needs_groups: ClassVar[bool] = True

    def __init__(
        self, gamma: float = 0.95, step_weight: float = 1.0, scale_by_std: bool = True, similarity: float = 1.0
    ) -> None:
        check_decays(self, gamma=gamma)
        if not 0 < similarity <= 1:
            raise ConfigError(f"GiGPO: similarity must be above 0 and at most 1, not {similarity}")
        require_at_least(0, self, step_weight=step_weight)
        self.gamma = gamma
        self.step_weight = step_weight
        self.scale_by_std = scale_by_std
        self.similarity = similarity
        self.needs_observations = similarity < 1

    def __call__(self, batch: CreditBatch) -> Credit:
        order = time_order(batch.chain_N, batch.index_N)
        end = ends_of_runs(batch.chain_N[order])
        rewards = batch.task_reward_N, batch.reward_N - batch.task_reward_N, batch.task_reward_N.abs()
        return_N = Returns(*(unsort(discounted_suffix_sums_(x[order], self.gamma, end), order) for x in rewards))
        _, group_E = torch.unique(batch.group_E, return_inverse=True)
        group_N = group_E[batch.episode_N]

        advantage_E = standardised_within(episode_returns(batch), group_E, self.scale_by_std)
        similar = self.needs_observations
        text_N = self._similar_texts(batch, group_N, order) if similar else given(batch.anchor_N, "anchor_N")
        texts, text_N = torch.unique(text_N, return_inverse=True)
        step_N = standardised_within(return_N, group_N * len(texts) + text_N, self.scale_by_std)
        episodes_of_group = torch.bincount(group_E)
        step_N = torch.where((episodes_of_group == 1)[group_N], 0.0, step_N)
        return Credit(advantage_N=advantage_E[batch.episode_N] + self.step_weight * step_N)

    def _similar_texts(self, batch: CreditBatch, group_N: Tensor, order: Tensor) -> Tensor:
        """Number of each step's observation, the same for similar ones of one agent in a group.

        A comparison for each two *different* texts of those, which are few in most tasks.
        """
        observation_N = given(batch.observation_N, "observation_N")
        peers = list(zip(group_N.tolist(), batch.agent_N.tolist(), strict=True))
        firsts: dict[tuple[int, int], list[tuple[str, int]]] = {}
        known: dict[tuple[tuple[int, int], str], int] = {}
        anchors = 0
        matcher = SequenceMatcher(autojunk=False)
        for row in order.tolist():
            text = observation_N[row]
            if (peers[row], text) in known:
                continue
            candidates = firsts.setdefault(peers[row], [])
            matcher.set_seq2(text)  # which it indexes, once for all that it is compared with
            found = next((anchor for first, anchor in candidates if self._is_like(first, matcher)), None)
            if found is None:
                found, anchors = anchors, anchors + 1
                candidates.append((text, found))
            known[peers[row], text] = found
        numbers = [known[pair] for pair in zip(peers, observation_N, strict=True)]
        return torch.tensor(numbers, dtype=torch.int64, device=group_N.device)

    def _is_like(self, first: str, matcher: SequenceMatcher[str]) -> bool:
        matcher.set_seq1(first)
        # Two upper bounds of the ratio, cheapest first.
        return (
            matcher.real_quick_ratio() >= self.similarity
            and matcher.quick_ratio() >= self.similarity
            and matcher.ratio() >= self.similarity
        )
