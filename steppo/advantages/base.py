"""What a credit scheme must offer, and the arithmetic that schemes share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from steppo.batch import Credit, CreditBatch
from steppo.errors import ConfigError


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


T = TypeVar("T")


def given(column: T | None, name: str) -> T:
    """A column that the scheme's ``needs_values`` or ``needs_observations`` has asked for.

    Raises:
        ConfigError: It is not there.
    """
    if column is None:
        raise ConfigError(f"the credit batch has no {name}: the scheme's needs_values or needs_observations must ask for it")
    return column


def check_decays(scheme: Advantage, **decays: float) -> None:
    """Discounts and the like are shares; ``ConfigError`` names the one that is not."""
    for name, value in decays.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{type(scheme).__name__}: {name} must be from 0 to 1, not {value}")


@dataclass(frozen=True)
class Returns:
    """Sums of rewards that a scheme compares: of whole episodes, or of what follows each step; all [n].

    Attributes:
        task: Of the task's rewards. They alone decide what is equal, what the mean is and how far numbers spread.
        penalty: Of the KL penalty in the reward; 0 without. A little noise of it must not become a verdict on equal returns.
        summed: Of the task rewards' magnitudes, which the rounding of ``task`` goes by.
    """

    task: Tensor
    penalty: Tensor
    summed: Tensor


_ROUNDING = 1e-12  # of a few thousand float64 numbers that were added up in another order


def are_equal(lowest: Tensor, highest: Tensor, summed: Tensor) -> Tensor:
    """Whether all numbers between two bounds count as one number: the one rule of all schemes and figures.

    Args:
        lowest: The smallest.
        highest: The largest.
        summed: Largest sum of magnitudes that one of them was added up from: where much cancels, much is rounded.
    """
    return (lowest == highest) | (highest - lowest < _ROUNDING * summed)


def whiten(x: Tensor, episode: Tensor | None = None) -> Tensor:
    """Zero mean, unit sample standard deviation; a single element, or equal ones, give 0.

    Args:
        x: [n].
        episode: int64, of each row: in mean and deviation all episodes weigh the same, however many rows they have, and a
            row its share of that. Without, all rows weigh the same. If all episodes are equally long both are one.
    """
    return whiten_(x.clone(), episode)


def whiten_(x: Tensor, episode: Tensor | None = None) -> Tensor:
    """``whiten``, in place."""
    return x.div_(centre_(x, episode))


def centre_(x: Tensor, episode: Tensor | None = None, summed: Tensor | None = None) -> Tensor | float:
    """Takes the mean of ``x`` from it, in place, and gives what whitening divides by: 1 where all are equal.

    Args:
        x: [n].
        episode: As for ``whiten``.
        summed: As for ``are_equal``; the largest magnitude of ``x`` unless given.
    """
    if x.numel() < 2:
        x.zero_()
        return 1.0
    lowest, highest = torch.aminmax(x)
    if are_equal(lowest, highest, torch.maximum(-lowest, highest) if summed is None else summed):
        x.zero_()
        return 1.0
    if episode is None:
        x.sub_(x.mean())
        deviation = torch.linalg.vector_norm(x) / math.sqrt(x.numel() - 1)
    else:
        weight = 1 / torch.bincount(episode).to(x)[episode]
        weight /= weight.sum()
        x.sub_(weight @ x)
        deviation = (weight @ x.square() * x.numel() / (x.numel() - 1)).sqrt()
    return deviation + 1e-8


def centred_within(x: Returns, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Task returns and penalties minus the means of their groups, and whether the group's task returns are equal; all [n].

    Equal task returns, and all of a group of one, give exactly 0.

    Args:
        x: What is compared.
        group: int64, equal for rows of one group; any numbers.
    """
    _, group, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    zeros = x.task.new_zeros(len(sizes))
    lowest = zeros.scatter_reduce(0, group, x.task, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, x.task, "amax", include_self=False)
    equal = are_equal(lowest, highest, zeros.scatter_reduce(0, group, x.summed, "amax", include_self=False))[group]
    task, penalty = (column - (zeros.index_add(0, group, column) / sizes)[group] for column in (x.task, x.penalty))
    return torch.where(equal, 0.0, task), penalty, equal


def standardised_within(x: Returns, group: Tensor, scale_by_std: bool) -> Tensor:
    """Minus the mean of the group and, if ``scale_by_std``, divided by the group's sample std + 1e-6; all [n].

    A group of one gives 0, and so do equal returns, but for their penalties: these are centred, too, divided by the
    deviation of the task returns, and added; where the task returns are equal they are left as they are.

    Args:
        x: What is compared.
        group: int64, equal for rows of one group; any numbers.
        scale_by_std: Divide, as GRPO does, or only centre.
    """
    task, penalty, equal = centred_within(x, group)
    if not scale_by_std:
        return task + penalty
    _, group, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    squares = task.new_zeros(len(sizes)).index_add(0, group, task.square())
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return (task + penalty) / torch.where(equal, 1.0, (deviation + 1e-6)[group])


_LINES_AT_ONCE = 4096  # few enough to stay in the cache from place to place


