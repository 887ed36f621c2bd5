"""Losses as pure functions. Each gives a *sum* over its microbatch: the caller divides by the size of the whole update.

Paper equations: step-level importance ratio and clipped objective (policy_loss), clipped value loss, KL to a reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steppo.errors import ConfigError

Ratio = Literal["step", "token"]
Aggregation = Literal["step-mean", "token-mean"]
KLEstimator = Literal["k3", "k2"]

# Larger log-ratios are clipped long before they matter; exp() of them must not overflow.
_MAX_LOG_RATIO = 10.0


@dataclass(frozen=True)
class LossSettings:
    """The objective.

    Attributes:
        ratio: One length-normalised importance ratio per step (StepPO, GSPO), or one per token (PPO).
        clip_low: Trust region of the ratio below 1.
        clip_high: Trust region of the ratio above 1.
        dual_clip: With token ratios: a bad token's loss stops growing where its ratio passes this number; 0 for never.
        aggregation: Mean over the tokens of a step, then over steps; or over all tokens alike.
        vf_coef: Weight of the value loss.
        value_clip: Largest change of a value that counts in one iteration; 0 for plain squared error.
        ent_coef: Weight of the entropy bonus.
        kl: Keep close to the policy as it was before training: not at all, by a loss, or by a penalty in the reward.
        kl_coef: Weight of that.
        kl_estimator: k3 (low variance) or k2 (unbiased gradient); of the loss and of the figure that is logged.
    """

    ratio: Ratio = "step"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 10.0
    aggregation: Aggregation = "step-mean"
    vf_coef: float = 1.0
    value_clip: float = 0.5
    ent_coef: float = 0.0
    kl: Literal["none", "loss", "reward"] = "none"
    kl_coef: float = 0.001
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "dual_clip", "vf_coef", "value_clip", "ent_coef", "kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"loss.{name} must be at least 0 and finite, not {getattr(self, name)}")
        if self.clip_low > 1:
            raise ConfigError(f"loss.clip_low must be at most 1, not {self.clip_low}: a ratio is never below 0")
        if self.ratio == "token" and 0 < self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(f"loss.dual_clip must be 0, or above 1 + clip_high, not {self.dual_clip}")


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


@dataclass
class PolicyLoss:
    """``loss``: the sum to minimise. ``ratio_A``, ``clipped_A`` (outside the trust region): detached, for diagnostics."""

    loss: Tensor
    ratio_A: Tensor
    clipped_A: Tensor


def policy_loss(
    logprobs_A: Tensor,
    old_logprobs_A: Tensor,
    advantage_A: Tensor,
    step_of_A: Tensor,
    weight_N: Tensor,
    *,
    ratio: Ratio,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    aggregation: Aggregation = "step-mean",
) -> PolicyLoss:
    """Clipped surrogate ``- sum min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)``.

    With token ratios and a dual clip ``c`` the objective is at least ``c A`` where ``A < 0``: a token that has become much
    more likely although it was bad does not dominate the update.

    Args:
        logprobs_A: Current policy; the gradient flows here only.
        old_logprobs_A: Policy when the iteration started.
        advantage_A: A step's advantage at each of its tokens, or tokens' own.
        step_of_A: int64 in [0, N).
        weight_N: Weight of each step: 1 on-policy, a truncated importance weight for stale data.
        ratio: One length-normalised ratio per step, or one per token.
        clip_low: Trust region below 1.
        clip_high: Trust region above 1.
        dual_clip: ``c``, for token ratios only; 0 for none.
        aggregation: How tokens are summed, see ``token_weights``.
    """
    ratio_A = log_ratios(logprobs_A, old_logprobs_A, step_of_A, weight_N.shape[0], ratio).exp()
    clipped_ratio_A = ratio_A.clamp(1 - clip_low, 1 + clip_high)
    objective_A = torch.minimum(ratio_A * advantage_A, clipped_ratio_A * advantage_A)
    if dual_clip and ratio == "token":
        objective_A = torch.where(advantage_A < 0, torch.maximum(objective_A, dual_clip * advantage_A), objective_A)
    loss = -(objective_A * token_weights(step_of_A, weight_N, aggregation)).sum()
    detached_A = ratio_A.detach()
    return PolicyLoss(loss, detached_A, (detached_A < 1 - clip_low) | (detached_A > 1 + clip_high))


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
