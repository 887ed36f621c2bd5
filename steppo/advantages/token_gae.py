"""Token-level GAE: PPO's credit, and the ablation without step GAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from steppo.advantages.base import (
    Advantage,
    check_decays,
    final_values,
    generalised_advantages,
    given,
    token_time_order,
    unsort,
    whiten_,
)
from steppo.batch import Credit, CreditBatch


@dataclass(eq=False)
class TokenGAE(Advantage):
    """GAE over the generated tokens of a whole episode, across its steps; whitened over tokens.

    With several agents, over the tokens of each one's steps. A step's reward sits on its last token. ``gamma`` and
    ``gae_lambda`` are per generated token: 0.99 a token leaves nothing of a reward 500 tokens on, hence the default 1.

    Args:
        gamma: Discount per generated token.
        gae_lambda: 1 is the Monte Carlo return, 0 the one-token difference.
        bootstrap_truncated: After the last token of an episode that was cut, take the critic's value instead of 0. What
            follows the last tokens of the episode's other agents is 0.
        whiten_over: Mean and deviation are of all tokens, or with each episode counting once (``episodes``). Where won
            episodes are longer than lost ones that mean is lower, and what was right in lost ones is pushed down less.
    """

    needs_values: ClassVar[Literal["none", "step", "token"]] = "token"

    gamma: float = 1.0
    gae_lambda: float = 1.0
    bootstrap_truncated: bool = False
    whiten_over: Literal["tokens", "episodes"] = "tokens"

    def __post_init__(self) -> None:
        check_decays(self, gamma=self.gamma, gae_lambda=self.gae_lambda)

    def __call__(self, batch: CreditBatch) -> Credit:
        value_A = given(batch.value_A, "value_A")
        order, end = token_time_order(batch)
        advantage = generalised_advantages(
            batch.reward_A[order],
            value_A[order],
            end,
            final_values(batch, self.bootstrap_truncated)[torch.unique(batch.chain_N)],
            self.gamma,
            self.gae_lambda,
        )
        advantage_A = unsort(advantage, order)
        target_A = advantage_A + value_A
        counted = torch.repeat_interleave(batch.episode_N, batch.length_N) if self.whiten_over == "episodes" else None
        return Credit(advantage_A=whiten_(advantage_A, counted), target_A=target_A)
