"""What a credit scheme must offer, and the arithmetic that schemes share."""

from __future__ import annotations

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
    if x.numel() < 2 or bool((x == x.flatten()[0]).all()):
        return torch.zeros_like(x)
    return (x - x.mean()) / (x.std() + 1e-8)


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


def discounted_suffix_sums(x: Tensor, decay: float, is_last: Tensor) -> Tensor:
    """``y_t = x_t + decay * y_{t+1}`` within runs that end where ``is_last`` is true; all [N], rows in order.

    A scan by doubling: the logarithm of the longest run in passes, each over all rows at once.
    """
    if x.numel() == 0:
        return x.clone()
    ends = torch.nonzero(is_last)[:, 0]
    longest = int(torch.diff(ends, prepend=ends.new_tensor([-1])).max())
    y = x.clone()
    factor = torch.where(is_last, torch.zeros_like(x), torch.full_like(x, decay))
    reach = 1
    while reach < longest:
        y[:-reach] = y[:-reach] + factor[:-reach] * y[reach:]
        ahead = torch.zeros_like(factor)
        ahead[:-reach] = factor[reach:]
        factor = factor * ahead
        reach *= 2
    return y


def generalised_advantages(
    reward: Tensor, value: Tensor, episode: Tensor, final_value_E: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """GAE over rows that are sorted by episode and time.

    Args:
        reward: [N] or [A].
        value: Same shape, value before each row's action.
        episode: int64, same shape, contiguous runs.
        final_value_E: Value after each episode's last row.
        gamma: Discount per row.
        gae_lambda: Decay of the temporal differences per row.
    """
    is_last = ends_of_runs(episode)
    following = torch.where(is_last, final_value_E[episode], torch.roll(value, -1))
    return discounted_suffix_sums(reward + gamma * following - value, gamma * gae_lambda, is_last)


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
    by_time = torch.argsort(index_N, stable=True)
    return by_time[torch.argsort(episode_N[by_time], stable=True)]


def token_time_order(batch: CreditBatch) -> Tensor:
    """Permutation that sorts action tokens by episode, then time, [A]."""
    order_N = time_order(batch.episode_N, batch.index_N)
    place_N = unsort(torch.arange(len(order_N), device=order_N.device), order_N)
    return torch.argsort(place_N[batch.step_of_A], stable=True)


def unsort(x: Tensor, order: Tensor) -> Tensor:
    """Undoes ``x = y[order]``."""
    y = torch.empty_like(x)
    y[order] = x
    return y


def final_values(batch: CreditBatch, bootstrap_truncated: bool) -> Tensor:
    """Value after each episode's last step, [E]: the bootstrap where an episode was cut and that is wanted, else 0."""
    if not bootstrap_truncated:
        return torch.zeros_like(batch.bootstrap_E)
    return torch.where(batch.terminated_E, torch.zeros_like(batch.bootstrap_E), batch.bootstrap_E)
