"""The steps of an iteration or a panel, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from steppo.batch import Segment
from steppo.distributed import gather_columns, rank_and_world
from steppo.minibatches import StepColumns
from steppo.types import Episode, Step


@dataclass(frozen=True, eq=False)
class StepTable:
    """This rank's steps, in logical order: those of all episodes that did not break. Episodes that broke have no rows.

    Attributes:
        episodes: All, by their order.
        records: The steps.
        order_N: int64, order of the step's episode.
        group_N: int64, its group.
        lengths_N: int64, action tokens of each step.
    """

    episodes: tuple[Episode, ...]
    records: tuple[Step, ...]
    order_N: np.ndarray
    group_N: np.ndarray
    lengths_N: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> StepTable:
        """The table of episodes, in whatever order they were finished."""
        episodes = sorted(episodes, key=lambda episode: episode.order)
        learned = [(episode, step) for episode in episodes if not episode.stop_reason.failed for step in episode.steps]
        return cls(
            episodes=tuple(episodes),
            records=tuple(step for _, step in learned),
            order_N=np.asarray([episode.order for episode, _ in learned], dtype=np.int64),
            group_N=np.asarray([episode.group_id for episode, _ in learned], dtype=np.int64),
            lengths_N=np.asarray([len(step.action_ids) for _, step in learned], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_tokens(self) -> int:
        """Action tokens."""
        return int(self.lengths_N.sum())

    def over_ranks(self) -> tuple[StepColumns, np.ndarray]:
        """The steps of all ranks in logical order, and the places of this rank's among them [N]. All ranks must ask."""
        mine = {"order": self.order_N, "group": self.group_N, "length": self.lengths_N}
        parts = gather_columns({name: torch.from_numpy(column) for name, column in mine.items()})
        order_N, group_N, length_N = (torch.cat([part[name] for part in parts]).numpy() for name in mine)
        rank_N = np.repeat(np.arange(len(parts)), [len(part["order"]) for part in parts])
        sort_N = np.argsort(order_N, kind="stable")  # an episode is one rank's, and its steps are in their order there
        mine_N = np.flatnonzero(rank_N[sort_N] == rank_and_world()[0])
        return StepColumns(order_N[sort_N], group_N[sort_N], length_N[sort_N]), mine_N

    @cached_property
    def segments(self) -> list[Segment]:
        """The steps, to be packed."""
        columns = zip(self.records, self.order_N.tolist(), self.group_N.tolist(), strict=True)
        return [Segment(step.prompt_ids, step.action_ids, order, group) for step, order, group in columns]

    @cached_property
    def behaviour_logprobs_A(self) -> Tensor:
        """The engine's log-probabilities, float32."""
        none = np.zeros(0, dtype=np.float32)
        return torch.from_numpy(np.concatenate([none, *(step.behaviour_logprobs for step in self.records)]))

    @cached_property
    def temperature_A(self) -> Tensor:
        """Sampling temperature by action token, float32."""
        per_step = np.asarray([step.temperature for step in self.records], dtype=np.float32)
        return torch.from_numpy(np.repeat(per_step, self.lengths_N))

    @cached_property
    def step_of_A(self) -> Tensor:
        """The step of each action token, int64."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.from_numpy(self.lengths_N))

    def tokens_of(self, rows: np.ndarray) -> Tensor:
        """Indices of the action tokens of steps, step by step, int64."""
        lengths = self.lengths_N[rows]
        first = np.cumsum(lengths) - lengths
        return torch.from_numpy(np.repeat(self._starts_N[rows] - first, lengths) + np.arange(lengths.sum()))

    @cached_property
    def _starts_N(self) -> np.ndarray:
        return np.cumsum(self.lengths_N) - self.lengths_N

    @cached_property
    def final_segments(self) -> list[Segment]:
        """The prompts after the last steps of truncated episodes, to be valued."""
        none = np.zeros(0, dtype=np.int32)
        return [
            Segment(episode.final_prompt_ids, none, episode.order, episode.group_id)
            for episode in self.episodes
            if episode.steps and episode.final_prompt_ids is not None
        ]
