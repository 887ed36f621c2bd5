"""What a learner has play elsewhere, who plays it, and what a process that plays begins with."""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from steppo.engines.thread import Surroundings
from steppo.envs.checks import checked_episode
from steppo.errors import ConfigError
from steppo.models.adapters import LoRASettings
from steppo.models.policy import Policy
from steppo.pool import DataPool
from steppo.rollouts.base import EpisodeSource
from steppo.types import Episode, Group, RolloutConfig
from steppo.weight_cache import save_whole

MOST_GROUPS = 2**31  # that may wait in the pool: the plan bounds them
DEATHS = 3  # in a row, without a group
_SEEN_S = 60.0  # in which a file is seen by another machine


@dataclass(frozen=True)
class Job:
    """Groups of one iteration, to be played with one version of the weights."""

    iteration: int
    groups: tuple[Group, ...]
    config: RolloutConfig

    @property
    def names(self) -> dict[str, Group]:
        """By the names that they have in the pool."""
        return {f"{self.config.name}/{group.id}": group for group in self.groups}

    def without(self, names: Iterable[str]) -> Job:
        """What is left of it."""
        gone = set(names)
        return replace(self, groups=tuple(group for name, group in self.names.items() if name not in gone))

    def share(self, number: int, count: int) -> Job:
        """One of so many, of about equal size."""
        return replace(self, groups=self.groups[number::count])


class Weights(NamedTuple):
    """The iteration that begins with them, their version, and what was published."""

    iteration: int
    version: int
    tensors: dict[str, Tensor]


class PublishedWeights:
    """A folder of weights, each file whole, of which the newest two stay: a producer may be about to read the older one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Writes those that an iteration begins with."""
        state = {"version": version, "weights": {name: weight.detach().cpu() for name, weight in weights}}
        path = self.folder / f"{iteration:09d}.pt"
        save_whole(state, path, path.with_suffix(".part"))
        for old in self._files()[:-2]:
            old.unlink()

    def newest(self, least: int = 0) -> Weights:
        """What was published last; waits for those of iteration ``least``, which other machines may see late."""
        until = time.monotonic() + _SEEN_S
        while time.monotonic() < until:
            files = self._files()
            if not files or int(files[-1].stem) < least:
                time.sleep(0.05)
                continue
            with suppress(FileNotFoundError):  # two newer ones came just now
                state = torch.load(files[-1], map_location="cpu", weights_only=True)
                return Weights(int(files[-1].stem), state["version"], state["weights"])
        raise ConfigError(f"{self.folder} has no weights of iteration {least}: it must be the same folder on all machines")

    def clear(self) -> None:
        """Removes the folder."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


# ---- where it is played ----


@dataclass(frozen=True)
class Outfit:
    """What a producer begins with.

    Attributes:
        source: Plays the groups; pickled before it was bound.
        policy: Not yet built.
        tokenizer: Its state.
        lora: Its adapter's settings, if it has one.
        dtype: Of its weights.
        device: Where it samples.
        surroundings: Precision and threads.
        default_dtype: Torch's.
        matmul_precision: Torch's.
    """

    source: bytes
    policy: Policy
    tokenizer: str
    lora: LoRASettings | None
    dtype: torch.dtype
    device: torch.device
    surroundings: Surroundings
    default_dtype: torch.dtype
    matmul_precision: str

    def on(self, device: torch.device) -> Outfit:
        """The same elsewhere."""
        index = device.index or 0 if device.type == "cuda" else None
        return replace(self, device=device, surroundings=replace(self.surroundings, cuda_device=index))

    def built_policy(self) -> Policy:
        """The learner's, but for its weights."""
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        policy = self.policy
        policy.load_device = self.device
        policy.build(list)
        if self.lora is not None:
            policy.add_lora(self.lora)
        if self.tokenizer:
            policy.load_tokenizer_state(self.tokenizer)
        if policy.dtype != self.dtype:
            policy.to(self.dtype)
        return policy if policy.bits is not None else policy.to(self.device)


class Producer:
    """A policy and a source of its own, in a process that is not the learner's.

    Args:
        outfit: What it begins with.
    """

    def __init__(self, outfit: Outfit) -> None:
        logging.disable_progress_bar()
        self._policy = outfit.built_policy()
        self._surroundings = outfit.surroundings
        self._held = -1
        self.source: EpisodeSource = pickle.loads(outfit.source)
        self.source.bind(self._policy)

    def play(self, job: Job, weights: Weights) -> Iterator[tuple[str, list[Episode]]]:
        """Each group as soon as it is whole, by its name in the pool."""
        # Autocast keeps rounded weights for as long as it is on.
        with self._surroundings.entered():
            if weights.iteration != self._held:
                self._held = weights.iteration
                for name, weight in self._policy.inference_weights():
                    weight.copy_(weights.tensors[name])
            self.source.load_weights(self._policy.inference_weights(), weights.version)
            for episodes in self.source.collect(job.groups, replace(job.config, version=weights.version)):
                yield f"{job.config.name}/{episodes[0].group_id}", list(map(checked_episode, episodes))

    def close(self) -> None:
        """Ends the source."""
        self.source.close()


# ---- for the learner ----


class Fleet(ABC):
    """Processes that play what the learner plans; the constructor only stores settings. Called from one thread.

    What one that dies or hangs owes is played again, elsewhere.
    """

    @abstractmethod
    def start(self, outfit: Outfit, count: int, pool: DataPool, timeout: float) -> None:
        """Before all others.

        Args:
            outfit: What each begins with.
            count: How many play.
            pool: Where their groups go.
            timeout: Seconds without a group, while the learner waits, after which one is taken for hanging.
        """

    @abstractmethod
    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Gives the weights that an iteration begins with to all that begin to play from now on."""

    @abstractmethod
    def send(self, job: Job) -> None:
        """Has a job played, after those before it. What the pool has is not."""

    @abstractmethod
    def watch(self, waiting: bool) -> None:
        """Replaces those that have ended; where the learner is ``waiting`` since it last looked, also those that hang.

        Raises:
            RunError: One died several times in a row without a group.
            SteppoError: What ended a source.
        """

    @abstractmethod
    def wait(self) -> None:
        """A moment, or until something happens."""

    @abstractmethod
    def counts(self) -> Counter[str]:
        """What their sources counted, and how many of them were replaced (``restarted_producers``)."""

    @abstractmethod
    def close(self) -> None:
        """Ends them all. It may be started again."""
