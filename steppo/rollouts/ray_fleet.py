"""Producers that Ray places on the machines of a cluster: docs/cluster.md."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from steppo.errors import ConfigError, RunError, SteppoError, in_short, located, require_at_least, said
from steppo.paths import user_path
from steppo.pool import DataPool
from steppo.rollouts.fleet import DEATHS, MOST_GROUPS, Fleet, Job, Outfit, Producer, PublishedWeights, Weights

_CLOSE_S = 2.0  # for environments to close
_LOOK_S = 0.05
_PLACED_S = 30.0  # in which an actor that has room has begun


class _Actor:
    """Plays in a process of Ray's."""

    def __init__(self, outfit: bytes) -> None:
        self._outfit = outfit
        self._producer: Producer | None = None
        vars(sys.modules["__main__"]).pop("__file__", None)  # workers of environments would import it, and all of Ray

    def play(self, job: Job | None, weights: Callable[[], Weights]) -> Iterator[Any]:
        """Makes the policy if it has none. Of a job it gives each group as soon as it is whole, and what the source counts.
        An error is given, too: it is the learner's to judge."""
        try:
            if self._producer is None:
                self._producer = Producer(pickle.loads(self._outfit))
            if job is not None:
                yield from self._producer.play(job, weights())
                yield self._producer.source.counts()
        except Exception as error:
            yield error if isinstance(error, SteppoError) else located(error)

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()


