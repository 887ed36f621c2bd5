"""What losses are made of, as pure functions. The caller divides sums by the size of the whole update."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ratio = Literal["step", "token"]
Aggregation = Literal["step-mean", "token-mean"]
KLEstimator = Literal["k3", "k2"]

# Larger log-ratios are clipped long before they matter; exp() of them must not overflow.
_MAX_LOG_RATIO = 10.0


def token_weights(step_of_A: Tensor, weight_N: Tensor, aggregation: Aggregation) -> Tensor:
    """Weight of each action token in a sum, [A].

    ``step-mean`` gives a step's tokens its weight together (mean over tokens, then sum over steps), ``token-mean`` each.
    """
    if aggregation == "token-mean":
        return weight_N[step_of_A]
    lengths_N = torch.bincount(step_of_A, minlength=weight_N.shape[0]).clamp(min=1)
    return (weight_N / lengths_N)[step_of_A]


def step_means(x_A: Tensor, step_of_A: Tensor, num_steps: int) -> Tensor:
    """Mean over each step's action tokens, [N]; 0 for a step without any."""
    lengths_N = torch.bincount(step_of_A, minlength=num_steps).clamp(min=1)
    return x_A.new_zeros(num_steps).index_add(0, step_of_A, x_A) / lengths_N


def log_ratios(logprobs_A: Tensor, old_logprobs_A: Tensor, step_of_A: Tensor, num_steps: int, ratio: Ratio) -> Tensor:
    """Logarithm of the importance ratio of each action token, [A].

    ``token``: ``log w_{t,i}``. ``step``: its *value* is the length-normalised ``log w_t = mean_i log w_{t,i}`` of the
    token's step, while its gradient flows through the token's own log-probability (the paper's public form). Where the
    advantage is constant over a step this has the gradient of ``w_t`` itself.
    """
    log_ratio_A = logprobs_A - old_logprobs_A
    if ratio == "step":
        mean_A = step_means(log_ratio_A.detach(), step_of_A, num_steps)[step_of_A]
        log_ratio_A = logprobs_A - logprobs_A.detach() + mean_A
    return log_ratio_A.clamp(max=_MAX_LOG_RATIO)


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """Clipped squared error ``0.5 * sum w max((v - R)^2, (clip(v, v_old +- clip) - R)^2)``.

    Args:
        values: [N] or [A].
        old_values: Same shape, when the iteration started.
        targets: Same shape.
        weights: Same shape.
        clip: Largest change of a value that still counts; ``None`` for plain squared error.
    """
    error = (values - targets).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - targets).square())
    return 0.5 * (error * weights).sum()


def kl_penalty(logprobs_A: Tensor, ref_logprobs_A: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(policy || reference) at each action token, [A], as a loss.

    ``k3``: ``exp(d) - d - 1`` with ``d = ref - current``: low variance, never negative, its gradient slightly biased.
    ``k2``: ``d^2 / 2``: on-policy its gradient is that of the true reverse KL.
    """
    difference = ref_logprobs_A - logprobs_A
    if estimator == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(max=_MAX_LOG_RATIO)
    return difference.exp() - difference - 1
