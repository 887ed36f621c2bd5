"""The engine that keeps caches: it gives what reading all anew gives, reads each token once, and forgets what is stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.errors import ConfigError
from steppo.models import TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.types import Completion, Request, Sampling

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def llama(kv_heads: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=kv_heads))


def qwen3(kv_heads: int) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=kv_heads))


def policy_of(model: Any, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> TinyPolicy:
    """A policy around a model, far from uniform."""
    policy = TinyPolicy(seed=0)
    model.set_attn_implementation(attention)
    policy.model, policy.stop_ids = model, frozenset([1, 2])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(40)
        model.get_output_embeddings().weight.mul_(20)
    return policy.to(dtype)


@pytest.fixture
def policy() -> TinyPolicy:
    torch.manual_seed(0)
    return policy_of(qwen3(2))


def engine_for(policy: TinyPolicy, kind: type[Engine] = HFEngine, **settings: int) -> Any:
    engine = kind(**settings)
    engine.bind(policy)
    return engine


# --- episodes that are played to a script ---

Context = Callable[[list[np.ndarray]], np.ndarray]


def words(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, VOCABULARY, length).astype(np.int32)


@dataclass
class Episode:
    """What is observed is a function of its seed; what was said is in the history."""

    name: str
    seed: int
    context: str
    sampling: Sampling
    length: int
    head: np.ndarray
    history: list[np.ndarray] = field(default_factory=list)
    answers: list[Completion] = field(default_factory=list)
    prompts: list[np.ndarray] = field(default_factory=list)

    def ask(self, number: int) -> Request:
        step = len(self.answers)
        rng = np.random.default_rng([self.seed, step])
        self.history.append(words(rng, int(rng.integers(1, 12))))
        if self.context == "append":
            prompt = np.concatenate([self.head, *self.history])
        elif self.context == "state":
            prompt = np.concatenate([self.head, self.history[-1]])
        else:  # a window of the newest turns
            prompt = np.concatenate([self.head, *self.history[-4:]])
        self.prompts.append(prompt)
        return Request(number, self.name, prompt, self.sampling, 1000 * self.seed + step)

    def hears(self, answer: Completion) -> bool:
        """Whether it is over."""
        assert answer.error == ""
        self.answers.append(answer)
        self.history.append(answer.action_ids)
        return len(self.answers) == self.length


def episodes(count: int, group: int = 4) -> list[Episode]:
    """Groups begin alike, all have the same instructions; lengths, temperatures, limits and contexts differ."""
    rng = np.random.default_rng(0)
    instructions, made = words(rng, 9), []
    for number in range(count):
        if number % group == 0:
            head = np.concatenate([instructions, words(rng, int(rng.integers(3, 20)))])
        sampling = Sampling((1.0, 0.7, 0.0, 1.4)[number % 4], int(rng.integers(1, 7)))
        context = ("append", "state", "window")[number // group % 3]
        made.append(Episode(f"episode {number}", number, context, sampling, int(rng.integers(1, 7)), head))
    return made


def play(engine: Engine, played: list[Episode], slots: int = 9) -> list[Episode]:
    """As a scheduler does: a slot's next episode begins when the one before is over, its next request a tick later."""
    wanted, asked = list(played), {}
    number = silent = 0
    asking: list[Episode] = []
    while wanted or asked or asking:
        while wanted and len(asked) + len(asking) < slots:
            asking.append(wanted.pop(0))
        for episode in asking:
            asked[number] = episode
            engine.submit(episode.ask(number))
            number += 1
        asking = []
        completions = engine.poll()
        silent = 0 if completions else silent + 1
        assert silent < 100
        for completion in completions:
            episode = asked.pop(completion.request_id)
            if episode.hears(completion):
                engine.release(episode.name)
            else:
                asking.append(episode)
    return played


def logits_behind(policy: TinyPolicy, ids: np.ndarray) -> torch.Tensor:
    """By a plain forward pass of transformers over all of it."""
    with torch.no_grad():
        read = torch.from_numpy(ids.astype(np.int64))[None].to(policy.device)
        return policy.model(read, use_cache=False).logits[0, -1].double().cpu()


