"""Losses against hand-worked numbers and slow implementations in plain Python, values and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steppo.errors import ConfigError
from steppo.losses import ClippedLoss, ObjectiveSettings, kl_penalty, log_ratios, step_means, token_weights, value_loss
from tests.numeric_helpers import FEW, close, near, normal, policy_loss, steps_of

LOW, HIGH = 0.1, 0.3
RATIO = pytest.mark.parametrize("ratio", ["step", "token"])
AGGREGATION = pytest.mark.parametrize("aggregation", ["step-mean", "token-mean"])


@dataclass
class Batch:
    """What the losses of an update need. Gradients are taken at ``logprobs_A`` and ``values_N``."""

    lengths: list[int]
    logprobs_A: Tensor
    old_A: Tensor
    ref_A: Tensor
    advantage_A: Tensor
    weight_N: Tensor
    values_N: Tensor
    old_values_N: Tensor
    targets_N: Tensor

    @property
    def step_of_A(self) -> Tensor:
        return steps_of(self.lengths)

    def select(self, steps: list[int]) -> Batch:
        """Some steps, in the order given."""
        tokens = torch.cat([torch.nonzero(self.step_of_A == step)[:, 0] for step in steps])
        return Batch(
            [self.lengths[step] for step in steps],
            *(x_A[tokens] for x_A in (self.logprobs_A, self.old_A, self.ref_A, self.advantage_A)),
            *(x_N[steps] for x_N in (self.weight_N, self.values_N, self.old_values_N, self.targets_N)),
        )


def random_batch(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Ratios far enough from 1 that clipping acts on both sides; advantages by token."""
    rng = np.random.default_rng(seed)
    tokens, steps = sum(lengths), len(lengths)
    old_A, old_values_N = normal(rng, tokens) - 3, normal(rng, steps)
    numbers = [
        (old_A + 0.4 * normal(rng, tokens)),
        old_A,
        old_A + 0.5 * normal(rng, tokens),
        normal(rng, tokens),
        0.1 + normal(rng, steps).abs(),
        (old_values_N + normal(rng, steps)),
        old_values_N,
        old_values_N + normal(rng, steps),
    ]
    batch = Batch(lengths, *(x.to(dtype) for x in numbers))
    batch.logprobs_A.requires_grad_()
    batch.values_N.requires_grad_()
    return batch


def policy(batch: Batch, ratio: str, aggregation: str, low: float = LOW, high: float = HIGH, dual: float = 0.0):
    loss = ClippedLoss(ratio, low, high, dual)
    return policy_loss(loss, batch.logprobs_A, batch.old_A, batch.advantage_A, batch.step_of_A, batch.weight_N, aggregation)


def slow_policy(batch: Batch, ratio: str, aggregation: str, low: float, high: float, dual: float = 0.0):
    """Loss, its gradient, ratio and clip flag of each token; the gradient derived by hand."""
    loss, gradients, ratios, clipped = 0.0, [], [], []
    tokens = iter(zip(batch.logprobs_A.tolist(), batch.old_A.tolist(), batch.advantage_A.tolist(), strict=True))
    for length, weight in zip(batch.lengths, batch.weight_N.tolist(), strict=True):
        step = [next(tokens) for _ in range(length)]
        mean = sum(new - old for new, old, _ in step) / length
        for new, old, advantage in step:
            w = math.exp(mean if ratio == "step" else new - old)
            share = weight / length if aggregation == "step-mean" else weight
            bounded = min(max(w, 1 - low), 1 + high)
            objective = min(w * advantage, bounded * advantage)
            # A ratio beyond the bound that its advantage pushes it to has no gradient.
            held = (advantage > 0 and w > 1 + high) or (advantage < 0 and w < 1 - low)
            if dual and ratio == "token" and advantage < 0:
                objective = max(objective, dual * advantage)
                held = held or w > dual
            loss -= share * objective
            gradients.append(0.0 if held else -share * w * advantage)
            ratios.append(w)
            clipped.append(w < 1 - low or w > 1 + high)
    return loss, gradients, ratios, clipped


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**16)


