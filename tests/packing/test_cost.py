"""What rows cost, counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steppo.models.branches import branches_of
from steppo.packing import PackingCost, PaddedPacker, PrefixTreePacker
from tests.numeric_helpers import FEW
from tests.packing.scenes import FOREST, SCENES, append, forest, played
from tests.packing.test_prefix_tree import check

ACTING = {name: segments for name, segments in SCENES.items() if all(len(segment.action_ids) for segment in segments)}


def counted(packer, segments, max_tokens):
    """The packer's batches, and their cost."""
    packed = packer.pack(segments, max_tokens)
    return packed, PackingCost.total(PackingCost.of(batch) for _, batch in packed)


def agree(packer, segments, max_tokens):
    packed, cost = counted(packer, segments, max_tokens)
    assert cost.read == sum(len(segment.prompt_ids) + len(segment.action_ids) - 1 for segment in segments)
    assert cost.unique == check(segments, packed, max_tokens)
    assert cost.computed == sum(batch.input_ids_BT.numel() for _, batch in packed)
    paths = [branches_of(batch.until_BT).paths for _, batch in packed if batch.until_BT is not None]
    assert cost.branches == sum(map(len, paths))


@pytest.mark.parametrize("branch_tokens", [0, 16, 10**6])
@pytest.mark.parametrize("scene", ACTING)
def test_counts_of_scenes(scene, branch_tokens):
    agree(PrefixTreePacker(branch_tokens), ACTING[scene], 10**6)


@FEW
@given(FOREST, st.integers(1, 80), st.sampled_from([0, 3, 10**6]))
def test_counts_of_any_forest(pairs, max_tokens, branch_tokens):
    agree(PrefixTreePacker(branch_tokens), forest([(prompt, [*action, 2]) for prompt, action in pairs]), max_tokens)


def test_padded_rows_share_nothing():
    segments = played(append, [5, 3, 6])
    packed, cost = counted(PaddedPacker(), segments, 10**6)
    [(_, batch)] = packed
    assert cost == (sum(len(s.prompt_ids) + len(s.action_ids) - 1 for s in segments),) * 2 + (batch.input_ids_BT.numel(), 0)
    assert cost.unique < cost.computed
    tree = counted(PrefixTreePacker(), segments, 10**6)[1]
    assert tree.read == cost.read
    assert tree.unique < cost.unique / 2


def test_figures_are_shares_of_what_adds_up():
    parts = [PackingCost(100, 50, 60, 0), PackingCost(40, 30, 40, 4)]
    assert PackingCost.total(parts) == PackingCost(140, 80, 100, 4)
    figures = PackingCost.total(parts).figures()
    assert figures == {"tokens_read": 140, "tokens_unique": 80, "padding_share": pytest.approx(0.2), "branches": 4}
    assert PackingCost().figures() == {"tokens_read": 0, "tokens_unique": 0, "padding_share": 0.0, "branches": 0}
