"""CISPO and DPPO-TV: by hand, against loops with gradients derived by hand, and what makes them what they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steppo.errors import ConfigError
from steppo.losses import CISPO, DPPOTV, ClippedLoss
from tests.numeric_helpers import FEW, close, normal, policy_loss, steps_of

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**16)


def draw(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """Log-probabilities below 0, far enough apart that bounds act; behaviour and old policy differ."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    old_A = -0.3 - normal(rng, tokens).abs()
    return {
        "logprobs_A": torch.minimum(old_A + 0.6 * normal(rng, tokens), torch.tensor(-1e-3)).requires_grad_(),
        "old_A": old_A,
        "behaviour_A": torch.minimum(old_A + 0.2 * normal(rng, tokens), torch.tensor(-1e-3)),
        "advantage_A": normal(rng, tokens),
        "step_of_A": steps_of(lengths),
        "weight_N": 0.1 + normal(rng, len(lengths)).abs(),
    }


@FEW
@given(LENGTHS, SEEDS, st.sampled_from([(1.0, 4.0), (0.2, 0.3), (0.5, 0.05)]), st.sampled_from(["token", "step"]))
def test_cispo_equals_a_loop(lengths, seed, bounds, ratio):
    """The gradient is that of REINFORCE times the bounded ratio: no token is dropped."""
    x = draw(lengths, seed)
    result = policy_loss(CISPO(*bounds, ratio), **x)
    result.loss.backward()
    loss, gradients, clipped, start = 0.0, [], [], 0
    for length, weight in zip(lengths, x["weight_N"].tolist(), strict=True):
        places = range(start, start + length)
        logs = [float(x["logprobs_A"][a].detach() - x["old_A"][a]) for a in places]
        for a, log in zip(places, logs, strict=True):
            w = math.exp(log if ratio == "token" else sum(logs) / length)
            bounded = min(max(w, 1 - bounds[0]), 1 + bounds[1])
            share, advantage = weight / length, float(x["advantage_A"][a])
            loss -= share * bounded * advantage * float(x["logprobs_A"][a])
            gradients.append(-share * bounded * advantage)
            clipped.append(bounded != w)
        start += length
    close(result.loss.detach(), loss)
    close(x["logprobs_A"].grad, gradients)
    assert result.clipped_A.tolist() == clipped
    assert not result.ratio_A.requires_grad


def test_cispo_by_hand():
    """Ratio 8, bounded by 5; advantage 2, log-probability ln 1/2: the loss is -5 * 2 * ln(1/2), its gradient -10."""
    logprobs_A = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    arguments = (logprobs_A, one * math.log(1 / 16), 2 * one, torch.tensor([0]), one)
    result = policy_loss(CISPO(1.0, 4.0), *arguments)
    close(result.loss.detach(), 10 * math.log(2))
    close(torch.autograd.grad(result.loss, logprobs_A)[0], [-10.0])
    assert float(torch.autograd.grad(policy_loss(ClippedLoss("token"), *arguments).loss, logprobs_A)[0]) == 0  # drops it


@FEW
@given(LENGTHS, SEEDS, st.sampled_from([(0.2, 1e-3), (0.05, 0.1), (0.01, 0.0)]))
def test_dppo_equals_a_loop(lengths, seed, settings):
    x = draw(lengths, seed)
    result = policy_loss(DPPOTV(*settings), **x)
    result.loss.backward()
    loss, gradients, dropped, start = 0.0, [], [], 0
    for length, weight in zip(lengths, x["weight_N"].tolist(), strict=True):
        for a in range(start, start + length):
            new, old = float(x["logprobs_A"][a]), float(x["behaviour_A"][a])
            advantage, w, share = float(x["advantage_A"][a]), math.exp(new - old), weight / length
            shift = math.exp(new) - math.exp(old)
            drop = (advantage > 0 and shift > settings[0]) or (advantage < 0 and shift < -settings[0])
            loss += share * ((0.0 if drop else -w * advantage) + settings[1] * (new - old) ** 2)
            gradients.append(share * ((0.0 if drop else -w * advantage) + 2 * settings[1] * (new - old)))
            dropped.append(drop)
        start += length
    close(result.loss.detach(), loss)
    close(x["logprobs_A"].grad, gradients)
    assert result.clipped_A.tolist() == dropped


@pytest.mark.parametrize(
    ("before", "now", "advantage", "dropped"),
    [
        (1e-4, 3e-4, 1.0, False),  # three times as likely, and still rare
        (0.5, 0.75, 1.0, True),
        (0.5, 0.75, -1.0, False),  # it comes back
        (0.75, 0.5, -1.0, True),
        (0.75, 0.5, 1.0, False),
        (0.5, 0.65, 1.0, False),
    ],
)
def test_dppo_goes_by_probabilities(before, now, advantage, dropped):
    """The old policy does not matter, only the one that sampled."""
    logprobs_A = torch.tensor([math.log(now)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    arguments = (logprobs_A, 0 * one - 9.0, advantage * one, torch.tensor([0]), one)
    result = policy_loss(DPPOTV(0.2, 0.0), *arguments, behaviour_A=one * math.log(before))
    assert result.clipped_A.tolist() == [dropped]
    close(result.loss.detach(), 0.0 if dropped else -advantage * now / before)
    close(torch.autograd.grad(result.loss, logprobs_A)[0], [0.0 if dropped else -advantage * now / before])


@pytest.mark.parametrize(
    "make", [lambda v: CISPO(v), lambda v: CISPO(0.5, v), lambda v: DPPOTV(v), lambda v: DPPOTV(0.2, v)]
)
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_settings_out_of_range_are_refused(make, value):
    with pytest.raises(ConfigError, match="must be at least 0 and finite"):
        make(value)


def test_a_bound_below_0_is_refused():
    with pytest.raises(ConfigError, match=r"CISPO: clip_low must be at most 1, not 1\.5"):
        CISPO(1.5)


@pytest.mark.parametrize("loss", [CISPO(), DPPOTV(), ClippedLoss("token"), ClippedLoss("step")], ids=str)
def test_huge_log_ratios_stay_finite(loss):
    logprobs_A = torch.tensor([500.0, -500.0], requires_grad=True)
    result = policy_loss(loss, logprobs_A, torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.tensor([0, 1]), torch.ones(2))
    result.loss.backward()
    assert result.loss.isfinite()
    assert logprobs_A.grad.isfinite().all()
