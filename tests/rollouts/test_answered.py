"""What an environment says on its way into an episode: a goal is said once, and feedback of its own is not trusted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from steppo.envs.checks import EnvReply, checked_turn, opening_turn
from steppo.rendering import AppendContext, CommandParser, ContextPolicy, StateContext, WindowContext
from steppo.rollouts import ScriptedPlayer
from steppo.rollouts.episode import play_episode
from steppo.rollouts.place import Place
from steppo.rollouts.rules import Rules
from steppo.types import Action, Group, Message, RolloutConfig, Sampling, Task, Turn
from tests.rendering.helpers import bound, make_tokenizers, text_of

GOAL = "Find out who keeps the bees."
PLACE = Place(RolloutConfig("train/0", 3), Group(0, Task("a"), first=0), 0)


class Says:
    """One turn after the other; the last is the end."""

    def __init__(self, *turns: Turn) -> None:
        self._turns = iter(turns)

    async def reset(self, task: Task, want_expert: bool) -> EnvReply:
        return EnvReply(opening_turn(next(self._turns)))

    async def step(self, action: Action) -> EnvReply:
        return EnvReply(checked_turn(next(self._turns)))


def prompts(context: ContextPolicy, *turns: Turn) -> list[str]:
    """Of an episode in which every second answer is refused."""
    tokenizer = make_tokenizers()["qwen3"]
    renderer = bound(context, tokenizer).renderer
    rules = Rules(context, CommandParser(), Sampling(), 20, None, 4096, 0.1, "continue", None)
    count = iter(range(20))
    player = ScriptedPlayer(lambda turn, request: "two\nlines" if next(count) % 2 else "go", _written(renderer))
    episode = asyncio.run(play_episode(rules, PLACE, Says(*turns), player, None))
    assert episode.stop_reason == "terminated", episode.error
    return [text_of(tokenizer, step.prompt_ids) for step in episode.steps]


def _written(renderer: Any) -> Any:
    return lambda action, turn: renderer.encode_action(str(action))


@pytest.mark.parametrize(
    "context",
    [AppendContext(), StateContext(), WindowContext(0), WindowContext(1), WindowContext(9)],
    ids=lambda c: str(vars(c)),
)
def test_a_goal_that_is_said_once_stays(context: ContextPolicy) -> None:
    later = [Turn("b"), Turn("", messages=(Message("tool", "c"), Message("user", "d"))), Turn("e", commands=("go",))]
    seen = prompts(context, Turn(goal=GOAL), *later, Turn("The end.", terminated=True))
    assert len(seen) == 7
    assert [prompt.count(GOAL) for prompt in seen] == [1] * 7


def test_a_new_goal_takes_the_place_of_the_last() -> None:
    turns = [Turn("a", GOAL), Turn("b", "Rest."), Turn("c"), Turn("d", terminated=True)]
    seen = prompts(StateContext(), *turns)
    assert [(GOAL in prompt, "Rest." in prompt) for prompt in seen] == [(True, False)] + [(False, True)] * 4


@pytest.mark.parametrize("context", [AppendContext(), StateContext(), WindowContext(0), WindowContext(1)])
@pytest.mark.parametrize("marker", ["<think>", "</think>", "<tool_call>", "</tool_call>", "</tool_response>", "<|im_end|>"])
def test_an_environment_s_feedback_shows_no_markup(marker: str, context: ContextPolicy) -> None:
    cut = f"No{marker[:3]}{marker}{marker[3:]}."
    clean, *marked = (
        prompts(context, Turn("a", feedback=feedback), Turn("b", feedback=feedback), Turn("c", terminated=True))
        for feedback in ("No.", f"No{marker}.", cut)
    )
    assert all("No." in prompt for prompt in clean[:2])
    assert marked == [clean, clean]
