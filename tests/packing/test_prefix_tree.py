"""Prefix trees against single tokens written out, and against padded rows through models: every number and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from steppo.batch import Microbatch, Segment, TokenBatch
from steppo.errors import ConfigError
from steppo.learner.update import UpdateLoss
from steppo.losses import ClippedLoss, ObjectiveSettings
from steppo.models import AdapterCritic, Critic, Policy, SeparateCritic, SharedCritic, TinyPolicy
from steppo.models import policy as policy_module
from steppo.models.adapters import LoRASettings
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker, prefix_tree
from tests.cli_helpers import evaluations, run
from tests.numeric_helpers import FEW, near, normal
from tests.packing.test_packing import VOCABULARY, _keep_float64, make_segments

WIDE = 10**6
TREE = PrefixTreePacker()
Packed = list[tuple[np.ndarray, TokenBatch]]

# ---- steps as agents make them ----


def ids(rng: np.random.Generator, *range_: int) -> np.ndarray:
    """A few random tokens; how many is drawn from a range."""
    return rng.integers(2, VOCABULARY, size=rng.integers(*range_)).astype(np.int32)


def dialogue(
    rng: np.random.Generator, first: np.ndarray, steps: int, seen: Callable, episode: int, group: int
) -> list[Segment]:
    """``seen`` makes a prompt of the first tokens and all turns (observation, then answer) so far."""
    turns: list[np.ndarray] = []
    segments = []
    for _ in range(steps):
        action = ids(rng, 1, 6)
        segments.append(Segment(np.concatenate(seen(first, turns)), action, episode, group))
        turns += [action, ids(rng, 3, 9)]
    return segments


def append(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns]


def state(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns[-1:]]


def window(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns[-3:]]


def summary(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    """Instructions, then something new each time; no answer is read again."""
    return [first[:-4], *turns[1::2]]


def played(seen: Callable, steps: Sequence[int], group_size: int = 1, head: int = 30, seed: int = 0) -> list[Segment]:
    """Episodes with the same instructions; those of a group also begin in the same place."""
    rng = np.random.default_rng(seed)
    instructions = ids(rng, head, head + 1)
    segments = []
    for episode, count in enumerate(steps):
        if episode % group_size == 0:
            first = np.concatenate([instructions, ids(rng, 5, 9)])
        segments += dialogue(rng, first, count, seen, episode, episode // group_size)
    return segments


def mixed() -> list[Segment]:
    """Append and state episodes, lone steps, one step twice, an action of another, values only, prefixes of others."""
    rng = np.random.default_rng(3)
    segments = [*played(append, [3, 1]), *played(state, [4, 2], seed=0), *played(window, [3], seed=1)]
    long = segments[2]
    none = np.zeros(0, dtype=np.int32)
    segments += [Segment(ids(rng, 4, 20), ids(rng, 1, 5)) for _ in range(3)]
    segments += [long, Segment(long.prompt_ids, ids(rng, 2, 4)), Segment(long.prompt_ids[:20], ids(rng, 2, 4))]
    segments += [Segment(long.prompt_ids[:20], long.prompt_ids[20:24]), Segment(long.prompt_ids[:1], none)]
    segments += [Segment(long.prompt_ids, none), Segment(np.concatenate([long.prompt_ids, long.action_ids]), none)]
    return segments


LONE = Segment(np.arange(5, 12, dtype=np.int32), np.arange(3, 6, dtype=np.int32))
SCENES = {
    "append": [*played(append, [5], seed=1), *played(append, [3], seed=2), *played(append, [4], seed=3)],
    "append head": played(append, [5, 3]),
    "append group": played(append, [3, 2, 4], group_size=3),
    "state": played(state, [4, 6]),
    "state group": played(state, [3, 3, 2, 3], group_size=2),
    "window": played(window, [6, 2, 4]),
    "summary": played(summary, [4, 4]),
    "long head": played(state, [4, 4, 4], head=300),  # a mask of several blocks of the attention's kernel
    "mixed": mixed(),
    "single": [LONE],
    "identical": [LONE] * 3,
    "prefix": [LONE, Segment(np.concatenate([LONE.prompt_ids, LONE.action_ids]), LONE.action_ids)],
    "values only": [Segment(segment.prompt_ids, LONE.action_ids[:0]) for segment in played(state, [3, 2])],
}
BRANCHED = {"append head", "append group", "state", "state group", "window", "summary", "long head", "mixed", "values only"}

# ---- what a batch says, token by token ----


def seen_by(batch: TokenBatch, position: int) -> tuple[list[int], list[int], list[int]]:
    """Flat columns that a position attends to, their tokens and their positions."""
    width = batch.input_ids_BT.shape[1]
    row, column = divmod(position, width)
    mask = batch.attention_mask(torch.float32)
    columns = torch.arange(column + 1) if mask is None else torch.nonzero(mask[row, 0, column] == 0)[:, 0]
    flat = columns + row * width
    return flat.tolist(), batch.input_ids_BT.flatten()[flat].tolist(), batch.position_ids_BT.flatten()[flat].tolist()


def beginnings(segments: Sequence[Segment]) -> set[tuple[int, ...]]:
    """The nodes of a trie: whatever the steps' tokens begin with. An action's last token is not read."""
    read = [[*segment.prompt_ids.tolist(), *segment.action_ids.tolist()[:-1]] for segment in segments]
    return {tuple(tokens[: length + 1]) for tokens in read for length in range(len(tokens))}


def check(segments: Sequence[Segment], packed: Packed, max_tokens: int) -> int:
    """Each step once, within the budget, read where it should be; how many tokens all rows have together."""
    assert sorted(step for steps, _ in packed for step in steps) == list(range(len(segments)))
    tokens = 0
    for steps, batch in packed:
        rows, width = batch.input_ids_BT.shape
        assert rows * width <= max_tokens or (rows == 1 and batch.until_BT is None)
        assert batch.until_BT is None or rows * width**2 <= prefix_tree._MASK_NUMBERS
        assert (batch.step_of_A.diff() >= 0).all()
        used: dict[int, set[int]] = {}
        by_row: dict[int, list[Segment]] = {}
        for place, step in enumerate(steps):
            prompt, action = segments[step].prompt_ids.tolist(), segments[step].action_ids.tolist()
            actions = batch.step_of_A == place
            assert batch.target_A[actions].tolist() == action
            positions = [int(batch.value_at_N[place]), *batch.predict_at_A[actions].tolist()]
            for position, read in zip(positions, [prompt, *(prompt + action[:n] for n in range(len(action)))], strict=True):
                flat, seen, counted = seen_by(batch, position)
                assert seen == read
                assert counted == list(range(len(read)))
                used.setdefault(position // width, set()).update(flat)
            by_row.setdefault(positions[0] // width, []).append(segments[step])
        assert sorted(used) == list(range(rows))
        for row, columns in used.items():
            # Each token once; what is behind them is padding.
            assert len(columns) == len(beginnings(by_row[row])) == max(columns) % width + 1
            tokens += len(columns)
    return tokens


TOKENS = st.integers(2, 4)
FOREST = st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=9), st.lists(TOKENS, max_size=5)), min_size=1, max_size=14)


def forest(pairs: list[tuple[list[int], list[int]]]) -> list[Segment]:
    return [Segment(np.array(prompt, dtype=np.int32), np.array(action, dtype=np.int32)) for prompt, action in pairs]


@FEW
@given(FOREST, st.integers(1, 80), st.sampled_from([1, 10, 100, 10**6]))
def test_any_forest_within_any_budget(pairs, max_tokens, keys_per_token):
    segments = forest(pairs)
    check(segments, PrefixTreePacker(keys_per_token).pack(segments, max_tokens), max_tokens)


@FEW
@given(FOREST)
def test_any_forest_has_each_token_once(pairs):
    """Where there is room, and attention costs nothing."""
    segments = forest(pairs)
    assert check(segments, PrefixTreePacker(10**9).pack(segments, WIDE), WIDE) == len(beginnings(segments))


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_are_laid_out(scene):
    segments = SCENES[scene]
    packed = TREE.pack(segments, WIDE)
    assert check(segments, packed, WIDE) >= len(beginnings(segments))
    assert any(batch.until_BT is not None for _, batch in packed) == (scene in BRANCHED)


def test_no_steps():
    assert TREE.pack([], WIDE) == []


def test_an_episode_that_appends_is_one_causal_row():
    """As many rows as episodes where they do not begin alike, as padded rows of their last steps."""
    segments = [*played(append, [6], seed=1), *played(append, [4], seed=2)]
    ((_, batch),) = TREE.pack(segments, WIDE)
    assert batch.until_BT is None
    ((_, last),) = PaddedPacker().pack([segments[5], segments[9]], WIDE)
    assert torch.equal(batch.input_ids_BT, last.input_ids_BT)
    assert torch.equal(batch.position_ids_BT, last.position_ids_BT)


def test_tokens_decide_whatever_the_episode():
    """A dialogue that breaks off and goes on in another episode is still one; a tie in numbers shares nothing."""
    segments = played(append, [4])
    moved = [Segment(segment.prompt_ids, segment.action_ids, episode=7 * n, group=n) for n, segment in enumerate(segments)]
    assert check(moved, TREE.pack(moved, WIDE), WIDE) == len(beginnings(segments))
    rng = np.random.default_rng(0)
    apart = [Segment(ids(rng, 9, 12), ids(rng, 2, 4)) for _ in range(5)]
    ((_, batch),) = TREE.pack(apart, WIDE)
    assert batch.until_BT is None
    assert len(batch.input_ids_BT) == 5


def test_little_in_common_is_padded():
    """What a mask costs decides: a long tail behind a short head is cheaper without."""
    rng = np.random.default_rng(0)
    head = ids(rng, 40, 41)
    tails = [Segment(np.concatenate([head, ids(rng, 100, 120)]), LONE.action_ids) for _ in range(6)]
    ((_, batch),) = PrefixTreePacker(keys_per_token=50).pack(tails, WIDE)
    ((_, padded),) = PaddedPacker().pack(tails, WIDE)
    assert batch.until_BT is None
    assert batch.input_ids_BT.shape == padded.input_ids_BT.shape
    ((_, batch),) = PrefixTreePacker(keys_per_token=10**6).pack(tails, WIDE)
    assert batch.until_BT is not None


def test_a_tree_that_outgrows_its_row_repeats_only_its_trunk(monkeypatch):
    """Twelve branches of 10 behind a trunk of 50, four to a row: by tokens, and where the mask is the limit."""
    rng = np.random.default_rng(1)
    trunk = ids(rng, 50, 51)
    segments = [Segment(np.concatenate([trunk, np.int32([n + 2]), ids(rng, 9, 10)]), LONE.action_ids[:1]) for n in range(12)]
    packer = PrefixTreePacker(10**6)
    assert check(segments, packer.pack(segments, 99), 99) == 3 * 50 + 12 * 10
    assert check(segments, packer.pack(segments, 90), 90) == 3 * 50 + 12 * 10
    assert check(segments, packer.pack(segments, 89), 89) == 4 * 50 + 12 * 10
    assert check(segments, packer.pack(segments, 49), 49) == 12 * 60
    monkeypatch.setattr(prefix_tree, "_MASK_NUMBERS", 2 * 90**2)
    packed = packer.pack(segments, WIDE)
    assert check(segments, packed, WIDE) < 3 * 50 + 12 * 10
    assert len(packed) == 2


def test_nothing_to_attend_with():
    with pytest.raises(ConfigError, match="keys_per_token must be at least 1, not 0"):
        PrefixTreePacker(keys_per_token=0)


# ---- through models ----


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]


class TinyLlama(TinyPolicy):
    """The same tokenizer, another architecture: no norms of queries and keys, a head of its own."""

    def build(self, tokenizer_texts):
        super().build(tokenizer_texts)
        sizes = {name: getattr(self.config, name) for name in SIZES}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def disturb(parameters: Sequence[nn.Parameter], scale: float = 0.2) -> None:
    """So that no part is negligible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def make(kind: type[TinyPolicy], critic: Critic, attention: str = "sdpa", lora: LoRASettings | None = None) -> UpdateLoss:
    """A policy and its critic in float64, and their loss."""
    policy: Policy = kind(hidden_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.build(lambda: ["go north take coin"] * 5)
    policy.model.set_attn_implementation(attention)
    policy.double()
    disturb(list(policy.parameters()))
    _keep_float64(policy)
    if lora is not None:
        policy.add_lora(lora)
        disturb(policy.trained_parameters())
    critic.build(policy)
    critic.double()
    disturb(critic.trained_parameters())
    return UpdateLoss(policy, critic, "step", ClippedLoss(), ObjectiveSettings(ent_coef=0.05))


def microbatch(segments: Sequence[Segment], steps: np.ndarray, tokens: TokenBatch) -> Microbatch:
    """Every step and every action token has numbers of its own, whatever batch it is in."""
    starts = np.cumsum([0, *(len(segment.action_ids) for segment in segments)])
    actions = np.concatenate([np.arange(starts[step], starts[step + 1]) for step in steps])
    old_A, behaviour_A, weight_A, temperature_A = normal(np.random.default_rng(5), 4, starts[-1])[:, actions]
    advantage_N, value_N, target_N = normal(np.random.default_rng(6), 3, len(segments))[:, steps]
    return Microbatch(
        tokens=tokens,
        temperature_A=1 + temperature_A.abs(),
        old_logprobs_A=old_A - 5,
        behaviour_logprobs_A=behaviour_A - 5,
        ref_logprobs_A=None,
        advantage_A=advantage_N[tokens.step_of_A],
        weight_A=weight_A.abs(),
        index_N=torch.from_numpy(steps),
        old_value=value_N,
        target=target_N,
        update_steps=len(segments),
        update_tokens=int(starts[-1]),
    )


def readings(loss: UpdateLoss, segments: Sequence[Segment], packer: Packer, max_tokens: int = WIDE) -> dict[str, Tensor]:
    """All that an update and scoring say of steps, by step, and the gradient of each parameter of policy and critic."""
    policy, critic = loss.policy, loss.critic
    assert critic is not None
    by_step: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
    named = [*policy.named_parameters(), *((f"critic.{name}", p) for name, p in critic.named_parameters())]
    for _, parameter in named:
        parameter.grad = None
    for steps, tokens in packer.pack(segments, max_tokens):
        batch = microbatch(segments, steps, tokens)
        with torch.no_grad():
            hidden, *read = policy(tokens, batch.temperature_A)
            values = critic(tokens, tokens.value_at_N, hidden)
            token_values = critic(tokens, tokens.predict_at_A, hidden)
        for place, step in enumerate(steps):
            own = tokens.step_of_A == place
            columns = {"logprobs": read[0][own], "entropies": read[1][own], "token values": token_values[own]}
            for name, value in {"values": values[place : place + 1], **columns}.items():
                by_step.setdefault(name, [torch.empty(0)] * len(segments))[step] = value
        for part in loss.parts(batch, policy_learns=len(tokens.target_A) > 0):
            part.loss.backward()
            found["loss"] += part.loss.detach()
    found |= {name: torch.cat(values) for name, values in by_step.items()}
    return found | {f"gradient of {name}": parameter.grad for name, parameter in named if parameter.grad is not None}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """The norm of each difference is small beside what it should be."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        difference = torch.linalg.vector_norm(actual[name] - value)
        assert difference <= tolerance * torch.linalg.vector_norm(value), f"{name}: {difference:.2e}"


@pytest.fixture
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """``eager`` takes its softmax in float32, whose rounding depends on the row: here in the precision of its scores."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


MODELS = [(TinyPolicy, SharedCritic, "sdpa"), (TinyLlama, SeparateCritic, "sdpa")]
MODELS += [(TinyPolicy, SeparateCritic, "eager"), (TinyLlama, SharedCritic, "eager")]


@pytest.fixture(scope="module", params=MODELS, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}-{case[2]}")
def update_loss(request: pytest.FixtureRequest) -> UpdateLoss:
    kind, critic, attention = request.param
    return make(kind, critic(), attention)


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("scene", SCENES)
def test_every_number_is_the_padded_rows(scene, update_loss):
    segments = SCENES[scene]
    expected = readings(update_loss, segments, PaddedPacker())
    if any(len(segment.action_ids) for segment in segments):
        assert expected["loss"].abs() > 0.01
        assert sum(name.startswith("gradient of") for name in expected) >= 20
    same(readings(update_loss, segments, TREE), expected)


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("max_tokens", [1, 60, 130])
def test_whatever_the_budget(max_tokens, update_loss):
    """Rows cut between branches, alone and together."""
    segments = SCENES["mixed"]
    assert len(TREE.pack(segments, max_tokens)) > 2
    same(readings(update_loss, segments, TREE, max_tokens), readings(update_loss, segments, PaddedPacker()))


@pytest.mark.usefixtures("wide_softmax")
def test_order_of_steps_does_not_matter(update_loss):
    """The numbers of a step go with it; sums are over the same steps."""
    segments = SCENES["mixed"]
    order = np.random.default_rng(2).permutation(len(segments))

    class Shuffled(PrefixTreePacker):
        def pack(self, segments, max_tokens):
            packed = super().pack([segments[step] for step in order], max_tokens)
            return [(order[steps], batch) for steps, batch in packed]

    same(readings(update_loss, segments, Shuffled(), 200), readings(update_loss, segments, TREE))


@pytest.fixture(scope="module")
def reader() -> UpdateLoss:
    return make(TinyPolicy, SharedCritic())


@FEW
@given(FOREST, st.sampled_from([20, 60, WIDE]), st.sampled_from([10, 10**6]))
def test_any_forest_through_a_model(reader, pairs, max_tokens, keys_per_token):
    segments = forest(pairs)
    expected = readings(reader, segments, PaddedPacker())
    same(readings(reader, segments, PrefixTreePacker(keys_per_token), max_tokens), expected)


@pytest.mark.parametrize("scene", ["append group", "window", "mixed"])
def test_under_lora(scene):
    loss = make(TinyPolicy, AdapterCritic(), lora=LoRASettings(rank=3, alpha=6.0))
    expected = readings(loss, SCENES[scene], PaddedPacker())
    assert sum("lora" in name for name in expected) >= 20
    same(readings(loss, SCENES[scene], TREE), expected)


def test_with_recomputed_layers():
    loss = make(TinyPolicy, SharedCritic())
    expected = readings(loss, SCENES["state group"], PaddedPacker())
    loss.policy.checkpoint_layers()
    same(readings(loss, SCENES["state group"], TREE), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_masks_in_other_precisions(precision, attention):
    """As far from float64 as padded rows are, not as a mask of the wrong type would be."""
    policy = make(TinyLlama, SharedCritic(), attention).policy.to(
        torch.bfloat16 if precision == "bfloat16" else torch.float32
    )
    segments = SCENES["state group"]

    def hidden(packer: Packer) -> Tensor:
        ends = [torch.empty(0)] * len(segments)
        for steps, batch in packer.pack(segments, WIDE):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                states = policy.hidden(batch)[batch.value_at_N]
            for step, end in zip(steps, states, strict=True):
                ends[step] = end.float()
        return torch.stack(ends)

    near(hidden(TREE), hidden(PaddedPacker()), 1e-5 if precision == "float32" else 3e-2)


def test_a_mask_says_what_is_seen():
    """By hand: a trunk of two, two branches of one each, a padding token."""
    batch = TokenBatch(*[torch.zeros(1, 5, dtype=torch.int64)] * 2, torch.tensor([[4, 4, 3, 4, 5]]), *[torch.zeros(0)] * 4)
    mask = batch.attention_mask(torch.float64)
    assert mask is not None
    assert mask.dtype == torch.float64
    out = -math.inf
    expected = [[0, out, out, out, out], [0, 0, out, out, out], [0, 0, 0, out, out], [0, 0, out, 0, out]]
    assert mask.tolist() == [[[*expected, [out, out, out, out, 0]]]]


ODD = {
    "sliding": ({"sliding_window": 8}, "sliding_attention"),
    "some sliding": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "linear": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "chunked": ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    "flash": ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    "flex": ({"_attn_implementation": "flex_attention"}, "flex_attention"),
    "alibi": ({"alibi": True}, "positions of its own"),
}


@pytest.mark.parametrize("kind", ODD)
def test_models_that_would_be_wrong_on_branches_are_refused(kind, reader, monkeypatch):
    settings, named = ODD[kind]
    trunk = reader.policy.trunk
    monkeypatch.setattr(trunk, "config", SimpleNamespace(model_type="other", **{"_attn_implementation": "sdpa", **settings}))
    ((_, batch),) = TREE.pack(SCENES["state"], WIDE)
    with pytest.raises(ConfigError, match=f"other has {named}: set data.packer to PaddedPacker"):
        policy_module.trunk_states(trunk, batch)


def test_models_without_position_ids_are_refused():
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    trunk = BloomForCausalLM(config).base_model
    ((_, batch),) = TREE.pack(SCENES["state"], WIDE)
    with pytest.raises(ConfigError, match="bloom has positions of its own"):
        policy_module.trunk_states(trunk, batch)


def test_any_model_takes_rows_that_do_not_branch():
    """Causal as ever: with a sliding window, too."""
    loss = make(TinyLlama, SharedCritic())
    config = MistralConfig(**{name: getattr(loss.policy.model.config, name) for name in SIZES}, sliding_window=7)
    loss.policy.model = MistralForCausalLM(config).double()
    disturb(list(loss.policy.parameters()))
    _keep_float64(loss.policy)
    same(readings(loss, SCENES["append"], TREE), readings(loss, SCENES["append"], PaddedPacker()))


def test_rows_of_one_batch_are_alike():
    """Rows of other lengths get a pass of their own, as long as padding would cost more."""
    short, long = (make_segments([(length, 1)] * 5, seed=length) for length in (20, 400))
    ((_, padded),) = PaddedPacker().pack([*short, *long], WIDE)
    assert padded.input_ids_BT.shape == (10, 400)
    assert [batch.input_ids_BT.shape for _, batch in TREE.pack([*short, *long], WIDE)] == [(5, 20), (5, 400)]
    little = make_segments([(20, 1), (21, 1), (40, 1)])
    assert [batch.input_ids_BT.shape for _, batch in TREE.pack(little, WIDE)] == [(3, 40)]


def test_a_run(tmp_path: Path) -> None:
    cli = run(tmp_path, "--data.packer=PrefixTreePacker", "--trainer.max_epochs=1", "--warm_start.updates=4")
    assert isinstance(cli.datamodule.buffer.packer, PrefixTreePacker)
    assert [record["iteration"] for record in evaluations(tmp_path)] == [0, 1]
