"""One row per step, padded on the right. The first packer, and the oracle for others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steppo.batch import Segment, TokenBatch
from steppo.packing.base import Packer


class PaddedPacker(Packer):
    """Rows of similar length together. With padding on the right and causal attention no mask is needed."""

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        widths = np.asarray([_width(segment) for segment in segments])
        order = np.argsort(widths, kind="stable")
        batches: list[tuple[np.ndarray, TokenBatch]] = []
        first = 0
        for last in range(1, len(order) + 1):
            # Ascending widths: the next row would be the widest.
            if last == len(order) or (last + 1 - first) * widths[order[last]] > max_tokens:
                rows = order[first:last]
                batches.append((rows, _pad([segments[row] for row in rows], int(widths[rows[-1]]))))
                first = last
        return batches


def _width(segment: Segment) -> int:
    """Tokens that the model reads: an action's last token is predicted, never read."""
    return len(segment.prompt_ids) + max(len(segment.action_ids) - 1, 0)


def _pad(segments: Sequence[Segment], width: int) -> TokenBatch:
    rows = len(segments)
    ids = np.zeros((rows, width), dtype=np.int64)
    for row, segment in enumerate(segments):
        prompt = len(segment.prompt_ids)
        ids[row, :prompt] = segment.prompt_ids
        ids[row, prompt : _width(segment)] = segment.action_ids[:-1]
    action_lengths = np.asarray([len(segment.action_ids) for segment in segments])
    value_at = np.arange(rows) * width + np.asarray([len(segment.prompt_ids) for segment in segments]) - 1
    step_of = np.repeat(np.arange(rows), action_lengths)
    starts = np.cumsum(action_lengths) - action_lengths
    within = np.arange(len(step_of)) - starts[step_of]
    targets = np.concatenate([segment.action_ids for segment in segments]).astype(np.int64)
    return TokenBatch(
        input_ids_BT=torch.from_numpy(ids),
        position_ids_BT=torch.arange(width).expand(rows, width).contiguous(),
        attention=None,
        predict_at_A=torch.from_numpy(value_at[step_of] + within),
        target_A=torch.from_numpy(targets),
        step_of_A=torch.from_numpy(step_of),
        value_at_N=torch.from_numpy(value_at),
    )
