"""Rows that hold what steps have in common once: tries of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from steppo.batch import Segment, TokenBatch
from steppo.errors import ConfigError
from steppo.packing.base import Packer
from steppo.packing.padded import by_width, tokens_read

# Most numbers in the mask of one batch, the same as logits that a policy holds at once: 64 MiB in float32, a row of 4096.
_MASK_NUMBERS = 2**24

# Most padding of a batch: a pass of its own costs about as much.
_PADDING = 256


class _Leaf(NamedTuple):
    """A sequence that no other one goes on from, and the steps that end along it.

    ``shared`` counts the tokens that it begins with in common with the leaf before.
    """

    ids: np.ndarray
    shared: int
    steps: list[int]


class PrefixTreePacker(Packer):
    """Each token that several steps begin with is computed once.

    A step that goes on from another (appended dialogues) lies in the same row as that one: an episode without rewritten
    prompts is one causal row. Where steps part, their row branches. It then needs a mask, in which each token pays for the
    whole row, so rows are cut where that costs more than to repeat what they begin with. Steps that have little in common
    get rows of their own, as from ``PaddedPacker``. Only tokens decide what is shared. A row longer than ``max_tokens`` is
    causal, and no longer than the longest step in it, which no packer can cut.

    Branched rows need full attention in each layer, computed by ``sdpa``, ``eager`` or, on GPUs, ``flex_attention``
    (which skips what is masked); others any causal model.

    Args:
        keys_per_token: To attend to so many tokens takes a layer as long as all else that it does for one. Smaller models
            and ``eager`` want less, larger models more (``benchmarks/update.py`` measures it).
    """

    def __init__(self, keys_per_token: int = 2000) -> None:
        if keys_per_token < 1:
            raise ConfigError(f"PrefixTreePacker: keys_per_token must be at least 1, not {keys_per_token}")
        self.keys_per_token = keys_per_token

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        rows = self._rows(_leaves(segments), max_tokens)
        batches = []
        for branched, max_pairs in ((False, math.inf), (True, _MASK_NUMBERS)):
            alike = [leaves for leaves in rows if (len(leaves) > 1) == branched]
            widths = np.asarray([_size(leaves) for leaves in alike], dtype=np.int64)
            for chosen in by_width(widths, max_tokens, max_pairs, _PADDING):
                found = _lay_out([alike[row] for row in chosen], segments, int(widths[chosen[-1]]), branched)
                batches.append(found)
        return batches

    def _rows(self, leaves: list[_Leaf], max_tokens: int) -> list[list[_Leaf]]:
        """The cheapest cut into rows of adjacent leaves, by dynamic programming; costs are in tokens."""
        limit = min(max_tokens, math.isqrt(_MASK_NUMBERS))
        length = np.asarray([len(leaf.ids) for leaf in leaves], dtype=np.int64)
        added = length - np.asarray([leaf.shared for leaf in leaves], dtype=np.int64)  # to a row that has the leaf before
        total = np.concatenate([[0], np.cumsum(added)])
        cost = np.zeros(len(leaves) + 1)
        start = np.zeros(len(leaves) + 1, dtype=np.int64)
        first = 0
        for last in range(1, len(leaves) + 1):
            # Rows that end before `last`, from each place on where they may begin: the later, the shorter.
            sizes = length[first:last] + total[last] - total[first + 1 : last + 1]
            over = min(int((sizes > limit).sum()), len(sizes) - 1)  # a leaf alone may be any length
            first, sizes = first + over, sizes[over:]
            keys = sizes.astype(np.float64)
            keys[-1] /= 2  # without a mask, attention leaves out what is ahead
            costs = cost[first:last] + sizes * (1 + keys / self.keys_per_token)
            start[last] = first + int(costs.argmin())
            cost[last] = costs[start[last] - first]
        rows = []
        last = len(leaves)
        while last:
            rows.append(leaves[start[last] : last])
            last = start[last]
        return rows[::-1]


def _leaves(segments: Sequence[Segment]) -> list[_Leaf]:
    """All leaves of the steps' trie, as a depth-first walk meets them."""
    read = [tokens_read(segment) for segment in segments]
    keys = [ids.tobytes() for ids in read]  # sorted in any order of tokens, those that begin alike are neighbours
    leaves: list[_Leaf] = []
    before = np.zeros(0, dtype=np.int32)
    steps: list[int] = []
    shared = 0
    for step in sorted(range(len(read)), key=keys.__getitem__):
        ids = read[step]
        common = _common(before, ids)
        if common < len(before):  # what was before ends in a leaf
            leaves.append(_Leaf(before, shared, steps))
            shared, steps = common, []
        steps.append(step)
        before = ids
    return [*leaves, _Leaf(before, shared, steps)] if steps else leaves


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _size(leaves: Sequence[_Leaf]) -> int:
    """Tokens of a row."""
    return len(leaves[0].ids) + sum(len(leaf.ids) - leaf.shared for leaf in leaves[1:])


def _lay_out(
    rows: Sequence[Sequence[_Leaf]], segments: Sequence[Segment], width: int, branched: bool
) -> tuple[np.ndarray, TokenBatch]:
    """A batch: of each row the tries in depth-first order, a leaf's new tokens behind those of the leaf before."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    # Padding: along a causal row positions go on, as in one sequence; in a branched one it sees itself alone.
    positions = np.zeros_like(ids) if branched else np.tile(np.arange(width), (len(rows), 1))
    until = np.tile(np.arange(1, width + 1), (len(rows), 1))
    steps: list[int] = []
    predict_at: list[np.ndarray] = []
    value_at: list[int] = []
    for row, leaves in enumerate(rows):
        path = np.zeros(0, dtype=np.int64)  # columns from the root to the newest token
        column = 0
        for place, leaf in enumerate(leaves):
            shared = leaf.shared if place else 0
            new = np.arange(column, column + len(leaf.ids) - shared)
            ids[row, new] = leaf.ids[shared:]
            positions[row, new] = np.arange(shared, len(leaf.ids))
            until[row, path[shared:]] = column  # the branch that is left
            path = np.concatenate([path[:shared], new])
            column += len(new)
            for step in leaf.steps:
                end = len(segments[step].prompt_ids) - 1
                steps.append(step)
                value_at.append(row * width + path[end])
                predict_at.append(row * width + path[end : end + len(segments[step].action_ids)])
        until[row, path] = column
    lengths = [len(at) for at in predict_at]
    batch = TokenBatch(
        input_ids_BT=torch.from_numpy(ids),
        position_ids_BT=torch.from_numpy(positions),
        until_BT=torch.from_numpy(until) if branched else None,
        predict_at_A=torch.from_numpy(np.concatenate(predict_at)),
        target_A=torch.from_numpy(np.concatenate([segments[step].action_ids for step in steps]).astype(np.int64)),
        step_of_A=torch.from_numpy(np.repeat(np.arange(len(steps)), lengths)),
        value_at_N=torch.from_numpy(np.asarray(value_at, dtype=np.int64)),
    )
    return np.asarray(steps), batch
