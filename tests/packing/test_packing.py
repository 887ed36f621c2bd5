"""Packed batches against a row-by-row construction, and a small model on them against single unpadded steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from steppo.batch import Segment, TokenBatch
from steppo.models import policy as policy_module
from steppo.models.critic import Critic, SeparateCritic, SharedCritic, ValueHead
from steppo.models.policy import Policy
from steppo.models.tiny import TinyPolicy
from steppo.packing import PaddedPacker
from tests.numeric_helpers import FEW, close, near, normal

TEMPERATURE = 0.7
VOCABULARY = 512


def make_segments(lengths: list[tuple[int, int]], seed: int = 0) -> list[Segment]:
    """Random steps of the given prompt and action lengths."""
    rng = np.random.default_rng(seed)
    return [Segment(*(rng.integers(2, VOCABULARY, size=length).astype(np.int32) for length in pair)) for pair in lengths]


# Prompts and actions of many lengths, an action of one token, one without any, and two steps of equal width.
SEGMENTS = make_segments([(5, 3), (1, 1), (9, 4), (3, 0), (7, 1), (2, 6), (4, 2)])
NUM_TOKENS = sum(len(segment.action_ids) for segment in SEGMENTS)

PAIRS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12)


@FEW
@given(PAIRS, st.integers(1, 60))
def test_every_step_once_within_the_budget(lengths, max_tokens):
    batches = PaddedPacker().pack(make_segments(lengths), max_tokens)
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(lengths)))
    for rows, batch in batches:
        assert batch.num_steps == len(rows) >= 1
        assert len(rows) == 1 or batch.input_ids_BT.numel() <= max_tokens


@FEW
@given(PAIRS, st.integers(1, 60))
def test_batches_equal_rows_written_by_hand(lengths, max_tokens):
    """Each action token is read where its predecessor sits, each value at the prompt's end, and no row holds more."""
    segments = make_segments(lengths)
    for rows, batch in PaddedPacker().pack(segments, max_tokens):
        width = max(lengths[row][0] + max(lengths[row][1] - 1, 0) for row in rows)
        predict_at, targets, step_of, value_at = [], [], [], []
        for place, row in enumerate(rows):
            prompt, action = segments[row].prompt_ids.tolist(), segments[row].action_ids.tolist()
            read = prompt + action[:-1]
            assert batch.input_ids_BT[place, : len(read)].tolist() == read
            value_at.append(place * width + len(prompt) - 1)
            for number, token in enumerate(action):
                predict_at.append(place * width + len(prompt) + number - 1)
                targets.append(token)
                step_of.append(place)
        assert batch.until_BT is None
        assert batch.input_ids_BT.shape == (len(rows), width)
        assert batch.position_ids_BT.tolist() == [list(range(width))] * len(rows)
        for actual, expected in (
            (batch.predict_at_A, predict_at),
            (batch.target_A, targets),
            (batch.step_of_A, step_of),
            (batch.value_at_N, value_at),
        ):
            assert actual.dtype == torch.int64
            assert actual.tolist() == expected


@FEW
@given(PAIRS, st.integers(1, 60))
def test_batches_decode_back(lengths, max_tokens):
    segments = make_segments(lengths)
    for rows, batch in PaddedPacker().pack(segments, max_tokens):
        width = batch.input_ids_BT.shape[1]
        for place, row in enumerate(rows):
            end = int(batch.value_at_N[place])
            assert batch.input_ids_BT.flatten()[place * width : end + 1].tolist() == segments[row].prompt_ids.tolist()
            assert batch.target_A[batch.step_of_A == place].tolist() == segments[row].action_ids.tolist()


def test_rows_are_shared_where_the_budget_allows():
    segments = make_segments([(4, 1)] * 6)
    assert [len(rows) for rows, _ in PaddedPacker().pack(segments, 12)] == [3, 3]
    assert [len(rows) for rows, _ in PaddedPacker().pack(segments, 11)] == [2, 2, 2]
    assert [len(rows) for rows, _ in PaddedPacker().pack(segments, 1)] == [1] * 6
    assert PaddedPacker().pack([], 12) == []


def test_values_only():
    ((rows, batch),) = PaddedPacker().pack(make_segments([(3, 0), (2, 0)]), 100)
    assert rows.tolist() == [1, 0]
    assert batch.value_at_N.tolist() == [1, 5]
    assert batch.predict_at_A.numel() == batch.target_A.numel() == batch.step_of_A.numel() == 0


def make_policy(seed: int = 0) -> Policy:
    """A small model in float64, with weights large enough that no part of it is negligible."""
    policy = TinyPolicy(hidden_size=32)
    policy.build(lambda: ["go north take coin"] * 5)
    generator = torch.Generator().manual_seed(seed)
    policy.double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    _keep_float64(policy)
    return policy


