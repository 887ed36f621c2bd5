"""Step-level GAE: StepPO's credit (paper, section on step-level credit assignment)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from steppo.advantages.base import (
    Advantage,
    check_decays,
    ends_of_runs,
    final_values,
    generalised_advantages,
    given,
    time_order,
    unsort,
    whiten,
)
from steppo.batch import Credit, CreditBatch


@dataclass(eq=False)
class StepGAE(Advantage):
    """``A_t = delta_t + gamma * lambda * A_{t+1}``, ``delta_t = r_t + gamma * V_{t+1} - V_t``, one value per step.

    ``t + 1`` is the next step of the same agent in the episode.
    Advantages are whitened over steps, so that long answers do not count more; targets ``A_t + V_t`` are not.

    Args:
        gamma: Discount per step.
        gae_lambda: 1 is the Monte Carlo return, 0 the one-step difference.
        bootstrap_truncated: After the last step of an episode that was cut, take the critic's value instead of 0. What
            follows the last steps of the episode's other agents is 0.
        whiten_over: Mean and deviation are of all steps, or with each episode counting once (``episodes``). Where won
            episodes are longer than lost ones that mean is lower, and what was right in lost ones is pushed down less.
    """

    needs_values: ClassVar[Literal["none", "step", "token"]] = "step"

    gamma: float = 1.0
    gae_lambda: float = 1.0
    bootstrap_truncated: bool = False
    whiten_over: Literal["steps", "episodes"] = "steps"

    def __post_init__(self) -> None:
        check_decays(self, gamma=self.gamma, gae_lambda=self.gae_lambda)

    def __call__(self, batch: CreditBatch) -> Credit:
        value_N = given(batch.value_N, "value_N")
        order = time_order(batch.chain_N, batch.index_N)
        chain = batch.chain_N[order]
        end = ends_of_runs(chain)
        advantage = generalised_advantages(
            batch.reward_N[order],
            value_N[order],
            end,
            final_values(batch, self.bootstrap_truncated)[chain[end]],
            self.gamma,
            self.gae_lambda,
        )
        advantage_N = unsort(advantage, order)
        counted = batch.episode_N if self.whiten_over == "episodes" else None
        return Credit(advantage_N=whiten(advantage_N, counted), target_N=advantage_N + value_N)
