"""Players: rules that choose by what is seen, and the policy, which sees its prompt alone."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from steppo.models import TinyPolicy
from steppo.rendering import HermesParser, Renderer
from steppo.rollouts import PolicyPlayer, ScriptedPlayer, expert_action, random_action
from steppo.types import Action, Completion, Request, Sampling, ToolCall, Turn

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
