"""Which episode of a round one is, and what follows from that: its name, its order, its seeds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from steppo.types import Group, RolloutConfig


@dataclass(frozen=True)
class Place:
    """The ``sample``-th episode of a group."""

    config: RolloutConfig
    group: Group
    sample: int

    @property
    def id(self) -> str:
        """The episode's."""
        return f"{self.config.name}/{self.group.id}/{self.group.task.id}/{self.sample}"

    @property
    def order(self) -> int:
        """The episode's, among all of the round."""
        return self.group.first + self.sample

    def seed(self, step: int | str) -> int:
        """Of the action at a step: by its number, or its name among several agents'."""
        return request_seed(self.config, self.group, self.sample, step)


def request_seed(config: RolloutConfig, group: Group, sample: int, step: int | str) -> int:
    """Seed of one action: the same wherever and beside whatever it is sampled."""
    name = f"{config.seed}|{config.name}|{group.id}|{group.task.id}|{sample}|{step}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
