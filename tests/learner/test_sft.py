"""Supervised fine-tuning beside a slow loop: one demonstration at a time, straight from the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from steppo.batch import Segment
from steppo.learner.sft import SFTLearner
from steppo.losses import NLL, LossInputs
from steppo.models import TinyPolicy
from tests.learner.fakes import ScrambledPacker
from tests.numeric_helpers import close, normal, steps_of


def demonstrations(count: int = 9) -> list[Segment]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, (count, 2))
    return [Segment(*(rng.integers(0, 40, length).astype(np.int32) for length in pair)) for pair in lengths]


def slow_sft(policy: TinyPolicy, updates: int, batch_size: int) -> None:
    segments, rng = demonstrations(), np.random.default_rng(5)
    parameters = policy.trained_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - update / updates)
        optimizer.zero_grad()
        losses = []
        for index in rng.choice(len(segments), min(batch_size, len(segments)), replace=False):
            prompt, action = segments[index].prompt_ids, segments[index].action_ids
            ids = torch.from_numpy(np.concatenate([prompt, action]).astype(np.int64))
            logprobs = policy.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-logprobs.gather(1, ids[1:, None])[-len(action) :].flatten())
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(4, 10**6), (4, 12), (100, 20)])
def test_it_equals_a_slow_loop(batch_size: int, max_tokens: int, tiny_policy: TinyPolicy) -> None:
    policy, expected = copy.deepcopy(tiny_policy).double(), copy.deepcopy(tiny_policy).double()
    slow_sft(expected, 3, batch_size)
    done: list[int] = []
    learner = SFTLearner(policy, demonstrations(), 3, batch_size, 0.01, 5, ScrambledPacker(), max_tokens)
    found = learner.fit(progress=done.append)
    assert done == [1, 2, 3]
    for weight, other in zip(policy.parameters(), expected.parameters(), strict=True):
        close(weight.detach(), other.detach(), 1e-10)
        assert weight.grad is None
    losses = [float(sum(update.figures["policy_loss"])) for update in found]
    assert losses == sorted(losses, reverse=True)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_policy: TinyPolicy) -> None:
    policy = copy.deepcopy(tiny_policy)
    before = [weight.detach().clone() for weight in policy.parameters()]

    def backward(loss: Tensor) -> None:
        (loss * torch.nan).backward()

    [found] = SFTLearner(policy, demonstrations(), 1, 4, 0.01, 0).fit(backward)
    assert not found.figures
    assert all(torch.equal(weight, old) for weight, old in zip(policy.parameters(), before, strict=True))


def test_nll_looks_at_the_policy_alone() -> None:
    logprobs_A = (normal(np.random.default_rng(0), 5) - 2).requires_grad_()
    noise = torch.full((5,), torch.nan, dtype=torch.float64)
    output = NLL()(LossInputs(logprobs_A, noise, noise, noise, steps_of([2, 3]), 2, noise))
    close(output.loss_A.detach(), -logprobs_A.detach())
    [gradient] = torch.autograd.grad(output.loss_A.sum(), logprobs_A)
    close(gradient, [-1.0] * 5)
    assert output.ratio_A.tolist() == [1.0] * 5
    assert not output.clipped_A.any()
