"""Log-probabilities and entropies from logits that are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# On a CPU logits are read several times while they are in a core's cache.
_NUMBERS_IN_CACHE = 2**18


def read_chunks(
    logits_of: Callable[[Tensor], Tensor],
    weights: Sequence[nn.Parameter],
    states_A: Tensor,
    target_A: Tensor,
    divisor_A: Tensor,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies, [A] each, from the logits of so many states at a time.

    The backward pass computes each chunk's logits once more and writes their gradient over them.

    Args:
        logits_of: The head: states [a, H] to logits [a, V], which may be overwritten.
        weights: Those of the head that are trained.
        states_A: [A, H].
        target_A: int64, the tokens.
        divisor_A: Temperature that the logits are divided by.
        rows: Most states of a chunk.
    """
    learning = torch.is_grad_enabled()
    read: tuple[Tensor, Tensor] = _Reading.apply(logits_of, rows, learning, target_A, divisor_A, states_A, *weights)
    return read


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        rows: int,
        learning: bool,
        target_A: Tensor,
        divisor_A: Tensor,
        states_A: Tensor,
        *weights: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        # With a graph: autocast keeps what it casts a weight to, and in some versions later passes get it as it was made.
        with torch.set_grad_enabled(learning):
            found = [_read(logits_of, *chunk) for chunk in _chunks(rows, states_A, target_A, divisor_A)]
        normaliser_A, logprobs_A, entropy_A = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.save_for_backward(states_A, target_A, divisor_A, normaliser_A, entropy_A)
        ctx.logits_of, ctx.rows, ctx.weights = logits_of, rows, weights
        device = states_A.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.set_materialize_grads(False)  # most losses leave the entropy out
        return logprobs_A, entropy_A

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs_A: Tensor | None, of_entropy_A: Tensor | None) -> tuple[Tensor | None, ...]:
        states_A, target_A, divisor_A, normaliser_A, entropy_A = ctx.saved_tensors
        if of_logprobs_A is None:
            of_logprobs_A = torch.zeros_like(normaliser_A)
        columns = [target_A, divisor_A, normaliser_A, of_logprobs_A]
        if of_entropy_A is not None:
            columns += [entropy_A, of_entropy_A]
        of_states: list[Tensor] = []
        of_weights: Sequence[Tensor | None] = [None] * len(ctx.weights)  # another adapter's get none
        with torch.autocast(*ctx.autocast):
            for chunk in _chunks(ctx.rows, states_A, *columns):
                of_chunk, *others = _gradients(ctx.logits_of, ctx.weights, *chunk)
                of_states.append(of_chunk)
                of_weights = [_sum(*pair) for pair in zip(of_weights, others, strict=True)]
                del others  # or they would be there beside the next chunk's
        return None, None, None, None, None, torch.cat(of_states), *of_weights


def _read(logits_of: Callable[[Tensor], Tensor], states: Tensor, *columns: Tensor) -> list[Tensor]:
    """The statistics of a chunk."""
    logits = logits_of(states.detach()).detach()
    found = [_statistics(*block) for block in _blocks(logits, *columns)]
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _gradients(
    logits_of: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], states: Tensor, *columns: Tensor
) -> tuple[Tensor, ...]:
    """Of a chunk's states and of the head's weights."""
    states = states.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(states)
    for block in _blocks(logits.detach(), *columns):
        _differentiate(*block)
    return torch.autograd.grad(logits, [states, *weights], logits.detach(), allow_unused=True)


def _sum(so_far: Tensor | None, one: Tensor | None) -> Tensor | None:
    return one if so_far is None or one is None else so_far.add_(one)


def _chunks(rows: int, *columns: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(column.split(rows) for column in columns), strict=True)


def _blocks(logits: Tensor, *columns: Tensor) -> zip[tuple[Tensor, ...]]:
    """A chunk's logits and what belongs to them, cut so that a CPU's cache holds a block."""
    rows = max(1, _NUMBERS_IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return _chunks(rows, logits, *columns)


def _statistics(logits: Tensor, target_A: Tensor, divisor_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the sum of exponentials, log-probability and entropy; overwrites the logits."""
    logits.div_(divisor_A[:, None])
    highest = logits.amax(-1)
    logits.sub_(highest[:, None])
    weights = logits.exp()
    total = weights.sum(-1)
    log_total = total.log()
    taken = logits.gather(1, target_A[:, None])[:, 0]
    return highest + log_total, taken - log_total, log_total - torch.linalg.vecdot(weights, logits) / total


def _differentiate(
    logits: Tensor,
    target_A: Tensor,
    divisor_A: Tensor,
    normaliser_A: Tensor,
    of_logprobs_A: Tensor,
    entropy_A: Tensor | None = None,
    of_entropy_A: Tensor | None = None,
) -> None:
    """Writes the gradient over the logits: with ``p`` their softmax, a log-probability's is ``onehot - p``, an entropy's
    ``- p (log p + entropy)``."""
    logits.div_(divisor_A[:, None]).sub_(normaliser_A[:, None])
    if entropy_A is None or of_entropy_A is None:
        logits.exp_().mul_(-of_logprobs_A[:, None])
    else:
        probabilities = logits.exp()
        logits.add_(entropy_A[:, None]).mul_(-of_entropy_A[:, None]).sub_(of_logprobs_A[:, None]).mul_(probabilities)
    logits.scatter_add_(1, target_A[:, None], of_logprobs_A[:, None])
    logits.div_(divisor_A[:, None])
