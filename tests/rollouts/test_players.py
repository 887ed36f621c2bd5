"""Players: rules that choose by what is seen, and the policy, which sees its prompt alone."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from steppo.models import TinyPolicy
from steppo.rendering import StateContext
from steppo.rollouts import PolicyPlayer, ScriptedPlayer, expert_action, random_action
from steppo.types import Completion, Observation, Request, Sampling

PROMPT = np.asarray([5], dtype=np.int32)


def asked(seed: int = 0) -> Request:
    return Request(0, "", PROMPT, Sampling(), seed)


def test_a_rule_answers_in_the_policy_s_tokens(tiny_policy: TinyPolicy) -> None:
    context = StateContext()
    context.bind(tiny_policy.tokenizer, tiny_policy.stop_ids)
    player = ScriptedPlayer(lambda observation, request: {"cellar": "go west"}[observation.text], context.encode_action)
    answer = asyncio.run(player.act(asked(), Observation("cellar")))
    assert context.decode_action(answer.action_ids) == "go west"
    assert answer.action_ids[-1] in tiny_policy.stop_ids
    assert (answer.finish_reason, answer.error) == ("stop", "")
    assert answer.logprobs.shape == answer.action_ids.shape
    with pytest.raises(KeyError):
        asyncio.run(player.act(asked(), Observation("attic")))


def test_random_actions_follow_the_seed() -> None:
    seen = Observation("", admissible_commands=("a", "b", "c"))
    drawn = Counter(random_action(seen, asked(seed)) for seed in range(600))
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 150
    assert random_action(seen, asked(7)) == random_action(seen, asked(7))
    for hidden in (None, ()):
        with pytest.raises(ValueError, match="no admissible commands"):
            random_action(Observation("", admissible_commands=hidden), asked())


def test_the_expert_s_advice_is_taken() -> None:
    assert expert_action(Observation("", expert_action="left"), asked()) == "left"
    with pytest.raises(ValueError, match="no expert"):
        expert_action(Observation(""), asked())


def test_the_policy_is_asked_by_its_prompt() -> None:
    class Heard:
        def __init__(self) -> None:
            self.requests: list[Request] = []

        async def generate(self, request: Request) -> Completion:
            self.requests.append(request)
            return Completion(request.id, PROMPT, np.zeros(1, np.float32), "stop")

    engine, request = Heard(), asked()
    assert asyncio.run(PolicyPlayer(engine).act(request, Observation("secret"))).action_ids is PROMPT
    assert engine.requests == [request]
