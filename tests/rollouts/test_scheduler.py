"""The scheduler: the clock decides nothing, an event loop of the caller's is no obstacle, and who leaves is gone at once."""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, ParsedAction, StateContext
from steppo.rollouts import EnvSource, Player, ScriptedPlayer, random_action
from steppo.rollouts.place import Place
from steppo.rollouts.scheduler import first_ticks
from steppo.types import Action, Completion, Episode, Request, RolloutConfig, Task, Turn, groups_of
from tests.toy_env import CorridorEnv, FaultyEnv, PatientEnv, RestlessEnv, wait_for

TASKS = CorridorEnv().tasks("train")
GROUPS = groups_of(TASKS, 3)
PLAN = RolloutConfig("train/0", seed=3, version=7)


class AnyTextParser(ActionParser):
    """Reads a command into any text, and refuses about one in five."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        number, commands = sum(text.encode()), turn.commands
        assert commands
        return ParsedAction(None, "Not now.") if number % 5 == 0 else ParsedAction(Action(commands[number % len(commands)]))


class BatchesEngine(PlainEngine):
    """Keeps who was asked together with whom, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[tuple[int, str]]] = []

    def poll(self) -> list[Completion]:
        self.batches.append([(request.id, request.session_id) for request in self._queue])
        return super().poll()


