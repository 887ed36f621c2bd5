"""An iteration as a simulation of discrete events: who works, who waits for whom, for how long."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np


class Station:
    """Jobs that share something: a GPU, cores, a link, the pool. Each goes on by ``speed(jobs)`` units a second."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed = speed
        self.jobs: list[tuple[float, int, Process]] = []  # by what has been done for each when they end
        self.done = self.since = self.busy = 0.0
        self.plan = 0  # only the newest counts


class Gate:
    """A level that rises, and who waits for one."""

    def __init__(self, level: int = 0) -> None:
        self.level = level
        self.waiting: list[tuple[int, Process]] = []


Process = Generator[tuple[Station | Gate, float], None, None]


class Simulation:
    """Processes that ask a station for work, or wait at a gate."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Any, int]] = []
        self._count = itertools.count()

    def start(self, process: Process) -> None:
        heapq.heappush(self._events, (self.now, next(self._count), process, 0))

    def open(self, gate: Gate, level: int) -> None:
        gate.level = max(gate.level, level)
        for wanted, process in gate.waiting:
            if wanted <= gate.level:
                self.start(process)
        gate.waiting = [waiting for waiting in gate.waiting if waiting[0] > gate.level]

    def run(self) -> None:
        while self._events:
            self.now, _, what, plan = heapq.heappop(self._events)
            if not isinstance(what, Station):
                self._resume(what)
            elif plan == what.plan:
                self._advance(what)
                process = heapq.heappop(what.jobs)[2]
                self._plan(what)
                self._resume(process)

    def _resume(self, process: Process) -> None:
        for place, amount in process:
            if isinstance(place, Gate):
                if place.level < amount:
                    place.waiting.append((int(amount), process))
                    return
            elif amount > 0:
                self._advance(place)
                heapq.heappush(place.jobs, (place.done + amount, next(self._count), process))
                self._plan(place)
                return

    def _advance(self, station: Station) -> None:
        if station.jobs:
            station.busy += self.now - station.since
            station.done += (self.now - station.since) * station.speed(len(station.jobs))
        station.since = self.now

    def _plan(self, station: Station) -> None:
        station.plan += 1
        if station.jobs:
            left = max(0.0, station.jobs[0][0] - station.done) / station.speed(len(station.jobs))
            heapq.heappush(self._events, (self.now + left, next(self._count), station, station.plan))


@dataclass(frozen=True)
class Run:
    """A run and where its parts are. Seconds, unless it says otherwise.

    Attributes:
        groups: Of an iteration.
        group_size: Episodes of a group.
        steps: Of an episode: a mean, from half to one and a half of it.
        tokens: Sampled in a step.
        tick: Of an engine that holds so many requests: each has a token more after it.
        env_cpu: That an environment computes in a step.
        env_wait: That it waits in a step.
        actors: That play.
        apart: Within which they begin, one by one. Those that begin together would compute together, and wait together.
        slots: Of each: episodes at the same time.
        machines: On which actors are.
        cores: Of each machine.
        learn: The learner's in an iteration, at work.
        threads: Of the learner, on the first machine's cores; 0: it has processors of its own. Several wait for each other:
            on as many cores they and who plays there take turns.
        ahead: Iterations that actors may be ahead; 0: they and the learner take turns.
        put: Of an episode into the pool.
        get: Of an episode out of it, and to its rank.
        publish: That weights hold up the learner.
        fetch: That they hold up an actor.
        varied: Whether lengths vary.
    """

    groups: int
    group_size: int = 1
    steps: int = 1
    tokens: int = 0
    tick: Callable[[int], float] = lambda held: 1.0
    env_cpu: float = 0.0
    env_wait: float = 0.0
    actors: int = 1
    apart: float = 0.0
    slots: int = 1
    machines: int = 1
    cores: float = 2.0
    learn: float = 0.0
    threads: int = 0
    ahead: int = 0
    put: float = 0.0
    get: float = 0.0
    publish: float = 0.0
    fetch: float = 0.0
    varied: bool = False


def simulate(run: Run, iterations: int = 5, seed: int = 0) -> dict[str, float]:
    """Seconds of an iteration, medians without the first two, and of what they consist."""
    simulation, chance = Simulation(), np.random.default_rng(seed)
    alone = Station(lambda jobs: 1.0)
    at_once = 1.0 if run.threads > 1 else run.cores
    cores = [Station(lambda jobs: min(1.0, at_once / jobs)) for _ in range(run.machines)]
    engines = [Station(lambda jobs: 1.0 / run.tick(jobs)) for _ in range(run.actors)]
    pool = Station(lambda jobs: 1.0 / jobs)  # one file: a writer at a time
    version, played = Gate(), [Gate() for _ in range(iterations)]
    starts, waits, idle = [], [], [0.0] * run.actors
    steps = 0

    def slot(actor: int, queue: list[tuple[list[int], int]], iteration: int, over: Gate) -> Process:
        nonlocal steps
        while queue:
            group, length = queue.pop()
            for _ in range(length):
                steps += 1
                yield engines[actor], run.tokens
                yield cores[actor % run.machines], run.env_cpu
                yield alone, run.env_wait
            group[0] -= 1
            if group[0] == 0:
                yield pool, run.put * run.group_size
                simulation.open(played[iteration], played[iteration].level + 1)
        simulation.open(over, over.level + 1)

    def actor(number: int) -> Process:
        yield alone, run.apart * number / run.actors
        for iteration in range(iterations):
            before = simulation.now
            yield version, iteration - run.ahead
            idle[number] += simulation.now - before
            yield alone, run.fetch
            groups = [[run.group_size] for _ in range(number, run.groups, run.actors)]
            spread = (run.steps + 1) // 2 if run.varied else run.steps
            queue = [
                (group, int(chance.integers(spread, 2 * run.steps - spread + 1)))
                for group in groups
                for _ in range(run.group_size)
            ]
            over = Gate()
            for _ in range(run.slots):
                simulation.start(slot(number, queue, iteration, over))
            yield over, run.slots

    def learner() -> Process:
        for iteration in range(iterations):
            starts.append(simulation.now)
            yield played[iteration], run.groups
            waits.append(simulation.now - starts[-1])
            yield pool, run.get * run.groups * run.group_size
            yield (cores[0] if run.threads else alone), run.learn
            yield alone, run.publish
            simulation.open(version, iteration + 1)

    for number in range(run.actors):
        simulation.start(actor(number))
    simulation.start(learner())
    simulation.run()
    whole = simulation.now
    lasted = [end - start for start, end in zip(starts, [*starts[1:], whole], strict=True)]
    return {
        "seconds": statistics.median(lasted[2:] or lasted),
        "learner_waits": statistics.median(waits[2:] or waits),
        "actors_wait": statistics.mean(idle) / whole,
        "engines_busy": statistics.mean(engine.busy for engine in engines) / whole,
        "steps": steps / iterations,
    }