@RATIO
@AGGREGATION
@FEW
@given(LENGTHS, SEEDS, st.sampled_from([(0.2, 0.2), (0.05, 0.5), (0.5, 0.05), (3e-4, 4e-4)]))
def test_policy_loss_equals_a_loop(ratio, aggregation, lengths, seed, clip):
    batch = random_batch(lengths, seed)
    result = policy(batch, ratio, aggregation, *clip)
    result.loss.backward()
    loss, gradients, ratios, clipped = slow_policy(batch, ratio, aggregation, *clip)
    close(result.loss.detach(), loss)
    close(batch.logprobs_A.grad, gradients)
    close(result.ratio_A, ratios)
    assert result.clipped_A.tolist() == clipped
    assert not result.ratio_A.requires_grad


def test_policy_loss_by_hand():
    """Two steps: log-ratios ln 2 and 0 (A = 3, weight 1), and ln 1/2 (A = -1, weight 10); clip to [0.9, 1.5]."""
    logprobs_A = torch.tensor([math.log(2.0), 0.0, math.log(0.5)], dtype=torch.float64)
    arguments = (
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([3.0, 3.0, -1.0], dtype=torch.float64),
        torch.tensor([0, 0, 1]),
        torch.tensor([1.0, 10.0], dtype=torch.float64),
    )
    settings = {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 0.0}
    # Token ratios 2 -> 1.5, 1, 0.5 -> 0.9: objectives 4.5, 3, -0.9.
    loss = policy_loss(ClippedLoss("token", **settings), logprobs_A, *arguments).loss
    close(loss, -((4.5 + 3) / 2 + 10 * -0.9))
    loss = policy_loss(ClippedLoss("token", **settings), logprobs_A, *arguments, "token-mean").loss
    close(loss, -(4.5 + 3 + 10 * -0.9))
    # The first step's ratio is sqrt(2), inside.
    loss = policy_loss(ClippedLoss("step", **settings), logprobs_A, *arguments).loss
    close(loss, -(3 * math.sqrt(2) - 9))


@RATIO
@AGGREGATION
@FEW
@given(LENGTHS, SEEDS, st.sampled_from([1.31, 1.5, 2.0, 10.0]))
def test_dual_clip_equals_a_loop(ratio, aggregation, lengths, seed, dual):
    batch = random_batch(lengths, seed)
    result = policy(batch, ratio, aggregation, dual=dual)
    result.loss.backward()
    loss, gradients, ratios, clipped = slow_policy(batch, ratio, aggregation, LOW, HIGH, dual)
    close(result.loss.detach(), loss)
    close(batch.logprobs_A.grad, gradients)
    close(result.ratio_A, ratios)
    assert result.clipped_A.tolist() == clipped


