"""Processes that play what the learner plans, with weights from files, and put the groups into a data pool."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.utils import logging

from steppo.engines.thread import Surroundings
from steppo.envs.checks import checked_episode
from steppo.envs.guard import Guard
from steppo.errors import RunError, SteppoError, located
from steppo.models.adapters import LoRASettings
from steppo.models.policy import Policy
from steppo.pool import DataPool
from steppo.rollouts.base import EpisodeSource
from steppo.types import Group, RolloutConfig
from steppo.weight_cache import save_whole

CONTEXT: Any = mp.get_context("spawn")  # a fork would copy torch's threads and locks
MOST_GROUPS = 2**31  # that may wait in the pool: the plan bounds them
_DEATHS = 3  # in a row, without a group
_CLOSE_S = 2.0  # for environments to close
_LOOK_S = 0.05


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

    def newest(self) -> tuple[int, int, dict[str, Tensor]]:
        """The iteration that begins with them, their version, and what was published."""
        while True:
            path = self._files()[-1]
            with suppress(FileNotFoundError):  # two newer ones came just now
                state = torch.load(path, map_location="cpu", weights_only=True)
                return int(path.stem), state["version"], state["weights"]

    def clear(self) -> None:
        """Removes the folder."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


# ---- in the process ----


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
        weights: Where they are published.
        pool: Where groups go.
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
    weights: PublishedWeights
    pool: Path

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


