"""Attention in rows that branch: each branch attends to its own path, so that no mask is as large as the row squared."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Since some version the kernel must be told that several heads share keys.
_SHARED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

_BLOCK = 512  # so many keys at a time torch's kernel on CPUs leaves out where attention is causal, and none under a mask


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


class Ragged(NamedTuple):
    """Branches as rows of any lengths, one behind the other.

    Attributes:
        columns: int64, of the keys that each branch sees.
        query_starts: int32 [branches + 1], where the tokens of each begin.
        key_starts: int32 [branches + 1], where its keys begin in ``columns``.
        longest: Most tokens and most keys of a branch.
    """

    columns: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest: tuple[int, int]


@lru_cache(maxsize=1)
def ragged(until: Tensor) -> Ragged:
    """The branches of a row by its ``until_BT``, on its device."""
    lengths, pieces, paths = branches_of(until)
    starts = np.cumsum([0, *pieces])
    seen = [np.concatenate([np.arange(starts[piece], starts[piece + 1]) for piece in path]) for path in paths]
    keys = [len(columns) for columns in seen]

    def on_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(until.device, dtype)

    return Ragged(
        on_device(np.concatenate(seen), torch.int64),
        on_device(np.cumsum([0, *lengths]), torch.int32),
        on_device(np.cumsum([0, *keys]), torch.int32),
        (max(lengths), max(keys)),
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
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for torch's own attention, which would do it branch by branch
        query, key, value = (heads.to(torch.get_autocast_dtype(device)) for heads in (query, key, value))
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    # That kernel wants Ampere or newer.
    if query.is_cuda and in_16_bits and not dropout and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return _at_once(query, key, value, ragged(attention_mask), scaling), None
    lengths, pieces, paths = branches_of(attention_mask)
    if device != "cpu":  # kernels that share key-value heads take no mask there
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    keys, values = key.split(pieces, dim=2), value.split(pieces, dim=2)
    found = []
    for own, path in zip(query.split(lengths, dim=2), paths, strict=True):
        seen = _joined([keys[piece] for piece in path])
        count, ahead = own.shape[2], seen.shape[2] - own.shape[2]
        is_causal = not ahead or count > ahead + _BLOCK
        if is_causal and ahead:  # queries of nobody cost less than the half that a mask hides
            own = pad(own, (0, 0, ahead, 0))
        given = scaled_dot_product_attention(
            own,
            seen,
            _joined([values[piece] for piece in path]),
            attn_mask=None if is_causal else own.new_full((count, ahead + count), -torch.inf).triu_(ahead + 1),
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        found.append(given[:, :, -count:])
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _at_once(query: Tensor, key: Tensor, value: Tensor, rows: Ragged, scaling: float | None) -> Tensor:
    """All branches in one call, each with a copy of the keys on its path."""
    own, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
    seen = varlen_attn(
        own,
        keys[rows.columns],
        values[rows.columns],
        rows.query_starts,
        rows.key_starts,
        *rows.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal, with the last token of a branch beside its last key
        **_SHARED_HEADS,
    )
    return cast(Tensor, seen)[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
