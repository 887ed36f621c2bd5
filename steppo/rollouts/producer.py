"""Processes of this machine that play, with weights from files, and put the groups into the data pool."""

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
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from steppo.envs.guard import Guard
from steppo.errors import RunError, SteppoError, located
from steppo.pool import DataPool
from steppo.rollouts.fleet import DEATHS, MOST_GROUPS, Fleet, Job, Outfit, Producer, PublishedWeights

CONTEXT: Any = mp.get_context("spawn")  # a fork would copy torch's threads and locks
_CLOSE_S = 2.0  # for environments to close
_LOOK_S = 0.05


# ---- in the process ----


def serve(connection: Connection, pickled: bytes) -> None:
    """Plays one job after the other until nobody listens; says what its source counts after each, or why it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked for the start
    signal.signal(signal.SIGTERM, _leave)
    os.setpgid(0, 0)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    try:
        _produce(jobs, connection, *pickle.loads(pickled))
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


def _produce(
    jobs: queue.SimpleQueue[Job], connection: Connection, outfit: Outfit, weights: PublishedWeights, path: Path
) -> None:
    with closing(Producer(outfit)) as producer, closing(DataPool(path, MOST_GROUPS)) as pool:
        while True:
            job = jobs.get()
            for name, episodes in producer.play(job, weights.newest()):
                pool.put(name, episodes)
            connection.send(producer.source.counts())


# ---- for the learner ----


class _Process:
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


class LocalFleet(Fleet):
    """Processes on this machine, each of which plays its share of every job."""

    def start(self, outfit: Outfit, count: int, pool: DataPool, timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout
        self._weights = PublishedWeights(pool.path.with_name(f"{pool.path.name}-weights"))
        self._weights.clear()  # of a run that was killed
        self._outfit = pickle.dumps((outfit, self._weights, pool.path))
        self._counts: Counter[str] = Counter()
        self._guard = Guard()
        self._processes: list[_Process] = []
        # Where nobody calls close: before multiprocessing waits for them.
        self._finalizer = Finalize(self, _end_all, (self._processes, self._guard), exitpriority=100)
        for number in range(count):
            self._processes.append(_Process(str(number), self._outfit, self._guard, (), 0))

    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights.publish(iteration, version, weights)

    def send(self, job: Job) -> None:
        for number, process in enumerate(self._processes):
            share = job.share(number, len(self._processes))
            share = share.without(self._pool.find(share.names))
            if share.groups:
                process.send(share)

    def watch(self, waiting: bool) -> None:
        for number, process in enumerate(self._processes):
            why = process.ended()
            process.takes(self._pool)
            if not waiting:
                process.since = time.monotonic()
            elif not why and process.jobs and time.monotonic() - process.since > self._timeout:
                why = f"no group within {self._timeout:g} s"
            if why:
                self._replace(number, why)

    def wait(self) -> None:
        wait([process.process.sentinel for process in self._processes], _LOOK_S)

    def counts(self) -> Counter[str]:
        return sum((process.counts for process in self._processes), self._counts)

    def close(self) -> None:
        self._finalizer()
        self._weights.clear()

    def _replace(self, number: int, why: str) -> None:
        old = self._processes[number]
        self._guard.kill(old.id, _leaders([old]))
        old.release()
        if old.deaths + 1 == DEATHS:
            raise RunError(f"a producer played nothing and ended, {DEATHS} times in a row: {why}")
        self._counts.update(old.counts + Counter(restarted_producers=1))
        jobs = [job for _, job in sorted(old.jobs.items())]
        self._processes[number] = _Process(old.id, self._outfit, self._guard, jobs, old.deaths + 1)


def _end_all(processes: list[_Process], guard: Guard) -> None:
    """At once if this is interrupted."""
    try:
        for process in processes:
            process.send(None)
        deadline = time.monotonic() + _CLOSE_S
        for process in processes:
            process.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        guard.kill(leaders=_leaders(processes))
        for process in processes:
            process.release()
        processes.clear()
        guard.close()


def _leaders(processes: Iterable[_Process]) -> list[int]:
    return [process.process.pid for process in processes if process.process.pid is not None]