def serve(connection: Connection, pickled: bytes) -> None:
    """Plays one job after the other until nobody listens; says what its source counts after each, or why it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked for the start
    signal.signal(signal.SIGTERM, _leave)
    os.setpgid(0, 0)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    logging.disable_progress_bar()
    try:
        _produce(pickle.loads(pickled), jobs, connection)
    except Exception as error:  # whatever it is, it is the learner's to judge
        with suppress(OSError):
            connection.send(error if isinstance(error, SteppoError) else located(error))


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit


def _listen(connection: Connection, jobs: queue.SimpleQueue[Job]) -> None:
    """Takes jobs at once, so that the learner never waits. After the last one the process ends, wherever it is."""
    try:
        while (job := connection.recv()) is not None:
            jobs.put(job)
    except (EOFError, OSError):
        pass  # the learner is gone
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _produce(outfit: Outfit, jobs: queue.SimpleQueue[Job], connection: Connection) -> None:
    policy = outfit.built_policy()
    source: EpisodeSource = pickle.loads(outfit.source)
    held = -1
    with closing(source), closing(DataPool(outfit.pool, MOST_GROUPS)) as pool:
        source.bind(policy)
        while True:
            job = jobs.get()
            newest, version, weights = outfit.weights.newest()
            # Autocast keeps rounded weights for as long as it is on.
            with outfit.surroundings.entered():
                if newest != held:
                    held = newest
                    for name, weight in policy.inference_weights():
                        weight.copy_(weights[name])
                source.load_weights(policy.inference_weights(), version)
                for episodes in source.collect(job.groups, replace(job.config, version=version)):
                    pool.put(f"{job.config.name}/{episodes[0].group_id}", list(map(checked_episode, episodes)))
            connection.send(source.counts())


# ---- for the learner ----


class _Producer:
    """One process. ``jobs`` by iteration, as far as it owes them; ``deaths`` of its predecessors in a row."""

    def __init__(self, id: str, outfit: bytes, guard: Guard, jobs: Iterable[Job], deaths: int) -> None:
        self.id = id
        self.jobs: dict[int, Job] = {}
        self.deaths = deaths
        self.counts: Counter[str] = Counter()
        self.since = time.monotonic()  # it was started, its last group came, or the learner began to wait
        self._why = ""
        self._connection, child = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(child, outfit))  # no daemon: those may have no children
        try:
            with guard.marking(id):
                self.process.start()
        except OSError as error:
            raise RunError(f"cannot start a producer: {error}") from error
        child.close()
        for job in jobs:
            self.send(job)

    def send(self, job: Job | None) -> None:
        """``None`` asks it to end. That it is dead is found when it is looked at."""
        if job is not None:
            self.jobs[job.iteration] = job
        with suppress(OSError):
            self._connection.send(job)

    def takes(self, pool: DataPool) -> None:
        """Notes which groups have come."""
        owed = [name for job in self.jobs.values() for name in job.names]
        come = pool.find(owed)
        left = (job.without(come) for job in self.jobs.values())
        self.jobs = {job.iteration: job for job in left if job.groups}
        if come:
            self.since, self.deaths = time.monotonic(), 0

    def ended(self) -> str:
        """Why it has, if it has.

        Raises:
            SteppoError: Its own.
        """
        alive = self.process.is_alive()
        with suppress(EOFError, OSError):
            while self._connection.poll():
                said = self._connection.recv()
                if isinstance(said, SteppoError):
                    raise said
                if isinstance(said, str):
                    self._why = said
                else:
                    self.counts = said
        return "" if alive else self._why or f"it died (exit status {self.process.exitcode})"

    def release(self) -> None:
        """Frees what is held for a process that has been killed."""
        self.process.join()
        self._connection.close()


class Producers:
    """Processes, each of which plays its share of every job.

    One that dies, or that owes groups and gives none for ``timeout`` seconds while the learner waits, is replaced; what it
    owes is played again.

    Args:
        outfit: What they begin with.
        count: How many.
        pool: Where their groups go, too.
        timeout: Seconds.
    """

    def __init__(self, outfit: Outfit, count: int, pool: DataPool, timeout: float) -> None:
        self._outfit = pickle.dumps(outfit)
        self._count = count
        self._pool = pool
        self._timeout = timeout
        self._counts: Counter[str] = Counter()
        self._guard = Guard()
        self._producers: list[_Producer] = []
        # Where nobody calls close: before multiprocessing waits for them.
        self._finalizer = Finalize(self, _end_all, (self._producers, self._guard), exitpriority=100)
        for number in range(count):
            self._producers.append(_Producer(str(number), self._outfit, self._guard, (), 0))

    def send(self, job: Job) -> None:
        """Shares it among them. What the pool has is not played."""
        for number, producer in enumerate(self._producers):
            share = replace(job, groups=job.groups[number :: self._count])
            share = share.without(self._pool.find(share.names))
            if share.groups:
                producer.send(share)

    def watch(self, waiting: bool) -> None:
        """Replaces those that have ended; where the learner is ``waiting`` since it last looked, also those that hang.

        Raises:
            RunError: One died several times in a row without a group.
            SteppoError: What ended a source.
        """
        for number, producer in enumerate(self._producers):
            why = producer.ended()
            producer.takes(self._pool)
            if not waiting:
                producer.since = time.monotonic()
            elif not why and producer.jobs and time.monotonic() - producer.since > self._timeout:
                why = f"no group within {self._timeout:g} s"
            if why:
                self._replace(number, why)

    def wait(self) -> None:
        """A moment, or until one dies."""
        wait([producer.process.sentinel for producer in self._producers], _LOOK_S)

    def counts(self) -> Counter[str]:
        """What their sources counted, and how many of them were replaced."""
        return sum((producer.counts for producer in self._producers), self._counts)

    def close(self) -> None:
        """Ends them all."""
        self._finalizer()

    def _replace(self, number: int, why: str) -> None:
        old = self._producers[number]
        self._guard.kill(old.id, _leaders([old]))
        old.release()
        if old.deaths + 1 == _DEATHS:
            raise RunError(f"a producer played nothing and ended, {_DEATHS} times in a row: {why}")
        self._counts.update(old.counts + Counter(restarted_producers=1))
        jobs = [job for _, job in sorted(old.jobs.items())]
        self._producers[number] = _Producer(old.id, self._outfit, self._guard, jobs, old.deaths + 1)


def _end_all(producers: list[_Producer], guard: Guard) -> None:
    """At once if this is interrupted."""
    try:
        for producer in producers:
            producer.send(None)
        deadline = time.monotonic() + _CLOSE_S
        for producer in producers:
            producer.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        guard.kill(leaders=_leaders(producers))
        for producer in producers:
            producer.release()
        producers.clear()
        guard.close()


def _leaders(producers: Iterable[_Producer]) -> list[int]:
    return [producer.process.pid for producer in producers if producer.process.pid is not None]
