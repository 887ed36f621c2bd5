"""Copies in oneDNN's layout: the same numbers, not stale, not in the learner's way."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

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

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


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


def in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(-1)


def elsewhere(linear: nn.Linear) -> None:
    linear.weight.data = -linear.weight.data


def by_an_optimizer(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW([linear.weight], lr=0.1).step()


def to_double_and_back(linear: nn.Linear) -> None:
    linear.double()
    linear.weight.data = linear.weight.data + 0.1
    linear.float()


def a_new_parameter(linear: nn.Linear) -> None:
    del linear.weight  # another one may get its place in memory
    linear.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))


CHANGES = [in_place, elsewhere, by_an_optimizer, to_double_and_back, a_new_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_copied_anew(change: Callable[[nn.Module], None]) -> None:
    model = layers()
    linears, input = PackedLinears(model), torch.randn(4, WIDTH)
    for _ in range(5):
        packed(model, linears, input)
        change(model[0])
        torch.testing.assert_close(packed(model, linears, input), model(input), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_between_are_seen(change: Callable[[nn.Module], None]) -> None:
    model, input = layers(), torch.randn(4, WIDTH)
    with torch.no_grad(), PackedLinears(model).in_use():
        change(model[0])
        mine = model(input)
    torch.testing.assert_close(mine, model(input), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("line", range(1, 12))
def test_an_interrupt_anywhere_leaves_nothing_old(line: int) -> None:
    """An engine in a thread is ended between any two lines."""
    model, input = layers(), torch.randn(4, WIDTH)
    linears = PackedLinears(model)
    packed(model, linears, input)
    left = line

    def tracer(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_name == "in_use" and event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer

    sys.settrace(tracer)
    try:
        packed(model, linears, input)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    in_place(cast(nn.Linear, model[0]))
    with torch.no_grad():
        expected = F.linear(input, cast(Tensor, model[0].weight))
        torch.testing.assert_close(model[0](input), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed(model[0], PackedLinears(model), input), expected, rtol=1e-5, atol=1e-5)
    assert not any(map(is_packed, model))


def test_two_may_overlap() -> None:
    model, input = layers(), torch.randn(4, WIDTH)
    one, other = PackedLinears(model).in_use(), PackedLinears(model).in_use()
    with torch.no_grad():
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        torch.testing.assert_close(model(input), packed(model, PackedLinears(model), input), rtol=1e-5, atol=1e-5)
        other.__exit__(None, None, None)
    assert not any(map(is_packed, model))


def test_no_room_for_a_copy_costs_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", full)
    model, input = layers(), torch.randn(4, WIDTH)
    assert torch.equal(packed(model, PackedLinears(model), input), model(input))


def test_who_turns_onednn_off_has_it_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        model = layers()
        with PackedLinears(model).in_use():
            assert not any(map(is_packed, model))


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
        with PackedLinears(model).in_use():
            assert not any(map(is_packed, model))


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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Grows with each product that reads a copy."""
    used: list[torch.Size] = []
    product = torch.ops.mkldnn._linear_pointwise

    def counting(*arguments: Any) -> Tensor:
        used.append(arguments[0].shape)
        return product(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    return used


@pytest.mark.parametrize("adapters", [False, True])
def test_an_engine_says_what_reading_all_says(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = large_policy()
    if adapters:
        policy.add_lora(LoRASettings(rank=2, alpha=4.0))
    used = counted(monkeypatch)
    kept, plain = HFEngine(), PlainEngine()
    kept.bind(policy)
    plain.bind(policy)
    for version in range(3):
        for mine, theirs in zip(answers(kept, policy), answers(plain, policy), strict=True):
            assert mine.action_ids.tolist() == theirs.action_ids.tolist()
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.trained_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        kept.load_weights((), version)
    assert used
    assert not any(map(is_packed, policy.model.modules()))


def test_weights_that_change_between_rollouts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a fused optimizer, whose changes torch does not count, and where nobody says so."""
    policy, used = large_policy(), counted(monkeypatch)
    kept, plain = HFEngine(), PlainEngine()
    kept.bind(policy)
    plain.bind(policy)
    before = answers(kept, policy)
    for number in range(6):
        kept.release(str(number))
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(policy.parameters(), lr=0.02, fused=True).step()
    after = answers(kept, policy)
    for mine, theirs in zip(after, answers(plain, policy), strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
    assert any(not np.array_equal(one.action_ids, other.action_ids) for one, other in zip(before, after, strict=True))
    assert used


@pytest.mark.parametrize("end", ["release", "load_weights", "close", "bind"])
def test_copies_are_gone_with_the_keys(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = weakref.WeakSet[Any]()
    pack = torch.ops.mkldnn._reorder_linear_weight

    def packing(*arguments: Any) -> Tensor:
        copy = pack(*arguments)
        made.add(copy)
        return copy

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", packing)
    policy, engine = large_policy(), HFEngine()
    engine.bind(policy)
    answers(engine, policy)
    assert len(made)
    if end == "release":
        for number in range(6):
            engine.release(str(number))
        engine.poll()
    else:
        {"load_weights": lambda: engine.load_weights((), 1), "close": engine.close, "bind": lambda: engine.bind(policy)}[
            end
        ]()
    gc.collect()
    assert not len(made)