def _keep_float64(module: nn.Module) -> None:
    """Qwen3's norms round to float32 inside; torch's own, with the same weight and epsilon, do not."""
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
            norm.weight = child.weight
            setattr(module, name, norm)
        else:
            _keep_float64(child)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def widen(batch: TokenBatch, extra: int) -> TokenBatch:
    """The same rows with more padding, of arbitrary tokens."""
    rows, width = batch.input_ids_BT.shape
    padding = torch.arange(rows * extra).reshape(rows, extra) % VOCABULARY

    def move(position: Tensor) -> Tensor:
        return position // width * (width + extra) + position % width

    return dataclasses.replace(
        batch,
        input_ids_BT=torch.cat([batch.input_ids_BT, padding], dim=1),
        position_ids_BT=torch.arange(width + extra).expand(rows, -1),
        predict_at_A=move(batch.predict_at_A),
        value_at_N=move(batch.value_at_N),
    )


def gradients(loss: Tensor, module: nn.Module) -> Tensor:
    """Of all parameters, end to end; 0 for those that had no part."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
    )


def objective(logprobs: list[Tensor], entropies: list[Tensor]) -> Tensor:
    """A number to differentiate in which every action token has its own weight."""
    rng = np.random.default_rng(7)
    return torch.cat(logprobs) @ normal(rng, NUM_TOKENS) + torch.cat(entropies) @ normal(rng, NUM_TOKENS)


def temperatures(batch: TokenBatch, temperature: float = TEMPERATURE) -> Tensor:
    return torch.full(batch.target_A.shape, temperature, dtype=torch.float64)


def packed_reading(
    policy: Policy, max_tokens: int = 10**6, order: list[int] | None = None, extra: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of all steps, by step, and the gradient of the objective, from packed batches."""
    order = list(range(len(SEGMENTS))) if order is None else order
    logprobs: list[Tensor] = [torch.empty(0)] * len(SEGMENTS)
    entropies: list[Tensor] = [torch.empty(0)] * len(SEGMENTS)
    for rows, batch in PaddedPacker().pack([SEGMENTS[step] for step in order], max_tokens):
        batch = widen(batch, extra) if extra else batch
        read = policy.action_logprobs(policy.hidden(batch), batch, temperatures(batch))
        for place, row in enumerate(rows):
            logprobs[order[row]], entropies[order[row]] = (x_A[batch.step_of_A == place] for x_A in read)
    gradient = gradients(objective(logprobs, entropies), policy)
    return torch.cat(logprobs).detach(), torch.cat(entropies).detach(), gradient


def slow_reading(policy: Policy, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor, Tensor]:
    """The same, one token at a time, from the model's own logits of one unpadded step."""
    logprobs, entropies = [], []
    for segment in SEGMENTS:
        ids = torch.from_numpy(np.concatenate([segment.prompt_ids, segment.action_ids])).long()
        logits = policy.model(input_ids=ids[None]).logits[0]
        for place in range(len(segment.prompt_ids), len(ids)):
            distribution = (logits[place - 1] / temperature).log_softmax(-1)
            logprobs.append(distribution[ids[place]][None])
            entropies.append(-(distribution.exp() * distribution).sum()[None])
    gradient = gradients(objective(logprobs, entropies), policy)
    return torch.cat(logprobs).detach(), torch.cat(entropies).detach(), gradient


def all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert other.abs().max() > 0.1
        close(one, other)


@pytest.mark.parametrize("max_tokens", [1, 20, 10**6], ids=["single", "few", "one-batch"])
def test_packed_equals_unpadded(policy, max_tokens):
    all_close(packed_reading(policy, max_tokens), slow_reading(policy))


def test_padding_does_not_matter(policy):
    all_close(packed_reading(policy, extra=5), packed_reading(policy))


def test_order_of_rows_does_not_matter(policy):
    order = np.random.default_rng(3).permutation(len(SEGMENTS)).tolist()
    assert order != sorted(order)
    all_close(packed_reading(policy, 30, order), packed_reading(policy, 30))


def test_logits_in_chunks(policy, monkeypatch):
    whole = packed_reading(policy)
    sizes = []
    read = policy.logits

    def recorded(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return read(states)

    monkeypatch.setattr(policy, "logits", recorded)
    monkeypatch.setattr(policy_module, "_LOGITS_PER_CHUNK", 3 * VOCABULARY + 1)
    monkeypatch.setattr(policy_module, "_ROWS_PER_CHUNK", 1)
    all_close(packed_reading(policy), whole)
    assert max(sizes) == 3
    assert sum(sizes) == 2 * NUM_TOKENS  # once more in the backward pass


def test_temperature_of_each_token(policy):
    """0 is greedy, read as 1."""
    ((_, batch),) = PaddedPacker().pack([SEGMENTS[0]], 100)
    hidden = policy.hidden(batch)
    logprobs, entropies = policy.action_logprobs(hidden, batch, torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64))
    for place, temperature in enumerate([1.0, 2.0, 0.5]):
        expected = policy.action_logprobs(hidden, batch, temperatures(batch, temperature))
        close(logprobs[place], expected[0][place])
        close(entropies[place], expected[1][place])