@pytest.mark.parametrize(
    ("w", "advantage", "ratio", "loss", "gradient"),
    [
        (4.0, -2.0, "token", 6.0, 0.0),  # w A = -8, but no less than 3 A
        (2.0, -2.0, "token", 4.0, 4.0),  # -4 is above -6
        (0.5, -2.0, "token", 1.8, 0.0),  # held by the lower bound, 0.9 A
        (4.0, 2.0, "token", -3.0, 0.0),  # held by the upper bound, 1.5 A
        (4.0, -2.0, "step", 8.0, 8.0),  # token ratios only
    ],
)
def test_dual_clip_by_hand(w, advantage, ratio, loss, gradient):
    """c = 3, clip to [0.9, 1.5]. The gradient is with respect to the log-probability: -w A where nothing holds."""
    logprobs_A = torch.tensor([math.log(w)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    arguments = (0 * one, advantage * one, torch.tensor([0]), one)
    settings = {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 3.0}
    result = policy_loss(ClippedLoss(ratio, **settings), logprobs_A, *arguments)
    close(result.loss.detach(), loss)
    close(torch.autograd.grad(result.loss, logprobs_A)[0], [gradient])


def loss_and_gradient(batch: Batch, ratio: str, dual: float) -> list[float]:
    loss = policy(batch, ratio, "step-mean", dual=dual).loss
    return [float(loss.detach()), *torch.autograd.grad(loss, batch.logprobs_A)[0].tolist()]


def test_where_dual_clip_has_no_effect():
    """1.31 holds one of these tokens at least, and only with token ratios where the advantage is negative."""
    lengths = [4] * 20
    batch = random_batch(lengths, seed=3)
    assert loss_and_gradient(batch, "token", 1.31) != loss_and_gradient(batch, "token", 0.0)
    assert loss_and_gradient(batch, "step", 1.31) == loss_and_gradient(batch, "step", 0.0)
    close(policy(batch, "token", "step-mean").loss.detach(), slow_policy(batch, "token", "step-mean", LOW, HIGH)[0])
    good = random_batch(lengths, seed=3)
    good.advantage_A = batch.advantage_A.abs() * (torch.arange(80) % 3 > 0)  # some of them 0
    assert loss_and_gradient(good, "token", 1.31) == loss_and_gradient(good, "token", 0.0)


@pytest.mark.parametrize("dual", [0.5, 1.0, 1.25])
def test_dual_clip_within_the_trust_region_is_refused(dual):
    with pytest.raises(ConfigError, match=rf"dual_clip must be 0, or above 1 \+ clip_high, not {dual}"):
        ClippedLoss("token", clip_high=0.25, dual_clip=dual)


@pytest.mark.parametrize("dual", [-1.0, math.inf, math.nan])
def test_dual_clip_must_be_a_number_at_least_0(dual):
    with pytest.raises(ConfigError, match=r"dual_clip must be at least 0 and finite"):
        ClippedLoss(dual_clip=dual)


def test_dual_clips_that_are_taken():
    assert ClippedLoss().dual_clip == 10
    assert [ClippedLoss("token", clip_high=0.25, dual_clip=dual).dual_clip for dual in (0.0, 1.26)] == [0.0, 1.26]


@pytest.mark.parametrize("name", ["vf_coef", "value_clip", "ent_coef", "kl_coef"])
def test_weights_of_terms_are_at_least_0(name):
    for value in (-1e-9, math.inf, math.nan):
        with pytest.raises(ConfigError, match=f"{name} must be at least 0 and finite"):
            ObjectiveSettings(**{name: value})


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.5, 1.0), (0.5, -1.0), (-0.5, 1.0), (-0.5, -1.0)])
def test_clip_bounds_are_told_apart(log_ratio, advantage):
    """Only ``clip_high`` matters above 1 and only ``clip_low`` below; a bound acts on one sign of the advantage."""

    def loss(low: float, high: float) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        arguments = (log_ratio * one, 0 * one, advantage * one, torch.tensor([0]), one)
        return policy_loss(ClippedLoss("token", low, high, 0.0), *arguments).loss

    unclipped = -math.exp(log_ratio) * advantage
    if log_ratio > 0:
        close(loss(0.1, 0.2), -1.2 if advantage > 0 else unclipped)
        close(loss(0.3, 0.2), loss(0.1, 0.2))
    else:
        close(loss(0.2, 0.1), unclipped if advantage > 0 else 0.8)
        close(loss(0.2, 0.3), loss(0.2, 0.1))


@RATIO
def test_huge_ratios_stay_finite(ratio):
    logprobs_A = torch.tensor([500.0, 500.0], requires_grad=True)
    arguments = torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([0, 1]), torch.ones(2)
    result = policy_loss(ClippedLoss(ratio, LOW, HIGH, 0.0), logprobs_A, *arguments)
    result.loss.backward()
    near(result.loss.detach(), torch.tensor(math.exp(10) - (1 + HIGH)), 1e-6)
    assert logprobs_A.grad.tolist() == [0.0, 0.0]


