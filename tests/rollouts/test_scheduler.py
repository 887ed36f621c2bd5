"""The scheduler: the clock decides nothing, an event loop of the caller's is no obstacle, and who leaves is gone at once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from steppo.engines import HFEngine, PlainEngine
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, ParsedAction, StateContext
from steppo.rollouts import EnvSource, Player, ScriptedPlayer, random_action
from steppo.types import Action, Completion, Episode, Request, RolloutConfig, Turn, groups_of
from tests.toy_env import CorridorEnv, FaultyEnv

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


class RestlessEnv(CorridorEnv):
    """Answers now at once and now later, each time another way."""

    def reset(self, task: Any) -> Any:
        self.rest()
        return super().reset(task)

    def step(self, action: Action) -> Any:
        self.rest()
        return super().step(action)

    def rest(self) -> None:
        drawn = random.SystemRandom().random()
        if drawn > 0.5:
            time.sleep(0.02 * drawn)


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


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_speed_of_environments_decides_nothing(num_workers: int, make_source: Callable[..., EnvSource]) -> None:
    """Neither what is played nor what is asked together, in float32."""
    engines = [BatchesEngine() for _ in range(3)]
    envs = [CorridorEnv(), RestlessEnv(), RestlessEnv()]
    first, *others = (
        told(play(make_source(env, engine=engine, num_workers=num_workers)))
        for env, engine in zip(envs, engines, strict=True)
    )
    assert len(first) == 24
    assert others == [first, first]
    assert engines[1].batches == engines[2].batches == engines[0].batches
    sizes = [len(batch) for batch in engines[0].batches]
    assert max(sizes) == 4
    assert len(set(sizes)) > 1
    numbers = [number for batch in engines[0].batches for number, _ in batch]
    assert numbers == sorted(numbers), "in the order of the slots"


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
    """All of a half at once; what they play is what it would be without."""
    source = make_source()
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
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(3):
        play(source)
    assert held() == before
