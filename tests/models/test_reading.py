"""Log-probabilities and entropies by chunks, against ``log_softmax`` of all logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from steppo.models import TinyPolicy
from steppo.models import policy as policy_module
from steppo.models import reading as reading_module
from steppo.models.adapters import LoRASettings
from steppo.models.reading import read_chunks
from steppo.packing import PaddedPacker
from tests.numeric_helpers import close
from tests.packing.test_packing import make_segments

TOKENS, WIDTH, VOCABULARY = 11, 5, 7
TARGET = torch.arange(TOKENS) * 3 % VOCABULARY
DIVISOR = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)


def plain(head: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (head(states) / DIVISOR[:, None]).log_softmax(-1)
    return logprobs.gather(1, TARGET[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def chunked(head: nn.Module, states: Tensor, rows: int = 4) -> tuple[Tensor, Tensor]:
    return read_chunks(head, [weight for weight in head.parameters() if weight.requires_grad], states, TARGET, DIVISOR, rows)


@pytest.fixture(params=["trained", "frozen"])
def head(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY).double().requires_grad_(request.param == "trained")


@pytest.fixture
def states() -> Tensor:
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("numbers_in_cache", [1, 2 * VOCABULARY, 10**6])
@pytest.mark.parametrize("of", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["log-probability", "entropy", "both"])
def test_values_and_gradients(
    head: nn.Module, states: Tensor, of: tuple[float, float], numbers_in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the loss has no part of one of the two."""
    monkeypatch.setattr(reading_module, "_NUMBERS_IN_CACHE", numbers_in_cache)
    found = []
    for read in (plain, chunked):
        for leaf in (states, *head.parameters()):
            leaf.grad = None
        columns = read(head, states)
        parts = zip(of, columns, strict=True)
        sum((part * (column * torch.arange(TOKENS)).sum() for part, column in parts if part), torch.zeros(())).backward()
        found.append([*columns, *(leaf.grad for leaf in (states, *head.parameters()) if leaf.grad is not None)])
    assert len(found[0]) == len(found[1])
    for ours, expected in zip(*reversed(found), strict=True):
        close(ours, expected)


def test_gradcheck(head: nn.Module, states: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda *leaves: chunked(head, leaves[0]), (states, *head.parameters()))


def test_without_gradients(head: nn.Module, states: Tensor) -> None:
    with torch.no_grad():
        for ours, expected in zip(chunked(head, states), plain(head, states), strict=True):
            assert not ours.requires_grad
            close(ours, expected)


def test_the_backward_pass_reads_under_the_same_autocast(states: Tensor) -> None:
    head, types = nn.Linear(WIDTH, VOCABULARY), []

    def logits_of(states: Tensor) -> Tensor:
        logits = head(states)
        types.append(logits.dtype)
        return logits.float()

    for dtype in (torch.bfloat16, torch.float16):
        types.clear()
        with torch.autocast("cpu", dtype):
            logprobs, _ = read_chunks(logits_of, [*head.parameters()], states.float(), TARGET, DIVISOR.float(), TOKENS)
        logprobs.sum().backward()
        assert types == [dtype, dtype]
        assert head.weight.grad is not None


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter on the head"])
def test_a_policy_by_chunks(tiny_policy: TinyPolicy, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its own reading in one piece; weights that had no part, as another adapter's, get no gradient."""
    tiny_policy.double()
    if adapted:
        tiny_policy.add_lora(LoRASettings(2, 4.0, ("lm_head", "q_proj")))
        assert tiny_policy.adapters is not None
        tiny_policy.adapters.add("critic")
        for parameter in tiny_policy.trained_parameters():
            parameter.data += 0.1
    other = copy.deepcopy(tiny_policy)
    [(_, batch)] = PaddedPacker().pack(make_segments([(5, 3), (4, 1), (2, 6)]), 1000)
    gradients = []
    for policy in (tiny_policy, other):
        output = policy(batch, torch.full((10,), 0.7, dtype=torch.float64))
        (output.logprobs_A.sum() + output.entropy_A.square().sum()).backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters()})
        monkeypatch.setattr(policy_module, "_LOGITS_PER_CHUNK", 1)
        monkeypatch.setattr(policy_module, "_ROWS_PER_CHUNK", 3)
    for name, expected in gradients[0].items():
        ours = gradients[1][name]
        assert (ours is None) == (expected is None), name
        if ours is not None and expected is not None:
            close(ours, expected)