class TokensEngine(HFEngine):
    """Keeps whose tokens were made together. There is no room for all sessions, nor for all requests."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=6, cache_tokens=1000)
        self.batches: list[list[tuple[int, str]]] = []

    def poll(self) -> list[Completion]:
        completions = super().poll()
        done = [(completion.request_id, "done") for completion in completions]
        self.batches.append(done + [(flight.request.id, flight.request.session_id) for flight in self._flights()])
        return completions


class OneByOneEngine(PlainEngine):
    """Answers one request a tick, the last first."""

    def poll(self) -> list[Completion]:
        return self._generate([self._queue.pop()])


@pytest.fixture
def make_source(tiny_policy: TinyPolicy) -> Iterator[Callable[..., EnvSource]]:
    """In float32, where another batch would round another way."""
    with torch.no_grad():
        tiny_policy.model.get_input_embeddings().weight.mul_(8)
    made: list[EnvSource] = []

    def make(env: CorridorEnv | None = None, **settings: Any) -> EnvSource:
        settings = {"engine": HFEngine(), "parser": AnyTextParser(), "num_slots": 8, "max_new_tokens": 3} | settings
        made.append(EnvSource(env or CorridorEnv(), StateContext(), max_prompt_tokens=512, **settings))
        made[-1].bind(tiny_policy)
        return made[-1]

    yield make
    for source in made:
        source.close()


def play(source: EnvSource, player: Player | None = None) -> list[Episode]:
    return [episode for group in source.collect(GROUPS, PLAN, player) for episode in group]


def told(episodes: list[Episode]) -> list[Any]:
    """All that they say, bit for bit, in the order in which they came."""
    return [
        (
            vars(episode) | {"steps": None, "final_prompt_ids": str(episode.final_prompt_ids)},
            [
                {name: part.tolist() if isinstance(part, np.ndarray) else part for name, part in vars(step).items()}
                for step in episode.steps
            ],
        )
        for episode in episodes
    ]


@pytest.mark.parametrize(
    ("kind", "num_workers", "env_ticks"),
    [
        *((BatchesEngine, *sizes) for sizes in ((1, 1), (2, 0), (2, 5))),
        *((TokensEngine, *sizes) for sizes in ((1, 1), (2, 0), (2, 5), (2, 50))),
    ],
)
def test_the_speed_of_environments_decides_nothing(
    kind: type[BatchesEngine | TokensEngine], num_workers: int, env_ticks: int, make_source: Callable[..., EnvSource]
) -> None:
    """Neither what is played nor what is asked together, in float32."""
    engines = [kind() for _ in range(3)]
    envs = [CorridorEnv(), RestlessEnv(), RestlessEnv()]
    first, *others = (
        told(play(make_source(env, engine=engine, num_workers=num_workers, env_ticks=env_ticks)))
        for env, engine in zip(envs, engines, strict=True)
    )
    assert len(first) == 24
    assert others == [first, first]
    assert engines[1].batches == engines[2].batches == engines[0].batches
    sizes = [len(batch) for batch in engines[0].batches]
    assert sizes[0] == min(6 if kind is TokensEngine else 8, first_ticks(8, env_ticks).count(0))
    assert len(set(sizes)) > 1
    if kind is BatchesEngine:
        numbers = [number for batch in engines[0].batches for number, _ in batch]
        assert numbers == sorted(numbers), "in the order of the slots"


@pytest.mark.parametrize("kind", [TokensEngine, OneByOneEngine])
def test_ticks_decide_nothing_where_numbers_are_exact(
    kind: type[Engine], tiny_policy: TinyPolicy, make_source: Callable[..., EnvSource]
) -> None:
    tiny_policy.double()
    expected = in_order(play(make_source(engine=kind())))
    for env_ticks, num_slots, num_workers in ((0, 8, 1), (1, 3, 2), (5, 24, 2), (50, 8, 2)):
        settings = {"env_ticks": env_ticks, "num_slots": num_slots, "num_workers": num_workers}
        assert in_order(play(make_source(engine=kind(), **settings))) == expected
    assert len({len(steps) for _, steps in expected}) > 3


def in_order(episodes: list[Episode]) -> list[Any]:
    """What the last bits of log-probabilities do not decide."""
    for episode in episodes:
        for step in episode.steps:
            step.behaviour_logprobs.fill(0)
    return told(sorted(episodes, key=lambda episode: episode.order))


class CountingEngine(Engine):
    """Takes as many ticks for a request as its seed says, and keeps who was in flight in each."""

    logprob_tolerance = float("inf")

    def __init__(self) -> None:
        self.flying: dict[int, tuple[Request, int]] = {}
        self.ticks: list[set[str]] = []

    @staticmethod
    def length(seed: int) -> int:
        return 1 + seed % 4

    def submit(self, request: Request) -> None:
        self.flying[request.id] = request, self.length(request.seed)

    def poll(self) -> list[Completion]:
        self.ticks.append({request.session_id for request, _ in self.flying.values()})
        left = {id: (request, ticks - 1) for id, (request, ticks) in self.flying.items()}
        self.flying = {id: one for id, one in left.items() if one[1]}
        return [answer(id, "left") for id, (_, ticks) in left.items() if not ticks]


def answer(id: int, text: str) -> Completion:
    ids = np.array([*text.encode()], np.int32)
    return Completion(id, ids, np.zeros(len(ids), np.float32), "stop")


class Walks(ActionParser):
    def parse(self, text: str, turn: Turn) -> ParsedAction:
        return ParsedAction(Action("take" if turn.commands and "take" in turn.commands else ""))


def expected_ticks(episodes: list[Place], slots: int, env_ticks: int, steps: int) -> list[set[str]]:
    """Who decodes together, by following each slot by itself. Only ticks with anyone in them are seen."""
    wanted, ticks = deque(episodes), dict[int, set[str]]()
    free = [(first, slot) for slot, first in enumerate(first_ticks(slots, env_ticks))]  # heap of (tick, slot)
    heapq.heapify(free)
    while wanted:
        now, slot = heapq.heappop(free)
        place = wanted.popleft()
        for step in range(steps):
            now += 1 + env_ticks  # asked at the tick, joins so many later
            length = CountingEngine.length(place.seed(step))
            for tick in range(now, now + length):
                ticks.setdefault(tick, set()).add(place.id)
            now += length - 1
        heapq.heappush(free, (now + 1 + env_ticks, slot))
    return [ticks[tick] for tick in sorted(ticks)]


@pytest.mark.parametrize("num_slots", [1, 5, 8])
@pytest.mark.parametrize("env_ticks", [0, 1, 3, 10])
def test_who_joins_when(env_ticks: int, num_slots: int, make_source: Callable[..., EnvSource]) -> None:
    """All episodes have three steps. A slot's next one begins at the tick at which its last environment's answer is read."""
    engine = CountingEngine()
    source = make_source(
        CorridorEnv(max_steps=3), engine=engine, parser=Walks(), num_slots=num_slots, env_ticks=env_ticks, num_workers=2
    )
    groups = groups_of([Task("far", {"start": 0, "goal": 3})] * 4, 3)
    played = [episode for group in source.collect(groups, PLAN) for episode in group]
    assert [len(episode.steps) for episode in played] == [3] * 12
    places = [Place(PLAN, group, sample) for group in groups for sample in range(3)]
    assert engine.ticks == expected_ticks(places, num_slots, env_ticks, 3)


class Joins(CountingEngine):
    """Keeps how many were at work, and how many joined them, at each tick at which any did."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.join_share = share
        self.at_work = 0
        self.joins: list[tuple[int, int]] = []

    def poll(self) -> list[Completion]:
        if len(self.flying) > self.at_work:
            self.joins.append((self.at_work, len(self.flying) - self.at_work))
        done = super().poll()
        self.at_work = len(self.flying)
        return done


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_an_engine_may_wait_for_many(share: float, make_source: Callable[..., EnvSource]) -> None:
    """While some are at work, fewer never join them, as long as no episode ends; and all are played."""
    engine = Joins(share)
    source = make_source(CorridorEnv(max_steps=9), engine=engine, parser=Walks(), env_ticks=0, num_workers=2)
    groups = groups_of([Task("far", {"start": 0, "goal": 3})] * 2, 4)
    assert [len(e.steps) for group in source.collect(groups, PLAN) for e in group] == [9] * 8
    totals = itertools.accumulate(joined for _, joined in engine.joins)
    early = [join for join, total in zip(engine.joins, totals, strict=True) if total <= 8 * 5]
    assert sum(joined for _, joined in engine.joins) == 72
    shares = [joined / 8 for at_work, joined in early if at_work]
    assert share <= min(shares) < 1.5 * share