def test_policy_loss_at_ratio_one_is_policy_gradient():
    """On-policy each token's gradient is minus its advantage over the step's length, although it ties with its clip."""
    for ratio in ("step", "token"):
        batch = random_batch([2, 3], seed=1)
        batch.old_A = batch.logprobs_A.detach().clone()
        policy(batch, ratio, "step-mean").loss.backward()
        shares = (batch.weight_N / torch.tensor(batch.lengths))[batch.step_of_A]
        close(batch.logprobs_A.grad, -batch.advantage_A * shares)


@FEW
@given(LENGTHS, SEEDS)
def test_step_ratio_is_the_geometric_mean(lengths, seed):
    batch = random_batch(lengths, seed)
    steps = len(lengths)
    ratio_A = log_ratios(batch.logprobs_A, batch.old_A, batch.step_of_A, steps, "step").exp()
    logs = (batch.logprobs_A - batch.old_A).detach().split(lengths)
    close(ratio_A.detach(), torch.cat([x.mean().exp().expand(len(x)) for x in logs]))


def direct_step_loss(batch: Batch, low: float, high: float) -> Tensor:
    """The step ratio as the paper defines it: ``w_t`` itself is differentiated, each token's advantage against it."""
    loss = batch.logprobs_A.new_zeros(())
    for step, tokens in enumerate(torch.arange(sum(batch.lengths)).split(batch.lengths)):
        w = (batch.logprobs_A[tokens] - batch.old_A[tokens]).mean().exp()
        advantage = batch.advantage_A[tokens]
        objective = torch.minimum(w * advantage, w.clamp(1 - low, 1 + high) * advantage).mean()
        loss = loss - batch.weight_N[step] * objective
    return loss


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [0.05, -0.05, 0.6, -0.6], ids=["in-above", "in-below", "out-above", "out-below"])
def test_step_ratio_gradient_in_each_region(log_ratio, advantage):
    """One step with a constant advantage: the gradient of ``min(w A, clip(w) A)`` with ``w = exp(mean(logp - old))``."""
    batch = random_batch([4], seed=5)
    batch.advantage_A = torch.full((4,), advantage, dtype=torch.float64)
    shifts = torch.tensor([0.3, -0.5, 0.1, 0.1], dtype=torch.float64)
    batch.old_A = batch.logprobs_A.detach() - log_ratio - shifts
    result = policy(batch, "step", "step-mean")
    (gradient,) = torch.autograd.grad(result.loss, batch.logprobs_A)
    direct = direct_step_loss(batch, LOW, HIGH)
    (expected,) = torch.autograd.grad(direct, batch.logprobs_A)
    close(result.loss.detach(), direct.detach())
    close(gradient, expected)
    held = (log_ratio, advantage) in [(0.6, 2.0), (-0.6, -2.0)]
    assert bool((gradient == 0).all()) == held
    assert bool(result.clipped_A.all()) == (abs(log_ratio) > 0.5)


@FEW
@given(LENGTHS, SEEDS)
def test_step_ratio_gradient_with_step_advantages(lengths, seed):
    batch = random_batch(lengths, seed)
    batch.advantage_A = normal(np.random.default_rng(seed), len(lengths))[batch.step_of_A]
    (gradient,) = torch.autograd.grad(policy(batch, "step", "step-mean").loss, batch.logprobs_A)
    (expected,) = torch.autograd.grad(direct_step_loss(batch, LOW, HIGH), batch.logprobs_A)
    close(gradient, expected)


