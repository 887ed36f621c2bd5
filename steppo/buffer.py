"""The step buffer: holds an iteration's experience and replays it as updates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steppo.batch import Microbatch, Segment
from steppo.distributed import gather, rank_and_world
from steppo.errors import RunError
from steppo.learner import Experience, OldLogprobs
from steppo.minibatches import Minibatches, ShuffledSteps, StepColumns, checked_cut
from steppo.packing import Packer, PackingCost


@dataclass(eq=False)
class StepBuffer:
    """Cuts an iteration's steps into updates, and updates into microbatches.

    An update is the same set of steps whatever the number of ranks.

    Attributes:
        packer: Steps -> token batches.
        max_tokens: Most tokens in one microbatch, padding included.
        update_epochs: Passes over the steps.
        num_minibatches: Updates per pass.
        minibatches: Which steps each of them learns from.
    """

    packer: Packer
    max_tokens: int
    update_epochs: int = 1
    num_minibatches: int = 1
    minibatches: Minibatches = field(default_factory=ShuffledSteps)
    _experience: Experience | None = field(default=None, init=False)
    _first_pass: tuple[StepColumns, list[np.ndarray]] | None = field(default=None, init=False)
    _old_A: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _left_out_A: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _costs: list[PackingCost] = field(default_factory=list, init=False)

    @property
    def updates_per_iteration(self) -> int:
        """Updates that one experience is good for."""
        return self.update_epochs * self.num_minibatches

    def rehearse(self, episodes: int, group_size: int) -> None:
        """Cuts a made-up iteration: what cannot be cut so is found before a real one is played.

        Raises:
            RunError: There are too few episodes or groups.
            ConfigError: ``minibatches`` gave something else than the updates of a pass.
        """
        episode_N = np.repeat(np.arange(episodes), self.num_minibatches)
        steps = StepColumns(episode_N, episode_N // group_size, np.ones_like(episode_N))
        checked_cut(self.minibatches, steps, self.num_minibatches, np.random.default_rng(0))

    def hold(self, experience: Experience) -> None:
        """Takes an iteration's experience in place of the last."""
        self._experience = experience
        self._old_A = experience.scores.old_logprobs_A.clone()
        self._left_out_A = experience.scores.left_out_A.clone()  # those of the first update may be still to come

    @property
    def experience(self) -> Experience:
        """What it holds.

        Raises:
            RunError: Nothing yet.
        """
        if self._experience is None:
            raise RunError("there is nothing to learn from: no callback has played episodes (RolloutCallback does)")
        return self._experience

    def first_update(self, steps: StepColumns, seed: int, iteration: int) -> np.ndarray:
        """Which steps of all ranks the first of ``updates`` will learn from. Raises as ``updates``."""
        self._first_pass = steps, self._cut(steps, seed, iteration, epoch=0)
        return self._first_pass[1][0]

    def take(self, found: Sequence[OldLogprobs]) -> None:
        """Old log-probabilities that the first update found, for later passes."""
        for part in found:
            tokens = self.experience.steps.tokens_of(part.index_N.cpu().numpy())
            self._old_A[tokens], self._left_out_A[tokens] = part.logprobs_A.to(self._old_A), False

    def logprob_mismatch(self) -> float:
        """Largest difference between old log-probabilities, if known, and the engine's over all ranks, which must ask."""
        difference_A = (self._old_A - self.experience.steps.behaviour_logprobs_A).abs().nan_to_num(0.0)
        return max(gather(float(difference_A.max()) if len(difference_A) else 0.0))

    def _cut(self, steps: StepColumns, seed: int, iteration: int, epoch: int) -> list[np.ndarray]:
        if epoch == 0 and self._first_pass is not None and self._first_pass[0] is steps:
            return self._first_pass[1]  # what was left out when it was scored is what the first update finds
        key = [seed, iteration, epoch]
        try:
            return checked_cut(self.minibatches, steps, self.num_minibatches, np.random.default_rng(key))
        except RunError as error:  # episodes failed: that costs them, not the run
            found = checked_cut(ShuffledSteps(), steps, self.num_minibatches, np.random.default_rng(key))
            if rank_and_world()[0] == 0:
                warnings.warn(f"{error}; this time steps are shuffled one by one", stacklevel=2)
            return found

    def updates(self, seed: int, iteration: int) -> Iterator[list[Microbatch]]:
        """This rank's part of each update; how steps are shuffled follows from the two numbers.

        Raises:
            RunError: There are too few steps for the updates of a pass. Where what is to stay together is too little,
                because episodes failed, steps are shuffled instead, with a warning.
            ConfigError: ``minibatches`` gave something else than the updates of a pass.
        """
        experience = self.experience
        columns = experience.columns
        local = np.full(experience.num_steps, -1)
        local[experience.mine_N] = np.arange(len(experience.mine_N))
        mean_sizes = len(local) / self.num_minibatches, int(columns.length_N.sum()) / self.num_minibatches
        self._costs = []
        has_begun = False
        for epoch in range(self.update_epochs):
            for chosen in self._cut(columns, seed, iteration, epoch):
                mine = np.sort(local[chosen][local[chosen] >= 0])
                own_sizes = len(chosen), int(columns.length_N[chosen].sum())
                sizes = mean_sizes if self.minibatches.mean_size else own_sizes
                own = self.microbatches(mine, *sizes)
                if has_begun and any(part.old_logprobs_A is None for part in own):
                    raise RunError("StepBuffer.take was not given the old log-probabilities that the first update found")
                has_begun = True
                self._costs += [PackingCost.of(part.tokens) for part in own]
                lacking = max(gather(len(own))) - len(own)  # all ranks make the same number of passes
                yield own + [self.padding_microbatch(*sizes) for _ in range(lacking)]

    def packing_figures(self) -> dict[str, float]:
        """What the rows of the latest ``updates`` cost, over all ranks, of which all must ask."""
        return PackingCost.total(gather(PackingCost.total(self._costs))).figures()

    def microbatches(self, chosen: np.ndarray, update_steps: float, update_tokens: float) -> list[Microbatch]:
        """One update's part of this rank.

        Args:
            chosen: Indices of steps.
            update_steps: What the update's sums over steps are divided by.
            update_tokens: What its sums over action tokens are divided by.
        """
        experience = self.experience
        table, scores, credit = experience.steps, experience.scores, experience.credit
        behaviour_A = table.behaviour_logprobs_A.to(scores.old_logprobs_A.dtype)
        weight_A = experience.weights.weight_A * experience.weights.keep_A
        found = []
        for rows, tokens in self.packer.pack([table.segments[index] for index in chosen], self.max_tokens):
            steps = torch.from_numpy(chosen[rows])
            actions = table.tokens_of(chosen[rows])
            advantage_A = credit.advantage_A[actions] if credit.advantage_A is not None else None
            if credit.advantage_N is not None:
                advantage_A = credit.advantage_N[steps][tokens.step_of_A]
            if advantage_A is None:
                raise ValueError("no credit was assigned: these episodes are not to be learned from")
            old_value = target = None
            if credit.target_A is not None and scores.value_A is not None:
                old_value, target = scores.value_A[actions], credit.target_A[actions]
            elif credit.target_N is not None and scores.value_N is not None:
                old_value, target = scores.value_N[steps], credit.target_N[steps]
            found.append(
                Microbatch(
                    tokens=tokens,
                    temperature_A=table.temperature_A[actions],
                    old_logprobs_A=None if bool(self._left_out_A[actions].any()) else self._old_A[actions],
                    behaviour_logprobs_A=behaviour_A[actions],
                    ref_logprobs_A=None if scores.ref_logprobs_A is None else scores.ref_logprobs_A[actions],
                    advantage_A=advantage_A,
                    weight_A=weight_A[actions],
                    index_N=steps,
                    old_value=old_value,
                    target=target,
                    update_steps=update_steps,
                    update_tokens=update_tokens,
                )
            )
        return found

    def padding_microbatch(self, update_steps: float, update_tokens: float) -> Microbatch:
        """A pass of weight 0, so that all ranks make the same number, also one that has no step of its own."""
        scores = self.experience.scores
        one = np.zeros(1, dtype=np.int32)
        [(_, tokens)] = self.packer.pack([Segment(one, one)], self.max_tokens)
        zero = torch.zeros(1, dtype=scores.old_logprobs_A.dtype)
        valued = scores.value_N is not None or scores.value_A is not None
        return Microbatch(
            tokens=tokens,
            temperature_A=torch.ones(1),
            old_logprobs_A=zero,
            behaviour_logprobs_A=zero,
            ref_logprobs_A=None if scores.ref_logprobs_A is None else zero,
            advantage_A=zero,
            weight_A=zero,
            index_N=torch.full((1,), -1),
            old_value=zero if valued else None,
            target=zero if valued else None,
            update_steps=update_steps,
            update_tokens=update_tokens,
            scale=0.0,
        )
