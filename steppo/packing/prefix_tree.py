"""Rows that hold what steps have in common once: tries of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from steppo.batch import Segment, TokenBatch
from steppo.errors import require_at_least
from steppo.packing.base import Packer
from steppo.packing.padded import by_width, tokens_read

# Most padding of a batch: a pass of its own costs about as much.
_PADDING = 256
# Most keys that the branches of a row see, over ``max_tokens``: each has a copy of those on its path.
_KEYS = 16


class _Leaf(NamedTuple):
    """A sequence that no other one goes on from, and the steps that end along it.

    ``shared`` counts the tokens that it begins with in common with the leaf before, which lie in the same row.
    """

    ids: np.ndarray
    shared: int
    steps: list[int]


class PrefixTreePacker(Packer):
    """Each token that several steps begin with is computed once.

    A step that goes on from another (appended dialogues) lies in the same row as that one: an episode without rewritten
    prompts is one causal row. Where steps part, their row branches, and each branch attends to its own path. Steps that
    have little in common get rows of their own, as from ``PaddedPacker``. Only tokens decide what is shared. Trees lie one
    behind the other in a row of at most ``max_tokens``; one that outgrows it repeats its trunk, as does one with many short
    branches on a long trunk. A causal row is no longer than the longest step in it, which no packer can cut.

    Branched rows need full attention in each layer, computed by ``sdpa`` (branch by branch), by ``flex_attention`` (which
    skips what is masked, and learns on GPUs only), or by ``eager`` (whose mask is the row squared); others any causal model.

    Args:
        branch_tokens: A branch costs as much as so many tokens beside its own: with fewer in common, rows do not branch
            (``benchmarks/update.py --branches`` measures it).
    """

    def __init__(self, branch_tokens: int = 8) -> None:
        require_at_least(0, self, branch_tokens=branch_tokens)
        self.branch_tokens = branch_tokens

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        trees = self._trees(_leaves(segments), max_tokens)
        rows = [leaves for leaves in trees if len(leaves) == 1]
        widths = np.asarray([_size(leaves) for leaves in rows], dtype=np.int64)
        batches = [
            _lay_out([rows[row] for row in chosen], segments, int(widths[chosen[-1]]))
            for chosen in by_width(widths, max_tokens, max_padding=_PADDING)
        ]
        forest: list[_Leaf] = []
        size = keys = 0
        for leaves in trees:
            if len(leaves) == 1:
                continue
            size, keys = size + _size(leaves), keys + _keys(leaves)
            if forest and (size > max_tokens or keys > _KEYS * max_tokens):
                batches.append(_lay_out([forest], segments, _size(forest)))
                forest, size, keys = [], _size(leaves), _keys(leaves)
            forest += leaves
        return [*batches, _lay_out([forest], segments, _size(forest))] if forest else batches

    def _trees(self, leaves: list[_Leaf], max_tokens: int) -> list[list[_Leaf]]:
        """The cheapest cut into trees of adjacent leaves, by dynamic programming."""
        length = np.asarray([len(leaf.ids) for leaf in leaves], dtype=np.int64)
        added = length - np.asarray([leaf.shared for leaf in leaves], dtype=np.int64)  # to a tree that has the leaf before
        total = np.concatenate([[0], np.cumsum(added)])
        keys = np.concatenate([[0], np.cumsum(length)])
        cost = np.zeros(len(leaves) + 1, dtype=np.int64)
        start = np.zeros(len(leaves) + 1, dtype=np.int64)
        first = 0
        for last in range(1, len(leaves) + 1):
            # Trees that end before `last`, from each place on where they may begin: the later, the smaller.
            sizes = length[first:last] + total[last] - total[first + 1 : last + 1]
            too_much = (sizes > max_tokens) | (keys[last] - keys[first:last] > _KEYS * max_tokens)
            over = min(int(too_much.sum()), len(sizes) - 1)  # a leaf alone may be any length
            first, sizes = first + over, sizes[over:]
            branches = np.arange(len(sizes), 0, -1)
            costs = cost[first:last] + sizes + self.branch_tokens * np.where(branches > 1, branches, 0)
            start[last] = last - 1 - int(costs[::-1].argmin())  # of trees that cost the same the smallest
            cost[last] = costs[start[last] - first]
        trees = []
        last = len(leaves)
        while last:
            root, *others = leaves[start[last] : last]
            trees.append([root._replace(shared=0), *others])
            last = start[last]
        return trees[::-1]


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
    return sum(len(leaf.ids) - leaf.shared for leaf in leaves)


def _keys(leaves: Sequence[_Leaf]) -> int:
    """Of all branches of a row: at most so many are copied."""
    return sum(len(leaf.ids) for leaf in leaves)


def _lay_out(rows: Sequence[Sequence[_Leaf]], segments: Sequence[Segment], width: int) -> tuple[np.ndarray, TokenBatch]:
    """A batch: of each row the trees in depth-first order, a leaf's new tokens behind those of the leaf before.

    Rows of one leaf each, or a single row.
    """
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.tile(np.arange(width), (len(rows), 1))  # along padding they go on, as in one sequence
    until = np.full((1, width), width)
    steps: list[int] = []
    predict_at: list[np.ndarray] = []
    value_at: list[int] = []
    for row, leaves in enumerate(rows):
        path = np.zeros(0, dtype=np.int64)  # columns from the root to the newest token
        column = 0
        for leaf in leaves:
            new = np.arange(column, column + len(leaf.ids) - leaf.shared)
            ids[row, new] = leaf.ids[leaf.shared :]
            positions[row, new] = np.arange(leaf.shared, len(leaf.ids))
            until[0, path[leaf.shared :]] = column  # the branch that is left
            path = np.concatenate([path[: leaf.shared], new])
            column += len(new)
            for step in leaf.steps:
                end = len(segments[step].prompt_ids) - 1
                steps.append(step)
                value_at.append(row * width + path[end])
                predict_at.append(row * width + path[end : end + len(segments[step].action_ids)])
    lengths = [len(at) for at in predict_at]
    batch = TokenBatch(
        input_ids_BT=torch.from_numpy(ids),
        position_ids_BT=torch.from_numpy(positions),
        until_BT=torch.from_numpy(until) if len(rows[0]) > 1 else None,
        predict_at_A=torch.from_numpy(np.concatenate(predict_at)),
        target_A=torch.from_numpy(np.concatenate([segments[step].action_ids for step in steps]).astype(np.int64)),
        step_of_A=torch.from_numpy(np.repeat(np.arange(len(steps)), lengths)),
        value_at_N=torch.from_numpy(np.asarray(value_at, dtype=np.int64)),
    )
    return np.asarray(steps), batch
