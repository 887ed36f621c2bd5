"""Adapters on one base: each is a model of its own, in its values and in its gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from steppo.batch import TokenBatch
from steppo.errors import ConfigError
from steppo.models import AdapterCritic, SeparateCritic, TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.packing import PaddedPacker
from tests.numeric_helpers import close
from tests.packing.test_packing import make_segments

LORA = LoRASettings(rank=3, alpha=6.0)


@pytest.fixture
def policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    tiny_policy.double()
    tiny_policy.add_lora(LORA)
    return tiny_policy


@pytest.fixture
def batch() -> TokenBatch:
    [(_, batch)] = PaddedPacker().pack(make_segments([(5, 3), (4, 1), (2, 6)]), 1000)
    return batch


def disturb(parameters: list[torch.nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def logprobs(policy: object, batch: TokenBatch) -> Tensor:
    return policy(batch, torch.ones(len(batch.target_A))).logprobs_A.detach()  # type: ignore[operator]


def test_a_new_adapter_adds_nothing(tiny_policy: TinyPolicy, batch: TokenBatch) -> None:
    tiny_policy.double()
    before = logprobs(tiny_policy, batch)
    tiny_policy.add_lora(LORA)
    close(logprobs(tiny_policy, batch), before)


def test_an_adapter_is_a_low_rank_change_of_each_layer(tiny_policy: TinyPolicy, batch: TokenBatch) -> None:
    """Against the base with alpha / rank * B A added to its matrices by hand."""
    tiny_policy.double()
    merged = copy.deepcopy(tiny_policy)
    tiny_policy.add_lora(LORA)
    disturb(tiny_policy.trained_parameters())
    weights = dict(tiny_policy.model.named_parameters())
    changed = 0
    for name, weight in merged.model.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.policy.weight" in weights:
            down, up = (weights[f"{layer}.lora_{side}.policy.weight"] for side in "AB")
            weight.data += LORA.alpha / LORA.rank * up.data @ down.data
            changed += 1
    assert changed == 2 * 7  # layers x linear maps of each
    close(logprobs(tiny_policy, batch), logprobs(merged, batch))


def test_the_reference_is_the_base_until_it_follows(policy: TinyPolicy, batch: TokenBatch) -> None:
    base = logprobs(policy, batch)
    reference = policy.frozen_copy()
    disturb(policy.trained_parameters())
    changed = logprobs(policy, batch)
    assert float((changed - base).abs().max()) > 1e-3
    close(logprobs(reference, batch), base)
    close(logprobs(policy, batch), changed)
    reference.copy_weights_from(policy)
    close(logprobs(reference, batch), changed)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_the_adapter_that_was_read(policy: TinyPolicy, batch: TokenBatch, checkpointed: bool) -> None:
    """Both forward passes come first: what is computed again in the backward pass must find its own adapter."""
    critic = AdapterCritic()
    critic.build(policy)
    critic.double()
    disturb(policy.trained_parameters(), seed=1)
    disturb(critic.trained_parameters(), seed=2)
    alone = []
    for read in ("policy", "critic"):
        policy.zero_grad()
        critic.zero_grad()
        loss = policy(batch, torch.ones(len(batch.target_A))).logprobs_A.sum() if read == "policy" else None
        loss = critic(batch, batch.value_at_N, None).square().sum() if loss is None else loss
        loss.backward()
        mine, other = policy.trained_parameters(), critic.trained_parameters()
        mine, other = (mine, other) if read == "policy" else (other, mine)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in other)
        alone.append([parameter.grad.clone() for parameter in mine if parameter.grad is not None])
        assert len(alone[-1]) == len(mine)
    assert all(parameter.grad is None for name, parameter in policy.model.named_parameters() if ".lora_" not in name)

    if checkpointed:
        policy.checkpoint_layers()
    policy.zero_grad()
    critic.zero_grad()
    value = critic(batch, batch.value_at_N, None).square().sum()
    logprob = policy(batch, torch.ones(len(batch.target_A))).logprobs_A.sum()
    value.backward()
    logprob.backward()
    for parameters, expected in ((policy.trained_parameters(), alone[0]), (critic.trained_parameters(), alone[1])):
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            close(parameter.grad, gradient)


def test_the_critic_follows_a_warm_start(policy: TinyPolicy, batch: TokenBatch) -> None:
    critic = AdapterCritic()
    critic.build(policy)
    disturb(policy.trained_parameters())
    critic.copy_weights_from(policy)
    close(critic.states(batch, None).detach(), policy(batch).hidden.detach())


def test_only_adapters_are_kept(policy: TinyPolicy) -> None:
    names = list(policy.state_dict())
    kept = [name for name in names if not policy.is_base_weight(name)]
    assert 0 < len(kept) < len(names)
    assert all(".lora_" in name for name in kept)


def test_critics_say_which_one_fits(tiny_policy: TinyPolicy) -> None:
    with pytest.raises(ConfigError, match="lora_rank"):
        AdapterCritic().build(tiny_policy)
    tiny_policy.add_lora(LORA)
    with pytest.raises(ConfigError, match="AdapterCritic"):
        SeparateCritic().build(tiny_policy)


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens", "norm", "mlp", "nowhere", ""])
def test_what_is_no_linear_layer_is_named(target: str, tiny_policy: TinyPolicy) -> None:
    """Also where another target is one; before anything is changed."""
    before = list(tiny_policy.state_dict())
    for targets in (target,), ("q_proj", target):
        with pytest.raises(ConfigError) as raised:
            tiny_policy.add_lora(LoRASettings(2, 4.0, targets))
        assert str(raised.value) == (
            f"quantization.lora_targets: {target!r}: only linear layers can be adapted; the model has down_proj, gate_proj, "
            "k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        )
    assert list(tiny_policy.state_dict()) == before


def test_linear_layers_of_gpt_2_are_adapted(tiny_policy: TinyPolicy) -> None:
    """They are of a class of their own, which the embedding beside them is not."""
    tiny_policy.model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(
        ConfigError, match="'wte': only linear layers can be adapted; the model has c_attn, c_fc, c_proj, lm"
    ):
        tiny_policy.add_lora(LoRASettings(2, 4.0, ("wte", "c_attn")))
    tiny_policy.add_lora(LoRASettings(2, 4.0, ("c_attn", "transformer.h.0.mlp.c_fc")))
    critic = AdapterCritic()
    critic.build(tiny_policy)
    assert len(tiny_policy.trained_parameters()) == 2 * 3
    assert len(critic.trained_parameters()) == 2 * 3 + 2  # and its head


def test_a_layer_that_a_model_reads_past_its_adapter_is_refused(tiny_policy: TinyPolicy) -> None:
    tiny_policy.model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"quantization\.lora_targets: .*out_proj"):
        tiny_policy.add_lora(LoRASettings(2, 4.0, ("out_proj",)))


def test_engines_get_a_whole_model_or_the_adapter(tiny_policy: TinyPolicy, batch: TokenBatch, tmp_path: Path) -> None:
    """Of a whole model all that transformers reads; of an adapter what peft reads, and nothing of other adapters."""
    tiny_policy.double()
    bare = copy.deepcopy(tiny_policy.model)
    disturb(list(bare.parameters()))
    missing, unexpected = bare.load_state_dict(dict(tiny_policy.inference_weights()), strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]  # tied to the embedding
    for name, weight in tiny_policy.model.named_parameters():
        assert torch.equal(dict(bare.named_parameters())[name], weight)

    tiny_policy.add_lora(LORA)
    disturb(tiny_policy.trained_parameters())
    AdapterCritic().build(tiny_policy)
    tiny_policy.model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    sent = dict(tiny_policy.inference_weights())
    assert sent.keys() == written.keys()
    assert all(torch.equal(weight, written[name]) for name, weight in sent.items())
