"""Episodes played by other processes while the learner learns: docs/asynchronous.md."""

from __future__ import annotations

import math
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steppo.distributed import dealt_once, made_once, rank_and_world
from steppo.engines.thread import Surroundings
from steppo.errors import ConfigError, RunError, require_at_least, said
from steppo.pool import DataPool
from steppo.rollouts.base import EpisodeSource, Rounds
from steppo.rollouts.fleet import MOST_GROUPS, Fleet, Job, Outfit
from steppo.rollouts.producer import LocalFleet
from steppo.types import Episode, Group, RolloutConfig, Task

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy
    from steppo.rollouts.env_source import EnvSource

_NAME = "data.asynchronous"


@dataclass(frozen=True)
class AsyncSettings:
    """How other processes play ahead.

    Attributes:
        max_staleness: An iteration's episodes are begun with the weights of at most so many iterations before; 0 waits for
            its own.
        num_producers: Processes that play, each with a copy of the policy and workers of its own.
        num_threads: CPU threads of torch in each of them; the learner's number unless given.
        device: Where they sample, such as ``cuda:1``; the learner's unless given.
        timeout: Seconds without a group, while the learner waits for it, after which a producer is taken for hanging.
        pool: File of the groups; ``pool.sqlite`` in the run's folder unless given. It must be on a local disk.
        keep: Groups whose episodes stay there once they are learned. A replay needs all.
        replay: File of an earlier run, whose episodes are learned from. Nothing is played.
        fleet: Where producers are: processes on this machine unless given.
    """

    max_staleness: int = 1
    num_producers: int = 1
    num_threads: int | None = None
    device: str | None = None
    timeout: float = 1800.0
    pool: str | None = None
    keep: int = 256
    replay: str | None = None
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        require_at_least(0, _NAME, max_staleness=self.max_staleness, keep=self.keep)
        require_at_least(1, _NAME, num_producers=self.num_producers, num_threads=self.num_threads, timeout=self.timeout)
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ConfigError(f"{_NAME}: device {self.device!r} is none, such as cpu or cuda:1") from error


