"""Task samplers: which tasks an iteration plays. Functions of a cursor, so that a checkpoint holds one number."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from steppo.errors import ConfigError, require_at_least
from steppo.types import Task


class TaskSampler(ABC):
    """An endless stream of tasks, the same for all ranks."""

    def __init__(self) -> None:
        self.cursor = 0

    def next(self, tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
        """The next ``count`` tasks of the run with this seed."""
        chosen = self.drawn(tasks, self.cursor, count, seed)
        self.cursor += count
        return chosen

    def drawn(self, tasks: Sequence[Task], first: int, count: int, seed: int) -> list[Task]:
        """So many tasks of the stream, from a position on."""
        return [tasks[self.choose(tasks, position, seed)] for position in range(first, first + count)]

    @abstractmethod
    def choose(self, tasks: Sequence[Task], position: int, seed: int) -> int:
        """Index of the task at a position of the stream."""


class SequentialSampler(TaskSampler):
    """In the environment's order, again and again."""

    def choose(self, tasks: Sequence[Task], position: int, seed: int) -> int:
        return position % len(tasks)


class ShuffledSampler(TaskSampler):
    """All tasks in a random order, then all in another."""

    def __init__(self) -> None:
        super().__init__()
        self._shuffle: tuple[tuple[int, int, int], np.ndarray] | None = None

    def choose(self, tasks: Sequence[Task], position: int, seed: int) -> int:
        key = (seed, len(tasks), position // len(tasks))
        if self._shuffle is None or self._shuffle[0] != key:
            self._shuffle = key, np.random.default_rng([seed, key[2]]).permutation(len(tasks))
        return int(self._shuffle[1][position % len(tasks)])


class WeightedSampler(TaskSampler):
    """Independent draws, some tasks more often.

    Args:
        weights: Pattern of task ids (``*`` and ``?``) -> weight; the first that fits counts, 1 where none does.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        require_at_least(0, self, **{f"the weight of {pattern!r}": weight for pattern, weight in weights.items()})
        self.weights = weights
        self._cumulative: tuple[Sequence[Task], np.ndarray] | None = None

    def choose(self, tasks: Sequence[Task], position: int, seed: int) -> int:
        known = self._cumulative
        if known is None or known[0] is not tasks or len(known[1]) != len(tasks):  # to compare all ids would be slow
            known = self._cumulative = tasks, np.cumsum([self._weight(task.id) for task in tasks])
        cumulative = known[1]
        if cumulative[-1] == 0:
            raise ConfigError("WeightedSampler: every task has weight 0")
        draw = np.random.default_rng([seed, position]).random() * cumulative[-1]
        return int(np.searchsorted(cumulative, draw, side="right"))

    def _weight(self, task_id: str) -> float:
        return next((weight for pattern, weight in self.weights.items() if fnmatch.fnmatch(task_id, pattern)), 1.0)