def check_by_reading_all(policy: TinyPolicy, played: list[Episode]) -> int:
    """Each token by the definition, one forward pass of transformers over the whole history for each."""
    tokens = 0
    for episode in played:
        for step, (prompt, answer) in enumerate(zip(episode.prompts, episode.answers, strict=True)):
            drawn = np.random.Generator(np.random.Philox(1000 * episode.seed + step)).random(episode.sampling.max_new_tokens)
            ids = prompt
            for place, token in enumerate(answer.action_ids):
                logits = logits_behind(policy, ids)
                temperature = episode.sampling.temperature
                logprobs = (logits / (float(np.float32(temperature)) or 1.0)).log_softmax(-1)
                cumulative = logprobs.exp().cumsum(0)
                expected = int((cumulative <= drawn[place] * cumulative[-1]).sum()) if temperature else int(logits.argmax())
                assert token == expected
                assert answer.logprobs[place] == pytest.approx(float(logprobs[token]), rel=1e-6, abs=1e-6)
                ids = np.append(ids, token)
                tokens += 1
            assert answer.action_ids[-1] in policy.stop_ids or len(answer.action_ids) == episode.sampling.max_new_tokens
    return tokens


def assert_same(left: list[Episode], right: list[Episode], atol: float = 0.0) -> None:
    for one, other in zip(left, right, strict=True):
        for mine, its in zip(one.answers, other.answers, strict=True):
            np.testing.assert_array_equal(mine.action_ids, its.action_ids)
            np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=atol, rtol=0)
            assert mine.finish_reason == its.finish_reason


def lora(policy: TinyPolicy) -> TinyPolicy:
    policy.add_lora(LoRASettings(rank=4, alpha=8.0))
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.normal_(std=0.3)
    return policy.double()


KINDS: dict[str, Callable[[], TinyPolicy]] = {
    "llama": lambda: policy_of(llama(4)),
    "llama, grouped": lambda: policy_of(llama(2)),
    "qwen3, one key": lambda: policy_of(qwen3(1)),
    "eager": lambda: policy_of(qwen3(2), attention="eager"),
    "lora": lambda: lora(policy_of(llama(2))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 4, "cache_tokens": 300}], ids=["roomy", "tight"])