@pytest.mark.timeout(60)
@pytest.mark.parametrize("env_ticks", [1, 7])
@pytest.mark.parametrize("kind", [HFEngine, PlainEngine])
def test_the_engine_goes_on_while_environments_work(
    kind: type[Engine],
    env_ticks: int,
    tmp_path: Path,
    make_source: Callable[..., EnvSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tick after the first answer waits for an environment that waits for it."""
    answered: list[Completion] = []
    poll = kind.poll

    def meeting(engine: Any) -> list[Completion]:
        if answered:
            wait_for(tmp_path / "environment")
            (tmp_path / "engine").touch()
        answered.extend(completions := poll(engine))
        return completions

    monkeypatch.setattr(kind, "poll", meeting)
    source = make_source(PatientEnv(str(tmp_path)), engine=kind(), parser=Walks(), env_ticks=env_ticks, num_workers=2)
    assert len(list(source.collect(groups_of(TASKS), PLAN))) == 8


def test_the_caller_may_have_an_event_loop(make_source: Callable[..., EnvSource]) -> None:
    """As a notebook has. It may also leave early there, and play again."""
    expected = told(play(make_source()))
    here = make_source()

    async def cell() -> tuple[list[Any], list[Any]]:
        early = here.collect(GROUPS, PLAN)
        next(early)
        early.close()  # type: ignore[attr-defined]
        whole = told(play(here))
        assert asyncio.get_running_loop().is_running()
        await asyncio.sleep(0)  # the loop is as it was
        return whole, told(play(here))

    assert asyncio.run(cell()) == (expected, expected)
    assert told(play(here)) == expected


class Ponders(ScriptedPlayer):
    """Takes its time, by the clock of the event loop."""

    most = 0
    pondering = 0

    async def act(self, request: Request, turn: Turn) -> Completion:
        self.pondering += 1
        self.most = max(self.most, self.pondering)
        await asyncio.sleep(random.SystemRandom().random() * 0.01)
        self.pondering -= 1
        return await super().act(request, turn)


def test_players_may_wait_for_something_else_than_the_engine(make_source: Callable[..., EnvSource]) -> None:
    """All that are due at once; what they play is what it would be without."""
    source = make_source(env_ticks=1)
    quick, slow = (kind(random_action, source.write) for kind in (ScriptedPlayer, Ponders))
    assert told(play(source, slow)) == told(play(source, quick))
    assert isinstance(slow, Ponders)
    assert slow.most == 4


class Never(Player):
    async def act(self, request: Request, turn: Turn) -> Completion:
        await asyncio.sleep(3600)
        raise AssertionError


class NeverEngine(HFEngine):
    def poll(self) -> list[Completion]:
        while True:
            time.sleep(0.01)


class NeverParser(ActionParser):
    def parse(self, text: str, turn: Turn) -> ParsedAction:
        while True:
            time.sleep(0.01)


STUCK: dict[str, Callable[[], dict[str, Any]]] = {
    "environment": lambda: {"env": FaultyEnv(hang_tasks=[task.id for task in TASKS]), "env_timeout": 600.0},
    "engine": lambda: {"engine": NeverEngine()},
    "parser": lambda: {"parser": NeverParser()},
    "player": lambda: {},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("notebook", [False, True], ids=["", "notebook"])
@pytest.mark.parametrize("name", STUCK)
def test_an_interrupt_ends_it_whatever_is_waited_for(
    name: str, notebook: bool, make_source: Callable[..., EnvSource]
) -> None:
    """What was under way is over, and the source plays again."""
    if (name, notebook) == ("parser", True):
        pytest.skip("blocking code in a thread beside the notebook's own ends when it ends")
    source = make_source(**STUCK[name]())
    player = Never() if name == "player" else None

    async def cell() -> list[Episode]:
        return play(source, player)

    def interrupt() -> None:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt), closing(asyncio.new_event_loop()) as loop:
            loop.run_until_complete(cell()) if notebook else play(source, player)
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert [thread for thread in threading.enumerate() if thread.name == "engine"] == []
    if name == "player":
        assert len(play(source, ScriptedPlayer(lambda *asked: "dance", source.write))) == 24


def test_every_round_ends_its_thread_and_its_files(make_source: Callable[..., EnvSource]) -> None:
    source = make_source()
    play(source)

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(3):
        play(source)
    assert held() == before
