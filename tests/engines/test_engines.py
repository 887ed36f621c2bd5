"""Engines: what is sampled, with which log-probabilities, whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from steppo.batch import Segment
from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.models import TinyPolicy
from steppo.packing import PaddedPacker
from steppo.rendering import AppendContext, ContextPolicy, Renderer, StateContext
from steppo.types import Action, Completion, Request, Sampling, Step, Turn
from tests.toy_env import CorridorEnv


@pytest.fixture
def sharp_policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    """Far from uniform: fresh weights would hide many mistakes."""
    with torch.no_grad():
        tiny_policy.model.get_input_embeddings().weight.mul_(8)
    return tiny_policy


EngineMaker = Callable[..., Engine]


@pytest.fixture(params=[HFEngine, PlainEngine])
def engine_for(request: pytest.FixtureRequest) -> EngineMaker:
    def make(policy: TinyPolicy, max_batch_size: int = 64) -> Engine:
        engine = request.param(max_batch_size)
        engine.bind(policy)
        return engine

    return make


def run(engine: Engine, requests: Sequence[Request]) -> dict[int, Completion]:
    """All completions by request id."""
    for request in requests:
        engine.submit(request)
    answers: dict[int, Completion] = {}
    silent = 0
    while len(answers) < len(requests):
        new = engine.poll()
        silent = 0 if new else silent + 1
        assert silent <= sum(request.sampling.max_new_tokens for request in requests)
        assert not answers.keys() & {completion.request_id for completion in new}
        answers |= {completion.request_id: completion for completion in new}
    assert engine.poll() == []
    return answers


def make_requests(count: int, temperature: float = 1.0, max_new_tokens: int = 8, seed: int = 100) -> list[Request]:
    """Prompts of 1, 4, 7, ... random tokens."""
    rng = np.random.default_rng(0)
    sampling = Sampling(temperature, max_new_tokens)
    return [
        Request(number, str(number), rng.integers(2, 258, 1 + 3 * number).astype(np.int32), sampling, seed + number)
        for number in range(count)
    ]


def assert_same(left: Completion, right: Completion, atol: float = 0.0) -> None:
    np.testing.assert_array_equal(left.action_ids, right.action_ids)
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=atol, rtol=0)
    assert left.finish_reason == right.finish_reason


def next_logits(policy: TinyPolicy, ids: np.ndarray) -> torch.Tensor:
    """Logits behind the last token, by a plain forward pass of transformers."""
    with torch.no_grad():
        return policy.model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0, -1].double()


# --- HFEngine, and PlainEngine ---


def test_the_batch_does_not_matter(engine_for: EngineMaker, sharp_policy: TinyPolicy) -> None:
    sharp_policy.double()
    requests = [
        Request(request.id, request.session_id, request.prompt_ids, Sampling(temperature, limit), request.seed)
        for request, temperature, limit in zip(
            make_requests(6), (1.0, 0.6, 0.0, 1.0, 2.0, 0.6), (12, 3, 7, 1, 12, 9), strict=True
        )
    ]
    together = run(engine_for(sharp_policy), requests)
    backwards = run(engine_for(sharp_policy), requests[::-1])
    assert len({tuple(completion.action_ids) for completion in together.values()}) == 6
    for request in requests:
        alone = run(engine_for(sharp_policy), [request])[request.id]
        assert_same(together[request.id], alone, atol=1e-6)
        assert_same(backwards[request.id], alone, atol=1e-6)


def test_the_seed_does_matter(engine_for: EngineMaker, sharp_policy: TinyPolicy) -> None:
    first, again, other = (run(engine_for(sharp_policy), make_requests(4, seed=seed))[3] for seed in (100, 100, 2**64 - 4))
    assert_same(first, again)
    assert first.action_ids.tolist() != other.action_ids.tolist()


@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_small_batches_give_the_same(engine_for: EngineMaker, sharp_policy: TinyPolicy, max_batch_size: int) -> None:
    sharp_policy.double()
    whole = run(engine_for(sharp_policy), make_requests(7))
    engine = engine_for(sharp_policy, max_batch_size)
    parts = run(engine, make_requests(7))
    for number in range(7):
        assert_same(parts[number], whole[number], atol=1e-6)
    one = make_requests(7, max_new_tokens=1)
    for request in one:
        engine.submit(request)
    assert len(engine.poll()) == max_batch_size


def test_completions_are_arrays_of_the_recorded_kind(engine_for: EngineMaker, sharp_policy: TinyPolicy) -> None:
    for completion in run(engine_for(sharp_policy), make_requests(3)).values():
        assert completion.action_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.action_ids.shape == completion.logprobs.shape
        assert completion.error == ""


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("context", [AppendContext(), StateContext(max_past_actions=2)], ids=["append", "state"])
def test_the_learner_sees_the_same_logprobs(
    engine_for: EngineMaker, sharp_policy: TinyPolicy, context: ContextPolicy, temperature: float
) -> None:
    engine = engine_for(sharp_policy)
    steps = play_corridors(context, sharp_policy, engine, temperature)
    [(order, batch)] = PaddedPacker().pack([Segment(step.prompt_ids, step.action_ids) for step in steps], 10**6)
    temperature_A = torch.full((len(batch.target_A),), temperature)
    with torch.no_grad():
        recomputed, _ = sharp_policy.action_logprobs(sharp_policy.hidden(batch), batch, temperature_A)
    recorded = np.concatenate([steps[row].behaviour_logprobs for row in order])
    assert len(recorded) > 3 * len(steps)
    assert recorded.min() < -1.0, "some token should be a surprise"
    np.testing.assert_allclose(recorded, recomputed.numpy(), atol=1e-4, rtol=0)
    assert engine.logprob_tolerance == 1e-4


def play_corridors(context: ContextPolicy, policy: TinyPolicy, engine: Engine, temperature: float) -> list[Step]:
    """Four steps in each of four corridors at once; the policy's text is played as it is."""
    renderer = Renderer()
    renderer.bind(policy.tokenizer, policy.stop_ids)
    context.bind(renderer)
    envs = [CorridorEnv() for _ in range(4)]
    tasks = envs[0].tasks("train")
    seen: list[list[Turn]] = [[env.reset(task)] for env, task in zip(envs, tasks, strict=False)]
    steps: list[list[Step]] = [[] for _ in envs]
    sampling = Sampling(temperature, max_new_tokens=6)
    for index in range(4):
        prompts = [context.prompt_ids(turns, past) for turns, past in zip(seen, steps, strict=True)]
        answers = run(engine, [Request(row, str(row), ids, sampling, 10 * index + row) for row, ids in enumerate(prompts)])
        for row, env in enumerate(envs):
            answer, text = answers[row], renderer.decode_action(answers[row].action_ids)
            turn = env.step(Action(text))
            steps[row].append(
                Step(
                    prompt_ids=prompts[row],
                    action_ids=answer.action_ids,
                    behaviour_logprobs=answer.logprobs,
                    reward=turn.reward,
                    index=index,
                    finish_reason=answer.finish_reason,
                    terminated=False,
                    truncated=False,
                    action_valid=True,
                    observation=seen[row][-1].text,
                    action=text,
                    temperature=temperature,
                    policy_version=0,
                )
            )
            seen[row].append(turn)
    return [step for past in steps for step in past]