def test_all_models_give_what_reading_all_gives(
    kind: str, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings:
        monkeypatch.setattr("steppo.engines.hf._pass_tokens", lambda policy: 8)  # more to share, narrower passes
    torch.manual_seed(0)
    policy = KINDS[kind]()
    played = play(engine_for(policy, **settings), episodes(12))
    assert check_by_reading_all(policy, played) > 80
    if kind != "eager":  # under which transformers reads padding on the left as NaN in float64
        assert_same(played, play(engine_for(policy, PlainEngine), episodes(12)), atol=1e-6)


@pytest.mark.parametrize("cache_tokens", [2**16, 700, 150, 1])
def test_a_hundred_episodes_come_out_the_same(
    policy: TinyPolicy, cache_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cache_tokens != 700:
        monkeypatch.setattr("steppo.engines.hf._pass_tokens", lambda policy: 8)
    expected = play(engine_for(policy, PlainEngine), episodes(100))
    engine = engine_for(policy, cache_tokens=cache_tokens)
    assert_same(play(engine, episodes(100)), expected, atol=1e-6)
    assert sum(len(episode.answers) for episode in expected) > 300
    assert (engine._cache.rows, engine._cache.layers) == (0, []), "nothing is held when all are over"


def test_in_float32_only_near_ties_come_out_otherwise() -> None:
    """Greedy: the first token that differs from the plain engine's is one of two that are hardly apart."""
    torch.manual_seed(0)
    policy = policy_of(qwen3(2), torch.float32)
    greedy = [replace(episode, sampling=Sampling(0.0, 6)) for episode in episodes(100)]
    kept = play(engine_for(policy, cache_tokens=700), greedy)
    plain = engine_for(policy, PlainEngine)
    asked, ties = [], 0
    for episode in kept:
        for prompt, answer in zip(episode.prompts, episode.answers, strict=True):
            asked.append((prompt, answer))
            plain.submit(Request(len(asked) - 1, "", prompt, episode.sampling, 0))
    expected: dict[int, Completion] = {}
    while len(expected) < len(asked):
        expected |= {completion.request_id: completion for completion in plain.poll()}
    for number, (prompt, answer) in enumerate(asked):
        other = expected[number]
        length = min(len(answer.action_ids), len(other.action_ids))
        differ = np.flatnonzero(answer.action_ids[:length] != other.action_ids[:length])
        same = int(differ[0]) if len(differ) else length
        np.testing.assert_allclose(answer.logprobs[:same], other.logprobs[:same], atol=1e-4, rtol=0)
        if len(differ):
            best = logits_behind(policy, np.concatenate([prompt, answer.action_ids[:same]])).topk(2).values
            assert best[0] - best[1] < 1e-4
            ties += 1
    assert ties <= 3
    assert len(asked) > 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    policy = policy_of(qwen3(2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        engine = engine_for(policy, cache_tokens=500)
        runs = [play(engine, episodes(24)) for _ in range(2)]
        assert_same(*runs)
        assert_same(runs[0], play(engine_for(policy, cache_tokens=500), episodes(24)))
    assert engine.logprob_tolerance == (1e-4 if dtype == torch.float32 else 0.1)


# --- each token once ---


def ask(engine: Engine, *requests: tuple[str, np.ndarray], limit: int = 4) -> list[Completion]:
    """Answers of the length ``limit``, all asked at once."""
    for number, (name, prompt) in enumerate(requests):
        engine.submit(Request(number, name, prompt, Sampling(1.0, limit), number))
    answers: dict[int, Completion] = {}
    for _ in range(200):
        answers |= {completion.request_id: completion for completion in engine.poll()}
        if len(answers) == len(requests):
            return [answers[number] for number in range(len(requests))]
    raise AssertionError("no answer")


def read_by(engine: Any, *requests: tuple[str, np.ndarray], limit: int = 4) -> int:
    before = engine.tokens_read
    ask(engine, *requests, limit=limit)
    return engine.tokens_read - before


@pytest.fixture
def wide(policy: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine to which the least in common is worth sharing. No token ends an answer."""
    policy.stop_ids = frozenset()
    monkeypatch.setattr("steppo.engines.hf._pass_tokens", lambda policy: 1)
    return engine_for(policy)


def test_a_dialogue_goes_on_where_it_stopped(wide: Any) -> None:
    rng = np.random.default_rng(0)
    prompt, new = words(rng, 50), 50
    for _ in range(5):
        before = wide.tokens_read
        [answer] = ask(wide, ("a", prompt))
        assert wide.tokens_read - before == new + 3, "what is new, and the answer but for its last token"
        observed = words(rng, 11)
        prompt, new = np.concatenate([prompt, answer.action_ids, observed]), 1 + 11


def test_a_rewritten_prompt_keeps_its_head(wide: Any) -> None:
    rng = np.random.default_rng(0)
    head = words(rng, 40)
    assert read_by(wide, ("a", np.concatenate([head, [5], words(rng, 9)]).astype(np.int32))) == 50 + 3
    assert read_by(wide, ("a", np.concatenate([head, [6], words(rng, 19)]).astype(np.int32))) == 20 + 3
    assert read_by(wide, ("a", head)) == 1 + 3, "the last one tells what comes next"


def test_siblings_read_their_first_prompt_once(wide: Any) -> None:
    rng = np.random.default_rng(0)
    instructions = words(rng, 30)
    tasks = [np.concatenate([instructions, [first], words(rng, 19)]).astype(np.int32) for first in (3, 4, 5)]
    group = [(f"{task} {sample}", prompt) for sample in range(4) for task, prompt in enumerate(tasks)]
    # All instructions once, each task's own part once, the last token by each.
    assert read_by(wide, *group) == 30 + 3 * 20 + 3 * 3 + 12 * 3
    assert read_by(wide, ("later", tasks[1])) == 1 + 3
    assert read_by(wide, ("another", np.append(instructions, np.int32(7)))) == 1 + 3


def test_the_oldest_is_forgotten_and_read_anew(policy: TinyPolicy) -> None:
    policy.stop_ids = frozenset()
    engine = engine_for(policy, cache_tokens=3 * 24)
    prompts = {name: np.full(20, 3 + place, np.int32) for place, name in enumerate("abcd")}
    for name in "abc":
        assert read_by(engine, (name, prompts[name])) == 23
    assert read_by(engine, ("a", prompts["a"])) == 4
    assert read_by(engine, ("d", prompts["d"])) == 23
    assert read_by(engine, ("a", prompts["a"])) == 4
    assert read_by(engine, ("b", prompts["b"])) == 23, "it was asked before the others"
    assert engine._cache.rows * engine._cache.columns <= 3 * 24


def test_no_more_are_under_way_than_there_is_room_for(policy: TinyPolicy) -> None:
    policy.stop_ids = frozenset()
    engine = engine_for(policy, cache_tokens=3 * 24)
    for number in range(7):
        engine.submit(Request(number, str(number), np.full(20, 3 + number, np.int32), Sampling(1.0, 4), number))
    done = [[completion.request_id for completion in engine.poll()] for _ in range(12)]
    assert [ids for ids in done if ids] == [[0, 1, 2], [3, 4, 5], [6]]
    assert read_by(engine, ("long", np.full(400, 3, np.int32))) == 403, "one always is"
    assert read_by(engine, ("short", np.full(20, 4, np.int32))) == 23
    assert engine._cache.rows * engine._cache.columns <= 3 * 24


def test_who_is_done_makes_room_at_the_next_tick(policy: TinyPolicy) -> None:
    policy.stop_ids = frozenset()
    engine = engine_for(policy, max_batch_size=2)
    for number, limit in enumerate((5, 1, 2, 3)):
        engine.submit(Request(number, str(number), np.full(20, 3 + number, np.int32), Sampling(1.0, limit), number))
    assert [[completion.request_id for completion in engine.poll()] for _ in range(6)] == [[1], [], [2], [], [0], [3]]


# --- what must not be kept ---


def test_weights_that_nobody_told_of_are_noticed(policy: TinyPolicy) -> None:
    """By the next request: a source of one's own may neither load weights nor release."""
    prompt = words(np.random.default_rng(0), 30)
    engine = engine_for(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    for _ in range(3):
        [answer] = ask(engine, ("a", prompt))
        logprobs = logits_behind(policy, prompt).log_softmax(-1)
        assert answer.logprobs[0] == pytest.approx(float(logprobs[answer.action_ids[0]]), abs=1e-6)
        policy.model(torch.from_numpy(prompt.astype(np.int64))[None]).logits.logsumexp(-1).sum().backward()
        optimizer.step()


def test_new_weights_meet_no_old_keys(policy: TinyPolicy) -> None:
    """Also of what is under way: it goes on as if it had been read by the new ones."""
    policy.stop_ids = frozenset()
    prompt = words(np.random.default_rng(0), 30)
    engine = engine_for(policy)
    [first] = ask(engine, ("a", prompt))
    engine.submit(Request(1, "b", prompt, Sampling(1.0, 6), 7))
    engine.poll()
    engine.poll()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine.load_weights(policy.inference_weights(), 1)
    [under_way] = [completion for _ in range(4) for completion in engine.poll()]
    longer = np.concatenate([prompt, first.action_ids, [5]]).astype(np.int32)
    [second] = ask(engine, ("a", longer))
    for ids, answer, known in ((prompt, under_way, 2), (longer, second, 0)):
        for place in range(known, len(answer.action_ids)):
            logprobs = logits_behind(policy, np.concatenate([ids, answer.action_ids[:place]])).log_softmax(-1)
            assert answer.logprobs[place] == pytest.approx(float(logprobs[answer.action_ids[place]]), abs=1e-6)


def test_a_session_that_is_over_is_answered_no_more(policy: TinyPolicy) -> None:
    policy.stop_ids = frozenset()
    engine = engine_for(policy, max_batch_size=3)
    for number in range(4):
        engine.submit(Request(number, "ab"[number % 2], np.full(20, 3 + number, np.int32), Sampling(1.0, 3), number))
    engine.poll()
    engine.release("a")
    assert sorted(completion.request_id for _ in range(6) for completion in engine.poll()) == [1, 3]
    engine.release("b")
    assert engine._cache.rows == 0


@pytest.mark.parametrize("fails", ["pass", "room"])
def test_out_of_memory_costs_the_requests_of_that_pass(policy: TinyPolicy, fails: str, monkeypatch: Any) -> None:
    policy.stop_ids = frozenset()
    engine = engine_for(policy)
    kept, lost = words(np.random.default_rng(0), 20), words(np.random.default_rng(1), 400)
    [before] = ask(engine, ("a", kept))
    target = (engine, "_pass") if fails == "pass" else (engine._cache, "reshape")
    with monkeypatch.context() as patched:
        work = getattr(*target)

        def too_much(first: Any, *others: Any) -> Any:
            if fails == "room":
                engine._cache.layers[0].keys = torch.zeros(0)  # the other layers have not grown
            if fails == "room" or any(len(flight.todo) > 100 for flight in first):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(first, *others)

        patched.setattr(*target, too_much)
        good, bad = ask(engine, ("a", kept), ("b", lost))
    assert (bad.error, len(bad.action_ids)) == ("OutOfMemoryError: CUDA out of memory", 0)
    np.testing.assert_array_equal(good.action_ids, before.action_ids)
    assert read_by(engine, ("a", kept), ("b", lost)) == 4 + 403


def test_a_cache_that_half_grew_is_forgotten(policy: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without memory raises something else than a GPU. Who asks again is not answered by keys of others."""
    policy.stop_ids = frozenset()
    engine = engine_for(policy)
    rng = np.random.default_rng(0)
    one, other, long = words(rng, 30), words(rng, 30), words(rng, 400)
    ask(engine, ("a", one), ("b", other))
    zeros = torch.Tensor.new_zeros
    shapes: list[tuple[int, ...]] = []

    def too_much(self: torch.Tensor, *shape: int) -> torch.Tensor:
        shapes.append(shape)
        if len(shapes) == 3:  # the first layer has grown
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return zeros(self, *shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_zeros", too_much)
        with pytest.raises(RuntimeError, match="can't allocate"):
            ask(engine, ("c", long))
    engine.release("c")
    asked = [("a", np.append(one[:20], words(rng, 5))), ("b", np.append(other[:20], words(rng, 5)))]
    for answer, expected in zip(ask(engine, *asked), ask(engine_for(policy), *asked), strict=True):
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-6)


# --- models that it cannot serve ---


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True},
            "sliding",
        ),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_other_attention_is_for_the_plain_engine(policy: TinyPolicy, settings: dict[str, Any], reason: str) -> None:
    settings = dict(settings)
    attention = settings.pop("attn_implementation", None)
    config = Qwen3Config(**SHAPE, **settings, num_attention_heads=4, num_key_value_heads=2)
    policy.model = Qwen3ForCausalLM(config).double()
    if attention:
        policy.model.config._attn_implementation = attention
    with pytest.raises(ConfigError, match=rf"qwen3 has .*{reason}.*: set data.source.engine to PlainEngine"):
        engine_for(policy)
    engine_for(policy, PlainEngine)


def test_layers_that_keep_a_state_are_for_the_plain_engine() -> None:
    """Linear attention keeps no keys. Rows of other lengths, padded, answer as each does read anew."""
    torch.manual_seed(0)
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    layers = {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}
    config = Qwen3NextConfig(**SHAPE, **linear, **layers, num_attention_heads=4, num_key_value_heads=2)
    policy = policy_of(Qwen3NextForCausalLM(config))
    policy.stop_ids = frozenset()
    with pytest.raises(ConfigError, match=r"set data.source.engine to PlainEngine"):
        engine_for(policy)
    prompts = [words(np.random.default_rng(length), length) for length in (20, 7, 12)]
    for prompt, answer in zip(prompts, ask(engine_for(policy, PlainEngine), *enumerate(prompts)), strict=True):
        for place, (token, logprob) in enumerate(zip(answer.action_ids.tolist(), answer.logprobs.tolist(), strict=True)):
            logprobs = logits_behind(policy, np.concatenate([prompt, answer.action_ids[:place]])).log_softmax(-1)
            assert logprob == pytest.approx(float(logprobs[token]), abs=1e-5)


def test_gradient_checkpointing_may_be_on(policy: TinyPolicy) -> None:
    played = play(engine_for(policy), episodes(8))
    policy.checkpoint_layers()
    with policy.keeping_activations():
        assert_same(play(engine_for(policy), episodes(8)), played)
