"""Players: rules that choose by what is seen, and the policy, which sees its prompt alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steppo.models import TinyPolicy
from steppo.rendering import HermesParser, Renderer
from steppo.rollouts import PolicyPlayer, ScriptedPlayer, expert_action, random_action
from steppo.types import Action, Completion, Request, Sampling, ToolCall, Turn
from tests.cli_helpers import run

PROMPT = np.asarray([5], dtype=np.int32)


def asked(seed: int = 0) -> Request:
    return Request(0, "", PROMPT, Sampling(), seed)


def test_a_rule_answers_in_the_policy_s_tokens(tiny_policy: TinyPolicy) -> None:
    renderer = Renderer()
    renderer.bind(tiny_policy.tokenizer, tiny_policy.stop_ids)
    parser = HermesParser()
    call = Action(tool_calls=(ToolCall("walk", {"to": "the west"}, "call_0"),))
    rule = {"cellar": "go west", "kitchen": Action("go east"), "hall": call}
    player = ScriptedPlayer(
        lambda turn, request: rule[turn.text], lambda *chosen: renderer.encode_action(parser.answer(*chosen))
    )
    said = {"cellar": "go west", "kitchen": "go east", "hall": parser.answer(call, Turn())}
    for room, text in said.items():
        answer = asyncio.run(player.act(asked(), Turn(room)))
        assert renderer.decode_action(answer.action_ids) == text
        assert answer.action_ids[-1] in tiny_policy.stop_ids
        assert (answer.finish_reason, answer.error) == ("stop", "")
        assert answer.logprobs.shape == answer.action_ids.shape
    with pytest.raises(KeyError):
        asyncio.run(player.act(asked(), Turn("attic")))


def test_random_actions_follow_the_seed() -> None:
    seen = Turn("", commands=("a", "b", "c"))
    drawn = Counter(random_action(seen, asked(seed)) for seed in range(600))
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 150
    assert random_action(seen, asked(7)) == random_action(seen, asked(7))
    some = Turn("", commands=("search[...]", "a", "think: ...", "..."))
    assert {random_action(some, asked(seed)) for seed in range(50)} == {"a"}, "it has no words of its own"
    for hidden in (None, (), ("search[...]", "...")):
        with pytest.raises(ValueError, match="no commands"):
            random_action(Turn("", commands=hidden), asked())


def test_the_expert_s_advice_is_taken() -> None:
    advice = Action("left")
    assert expert_action(Turn("", expert_action=advice), asked()) is advice
    with pytest.raises(ValueError, match="no expert"):
        expert_action(Turn(""), asked())


def test_the_policy_is_asked_by_its_prompt() -> None:
    class Heard:
        def __init__(self) -> None:
            self.requests: list[Request] = []

        async def generate(self, request: Request) -> Completion:
            self.requests.append(request)
            return Completion(request.id, PROMPT, np.zeros(1, np.float32), "stop")

    engine, request = Heard(), asked()
    assert asyncio.run(PolicyPlayer(engine).act(request, Turn("secret"))).action_ids is PROMPT
    assert engine.requests == [request]


@pytest.mark.parametrize(
    ("draws", "good", "temperature", "error", "asked_for"),
    [
        (9, 3, 1.0, "", 3),
        (3, 3, 1.0, "", 3),
        (2, 3, 1.0, "", 2),
        (1, 3, 1.0, "", 1),
        (9, 3, 0.0, "", 1),
        (9, 3, 1.0, "!", 1),
    ],
)
def test_the_policy_is_asked_again(draws: int, good: int, temperature: float, error: str, asked_for: int) -> None:
    """While its answer is refused; each time with a seed of its own, and not where that changes nothing."""
    heard: list[Request] = []

    class Counts:
        async def generate(self, request: Request) -> Completion:
            heard.append(request)
            return Completion(request.id, PROMPT * len(heard), np.zeros(1, np.float32), "stop", error)

    request = Request(0, "", PROMPT, Sampling(temperature), 7)
    player = PolicyPlayer(Counts(), draws, lambda completion, turn: completion.action_ids[0] < good * PROMPT[0])
    assert asyncio.run(player.act(request, Turn("a room"))).action_ids == PROMPT * asked_for
    assert len({one.seed for one in heard}) == len(heard) == asked_for
    assert heard[0] is request


def test_asked_again_it_says_at_last_what_can_be_done(tmp_path: Path) -> None:
    """A policy that was hardly taught, with its plain probabilities."""
    more = ["--warm_start.updates=25", "--trainer.max_epochs=1", "--evaluation.before_training=false"]
    invalid = []
    for draws in (1, 60):
        cli = run(tmp_path / str(draws), *more, f"--data.source.draws={draws}")
        steps = cli.datamodule.buffer.experience.steps.records
        invalid.append(sum(not step.action_valid for step in steps) / len(steps))
        assert cli.datamodule.buffer.logprob_mismatch() < 1e-4
        assert cli.datamodule.source.protocol()["draws"] == draws
    assert invalid[0] > 0.1 > invalid[1]
