"""The method: episodes -> experience -> updates. It knows modules and callables, and nothing of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from steppo.advantages import Advantage
from steppo.batch import Credit, Microbatch
from steppo.distributed import gather
from steppo.learner.correction import Correction, CorrectionInputs, NoCorrection, Weights, weight_figures
from steppo.learner.credit import assign_credit, check_orders
from steppo.learner.experience import Experience
from steppo.learner.scoring import Reference, Scores, score
from steppo.learner.steps import StepTable
from steppo.learner.update import UpdateLoss, UpdateStatistics, run_update
from steppo.losses import ClippedLoss, ObjectiveSettings, PolicyLoss
from steppo.minibatches import StepColumns
from steppo.models import Critic, Policy
from steppo.packing import Packer, PaddedPacker
from steppo.types import Episode


@dataclass(eq=False)
class Learner:
    """Prepares an iteration's episodes, and makes its updates.

    Attributes:
        policy: Built.
        advantage: Credit scheme; it says which values it needs.
        critic: Built; ``None`` where the scheme needs no values.
        reference: The policy that KL keeps close to, if there is one.
        loss: The policy's part of the objective.
        objective: The rest of it.
        correction: Importance weights of what another policy sampled.
        packer: Steps -> token batches, for scoring.
        max_tokens: Most tokens in one batch.
        inference: Entered for passes without gradients.
    """

    policy: Policy
    advantage: Advantage
    critic: Critic | None = None
    reference: Reference | None = None
    loss: PolicyLoss = field(default_factory=ClippedLoss)
    objective: ObjectiveSettings = ObjectiveSettings()
    correction: Correction = field(default_factory=NoCorrection)
    packer: Packer = field(default_factory=PaddedPacker)
    max_tokens: int = 16384
    inference: Callable[[], AbstractContextManager[object]] = torch.no_grad

    def __post_init__(self) -> None:
        self._update_loss = UpdateLoss(self.policy, self.critic, self.advantage.needs_values, self.loss, self.objective)

    def prepare(
        self, episodes: Sequence[Episode], first_update: Callable[[StepColumns], np.ndarray] | None = None
    ) -> Experience:
        """Scores an iteration's episodes and assigns credit over all ranks, of which all must ask.

        Args:
            episodes: This rank's, in whatever order they were finished.
            first_update: Which steps of all ranks the first update learns from, with the policy as it is now: it finds their
                old log-probabilities by itself, so they are left out here, unless something needs them before.

        Raises:
            RunError: There is not one step on any rank, or two episodes have the same order.
            ConfigError: The credit scheme gave something of the wrong kind or shape.
        """
        check_orders(episodes)
        steps = StepTable.of(episodes)
        columns, mine_N = steps.over_ranks()
        left_out_N = None
        if self.correction.old_is_behaviour and not self._shares_pass:
            left_out_N = np.ones(len(steps), dtype=bool)
        elif first_update is not None and len(columns.length_N) and not self._needs_old_logprobs:
            left_out_N = np.isin(mine_N, first_update(columns))
        return self._with_credit(steps, columns, mine_N, *self._score(steps, left_out_N))

    @property
    def _needs_old_logprobs(self) -> bool:
        """Of all steps, before the first update: for rewards or weights, or because the critic reads the same pass."""
        return self._shares_pass or self.correction.needs_old_logprobs or self.objective.reward_kl_coef > 0

    @property
    def _shares_pass(self) -> bool:
        """The critic reads what the policy's pass leaves."""
        return self.critic is not None and self.critic.needs_policy_hidden

    def score_episodes(self, episodes: Sequence[Episode]) -> Experience:
        """Scores episodes that are not learned from, and assigns credit among them; training does not notice.

        All ranks must ask, each with its share of the episodes (or none). Without credit if the scheme compares the
        episodes of a task, which nobody promises here, or if there is not one step.
        """
        steps = StepTable.of(episodes)
        is_credited = not self.advantage.needs_groups and any(gather(len(steps)))
        reads_policy = self._needs_old_logprobs if is_credited else self._shares_pass
        left_out_N = np.full(len(steps), not reads_policy)
        scores, weights = self._score(steps, left_out_N, reads_reference=is_credited and self.objective.reward_kl_coef > 0)
        if is_credited:
            return self._with_credit(steps, *steps.over_ranks(), scores, weights)
        columns = StepColumns(steps.order_N, steps.group_N, steps.lengths_N)
        return Experience(steps, scores, weights, Credit(), np.arange(len(steps)), columns, len(episodes), {})

    def update(
        self,
        batch: Sequence[Microbatch],
        backward: Callable[[Tensor], object],
        step: Callable[[], Mapping[str, Tensor] | None],
        policy_learns: bool = True,
    ) -> UpdateStatistics:
        """One update: see ``run_update``. The batch may lie on another device than the policy."""
        return run_update(self._update_loss, [part.to(self.policy.device) for part in batch], backward, step, policy_learns)

    def _score(
        self, steps: StepTable, left_out_N: np.ndarray | None = None, reads_reference: bool = True
    ) -> tuple[Scores, Weights]:
        models = self.policy, self.reference if reads_reference else None, self.critic
        with self.inference():
            scores = score(steps, *models, self.advantage.needs_values, self.packer, self.max_tokens, left_out_N)
            if self.correction.old_is_behaviour:
                old_A = steps.behaviour_logprobs_A.to(scores.old_logprobs_A.dtype)
                scores = replace(scores, old_logprobs_A=old_A, left_out_A=torch.zeros_like(scores.left_out_A))
            return scores, self.correction(_correction_inputs(steps, scores))

    def _with_credit(
        self, steps: StepTable, columns: StepColumns, mine_N: np.ndarray, scores: Scores, weights: Weights
    ) -> Experience:
        assigned = assign_credit(steps, scores, self.advantage, self.objective.reward_kl_coef)
        statistics = assigned.statistics()
        if self.correction.needs_old_logprobs:
            statistics |= weight_figures(weights, _correction_inputs(steps, scores))
        return Experience(
            steps=steps,
            scores=scores,
            weights=weights,
            credit=assigned.mine,
            mine_N=mine_N,
            columns=columns,
            num_episodes=len(assigned.batch.terminated_E),
            statistics=statistics,
        )


def _correction_inputs(steps: StepTable, scores: Scores) -> CorrectionInputs:
    behaviour_A = steps.behaviour_logprobs_A.to(scores.old_logprobs_A.dtype)
    _, episode_N = np.unique(steps.order_N, return_inverse=True)
    return CorrectionInputs(behaviour_A, scores.old_logprobs_A, steps.step_of_A, len(steps), torch.from_numpy(episode_N))