def test_temperature_is_not_rounded_in_bfloat16():
    """Logits are float32 whatever the weights; a temperature of 0.7 must not become the nearest bfloat16."""
    policy = make_policy().to(torch.bfloat16)
    ((_, batch),) = PaddedPacker().pack([SEGMENTS[2]], 100)
    with torch.no_grad():
        hidden = policy.hidden(batch)
        logits = policy.logits(hidden[batch.predict_at_A])
        logprobs, _ = policy.action_logprobs(hidden, batch, torch.full((4,), TEMPERATURE))
    assert logprobs.dtype == logits.dtype == torch.float32
    expected = (logits.double() / TEMPERATURE).log_softmax(-1).gather(1, batch.target_A[:, None])[:, 0]
    near(logprobs, expected, 1e-5)


def make_critic(critic: Critic, policy: Policy) -> Critic:
    """Built in float64, its head no longer 0."""
    critic.build(policy)
    critic.double()
    with torch.no_grad():
        critic.head.weight.copy_(normal(np.random.default_rng(5), 1, critic.head.in_features))
        critic.head.bias.fill_(0.5)
    return critic


def packed_values(critic: Critic, policy: Policy, max_tokens: int, extra: int = 0) -> Tensor:
    """Values of all steps, by step."""
    values = [torch.empty(0)] * len(SEGMENTS)
    for rows, batch in PaddedPacker().pack(SEGMENTS, max_tokens):
        batch = widen(batch, extra) if extra else batch
        hidden = policy.hidden(batch) if critic.needs_policy_hidden else None
        for row, value in zip(rows, critic.values(batch, batch.value_at_N, hidden), strict=True):
            values[row] = value
    return torch.stack(values)


@pytest.mark.parametrize("kind", [SharedCritic, SeparateCritic])
def test_values_do_not_depend_on_padding(policy, kind):
    """They are the head on the last prompt token's state, the action unseen."""
    critic = make_critic(kind(), policy)
    with torch.no_grad():
        expected = []
        for segment in SEGMENTS:
            prompt = torch.from_numpy(segment.prompt_ids).long()[None]
            state = policy.model(input_ids=prompt, output_hidden_states=True).hidden_states[-1][0, -1]
            expected.append(state @ critic.head.weight[0] + 0.5)
        for max_tokens, extra in ((1, 0), (20, 0), (10**6, 0), (10**6, 4)):
            close(packed_values(critic, policy, max_tokens, extra), torch.stack(expected))


@pytest.mark.parametrize("detach", [False, True], ids=["open", "detached"])
def test_shared_critic_detach(policy, detach):
    critic = make_critic(SharedCritic(detach), policy)
    loss = packed_values(critic, policy, 20).square().sum()
    trunk, head = list(policy.parameters()), list(critic.parameters())
    found = torch.autograd.grad(loss, trunk + head, allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 0.1 for gradient in found[len(trunk) :])
    assert all(gradient is None for gradient in found[: len(trunk)]) == detach
    assert detach or gradients(packed_values(critic, policy, 20).sum(), policy).abs().max() > 0.1


def test_separate_critic_has_its_own_trunk():
    policy = make_policy()
    critic = make_critic(SeparateCritic(), policy)
    loss = packed_values(critic, policy, 20).square().sum()
    assert gradients(loss, critic.trunk).abs().max() > 0.1
    with torch.no_grad():
        before = packed_values(critic, policy, 20)
        for parameter in policy.parameters():
            parameter.mul_(1.5)
        assert torch.equal(packed_values(critic, policy, 20), before)
        critic.copy_weights_from(policy)
        shared = make_critic(SharedCritic(), policy)
        close(packed_values(critic, policy, 20), packed_values(shared, policy, 20))


@pytest.mark.parametrize("kind", [SharedCritic, SeparateCritic])
def test_first_values_are_zero(policy, kind):
    critic = kind()
    critic.build(policy)
    critic.double()
    assert packed_values(critic, policy, 20).tolist() == [0.0] * len(SEGMENTS)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", [SharedCritic, SeparateCritic])
def test_value_head_keeps_float32(kind, autocast):
    policy = make_policy().to(torch.bfloat16)
    critic = kind()
    critic.build(policy)
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    assert critic.head.weight.dtype == torch.float32
    ((_, batch),) = PaddedPacker().pack(SEGMENTS, 10**6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = policy.hidden(batch)
        values = critic.values(batch, batch.value_at_N, hidden)
        states = critic.states(batch, hidden)[batch.value_at_N]
    assert states.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    near(values, states.double() @ critic.head.weight[0].double(), 1e-5)


def test_value_head_by_hand():
    head = ValueHead(2)
    assert [*head.weight.flatten().tolist(), *head.bias.tolist()] == [0.0] * 3
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, -1.0]]))
        head.bias.fill_(0.5)
    values = head(torch.tensor([[[1.0, 1.0], [0.0, 3.0]]]))
    assert values.tolist() == [[1.5, -2.5]]
