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


def slow_sft(policy: TinyPolicy, updates: int, batch_size: int, prompt_coef: float) -> None:
    segments, rng = demonstrations(), np.random.default_rng(5)
    parameters = policy.trained_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - update / updates)
        optimizer.zero_grad()
        losses, of_prompts = [], []
        for index in rng.choice(len(segments), min(batch_size, len(segments)), replace=False):
            prompt, action = segments[index].prompt_ids, segments[index].action_ids
            ids = torch.from_numpy(np.concatenate([prompt, action]).astype(np.int64))
            logprobs = policy.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            of_tokens = -logprobs.gather(1, ids[1:, None]).flatten()
            losses.append(of_tokens[-len(action) :])
            of_prompts.append(of_tokens[: -len(action)])
        (torch.cat(losses).mean() + prompt_coef * torch.cat(of_prompts).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize("prompt_coef", [0.0, 0.3])
@pytest.mark.parametrize(("batch_size", "max_tokens"), [(4, 10**6), (4, 12), (100, 20)])
def test_it_equals_a_slow_loop(batch_size: int, max_tokens: int, prompt_coef: float, tiny_policy: TinyPolicy) -> None:
    policy, expected = copy.deepcopy(tiny_policy).double(), copy.deepcopy(tiny_policy).double()
    slow_sft(expected, 3, batch_size, prompt_coef)
    done: list[int] = []
    learner = SFTLearner(policy, demonstrations(), 3, batch_size, 0.01, 5, ScrambledPacker(), max_tokens, prompt_coef)
    found = learner.fit(progress=lambda update, statistics: done.append(update))
    assert done == [1, 2, 3]
    for weight, other in zip(policy.parameters(), expected.parameters(), strict=True):
        close(weight.detach(), other.detach(), 1e-10)
        assert weight.grad is None
    losses = [float(sum(update.figures["policy_loss"])) for update in found]
    assert losses == sorted(losses, reverse=True)


def test_it_measures_what_greedy_play_would_say(tiny_policy: TinyPolicy) -> None:
    """Also where an action has more than one token, and only some of them are right."""
    policy, segments = copy.deepcopy(tiny_policy).double(), demonstrations(40)
    learner = SFTLearner(policy, segments[:20], 15, 20, 0.01, 0, ScrambledPacker(), 50)
    learner.fit()
    before = [weight.detach().clone() for weight in policy.parameters()]
    losses, exact, right = [], [], []
    for segment in segments:
        ids = segment.prompt_ids.tolist()
        for token in segment.action_ids.tolist():
            with torch.no_grad():
                logprobs = policy.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            losses.append(-float(logprobs[token]))
            right.append(int(logprobs.argmax()) == token)
            ids.append(token)
        exact.append(all(right[-len(segment.action_ids) :]))
    loss, accuracy = learner.measure(segments)
    assert loss == pytest.approx(np.mean(losses), rel=1e-10)
    assert accuracy == np.mean(exact)
    assert 0 < accuracy < np.mean(right)
    assert all(torch.equal(weight, old) for weight, old in zip(policy.parameters(), before, strict=True))


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