def test_step_ratio_gradient_with_token_advantages():
    """Here the two differ: each token has its own advantage, instead of all of them the mean. The values are equal."""
    batch = random_batch([2], seed=0)
    batch.old_A = batch.logprobs_A.detach().clone()
    batch.advantage_A = torch.tensor([3.0, -1.0], dtype=torch.float64)
    batch.weight_N = torch.ones(1, dtype=torch.float64)
    loss, direct = policy(batch, "step", "step-mean").loss, direct_step_loss(batch, LOW, HIGH)
    close(loss.detach(), direct.detach())
    close(torch.autograd.grad(loss, batch.logprobs_A)[0], [-1.5, 0.5])
    close(torch.autograd.grad(direct, batch.logprobs_A)[0], [-0.5, -0.5])


@AGGREGATION
def test_single_token_steps(aggregation):
    """With one token a step the two ratios, and the two aggregations, are one."""
    batch = random_batch([1] * 6, seed=2)
    losses = [policy(batch, ratio, kind).loss for ratio, kind in (("step", aggregation), ("token", "step-mean"))]
    close(losses[0].detach(), losses[1].detach())
    close(*(torch.autograd.grad(loss, batch.logprobs_A)[0] for loss in losses))


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("step-mean", [1.0, 1.0, 6.0]), ("token-mean", [2.0, 2.0, 6.0])], ids=["step", "token"]
)
def test_token_weights_by_hand(aggregation, expected):
    """The middle step has no tokens."""
    weight_N = torch.tensor([2.0, 5.0, 6.0], dtype=torch.float64)
    close(token_weights(torch.tensor([0, 0, 2]), weight_N, aggregation), expected)


def test_step_means_by_hand():
    x_A = torch.tensor([1.0, 2.0, 6.0, 4.0], dtype=torch.float64)
    close(step_means(x_A, torch.tensor([0, 0, 0, 2]), 3), [3.0, 0.0, 4.0])


def test_value_loss_by_hand():
    """Errors: inside the clip 1 -> 1; beyond, clipped further from the target 0.5 -> 1.5; beyond, plain worse -> 3."""
    values = torch.tensor([1.0, 2.5, 3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.75, 1.0, 0.0], dtype=torch.float64)
    targets = torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    loss = value_loss(values, old, targets, weights, 0.5)
    close(loss.detach(), 0.5 * (1 * 1 + 2 * 2.25 + 4 * 9))
    close(torch.autograd.grad(loss, values)[0], [-1.0, 0.0, 12.0])
    loss = value_loss(values, old, targets, weights, None)
    close(loss.detach(), 0.5 * (1 * 1 + 2 * 0.25 + 4 * 9))
    close(torch.autograd.grad(loss, values)[0], [-1.0, -1.0, 12.0])


@FEW
@given(st.integers(1, 12), SEEDS, st.sampled_from([None, 0.1, 0.5, 5.0]))
def test_value_loss_equals_a_loop(steps, seed, clip):
    batch = random_batch([1] * steps, seed)
    loss = value_loss(batch.values_N, batch.old_values_N, batch.targets_N, batch.weight_N, clip)
    loss.backward()
    expected, gradients = 0.0, []
    arrays = (batch.values_N, batch.old_values_N, batch.targets_N, batch.weight_N)
    for value, old, target, weight in zip(*(x.tolist() for x in arrays), strict=True):
        error, gradient = (value - target) ** 2, weight * (value - target)
        if clip is not None and abs(value - old) > clip:
            clipped_error = (old + math.copysign(clip, value - old) - target) ** 2
            error, gradient = (clipped_error, 0.0) if clipped_error > error else (error, gradient)
        expected += 0.5 * weight * error
        gradients.append(gradient)
    close(loss.detach(), expected)
    close(batch.values_N.grad, gradients)


def test_kl_penalty_formulas():
    logprobs_A = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    ref_A = torch.tensor([-1.5, -2.0, -1.0], dtype=torch.float64)
    close(kl_penalty(logprobs_A, ref_A, "k2"), [0.125, 0.0, 2.0])
    close(kl_penalty(logprobs_A, ref_A, "k3"), [math.exp(-0.5) - 0.5, 0.0, math.exp(2) - 3])


