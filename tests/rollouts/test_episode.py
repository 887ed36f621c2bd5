"""An episode by itself: no process, no scheduler, no model; whoever answers what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from steppo.envs.checks import EnvReply, checked_turn, opening_turn
from steppo.errors import ConfigError
from steppo.models import TinyPolicy
from steppo.rendering import CommandParser, Renderer, StateContext
from steppo.rollouts import ScriptedPlayer, request_seed
from steppo.rollouts.episode import play_episode
from steppo.rollouts.place import Place
from steppo.rollouts.players import Player
from steppo.rollouts.rules import Rules
from steppo.types import (
    Action,
    Completion,
    Episode,
    Group,
    Request,
    RolloutConfig,
    Sampling,
    Step,
    StopReason,
    Task,
    Turn,
)
from tests.toy_env import CorridorEnv

TASK = CorridorEnv().tasks("train")[3]
PLACE = Place(RolloutConfig("train/0", 3, 0.7, version=2), Group(5, TASK, 2, first=10), 1)


class Here:
    """An environment in this process, that answers at once."""

    def __init__(self, env: CorridorEnv) -> None:
        self.env = env

    async def reset(self, task: Task, want_expert: bool) -> EnvReply:
        return EnvReply(opening_turn(self.env.reset(task)))

    async def step(self, action: Action) -> EnvReply:
        return EnvReply(checked_turn(self.env.step(action)))


@pytest.fixture
def play(tiny_policy: TinyPolicy) -> Callable[..., Episode]:
    context = StateContext()
    renderer = Renderer()
    renderer.bind(tiny_policy.tokenizer, tiny_policy.stop_ids)
    context.bind(renderer)
    parser = CommandParser()

    def play(choose: Any, env: Any = None, player: Player | None = None, on_step: Any = None) -> Episode:
        rules = Rules(context, parser, Sampling(0.7, 4), None, 8, 512, 0.25, "continue", None)
        player = player or ScriptedPlayer(choose, lambda *chosen: renderer.encode_action(parser.answer(*chosen)))
        return asyncio.run(play_episode(rules, PLACE, env or Here(CorridorEnv()), player, on_step))

    return play


def expert(turn: Turn, request: Request) -> str:
    room = int(turn.text.split()[-1].rstrip("."))
    goal = TASK.data["goal"]
    return "take" if room == goal else "right" if room < goal else "left"


def test_an_episode_needs_nothing_but_answers(play: Callable[..., Episode]) -> None:
    requests: list[Request] = []
    watched: list[tuple[Step | None, Turn]] = []
    choose = lambda turn, request: (requests.append(request), expert(turn, request))[1]  # noqa: E731
    episode = play(choose, on_step=lambda step, turn: watched.append((step, turn)))
    assert (episode.id, episode.order, episode.group_id) == (f"train/0/5/{TASK.id}/1", 11, 5)
    assert (episode.stop_reason, episode.success, episode.episode_return) == (StopReason.TERMINATED, True, 1.0)
    assert [request.session_id for request in requests] == [episode.id] * len(episode.steps)
    assert [request.seed for request in requests] == [
        request_seed(PLACE.config, PLACE.group, 1, index) for index in range(len(requests))
    ]
    for request, step in zip(requests, episode.steps, strict=True):
        np.testing.assert_array_equal(request.prompt_ids, step.prompt_ids)
        assert (step.temperature, step.policy_version, request.sampling) == (0.7, 2, Sampling(0.7, 4))
    assert [step for step, _ in watched] == [None, *episode.steps]
    assert [turn.text for _, turn in watched][:-1] == [step.observation for step in episode.steps]


class Breaks(Here):
    def __init__(self, at: int, reply: EnvReply) -> None:
        super().__init__(CorridorEnv())
        self.at, self.reply, self.calls = at, reply, 0

    async def reset(self, task: Task, want_expert: bool) -> EnvReply:
        return self.reply if self.at == 0 else await super().reset(task, want_expert)

    async def step(self, action: Action) -> EnvReply:
        self.calls += 1
        return self.reply if self.calls == self.at else await super().step(action)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_environment_that_breaks_ends_it_where_it_is(at: int, play: Callable[..., Episode]) -> None:
    episode = play(lambda turn, request: "take", Breaks(at, EnvReply(error="it broke")))
    assert (episode.stop_reason, episode.error, len(episode.steps)) == (StopReason.ENV_ERROR, "it broke", max(at - 1, 0))
    assert [step.truncated for step in episode.steps] == [False] * (at - 2) + [True] * (at > 1)


class Says(Player):
    """Whatever it is given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def act(self, request: Request, turn: Turn) -> Completion:
        await asyncio.sleep(0)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


NOTHING = np.zeros(0, np.int32)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (ValueError("no idea"), "ValueError: no idea"),
        (TimeoutError("late"), "TimeoutError: late"),
        (StopIteration(), "RuntimeError: coroutine raised StopIteration"),
        (Completion(0, NOTHING, NOTHING, "stop"), "the engine gave an action without a token"),
        (Completion(0, NOTHING, NOTHING, "stop", "out of memory"), "out of memory"),
    ],
)
def test_a_player_without_an_answer_costs_its_episode(answer: Any, error: str, play: Callable[..., Episode]) -> None:
    episode = play(None, player=Says(answer))
    assert (episode.stop_reason, episode.steps) == (StopReason.ENGINE_ERROR, ())
    assert error in episode.error


@pytest.mark.parametrize("answer", [ConfigError("a mistake"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
def test_mistakes_and_interrupts_go_further(answer: BaseException, play: Callable[..., Episode]) -> None:
    with pytest.raises(type(answer)):
        play(None, player=Says(answer))
