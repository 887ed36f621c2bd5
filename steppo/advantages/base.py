"""What a credit scheme must offer, and the arithmetic that schemes share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steppo.errors import ConfigError
from steppo.types import Credit, CreditBatch


class Advantage(ABC):
    """Steps of one iteration -> advantages and critic targets. Pure: no rank, no batch, no model.

    Attributes:
        needs_values: ``step`` builds a critic read at each prompt's last token, ``token`` one read before each action token.
        needs_groups: Several episodes per task are needed.
        needs_observations: ``CreditBatch.observation_N`` is wanted; an instance may decide by its settings.
    """

    needs_values: ClassVar[Literal["none", "step", "token"]] = "none"
    needs_groups: ClassVar[bool] = False
    needs_observations: bool = False

    @abstractmethod
    def __call__(self, batch: CreditBatch) -> Credit:
        """Assigns credit. The result is in the order of the batch and does not depend on it."""


def check_decays(scheme: Advantage, **decays: float) -> None:
    """Discounts and the like are shares; ``ConfigError`` names the one that is not."""
    for name, value in decays.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{type(scheme).__name__}: {name} must be from 0 to 1, not {value}")


def whiten(x: Tensor) -> Tensor:
    """Zero mean, unit sample standard deviation; a single element, or equal ones, give 0."""
    if x.numel() < 2 or torch.equal(*torch.aminmax(x)):
        return torch.zeros_like(x)
    centred = x - x.mean()
    deviation = torch.linalg.vector_norm(centred) / math.sqrt(x.numel() - 1)
    return centred.div_(deviation + 1e-8)


def standardised_within(x: Tensor, group: Tensor, scale_by_std: bool) -> Tensor:
    """``x`` minus the mean of its group and, if ``scale_by_std``, divided by the group's sample std + 1e-6; all [n].

    A group of one, or of equal numbers, gives 0.

    Args:
        x: Floating-point numbers.
        group: int64, equal for rows of one group; any numbers.
        scale_by_std: Divide, as GRPO does, or only centre.
    """
    _, group, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    zeros = x.new_zeros(len(sizes))
    centred = x - (zeros.index_add(0, group, x) / sizes)[group]
    lowest = zeros.scatter_reduce(0, group, x, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, x, "amax", include_self=False)
    centred = torch.where((lowest == highest)[group], 0.0, centred)
    if not scale_by_std:
        return centred
    deviation = (zeros.index_add(0, group, centred.square()) / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (deviation + 1e-6)[group]


_ROWS_AT_ONCE = 2**18  # what is allocated for them is small enough to be used again


def discounted_suffix_sums_(x: Tensor, decay: float, is_last: Tensor) -> Tensor:
    """``x_t <- x_t + decay * x_{t+1}``, in place, within runs that end where ``is_last`` is true; all [N], rows in order.

    A scan by columns of rows: the same place of all columns at once, then the columns' first rows in the same way.
    """
    for start in reversed(range(0, len(x), _ROWS_AT_ONCE)):
        stop = start + _ROWS_AT_ONCE
        rows, ends = x[start:stop], is_last[start:stop]
        if stop < len(x):
            rows[-1] += decay * x[stop] * ~ends[-1]
        columns = _in_columns(rows)
        factor = torch.full_like(columns, decay).masked_fill_(_in_columns(ends), 0.0)
        rows.copy_(_scan(columns, factor)[: len(rows)])
    return x


def _scan(y: Tensor, factor: Tensor) -> Tensor:
    """``y_t <- y_t + factor_t * y_{t+1}``, from the end on, of rows that stand in columns; gives them in one. Overwrites."""
    ys, factors = y.unbind(), factor.unbind()
    for place in reversed(range(len(ys) - 1)):
        ys[place].addcmul_(factors[place], ys[place + 1])
        factors[place].mul_(factors[place + 1])  # what the next column's first row will count here
    columns = y.shape[1]
    if columns > 1:
        firsts = _scan(_in_columns(y[0]), _in_columns(factor[0]))[:columns]
        y[:, :-1].addcmul_(factor[:, :-1], firsts[1:])
    return y.t().reshape(-1)


def _in_columns(x: Tensor) -> Tensor:
    """[width, n]: one row after the other down each column, the last one filled up with 0."""
    width = min(64, math.isqrt(len(x)) + 1)
    full, rest = divmod(len(x), width)
    columns = x.new_empty(width, full + (rest > 0))
    columns[:, :full] = x[: full * width].reshape(full, width).t()
    if rest:
        columns[:rest, full] = x[full * width :]
        columns[rest:, full] = 0
    return columns


def generalised_advantages(
    reward: Tensor, value: Tensor, is_last: Tensor, final_value: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """GAE over rows that are sorted by episode and time.

    Args:
        reward: [N] or [A].
        value: Same shape, value before each row's action.
        is_last: bool, same shape, each episode's last row.
        final_value: Value after each of those, in their order.
        gamma: Discount per row.
        gae_lambda: Decay of the temporal differences per row.
    """
    difference = reward - value
    difference[:-1].add_(value[1:], alpha=gamma)
    difference[is_last] = reward[is_last] - value[is_last] + gamma * final_value
    return discounted_suffix_sums_(difference, gamma * gae_lambda, is_last)


def ends_of_runs(episode: Tensor) -> Tensor:
    """Last row of each contiguous run of equal numbers: bool, [N]."""
    is_last = torch.ones_like(episode, dtype=torch.bool)
    is_last[:-1] = episode[1:] != episode[:-1]
    return is_last


def episode_returns(batch: CreditBatch) -> Tensor:
    """Undiscounted return of each episode, [E]."""
    return torch.zeros_like(batch.bootstrap_E).index_add(0, batch.episode_N, batch.reward_N)


def time_order(episode_N: Tensor, index_N: Tensor) -> Tensor:
    """Permutation that sorts steps by episode, then time."""
    return torch.argsort(episode_N * (index_N.max() + 1) + index_N, stable=True)


def token_time_order(batch: CreditBatch) -> tuple[Tensor | slice, Tensor]:
    """Permutation that sorts action tokens by episode, then time, and each episode's last token in that order, bool [A].

    Where the steps are in order already the permutation is ``slice(None)``, which copies nothing.
    """
    order_N = time_order(batch.episode_N, batch.index_N)
    length_N = torch.bincount(batch.step_of_A, minlength=len(order_N))
    end_N = length_N[order_N].cumsum(0)
    is_last = torch.zeros_like(batch.step_of_A, dtype=torch.bool)
    is_last[end_N[ends_of_runs(batch.episode_N[order_N])] - 1] = True
    if bool((order_N[1:] > order_N[:-1]).all()):
        return slice(None), is_last
    return tokens_in_order(length_N, order_N), is_last


def tokens_in_order(length_N: Tensor, order_N: Tensor) -> Tensor:
    """Permutation of action tokens, [A], that follows a permutation of their steps."""
    start_N = length_N.cumsum(0) - length_N
    lengths = length_N[order_N]
    first = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(start_N[order_N] - first, lengths) + torch.arange(
        int(length_N.sum()), device=length_N.device
    )


def unsort(x: Tensor, order: Tensor | slice) -> Tensor:
    """Undoes ``x = y[order]``."""
    if isinstance(order, slice):
        return x
    y = torch.empty_like(x)
    y[order] = x
    return y


def final_values(batch: CreditBatch, bootstrap_truncated: bool) -> Tensor:
    """Value after each episode's last step, [E]: the bootstrap where an episode was cut and that is wanted, else 0."""
    if not bootstrap_truncated:
        return torch.zeros_like(batch.bootstrap_E)
    return torch.where(batch.terminated_E, torch.zeros_like(batch.bootstrap_E), batch.bootstrap_E)