@FEW
@given(st.integers(1, 20), SEEDS)
def test_kl_penalty_is_never_negative_and_zero_at_equality(size, seed):
    rng = np.random.default_rng(seed)
    logprobs_A, ref_A = normal(rng, size), normal(rng, size)
    for estimator in ("k3", "k2"):
        assert (kl_penalty(logprobs_A, ref_A, estimator) > 0).all()
        assert (kl_penalty(logprobs_A, logprobs_A, estimator) == 0).all()


def test_kl_penalty_stays_finite():
    logprobs_A = torch.tensor([-500.0], requires_grad=True)
    penalty = kl_penalty(logprobs_A, torch.zeros(1), "k3")
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert logprobs_A.grad.isfinite().all()


def test_kl_penalty_expectations():
    """Over all outcomes k3's value and k2's gradient are the reverse KL's; k3's gradient and k2's value are not."""
    rng = np.random.default_rng(0)
    logits = normal(rng, 5).requires_grad_()
    logprobs, ref = logits.log_softmax(-1), normal(rng, 5).log_softmax(-1)
    chances = logprobs.detach().exp()
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    (true_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    expected = {name: (chances * kl_penalty(logprobs, ref, name)).sum() for name in ("k2", "k3")}
    gradient = {name: torch.autograd.grad(expected[name], logits, retain_graph=True)[0] for name in expected}
    close(gradient["k2"], true_gradient)
    close(expected["k3"].detach(), kl.detach())
    assert (gradient["k3"] - true_gradient).norm() > 0.1 * true_gradient.norm()
    assert (expected["k2"] - kl).abs() > 0.01 * kl


def all_losses(batch: Batch, ratio: str, aggregation: str) -> Tensor:
    """Policy, value and KL terms of a batch, summed."""
    kl_A = kl_penalty(batch.logprobs_A, batch.ref_A, "k3")
    return (
        policy(batch, ratio, aggregation).loss
        + value_loss(batch.values_N, batch.old_values_N, batch.targets_N, batch.weight_N, 0.5)
        + 0.1 * (kl_A * token_weights(batch.step_of_A, batch.weight_N, aggregation)).sum()
    )


def loss_and_gradients(batch: Batch, parts: list[list[int]], ratio: str, aggregation: str) -> list[Tensor]:
    """Of the sum over microbatches made of the given steps."""
    loss = sum(all_losses(batch.select(part), ratio, aggregation) for part in parts)
    return [loss.detach(), *torch.autograd.grad(loss, [batch.logprobs_A, batch.values_N])]


@RATIO
@AGGREGATION
@FEW
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), SEEDS, st.randoms(use_true_random=False))
def test_order_and_microbatches_do_not_matter(ratio, aggregation, lengths, seed, random):
    batch = random_batch(lengths, seed)
    steps = list(range(len(lengths)))
    whole = loss_and_gradients(batch, [steps], ratio, aggregation)
    random.shuffle(steps)
    cut = random.randint(1, len(steps) - 1)
    for parts in ([steps], [steps[:cut], steps[cut:]], [[step] for step in steps]):
        for actual, expected in zip(loss_and_gradients(batch, parts, ratio, aggregation), whole, strict=True):
            close(actual, expected)


@RATIO
@AGGREGATION
def test_order_and_microbatches_do_not_matter_in_float32(ratio, aggregation):
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 40, size=60).tolist()
    whole = loss_and_gradients(random_batch(lengths, 6), [list(range(60))], ratio, aggregation)
    single = random_batch(lengths, 6, torch.float32)
    parts = [part.tolist() for part in np.array_split(rng.permutation(60), 7)]
    for actual, expected in zip(loss_and_gradients(single, parts, ratio, aggregation), whole, strict=True):
        assert actual.dtype == torch.float32
        near(actual, expected, 1e-5)