def discounted_suffix_sums_(x: Tensor, decay: float, end: Tensor) -> Tensor:
    """``x_t <- x_t + decay * x_{t+1}``, in place, within runs.

    A scan: rows are cut into lines and summed up in each, one place of all lines at a time; then the lines' first rows in
    the same way; and what comes from the next line goes to the rows of each. Lines in which a run ends are few, and go by
    a table of factors of their own. So does the last line, which may be shorter.

    Args:
        x: [N], contiguous and finite.
        decay: From 0 to 1.
        end: int64, ascending, each run's last row (``ends_of_runs``).
    """
    if len(end) == len(x):
        return x
    width = min(64, math.isqrt(len(x)) + 1)
    whole = (len(x) - 1) // width
    lines, last = x[: whole * width].view(whole, width), x[whole * width :]
    cut, cut_of_end = torch.unique_consecutive(end // width, return_inverse=True)

    cuts = torch.cat([lines[cut[:-1]], pad(last, (0, width - len(last)))[None]]).t().contiguous()
    factors = torch.full_like(cuts, decay)
    factors[end % width, cut_of_end] = 0.0
    reach = factors.flip(0).cumprod(0).flip(0)  # share of the next line's first row that each row gets
    rows, shares = cuts.unbind(), factors.unbind()
    for place in reversed(range(width - 1)):
        rows[place].addcmul_(shares[place], rows[place + 1])

    if whole:
        for some in lines.split(_LINES_AT_ONCE):
            rows = some.unbind(1)
            for place in reversed(range(width - 1)):
                rows[place].add_(rows[place + 1], alpha=decay)
        powers = x.new_full((width,), decay).cumprod(0).flip(0)
        firsts = pad(lines[:, 0], (0, 1)).index_copy_(0, cut, cuts[0])
        next_first = pad(discounted_suffix_sums_(firsts, float(powers[0]), cut)[1:], (0, 1))
        lines.addcmul_(next_first[:-1, None], powers)
        lines[cut[:-1]] = cuts.addcmul_(reach, next_first[cut]).t()[:-1]
    last.copy_(cuts[: len(last), -1])
    return x


def generalised_advantages(
    reward: Tensor, value: Tensor, end: Tensor, final_value: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """GAE over rows that are sorted by chain and time.

    Args:
        reward: [N] or [A].
        value: Same shape, value before each row's action.
        end: int64, each chain's last row.
        final_value: Value after each of those, in their order.
        gamma: Discount per row.
        gae_lambda: Decay of the temporal differences per row.
    """
    difference = reward - value
    difference[:-1].add_(value[1:], alpha=gamma)
    difference[end] = reward[end] - value[end] + gamma * final_value
    return discounted_suffix_sums_(difference, gamma * gae_lambda, end)


def ends_of_runs(chain: Tensor) -> Tensor:
    """Last row of each contiguous run of equal numbers: int64, ascending."""
    is_last = torch.ones_like(chain, dtype=torch.bool)
    is_last[:-1] = chain[1:] != chain[:-1]
    return torch.nonzero(is_last)[:, 0]


def episode_returns(batch: CreditBatch) -> Returns:
    """Undiscounted returns of the episodes, [E]: all agents' rewards, the final one once, however many chains have it."""
    zeros = torch.zeros_like(batch.bootstrap_E)
    rewards = batch.task_reward_N, batch.reward_N - batch.task_reward_N, batch.task_reward_N.abs()
    task, penalty, summed = (zeros.index_add(0, batch.episode_N, reward_N) for reward_N in rewards)
    if batch.final_reward_E.any():
        chains_E = torch.bincount(episode_of_chains(batch), minlength=len(zeros))
        task = task - (chains_E - 1) * batch.final_reward_E
        summed = summed + 2 * chains_E * batch.final_reward_E.abs()  # it may have cancelled with a last step's own reward
    return Returns(task, penalty, summed)


def episode_of_chains(batch: CreditBatch) -> Tensor:
    """Episode of each chain, int64 [C]."""
    return batch.chain_N.new_zeros(int(batch.chain_N.max()) + 1).scatter(0, batch.chain_N, batch.episode_N)


def time_order(chain_N: Tensor, index_N: Tensor) -> Tensor:
    """Permutation that sorts steps by chain, then time."""
    return torch.argsort(chain_N * (index_N.max() + 1) + index_N, stable=True)


def token_time_order(batch: CreditBatch) -> tuple[Tensor | slice, Tensor]:
    """Permutation that sorts action tokens by chain, then time, and each chain's last token in that order.

    Where the steps are in order already the permutation is ``slice(None)``, which copies nothing.
    """
    order_N = time_order(batch.chain_N, batch.index_N)
    end = batch.length_N[order_N].cumsum(0)[ends_of_runs(batch.chain_N[order_N])] - 1
    if bool((order_N[1:] > order_N[:-1]).all()):
        return slice(None), end
    return tokens_in_order(batch.length_N, order_N), end


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
    """Value after each chain's last step, [C]: 0, or the bootstrap for the chain in which an episode was cut, if wanted."""
    value_C = batch.bootstrap_E.new_zeros(int(batch.chain_N.max()) + 1)
    if bootstrap_truncated:
        value_C[batch.last_chain_E] = torch.where(batch.terminated_E, 0.0, batch.bootstrap_E)
    return value_C
