"""Attention in rows that branch: each branch attends to its own path, so that no mask is as large as the row squared."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Branches(NamedTuple):
    """How a row is cut.

    Attributes:
        lengths: Tokens of each branch, in their order.
        pieces: Tokens of each piece, in their order; no branch begins within one, and no path ends there.
        paths: Of each branch the pieces that its last token sees, in their order.
    """

    lengths: list[int]
    pieces: list[int]
    paths: list[list[int]]


@lru_cache(maxsize=1)  # all layers ask for the same row
def branches_of(until: Tensor) -> Branches:
    """Branches of a row by its ``TokenBatch.until_BT``, any shape of T numbers.

    A branch begins where others end; what is then still seen are its ancestors, and they see it to its own end.
    """
    row = until.flatten().cpu().numpy()
    width = len(row)
    starts = sorted({0, *row.tolist()} - {width})
    paths: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []  # columns from the root on, as ranges: those that are seen longest come first
    for start, end in zip(starts, [*starts[1:], width], strict=True):
        while path:
            first, last = path.pop()
            kept = int(np.searchsorted(-row[first:last], -start))  # how many are seen beyond `start`
            if kept:
                path.append((first, first + kept))
                break
        path.append((start, end))
        paths.append(list(path))
    cuts = sorted({column for path in paths for range_ in path for column in range_})
    piece_at = {column: number for number, column in enumerate(cuts)}
    return Branches(
        np.diff([*starts, width]).tolist(),
        np.diff(cuts).tolist(),
        [[piece for first, last in path for piece in range(piece_at[first], piece_at[last])] for path in paths],
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, which also takes a row that branches, by an int64 mask: its ``until_BT`` as [1, 1, 1, T].

    Args:
        module: The layer's attention.
        query: [B, heads, T, width].
        key: [B, key-value heads, T, width].
        value: The same shape.
        attention_mask: As ``sdpa`` takes it, or int64.
        dropout: Probability.
        scaling: Of the scores.
        kwargs: What else ``sdpa`` takes.

    Returns:
        [B, T, heads, width], and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    lengths, pieces, paths = branches_of(attention_mask)
    if query.device.type != "cpu":  # kernels that share key-value heads take no mask there
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    keys, values = key.split(pieces, dim=2), value.split(pieces, dim=2)
    found = []
    for own, path in zip(query.split(lengths, dim=2), paths, strict=True):
        seen = _joined([keys[piece] for piece in path])
        count, ahead = own.shape[2], seen.shape[2] - own.shape[2]
        mask = own.new_full((count, seen.shape[2]), -torch.inf).triu_(ahead + 1) if ahead else None
        found.append(
            scaled_dot_product_attention(
                own,
                seen,
                _joined([values[piece] for piece in path]),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