def _packed(tensor: Tensor) -> tuple[Any, torch.dtype, torch.Size]:
    """As bytes, which the actors of a machine share without a copy; tensors Ray would pickle."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def _unpacked(iteration: int, version: int, packed: dict[str, Any]) -> Weights:
    with warnings.catch_warnings(action="ignore"):  # nobody writes to them
        tensors = {name: torch.from_numpy(flat).view(dtype).view(shape) for name, (flat, dtype, shape) in packed.items()}
    return Weights(iteration, version, tensors)


# ---- for the learner ----


@dataclass(eq=False)
class _Place:
    """An actor, or who comes after it.

    Attributes:
        actor: Ray's handle.
        told: What it says, as a stream, until it has nothing to do.
        share: What it plays, if it is ready.
        counts: Of its source.
        since: It was made, it began, or its last group came.
        why: It is to be replaced.
    """

    actor: Any
    told: Any
    share: Job | None = None
    counts: Counter[str] = field(default_factory=Counter)
    since: float = field(default_factory=time.monotonic)
    why: str = ""

    @property
    def starts(self) -> bool:
        return self.told is not None and self.share is None


class RayFleet(Fleet):
    """Actors on the machines of a Ray cluster, ``num_producers`` of them.

    Whoever is free takes the next share of the plan: as many shares of an iteration as there are actors. A thread of the
    learner's hands them out, and puts what is played into the pool. What an actor on a lost machine has not given is played
    again by another; one in its place is begun wherever there is room.

    Args:
        address: Of the cluster, which this machine has joined (``ray start``). Unless given, that in ``RAY_ADDRESS``, or a
            cluster of this machine alone is started and ends with the run.
        num_cpus: That an actor takes up, as Ray counts.
        num_gpus: As many; it samples on the first of them, or on the CPU if there is none.
        resources: Others that it takes up, by the names that ``ray start --resources`` gave them.
        weights_folder: Seen by all machines, for weights to go through; Ray's object store unless given.
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        resources: dict[str, float] | None = None,
        weights_folder: str | None = None,
    ) -> None:
        require_at_least(0, self, num_cpus=num_cpus, num_gpus=num_gpus)
        require_at_least(0, self, **(resources or {}))
        if find_spec("ray") is None:
            raise ConfigError("RayFleet needs Ray: pip install 'steppo[ray]'")
        self.address = address
        self.wanted = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}
        self.weights_folder = weights_folder

    def start(self, outfit: Outfit, count: int, pool: DataPool, timeout: float) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS")
        if not address:  # read when Ray is imported: then a cluster of this machine alone listens on loopback, also on Linux
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            self._join(address)
        self._require_room()
        self._path, self._timeout = pool.path, timeout
        run = hashlib.sha256(f"{platform.node()} {pool.path.absolute()}".encode()).hexdigest()[:16]
        self._folder = PublishedWeights(user_path(self.weights_folder or "").absolute() / f"{run}-weights")
        self._folder.clear()  # of a run that was killed
        self._outfit = ray.put(pickle.dumps(outfit.on(torch.device("cuda:0" if self.wanted["GPU"] else "cpu"))))
        self._weights: Any = None  # the newest, as a call that gives them
        self._queue: deque[Job] = deque()  # shares of jobs
        self._deaths = 0  # of actors, since the last group came from any of them
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # of counts and places
        self._places = [self._placed() for _ in range(count)]
        self._asked = time.monotonic()  # the learner waits since then
        self._late = 0
        self._error: SteppoError | None = None
        self._is_closing = False
        self._work, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.weights_folder is not None:
            self._folder.publish(iteration, version, weights)
            self._weights = partial(self._folder.newest, iteration)
        else:
            packed = {name: _packed(weight) for name, weight in weights}
            self._weights = self._ray.put(partial(_unpacked, iteration, version, packed))

    def send(self, job: Job) -> None:
        shares = (job.share(number, len(self._places)) for number in range(len(self._places)))
        self._queue.extend(share for share in shares if share.groups)
        self._work.set()

    def watch(self, waiting: bool) -> None:
        if self._error is not None:
            raise self._error
        now = time.monotonic()
        if not waiting:
            self._asked = now
        starting = [now - place.since for place in self._places if place.starts]
        late, wanted = sum(seconds > _PLACED_S for seconds in starting), f"each wants {_words(self.wanted)}"
        if late > self._late:
            free = _words(self._ray.available_resources())
            words = f"{late} actors have not begun within {_PLACED_S:g} s: {wanted}, free in the cluster: {free}"
            warnings.warn(f"RayFleet: {words}", stacklevel=2)
        self._late = late
        if waiting and len(starting) == len(self._places) and min(*starting, now - self._asked) > self._timeout:
            raise RunError(f"RayFleet: no actor has begun within {self._timeout:g} s: {wanted}")
        for place in self._places:
            if waiting and place.share is not None and now - max(place.since, self._asked) > self._timeout:
                place.why = f"no group within {self._timeout:g} s"

    def wait(self) -> None:
        self._news.wait(_LOOK_S)
        self._news.clear()

    def counts(self) -> Counter[str]:
        with self._lock:
            return sum((place.counts for place in self._places), self._counts)

    def close(self) -> None:
        self._is_closing = True
        self._work.set()
        self._thread.join()
        with suppress(Exception):  # there may be no cluster any more
            closing = [place.actor.close.remote() for place in self._places if not place.starts]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
            for place in self._places:
                self._ray.kill(place.actor)
        self._folder.clear()
        if self._is_ours:
            self._ray.shutdown()

    # ---- the cluster ----

    def _join(self, address: str | None) -> None:
        alone = {} if address else {"include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        try:
            if address and "://" in address:
                raise ValueError("give host:port, or auto")
            self._ray.init(address or "local", log_to_driver=False, logging_level="warning", **alone)
        except Exception as error:
            what = f"cannot reach the cluster {address}" if address else "cannot start a cluster"
            hint = "; this machine joins it first: ray start --address=HOST:PORT" if address else ""
            raise ConfigError(f"RayFleet {what}: {said(error)}{hint}") from error
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray took it

    def _require_room(self) -> None:
        """Raises ``ConfigError`` if no machine could ever hold an actor."""
        machines = [machine["Resources"] for machine in self._ray.nodes() if machine["Alive"]]
        if not any(all(has.get(name, 0) >= much for name, much in self.wanted.items()) for has in machines):
            there = "; ".join(sorted({_words(has) for has in machines}))
            raise ConfigError(f"RayFleet: an actor wants {_words(self.wanted)}, no machine of the cluster has that: {there}")

    def _placed(self) -> _Place:
        """A new actor, wherever there is room, now or later."""
        others = dict(self.wanted)
        wanted = {"num_cpus": others.pop("CPU"), "num_gpus": others.pop("GPU"), "resources": others}
        # Else Ray kills an actor's children when it ends, among them the guard that would end theirs.
        variables = {"RAY_kill_child_processes_on_worker_exit": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        made = self._ray.remote(_Actor).options(**wanted, scheduling_strategy="SPREAD", runtime_env={"env_vars": variables})
        actor = made.remote(self._outfit)
        return _Place(actor, actor.play.remote(None, None))

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with closing(DataPool(self._path, MOST_GROUPS)) as pool:
                while not self._is_closing:
                    self._turn(pool)
        except Exception as error:  # the learner's, which looks for it
            self._error = error if isinstance(error, SteppoError) else RunError(f"RayFleet: {located(error)}")
            self._news.set()

    def _turn(self, pool: DataPool) -> None:
        """Hands shares out, and hears one of those that have something to say."""
        for place in self._places:
            while place.told is None and self._queue:
                share = self._queue.popleft()
                share = share.without(pool.find(share.names))
                if share.groups:
                    place.share, place.since = share, time.monotonic()
                    place.told = place.actor.play.remote(share, self._weights)
        busy = [place for place in self._places if place.told is not None]
        if not busy:
            self._work.wait()
            self._work.clear()
            return
        come, _ = self._ray.wait([place.told for place in busy], timeout=_LOOK_S)
        for place in busy:
            if any(place.told is stream for stream in come):
                self._hear(place, pool)
            if place.why:
                self._replace(place)

    def _hear(self, place: _Place, pool: DataPool) -> None:
        try:
            told = self._ray.get(next(place.told))
        except StopIteration:
            place.told = place.share = None
            return
        except self._ray.exceptions.RayError as error:
            place.why = in_short(str(error).strip().splitlines()[-1])
            return
        if isinstance(told, SteppoError):
            raise told
        if isinstance(told, str):
            place.why = told
        elif isinstance(told, Counter):
            place.counts = told
        elif place.share is not None:
            pool.put(*told)
            self._deaths, place.since = 0, time.monotonic()
            self._news.set()

    def _replace(self, place: _Place) -> None:
        self._ray.kill(place.actor)
        self._deaths += 1
        if self._deaths == DEATHS * len(self._places):
            raise RunError(f"{self._deaths} actors ended in a row, and none played a group: {place.why}")
        if place.share is not None:
            self._queue.appendleft(place.share)
        after = self._placed()
        with self._lock:
            self._counts.update(place.counts + Counter(restarted_producers=1))
            self._places[self._places.index(place)] = after


def _words(resources: Mapping[str, float]) -> str:
    """Those that people name."""
    named = {name: much for name, much in resources.items() if much and ":" not in name and "memory" not in name}
    return ", ".join(f"{much:g} {name}" for name, much in sorted(named.items())) or "nothing"