def test_greedy_takes_the_most_likely(engine_for: EngineMaker, sharp_policy: TinyPolicy) -> None:
    requests = make_requests(3, temperature=0.0, max_new_tokens=5)
    for number, completion in run(engine_for(sharp_policy), requests).items():
        ids = requests[number].prompt_ids
        for token, logprob in zip(completion.action_ids, completion.logprobs, strict=True):
            logprobs = next_logits(sharp_policy, ids).log_softmax(-1)
            assert token == int(logprobs.argmax())
            assert logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
            ids = np.append(ids, token)


@pytest.mark.parametrize("share", [2, 8])
def test_actions_end_with_a_stop_token_or_at_their_limit(
    engine_for: EngineMaker, sharp_policy: TinyPolicy, share: int
) -> None:
    """One token in ``share`` is made a stop token."""
    stops = sharp_policy.stop_ids = frozenset(range(0, 512, share))
    requests = [
        Request(request.id, "", request.prompt_ids, Sampling(1.0, 1 + request.id % 7), request.seed)
        for request in make_requests(40)
    ]
    kinds = set()
    for number, completion in run(engine_for(sharp_policy), requests).items():
        limit, action = requests[number].sampling.max_new_tokens, completion.action_ids.tolist()
        assert not stops & set(action[:-1])
        assert (completion.finish_reason == "stop") == (action[-1] in stops)
        assert (completion.finish_reason == "length") == (action[-1] not in stops)
        assert len(action) == limit if completion.finish_reason == "length" else len(action) <= limit
        kinds.add((completion.finish_reason, len(action) == limit))
    assert kinds == {("stop", True), ("stop", False), ("length", True)}


def test_a_later_token_does_not_change_with_the_limit(engine_for: EngineMaker, sharp_policy: TinyPolicy) -> None:
    short = run(engine_for(sharp_policy), make_requests(3, max_new_tokens=3))
    long = run(engine_for(sharp_policy), make_requests(3, max_new_tokens=9))
    for number in range(3):
        np.testing.assert_array_equal(short[number].action_ids, long[number].action_ids[:3])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_come_as_often_as_they_should(engine_for: EngineMaker, sharp_policy: TinyPolicy, temperature: float) -> None:
    """Chi-square over 3000 first tokens, rare ones counted together."""
    prompt, count = make_requests(4)[3].prompt_ids, 3000
    requests = [Request(seed, "", prompt, Sampling(temperature, 1), seed) for seed in range(count)]
    answers = run(engine_for(sharp_policy, max_batch_size=1000), requests)
    observed = np.bincount([answers[seed].action_ids[0] for seed in range(count)], minlength=512)
    logits = next_logits(sharp_policy, prompt)

    def standard_deviations_off(temperature: float) -> float:
        expected = count * (logits / temperature).softmax(-1).numpy()
        common = expected >= 5
        assert common.sum() > 10
        left = np.append(observed[common], observed[~common].sum())
        right = np.append(expected[common], expected[~common].sum())
        freedom = len(left) - 1
        return float((((left - right) ** 2 / right).sum() - freedom) / math.sqrt(2 * freedom))

    assert abs(standard_deviations_off(temperature)) < 4
    assert standard_deviations_off(1.2 * temperature) > 8, "the sample is too small to tell temperatures apart"