class AsyncSource(EpisodeSource):
    """Has producers play what is planned, and takes an iteration's groups out of a data pool.

    What is not planned (evaluations, demonstrations) is played in this process.

    Args:
        source: Plays, here and in each producer.
        settings: How.
    """

    plays_ahead = True

    def __init__(self, source: EpisodeSource, settings: AsyncSettings = AsyncSettings()) -> None:
        self.source = source
        self.settings = settings
        try:
            self._pickled = pickle.dumps(source)  # before it is bound to a policy
        except Exception as error:
            raise ConfigError(f"{_NAME}: the source cannot be sent to a producer: {said(error)}") from error
        self._policy: Policy | None = None
        self._rounds: Rounds | None = None
        self._folder: Path | None = None
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._pool: DataPool | None = None
        self._fleet: Fleet | None = None  # once it is started
        self._jobs: dict[str, Job] = {}  # by the name of what they play: begun, and not yet collected
        self._begun = 0  # iterations
        self._versions: dict[int, int] = {}  # of the weights that the latest iterations began with
        self._counts = Counter({"restarted_producers": 0})
        self._figures: dict[str, float] = {}

    # ---- the source in this process ----

    @property
    def scripted(self) -> EnvSource | None:
        return self.source.scripted

    @property
    def version(self) -> str:
        return self.source.version

    @property
    def logprob_tolerance(self) -> float:
        return math.inf if self.settings.max_staleness else self.source.logprob_tolerance  # stale ones differ

    @property
    def longest_episode(self) -> int | None:
        return self.source.longest_episode

    def tasks(self, split: str) -> list[Task]:
        return self.source.tasks(split)

    def content(self, task: Task) -> str:
        return self.source.content(task)

    def protocol(self) -> dict[str, Any]:
        return self.source.protocol()

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        self.source.prepare(tasks, progress)

    def tokenizer_texts(self, tasks: Sequence[Task]) -> list[str]:
        return self.source.tokenizer_texts(tasks)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.source.load_weights(weights, version)

    def bind(self, policy: Policy) -> None:
        self.source.bind(policy)
        self._policy = policy

    # ---- ahead of the learner ----

    def plan(self, rounds: Rounds, folder: Path | None) -> None:
        self._rounds, self._folder = rounds, folder
        self._jobs, self._begun = {}, 0

    def publish(self, iteration: int, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Begins the iterations that may be played with these weights. No other line begins one: the bound is here."""
        ahead = self.settings.max_staleness
        self._versions = {number: known for number, known in self._versions.items() if number >= iteration - ahead}
        self._versions[iteration] = version
        jobs = []
        for number in range(max(self._begun, iteration), iteration + ahead + 1):
            if self._rounds is not None and (planned := self._rounds(number)) is not None:
                groups, config = planned
                jobs.append(Job(number, tuple(groups), config))
                self._jobs[config.name] = jobs[-1]
                self._begun = number + 1
        if self._jobs:
            is_first = rank_and_world()[0] == 0  # where weights are sharded, all go through them, and one holds them
            held = [named for named in weights if is_first]
            made_once(lambda: self._begin(jobs, iteration, version, held))

    def _begin(self, jobs: Sequence[Job], iteration: int, version: int, weights: Sequence[tuple[str, Tensor]]) -> None:
        if self._pool is None:
            self._pool = self._opened()
        if self.settings.replay is not None:
            return
        if self._fleet is None:
            fleet = self.settings.fleet or LocalFleet()
            fleet.start(self._outfit(), self.settings.num_producers, self._pool, self.settings.timeout)
            self._fleet = fleet
        self._fleet.publish(iteration, version, weights)
        self._fleet.watch(waiting=False)
        for job in jobs:
            self._fleet.send(job)

    def _opened(self) -> DataPool:
        if self.settings.replay is not None:
            return DataPool(self.settings.replay, create=False)
        folder = self._folder
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="steppo-")
            folder = Path(self._scratch.name)
        return DataPool(self.settings.pool or folder / "pool.sqlite", MOST_GROUPS, self.settings.keep)

    def _outfit(self) -> Outfit:
        policy = self._policy
        assert policy is not None, "bind comes before"
        device = torch.device(self.settings.device or policy.device)
        surroundings = Surroundings.here()
        surroundings = replace(surroundings, num_threads=self.settings.num_threads or surroundings.num_threads)
        return Outfit(
            self._pickled,
            policy.unbuilt(),
            policy.tokenizer_state(),
            policy.adapters.settings if policy.adapters is not None else None,
            policy.dtype,
            device,
            surroundings,
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
        ).on(device)

    # ---- an iteration ----

    def collect(self, groups: Sequence[Group], config: RolloutConfig) -> Iterator[list[Episode]]:
        job = self._jobs.get(config.name)
        if job is None:
            yield from self.source.collect(groups, config)
            return
        rank, world = rank_and_world()
        if tuple(groups) != job.groups[rank::world]:
            raise RunError(
                f"{_NAME}: {config.name} plays other tasks than were planned: what the sampler chooses must follow from "
                "position and seed alone"
            )
        if world == 1:
            yield from self._collected(job, config)
        else:
            make = lambda: [(part, self._figures) for part in _evenly(self._collected(job, config), world)]  # noqa: E731
            mine, self._figures = dealt_once(make)
            yield from mine
        del self._jobs[config.name]

    def _collected(self, job: Job, config: RolloutConfig) -> Iterator[list[Episode]]:
        """All groups of a job, as they come."""
        assert self._pool is not None, "it is open since the job was begun"
        staleness: Counter[int] = Counter()
        waited = 0.0
        missing = job.names
        if self._fleet is not None:
            self._fleet.watch(waiting=False)
        while missing:
            for name, number in self._pool.find(missing).items():
                episodes = self._pool.read(number)
                self._check(name, missing.pop(name), episodes, config)
                staleness.update(self._staleness(name, job.iteration, episodes))
                yield episodes
            if missing:
                start = time.monotonic()
                self._wait(missing)
                waited += time.monotonic() - start
        if self.settings.replay is None:
            self._pool.claim_named(job.iteration, job.names)
        self._measure(staleness, waited)

    def _wait(self, missing: Iterable[str]) -> None:
        if self._fleet is None:
            name = self.settings.replay
            raise ConfigError(f"{_NAME}: {name} has no {min(missing)}: it is of a shorter run, or of other groups")
        self._fleet.watch(waiting=True)
        self._fleet.wait()

    def _check(self, name: str, group: Group, episodes: Sequence[Episode], config: RolloutConfig) -> None:
        """Raises ``ConfigError`` if these are not what is planned: the pool is another run's."""
        path = self.settings.replay or (self._pool.path if self._pool is not None else "")
        if not episodes:
            raise ConfigError(f"{_NAME}: {path} has had {name}, and its episodes are gone ({_NAME}.keep)")
        same_tasks = {episode.task_id for episode in episodes} == {group.task.id}
        orders = [episode.order for episode in episodes] == [*range(group.first, group.first + group.size)]
        temperatures = {step.temperature for episode in episodes for step in episode.steps} <= {config.temperature}
        if not (same_tasks and orders and temperatures):
            raise ConfigError(f"{_NAME}: {name} of {path} is of another run: give another file, or the settings of that run")

    def _staleness(self, name: str, iteration: int, episodes: Sequence[Episode]) -> list[int]:
        """By how many iterations the weights of each episode with a step were older."""
        versions = [min(step.policy_version for step in episode.steps) for episode in episodes if episode.steps]
        begun = {version: number for number, version in self._versions.items()}
        if not set(versions) <= set(begun):
            raise ConfigError(
                f"{_NAME}: {name} was played with weights that are older than max_staleness, {self.settings.max_staleness}, "
                "or not of this run: set that as it was, or give another pool"
            )
        return [iteration - begun[version] for version in versions]

    def _measure(self, staleness: Counter[int], waited: float) -> None:
        known = max(staleness.total(), 1)
        shares = {f"staleness_{age}": staleness[age] / known for age in range(self.settings.max_staleness + 1)}
        self._figures = {
            "staleness": sum(age * count for age, count in staleness.items()) / known,
            "staleness_max": float(max(staleness, default=0)),
            **shares,
            "seconds_waited": waited,
            "groups_waiting": float(self._pool.waiting if self._pool is not None else 0),
        }

    # ---- a run ----

    def learned(self, iterations: int) -> None:
        if self._pool is not None and self.settings.replay is None:
            self._pool.learned(iterations)

    def figures(self) -> dict[str, float]:
        return dict(self._figures)

    def counts(self) -> Counter[str]:
        """What the sources counted, here and there, and producers that were replaced."""
        counts = self.source.counts()
        counts.update(self._counts)
        if self._fleet is not None:
            counts.update(self._fleet.counts())
        return counts

    def state_dict(self) -> dict[str, Any]:
        return {**self.source.state_dict(), "versions": dict(self._versions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._versions = dict(state.get("versions", {}))
        self.source.load_state_dict({name: value for name, value in state.items() if name != "versions"})

    def close(self) -> None:
        if self._fleet is not None:
            self._counts.update(self._fleet.counts())
            self._fleet.close()
            self._fleet = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._scratch is not None:
            with suppress(OSError):
                self._scratch.cleanup()
        self.source.close()


def _evenly(groups: Iterable[list[Episode]], world: int) -> list[list[list[Episode]]]:
    """Whole groups for each rank, about as many tokens each: the longest first, to whom has fewest."""
    parts: list[list[list[Episode]]] = [[] for _ in range(world)]
    held = [0] * world
    for group in sorted(groups, key=lambda group: (-_tokens(group), group[0].order)):
        rank = min(range(world), key=lambda rank: (held[rank], len(parts[rank])))
        parts[rank].append(group)
        held[rank] += _tokens(group)
    return parts


def _tokens(group: Iterable[Episode]) -> int:
    return sum(step.prompt_ids.size + step.action_ids.size for episode in group for step in episode.steps)
