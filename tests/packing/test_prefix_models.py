"""Models on prefix trees against models on padded rows: every number and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from steppo.batch import Microbatch, Segment, TokenBatch
from steppo.errors import ConfigError
from steppo.learner.update import UpdateLoss
from steppo.losses import ClippedLoss, ObjectiveSettings
from steppo.models import AdapterCritic, Critic, HFPolicy, Policy, SeparateCritic, SharedCritic, TinyPolicy
from steppo.models import policy as policy_module
from steppo.models.adapters import LoRASettings
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from tests.cli_helpers import evaluations, run
from tests.numeric_helpers import FEW, near, normal
from tests.packing.scenes import FOREST, SCENES, forest
from tests.packing.test_packing import VOCABULARY, _keep_float64

WIDE = 10**6
TREE = PrefixTreePacker(branch_tokens=0)
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]


class TinyLlama(TinyPolicy):
    """The same tokenizer, another architecture: no norms of queries and keys, a head of its own."""

    def build(self, tokenizer_texts):
        super().build(tokenizer_texts)
        sizes = {name: getattr(self.config, name) for name in SIZES}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def disturb(parameters: Sequence[nn.Parameter]) -> None:
    """So that no part is negligible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


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


def plain_flex_attention(query: Tensor, key: Tensor, value: Tensor, training: bool, **kwargs: Any) -> Tensor:
    return flex_attention(query, key, value, **kwargs)


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
@given(FOREST, st.sampled_from([20, 60, WIDE]), st.sampled_from([0, 3]))
def test_any_forest_through_a_model(reader, pairs, max_tokens, branch_tokens):
    segments = forest(pairs)
    expected = readings(reader, segments, PaddedPacker())
    same(readings(reader, segments, PrefixTreePacker(branch_tokens), max_tokens), expected)


@pytest.mark.parametrize("scene", ["append group", "window", "mixed"])
def test_under_lora(scene):
    loss = make(TinyPolicy, AdapterCritic(), lora=LoRASettings(rank=3, alpha=6.0))
    expected = readings(loss, SCENES[scene], PaddedPacker())
    assert sum("lora" in name for name in expected) >= 20
    same(readings(loss, SCENES[scene], TREE), expected)


@pytest.mark.parametrize("scene", ["append", "append group", "state group", "mixed"])
def test_on_a_base_in_4_bits(scene: str, tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    """In float32. Products of a row of packed weights may go by another kernel than those of many."""
    tiny_policy.export(tmp_path, merge=False)
    policy = HFPolicy(str(tmp_path))
    policy.bits = 4
    policy.build(list)
    policy.add_lora(LoRASettings(rank=3, alpha=6.0))
    critic = AdapterCritic()
    critic.build(policy)
    disturb([*policy.trained_parameters(), *critic.trained_parameters()])
    loss = UpdateLoss(policy, critic, "step", ClippedLoss(), ObjectiveSettings(ent_coef=0.05))
    expected = readings(loss, SCENES[scene], PaddedPacker())
    assert sum("lora" in name for name in expected) >= 20
    same(readings(loss, SCENES[scene], TREE), expected, 1e-3)


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


@pytest.mark.parametrize("kind", [TinyPolicy, TinyLlama])
def test_block_masks_of_flex_attention(kind: type[TinyPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    """In its plain form: to compile it takes a compiler, and its gradients a GPU."""
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain_flex_attention)
    loss = make(kind, SharedCritic(), "flex_attention")
    padded = make(kind, SharedCritic())
    segments = SCENES["state group"]
    branched = 0
    for steps, tokens in TREE.pack(segments, WIDE):
        branched += tokens.until_BT is not None
        with torch.no_grad():
            found = loss.policy.action_logprobs(loss.policy.hidden(tokens), tokens, torch.ones(len(tokens.target_A)))[0]
            for place, step in enumerate(steps):
                [(_, alone)] = PaddedPacker().pack([segments[step]], WIDE)
                expected = padded.policy(alone, torch.ones(len(alone.target_A))).logprobs_A
                near(found[tokens.step_of_A == place], expected, 1e-9)
    assert branched


ODD = {
    "sliding": ({"sliding_window": 8}, "sliding_attention"),
    "some sliding": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "linear": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "chunked": ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    "flash": ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    "alibi": ({"alibi": True}, "positions of its own"),
}


@pytest.mark.parametrize("kind", ODD)
def test_models_that_would_be_wrong_on_branches_are_refused(kind, reader, monkeypatch):
    settings, named = ODD[kind]
    trunk = reader.policy.trunk
    config = SimpleNamespace(model_type="other", **{"_attn_implementation": "sdpa", **settings})
    config.get_text_config = lambda: config
    monkeypatch.setattr(trunk, "config", config)
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


def test_attention_that_is_a_model_s_own_gets_a_mask():
    """StableLM does not ask transformers for its attention."""
    loss = make(TinyLlama, SharedCritic())
    config = StableLmConfig(**{name: getattr(loss.policy.model.config, name) for name in SIZES}, attn_implementation="sdpa")
    loss.policy.model = StableLmForCausalLM(config).double()
    disturb(list(loss.policy.parameters()))
    same(readings(loss, SCENES["state group"], TREE), readings(loss, SCENES["state group"], PaddedPacker()))


def test_a_run(tmp_path: Path) -> None:
    cli = run(tmp_path, "--data.packer=PrefixTreePacker", "--trainer.max_epochs=1", "--warm_start.updates=4")
    assert isinstance(cli.datamodule.buffer.packer, PrefixTreePacker)
    assert [record["iteration"] for record in evaluations(tmp_path)] == [0, 1]
