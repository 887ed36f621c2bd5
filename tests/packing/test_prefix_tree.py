"""Prefix trees, token by token, against steps written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steppo.batch import Segment, TokenBatch
from steppo.errors import ConfigError
from steppo.models.branches import branches_of
from steppo.packing import PaddedPacker, PrefixTreePacker
from steppo.packing.padded import tokens_read
from steppo.packing.prefix_tree import _KEYS
from tests.numeric_helpers import FEW
from tests.packing.scenes import BRANCHED, FOREST, LONE, SCENES, append, forest, ids, played, state
from tests.packing.test_packing import make_segments

WIDE = 10**6
TREE = PrefixTreePacker(branch_tokens=0)


def seen_by(batch: TokenBatch, position: int) -> tuple[list[int], list[int], list[int]]:
    """Flat columns that a position attends to, their tokens and their positions."""
    width = batch.input_ids_BT.shape[1]
    row, column = divmod(position, width)
    mask = batch.attention_mask(torch.float32)
    columns = torch.arange(column + 1) if mask is None else torch.nonzero(mask[row, 0, column] == 0)[:, 0]
    flat = columns + row * width
    return flat.tolist(), batch.input_ids_BT.flatten()[flat].tolist(), batch.position_ids_BT.flatten()[flat].tolist()


def beginnings(segments: Sequence[Segment]) -> set[tuple[int, ...]]:
    """The nodes of a trie: whatever the steps' tokens begin with. An action's last token is not read."""
    read = [[*segment.prompt_ids.tolist(), *segment.action_ids.tolist()[:-1]] for segment in segments]
    return {tuple(tokens[: length + 1]) for tokens in read for length in range(len(tokens))}


def keys_of(batch: TokenBatch) -> int:
    """What the branches of a row have copies of."""
    _, pieces, paths = branches_of(batch.until_BT)
    return sum(pieces[piece] for path in paths for piece in path)


def check(segments: Sequence[Segment], packed: list[tuple[np.ndarray, TokenBatch]], max_tokens: int) -> int:
    """Each step once, within the budget, read where it should be; how many tokens all rows have together."""
    assert sorted(step for steps, _ in packed for step in steps) == list(range(len(segments)))
    tokens, longest = 0, max(map(len, map(tokens_read, segments)), default=0)
    for steps, batch in packed:
        rows, width = batch.input_ids_BT.shape
        assert rows * width <= max_tokens or (rows == 1 and batch.until_BT is None and width <= longest)
        assert batch.until_BT is None or rows == 1
        assert batch.until_BT is None or keys_of(batch) <= _KEYS * max_tokens
        assert (batch.step_of_A.diff() >= 0).all()
        used: dict[int, set[int]] = {}
        by_row: dict[int, list[Segment]] = {}
        for place, step in enumerate(steps):
            prompt, action = segments[step].prompt_ids.tolist(), segments[step].action_ids.tolist()
            actions = batch.step_of_A == place
            assert batch.target_A[actions].tolist() == action
            positions = [int(batch.value_at_N[place]), *batch.predict_at_A[actions].tolist()]
            for position, read in zip(positions, [prompt, *(prompt + action[:n] for n in range(len(action)))], strict=True):
                flat, seen, counted = seen_by(batch, position)
                assert seen == read
                assert counted == list(range(len(read)))
                used.setdefault(position // width, set()).update(flat)
            by_row.setdefault(positions[0] // width, []).append(segments[step])
        assert sorted(used) == list(range(rows))
        for row, columns in used.items():
            # Each token once; what is behind them is padding.
            assert len(columns) == len(beginnings(by_row[row])) == max(columns) % width + 1
            tokens += len(columns)
    return tokens


@FEW
@given(FOREST, st.integers(1, 80), st.sampled_from([0, 1, 3, 10, 10**6]))
def test_any_forest_within_any_budget(pairs, max_tokens, branch_tokens):
    segments = forest(pairs)
    check(segments, PrefixTreePacker(branch_tokens).pack(segments, max_tokens), max_tokens)


@FEW
@given(FOREST)
def test_any_forest_has_each_token_once(pairs):
    """Where there is room, and branches cost nothing."""
    segments = forest(pairs)
    assert check(segments, TREE.pack(segments, WIDE), WIDE) == len(beginnings(segments))


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_are_laid_out(scene):
    segments = SCENES[scene]
    packed = TREE.pack(segments, WIDE)
    assert check(segments, packed, WIDE) == len(beginnings(segments))
    assert any(batch.until_BT is not None for _, batch in packed) == (scene in BRANCHED)


def test_no_steps():
    assert TREE.pack([], WIDE) == []


def test_an_episode_that_appends_is_one_causal_row():
    """As many rows as episodes where they do not begin alike, as padded rows of their last steps."""
    segments = [*played(append, [6], seed=1), *played(append, [4], seed=2)]
    ((_, batch),) = TREE.pack(segments, WIDE)
    assert batch.until_BT is None
    ((_, last),) = PaddedPacker().pack([segments[5], segments[9]], WIDE)
    assert torch.equal(batch.input_ids_BT, last.input_ids_BT)
    assert torch.equal(batch.position_ids_BT, last.position_ids_BT)


def test_tokens_decide_whatever_the_episode():
    """A dialogue that breaks off and goes on in another episode is still one; a tie in numbers shares nothing."""
    segments = played(append, [4])
    moved = [Segment(segment.prompt_ids, segment.action_ids, episode=7 * n, group=n) for n, segment in enumerate(segments)]
    assert check(moved, TREE.pack(moved, WIDE), WIDE) == len(beginnings(segments))
    rng = np.random.default_rng(0)
    apart = [Segment(ids(rng, 9, 12), ids(rng, 2, 4)) for _ in range(5)]
    ((_, batch),) = TREE.pack(apart, WIDE)
    assert batch.until_BT is None
    assert len(batch.input_ids_BT) == 5


def test_little_in_common_is_padded():
    """Six branches behind a head of 40 save 200 tokens: worth it as long as each costs less than a sixth of that."""
    rng = np.random.default_rng(0)
    head = ids(rng, 40, 41)
    tails = [Segment(np.concatenate([head, [n + 2], ids(rng, 99, 119)]), LONE.action_ids) for n in range(6)]
    ((_, batch),) = PrefixTreePacker(branch_tokens=34).pack(tails, WIDE)
    ((_, padded),) = PaddedPacker().pack(tails, WIDE)
    assert batch.until_BT is None
    assert batch.input_ids_BT.shape == padded.input_ids_BT.shape
    ((_, batch),) = PrefixTreePacker(branch_tokens=33).pack(tails, WIDE)
    assert batch.until_BT is not None


def test_a_tree_that_outgrows_its_row_repeats_only_its_trunk():
    """Twelve branches of 10 behind a trunk of 50, four to a row."""
    rng = np.random.default_rng(1)
    trunk = ids(rng, 50, 51)
    segments = [Segment(np.concatenate([trunk, np.int32([n + 2]), ids(rng, 9, 10)]), LONE.action_ids[:1]) for n in range(12)]
    assert check(segments, TREE.pack(segments, 99), 99) == 3 * 50 + 12 * 10
    assert check(segments, TREE.pack(segments, 90), 90) == 3 * 50 + 12 * 10
    assert check(segments, TREE.pack(segments, 89), 89) == 4 * 50 + 12 * 10
    assert check(segments, TREE.pack(segments, 49), 49) == 12 * 60


def test_many_short_branches_on_a_long_trunk_take_several_rows():
    """Sixty branches of 2 behind a trunk of 100: 220 tokens, of which the branches have 6,120 copies."""
    rng = np.random.default_rng(1)
    trunk = ids(rng, 100, 101)
    segments = [Segment(np.concatenate([trunk, np.int32([n + 2, 1])]), LONE.action_ids[:1]) for n in range(60)]
    assert check(segments, TREE.pack(segments, 383), 383) == 100 + 60 * 2
    assert check(segments, TREE.pack(segments, 382), 382) == 2 * 100 + 60 * 2
    assert check(segments, TREE.pack(segments, 220), 220) == 2 * 100 + 60 * 2


def test_trees_lie_one_behind_the_other():
    """Without padding, as many as the budget takes."""
    trees = [played(state, [3], seed=seed) for seed in range(4)]
    segments = [segment for tree in trees for segment in tree]
    sizes = [len(beginnings(tree)) for tree in trees]
    ((_, batch),) = TREE.pack(segments, WIDE)
    assert batch.input_ids_BT.shape == (1, sum(sizes))
    assert len(TREE.pack(segments, sum(sizes) - 1)) == 2


def test_branches_that_would_pay():
    with pytest.raises(ConfigError, match="branch_tokens must be at least 0, not -1"):
        PrefixTreePacker(branch_tokens=-1)


def test_a_mask_says_what_is_seen():
    """By hand: a trunk of two, two branches of one each, a padding token."""
    batch = TokenBatch(*[torch.zeros(1, 5, dtype=torch.int64)] * 2, torch.tensor([[4, 4, 3, 4, 5]]), *[torch.zeros(0)] * 4)
    mask = batch.attention_mask(torch.float64)
    assert mask is not None
    assert mask.dtype == torch.float64
    out = -math.inf
    expected = [[0, out, out, out, out], [0, 0, out, out, out], [0, 0, 0, out, out], [0, 0, out, 0, out]]
    assert mask.tolist() == [[[*expected, [out, out, out, out, 0]]]]


def test_rows_of_one_batch_are_alike():
    """Rows of other lengths get a pass of their own, as long as padding would cost more."""
    short, long = (make_segments([(length, 1)] * 5, seed=length) for length in (20, 400))
    ((_, padded),) = PaddedPacker().pack([*short, *long], WIDE)
    assert padded.input_ids_BT.shape == (10, 400)
    assert [batch.input_ids_BT.shape for _, batch in TREE.pack([*short, *long], WIDE)] == [(5, 20), (5, 400)]
    little = make_segments([(20, 1), (21, 1), (40, 1)])
    assert [batch.input_ids_BT.shape for _, batch in TREE.pack(little, WIDE)] == [(3, 40)]
