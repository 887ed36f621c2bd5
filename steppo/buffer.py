"""The step buffer: the steps of one iteration and what the learner knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steppo.packing import Packer
from steppo.types import Credit, Episode, Microbatch, Segment, Step, TokenBatch


@dataclass
class Scores:
    """What the policies and the critic say of the buffer's steps when the iteration starts, on the CPU.

    Attributes:
        old_logprobs_A: By action token, in the order of the buffer.
        ref_logprobs_A: The same from the reference policy, if there is one.
        value_N: By step, if the credit wants step values.
        value_A: By action token, if it wants token values.
        bootstrap_N: Value after the last step of the step's episode, 0 where there is no state to value.
        weight_A: By action token: what its losses are multiplied by, 1 on-policy.
    """

    old_logprobs_A: Tensor
    ref_logprobs_A: Tensor | None
    value_N: Tensor | None
    value_A: Tensor | None
    bootstrap_N: Tensor
    weight_A: Tensor


class StepBuffer:
    """Holds whole groups of episodes; after scoring and credit, cuts updates into microbatches.

    Episodes that broke are kept for counting, but none of their steps is learned from. ``ratio_N`` and ``clipped_N``
    (float32) hold the mean over a step's tokens of the importance ratio, and of its lying outside the trust region, at the
    step's last update; NaN before it.

    Args:
        packer: Steps -> token batches.
        max_tokens: Most tokens in one microbatch, padding included.
    """

    def __init__(self, packer: Packer, max_tokens: int) -> None:
        self._packer = packer
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.episodes: list[Episode] = []
        self.steps: list[Step] = []
        self.order_N = np.zeros(0, dtype=np.int64)
        self.group_N = np.zeros(0, dtype=np.int64)
        self.lengths_N = np.zeros(0, dtype=np.int64)
        self._segments: list[Segment] = []
        self._starts_N = np.zeros(0, dtype=np.int64)
        self.scores: Scores | None = None
        self.credit: Credit | None = None
        self.ratio_N = torch.zeros(0)
        self.clipped_N = torch.zeros(0)

    def empty(self) -> StepBuffer:
        """Another buffer, of the same packer and size."""
        return StepBuffer(self._packer, self.max_tokens)

    def fill(self, episodes: Sequence[Episode]) -> None:
        """Takes an iteration's episodes, in whatever order they were finished."""
        self.clear()
        self.episodes = sorted(episodes, key=lambda episode: episode.order)
        learned = [(episode, step) for episode in self.episodes if not episode.stop_reason.failed for step in episode.steps]
        self.steps = [step for _, step in learned]
        self.order_N = np.asarray([episode.order for episode, _ in learned], dtype=np.int64)
        self.group_N = np.asarray([episode.group_id for episode, _ in learned], dtype=np.int64)
        self._segments = [
            Segment(step.prompt_ids, step.action_ids, episode.order, episode.group_id) for episode, step in learned
        ]
        self.lengths_N = np.asarray([len(step.action_ids) for step in self.steps], dtype=np.int64)
        self._starts_N = np.cumsum(self.lengths_N) - self.lengths_N
        self.ratio_N = torch.full((len(self.steps),), torch.nan)
        self.clipped_N = torch.full((len(self.steps),), torch.nan)

    @property
    def num_tokens(self) -> int:
        """Action tokens."""
        return int(self.lengths_N.sum())

    def batches(self) -> Iterator[tuple[Tensor, Tensor, TokenBatch]]:
        """All steps for a forward pass: indices of the steps [n], of their action tokens [a], and the batch."""
        for rows, batch in self._packer.pack(self._segments, self.max_tokens):
            yield torch.from_numpy(rows), self._tokens_of(rows), batch

    def final_batches(self) -> Iterator[tuple[list[Episode], TokenBatch]]:
        """The prompts after the last step of truncated episodes, and their episodes."""
        cut = [episode for episode in self.episodes if episode.steps and episode.final_prompt_ids is not None]
        no_action = np.zeros(0, dtype=np.int32)
        segments = [
            Segment(episode.final_prompt_ids, no_action, episode.order, episode.group_id)
            for episode in cut
            if episode.final_prompt_ids is not None
        ]
        for rows, batch in self._packer.pack(segments, self.max_tokens):
            yield [cut[row] for row in rows], batch

    def behaviour_logprobs(self) -> Tensor:
        """The engine's log-probabilities, float32 [A]."""
        none = np.zeros(0, dtype=np.float32)
        return torch.from_numpy(np.concatenate([none, *(step.behaviour_logprobs for step in self.steps)]))

    def step_of_tokens(self) -> Tensor:
        """The step of each action token, int64 [A]."""
        return torch.repeat_interleave(torch.arange(len(self.steps)), torch.from_numpy(self.lengths_N))

    def temperatures(self) -> Tensor:
        """Sampling temperature by action token, float32 [A]."""
        per_step = np.asarray([step.temperature for step in self.steps], dtype=np.float32)
        return torch.from_numpy(np.repeat(per_step, self.lengths_N))

    def microbatches(self, chosen: np.ndarray, update_steps: int, update_tokens: int) -> list[Microbatch]:
        """One update's part of this rank.

        Args:
            chosen: Indices of steps.
            update_steps: Steps of the update over all ranks.
            update_tokens: Action tokens of the update over all ranks.
        """
        assert self.scores is not None
        assert self.credit is not None
        scores, credit = self.scores, self.credit
        temperatures, behaviour_A = self.temperatures(), self.behaviour_logprobs().to(scores.old_logprobs_A.dtype)
        found = []
        for rows, tokens in self._packer.pack([self._segments[index] for index in chosen], self.max_tokens):
            steps = torch.from_numpy(chosen[rows])
            actions = self._tokens_of(chosen[rows])
            if credit.advantage_A is not None:
                advantage_A = credit.advantage_A[actions]
            else:
                assert credit.advantage_N is not None
                advantage_A = credit.advantage_N[steps][tokens.step_of_A]
            old_value = target = None
            if credit.target_A is not None and scores.value_A is not None:
                old_value, target = scores.value_A[actions], credit.target_A[actions]
            elif credit.target_N is not None and scores.value_N is not None:
                old_value, target = scores.value_N[steps], credit.target_N[steps]
            found.append(
                Microbatch(
                    tokens=tokens,
                    temperature_A=temperatures[actions],
                    old_logprobs_A=scores.old_logprobs_A[actions],
                    behaviour_logprobs_A=behaviour_A[actions],
                    ref_logprobs_A=None if scores.ref_logprobs_A is None else scores.ref_logprobs_A[actions],
                    advantage_A=advantage_A,
                    weight_A=scores.weight_A[actions],
                    index_N=steps,
                    old_value=old_value,
                    target=target,
                    update_steps=update_steps,
                    update_tokens=update_tokens,
                )
            )
        return found

    def padding_microbatch(self, update_steps: int, update_tokens: int) -> Microbatch:
        """A pass of weight 0, so that all ranks make the same number, also one that has no step of its own."""
        assert self.scores is not None
        one = np.zeros(1, dtype=np.int32)
        [(_, tokens)] = self._packer.pack([Segment(one, one)], self.max_tokens)
        zero = torch.zeros(1, dtype=self.scores.old_logprobs_A.dtype)
        valued = self.scores.value_N is not None or self.scores.value_A is not None
        return Microbatch(
            tokens=tokens,
            temperature_A=torch.ones(1),
            old_logprobs_A=zero,
            behaviour_logprobs_A=zero,
            ref_logprobs_A=None if self.scores.ref_logprobs_A is None else zero,
            advantage_A=zero,
            weight_A=zero,
            index_N=torch.full((1,), -1),
            old_value=zero if valued else None,
            target=zero if valued else None,
            update_steps=update_steps,
            update_tokens=update_tokens,
            scale=0.0,
        )

    def _tokens_of(self, steps: np.ndarray) -> Tensor:
        """Indices of the action tokens of steps, step by step."""
        lengths = self.lengths_N[steps]
        first = np.cumsum(lengths) - lengths
        return torch.from_numpy(np.repeat(self._starts_N[steps] - first, lengths) + np.arange(lengths.sum()))
