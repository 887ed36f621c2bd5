"""One row per step, padded on the right. The first packer, and the oracle for others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from steppo.batch import Segment, TokenBatch
from steppo.packing.base import Packer


class PaddedPacker(Packer):
    """Rows of similar length together. With padding on the right and causal attention no mask is needed."""

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        read = [tokens_read(segment) for segment in segments]
        widths = np.asarray([len(ids) for ids in read])
        return [
            (rows, _pad([segments[row] for row in rows], [read[row] for row in rows], int(widths[rows[-1]])))
            for rows in by_width(widths, max_tokens)
        ]


def tokens_read(segment: Segment) -> np.ndarray:
    """What the model reads of a step: an action's last token is predicted, never read."""
    return np.concatenate([segment.prompt_ids, segment.action_ids[:-1]])


def by_width(widths: np.ndarray, max_tokens: int, max_padding: float = math.inf) -> Iterator[np.ndarray]:
    """Indices of rows of similar width, ascending, as many together as are within the limits; a single row always is.

    Args:
        widths: Tokens of each row.
        max_tokens: Most tokens of a batch, padding included.
        max_padding: Most padding.
    """
    order = np.argsort(widths, kind="stable")
    first = tokens = 0
    for last in range(1, len(order) + 1):
        tokens += int(widths[order[last - 1]])
        if last < len(order):
            rows, width = last + 1 - first, int(widths[order[last]])  # ascending: the next row would be the widest
            padding = (rows - 1) * width - tokens
            if rows * width <= max_tokens and padding <= max_padding:
                continue
        yield order[first:last]
        first, tokens = last, 0


def _pad(segments: Sequence[Segment], read: Sequence[np.ndarray], width: int) -> TokenBatch:
    rows = len(segments)
    ids = np.zeros((rows, width), dtype=np.int64)
    for row, tokens in enumerate(read):
        ids[row, : len(tokens)] = tokens
    action_lengths = np.asarray([len(segment.action_ids) for segment in segments])
    value_at = np.arange(rows) * width + np.asarray([len(segment.prompt_ids) for segment in segments]) - 1
    step_of = np.repeat(np.arange(rows), action_lengths)
    starts = np.cumsum(action_lengths) - action_lengths
    within = np.arange(len(step_of)) - starts[step_of]
    targets = np.concatenate([segment.action_ids for segment in segments]).astype(np.int64)
    return TokenBatch(
        input_ids_BT=torch.from_numpy(ids),
        position_ids_BT=torch.arange(width).expand(rows, width).contiguous(),
        until_BT=None,
        predict_at_A=torch.from_numpy(value_at[step_of] + within),
        target_A=torch.from_numpy(targets),
        step_of_A=torch.from_numpy(step_of),
        value_at_N=torch.from_numpy(value_at),
    )
