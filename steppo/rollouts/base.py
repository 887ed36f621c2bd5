"""What a source of episodes must offer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppo.errors import ConfigError
from steppo.types import Episode, Group, RolloutConfig, Task

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy
    from steppo.rollouts.env_source import EnvSource

Rounds = Callable[[int], tuple[Sequence[Group], RolloutConfig] | None]


def require_positions(policy: Policy, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ``ConfigError`` if the model cannot read so much."""
    longest = max_prompt_tokens + max_new_tokens
    if longest > policy.max_positions:
        most = f"the model's {policy.max_positions} positions"
        raise ConfigError(f"max_prompt_tokens + max_new_tokens = {longest} is more than {most}")


class EpisodeSource(ABC):
    """Gives whole groups of episodes.

    Attributes:
        plays_ahead: It wants to hear what is planned, and of new weights.
    """

    plays_ahead: bool = False

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
    def scripted(self) -> EnvSource | None:
        """The source that others than the policy can play, by a script or by hand, if there is one."""
        return None

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

    # ---- for sources that play ahead ----

    def plan(self, rounds: Rounds, folder: Path | None) -> None:
        """Hears before the first iteration what each plays.

        Args:
            rounds: Iteration -> its groups, and how they are played but for the policy's version; ``None`` after the last.
            folder: The run's, if it has one.
        """

    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hears as soon as the weights are known that an iteration begins with."""

    def learned(self, iterations: int) -> None:
        """Hears that the run does not go on from fewer iterations any more."""

    def figures(self) -> dict[str, float]:
        """Of the groups that were collected last, always under the same names; logged by iteration."""
        return {}

    # ---- a run ----

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
