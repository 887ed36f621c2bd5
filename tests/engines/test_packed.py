"""Weights in oneDNN's order: the same numbers, never stale, never in the learner's way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.engines.packed import PackedLinears
from steppo.models import TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.types import Completion, Request, Sampling

WIDTH = 512  # a layer of WIDTH x WIDTH is large enough


def layers(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 4))


@torch.no_grad()
def packed(model: nn.Module, linears: PackedLinears, input: Tensor) -> Tensor:
    with linears.in_use():
        return model(input)


def is_packed(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, WIDTH), (3, 1, WIDTH), (2, 300, WIDTH), (0, WIDTH)])
def test_products_are_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    model = layers(bias)
    input = torch.randn(shape)
    torch.testing.assert_close(packed(model, PackedLinears(model), input), model(input), rtol=1e-5, atol=1e-5)


def test_inputs_may_lie_in_any_order() -> None:
    model = layers()
    input = torch.randn(WIDTH, 6).t()
    torch.testing.assert_close(packed(model, PackedLinears(model), input), model(input), rtol=1e-5, atol=1e-5)


def test_large_layers_alone_are_packed_and_only_within() -> None:
    model = layers()
    with PackedLinears(model).in_use():
        assert [is_packed(module) for module in model] == [True, True, False]
    assert not any(map(is_packed, model))


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model = layers()
    with pytest.raises(KeyError), PackedLinears(model).in_use():
        raise KeyError
    assert not any(map(is_packed, model))


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(-1)


def elsewhere(weight: nn.Parameter) -> None:
    weight.data = -weight.data


@pytest.mark.parametrize("change", [in_place, elsewhere])
def test_changed_weights_are_packed_anew(change: Callable[[nn.Parameter], None]) -> None:
    model = layers()
    linears, input = PackedLinears(model), torch.randn(4, WIDTH)
    packed(model, linears, input)
    change(next(model.parameters()))
    torch.testing.assert_close(packed(model, linears, input), model(input), rtol=1e-5, atol=1e-5)


def test_a_whole_new_parameter_counts() -> None:
    model = layers()
    linears, input = PackedLinears(model), torch.randn(4, WIDTH)
    packed(model, linears, input)
    model[1].weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    torch.testing.assert_close(packed(model, linears, input), model(input), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype: torch.dtype) -> None:
    model = layers()
    linears, input = PackedLinears(model), torch.randn(4, WIDTH)
    packed(model, linears, input)
    model.to(dtype)
    assert torch.equal(packed(model, linears, input.to(dtype)), model(input.to(dtype)))


def test_mixed_precision_rounds_as_ever() -> None:
    model, input = layers(), torch.randn(4, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(model, PackedLinears(model), input), model(input))


def test_a_learner_in_another_thread_has_its_gradients() -> None:
    model, input = layers(), torch.randn(4, WIDTH)
    found: list[Tensor] = []

    def learn() -> None:
        found.extend(torch.autograd.grad(model(input).sum(), next(model.parameters())))

    learn()

    with torch.no_grad(), PackedLinears(model).in_use():
        thread = threading.Thread(target=learn)
        thread.start()
        thread.join()
    assert torch.equal(*found)


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    patched = nn.Linear(WIDTH, WIDTH)
    patched.forward = lambda input: 3 * F.linear(input, patched.weight)  # type: ignore[method-assign]
    model, input = nn.Sequential(Doubled(WIDTH, WIDTH), patched), torch.randn(4, WIDTH)
    assert torch.equal(packed(model, PackedLinears(model), input), model(input))


# ---- in the engine ----


def large_policy() -> TinyPolicy:
    torch.manual_seed(0)
    shape: Any = {"vocab_size": WIDTH, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    policy = TinyPolicy(seed=0)
    policy.model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
    policy.stop_ids = frozenset()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(40)
    return policy


def answers(engine: Engine, policy: TinyPolicy) -> list[Completion]:
    rng = np.random.default_rng(0)
    for number in range(6):
        prompt = rng.integers(3, WIDTH, 3 + number).astype(np.int32)
        engine.submit(Request(number, str(number), prompt, Sampling((1.0, 0.0)[number % 2], 8), number))
    found: dict[int, Completion] = {}
    while len(found) < 6:
        found |= {completion.request_id: completion for completion in engine.poll()}
    return [found[number] for number in range(6)]


@pytest.mark.parametrize("adapters", [False, True])
def test_an_engine_says_what_reading_all_says(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = large_policy()
    if adapters:
        policy.add_lora(LoRASettings(rank=2, alpha=4.0))
    used = []
    product = torch.ops.mkldnn._linear_pointwise

    def counted(*arguments: Any) -> Tensor:
        used.append(arguments[0].shape)
        return product(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    kept, plain = HFEngine(), PlainEngine()
    kept.bind(policy)
    plain.bind(policy)
    for version in range(3):
        for mine, theirs in zip(answers(kept, policy), answers(plain, policy), strict=True):
            assert mine.action_ids.tolist() == theirs.action_ids.tolist()
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
        kept.rest()
        with torch.no_grad():
            for parameter in policy.trained_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        kept.load_weights((), version)
    assert used
    assert not any(map(is_packed, policy.model.modules()))
