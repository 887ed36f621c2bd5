"""What a source of episodes must offer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from steppo.errors import ConfigError
from steppo.types import Episode, Group, RolloutConfig, Task

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy


class EpisodeSource(ABC):
    """Gives whole groups of episodes."""

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """Tasks of a split."""

    @abstractmethod
    def bind(self, policy: Policy) -> None:
        """Takes the policy before the first episode."""

    @abstractmethod
    def collect(self, groups: Sequence[Group], config: RolloutConfig) -> Iterator[list[Episode]]:
        """Plays the groups; each comes out whole, in the order in which they are finished."""

    @property
    def version(self) -> str:
        """Of the tasks' grammar or data."""
        return ""

    def content(self, task: Task) -> str:
        """Text that decides what a task is, which a panel hashes."""
        return task.as_text()

    def protocol(self) -> dict[str, Any]:
        """How it plays, for records: plain values, by name."""
        return {}

    @property
    def logprob_tolerance(self) -> float:
        """Largest difference between sampler and learner that is no cause for worry."""
        return math.inf

    @property
    def longest_episode(self) -> int | None:
        """Most steps of an episode, where that is known."""
        return None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the learner's weights, before the episodes of an iteration or an evaluation."""

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Makes what the tasks need on disk; ``progress`` gets (done, total)."""

    def tokenizer_texts(self, tasks: Sequence[Task]) -> list[str]:
        """Texts of the environment, for a policy that makes its own tokenizer."""
        raise ConfigError(f"{type(self).__name__} has no text to train a tokenizer on; use a pretrained policy")

    def counts(self) -> Counter[str]:
        """What else happened since the source was made, always under the same names; logged by iteration."""
        return Counter()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a ``state_dict``."""

    def close(self) -> None:
        """Ends processes."""
