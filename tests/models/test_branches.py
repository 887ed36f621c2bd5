"""Attention by branches against attention under a mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from steppo.batch import TokenBatch
from steppo.models import branches
from steppo.models.branches import attend, branches_of
from steppo.packing import PrefixTreePacker
from tests.numeric_helpers import FEW, close, normal
from tests.packing.scenes import BRANCHED, FOREST, SCENES, forest

LAYER = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def test_branches_by_hand() -> None:
    """A trunk 0 1, on it 2 3, on 2 also 4, on the trunk 5; then another tree, 6 7."""
    assert branches_of(torch.tensor([6, 6, 5, 4, 5, 6, 8, 8])) == (
        [4, 1, 1, 2],
        [2, 1, 1, 1, 1, 2],
        [[0, 1, 2], [0, 1, 3], [0, 4], [5]],
    )


def heads(width: int, seed: int) -> list[Tensor]:
    """Query, key and value of four heads that share two, and a direction for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 4, width, 6), (1, 2, width, 6), (1, 2, width, 6), (1, width, 4, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attended(mask: Tensor | None, tensors: list[Tensor], scaling: float | None) -> list[Tensor]:
    """What is seen, and its gradients."""
    *inputs, direction = tensors
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    seen = attend(LAYER, *inputs, mask, scaling=scaling)[0]
    return [seen.detach(), *torch.autograd.grad((seen * direction).sum(), inputs)]


def agree(batch: TokenBatch, scaling: float | None = None) -> None:
    assert batch.until_BT is not None
    tensors = heads(batch.until_BT.shape[1], seed=0)
    found = attended(batch.until_BT[:, None, None], tensors, scaling)
    for one, other in zip(found, attended(batch.attention_mask(torch.float64), tensors, scaling), strict=True):
        close(one, other)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("scene", sorted(BRANCHED))
def test_branches_see_what_the_mask_lets_them(scene: str, scaling: float | None) -> None:
    ((_, batch),) = [(steps, batch) for steps, batch in packed(SCENES[scene]) if batch.until_BT is not None]
    agree(batch, scaling)


@FEW
@given(FOREST, st.sampled_from([branches._BLOCK, 0, -1000]))
def test_any_forest(pairs: list[tuple[list[int], list[int]]], block: int) -> None:
    """By masks, by causal attention where a branch is longer than what is ahead of it, and always by that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "_BLOCK", block)
        for _, batch in packed(forest(pairs)):
            if batch.until_BT is not None:
                agree(batch)


def test_long_branches_have_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what it would have computed is hidden. Short ones beside them keep theirs."""
    ((_, batch),) = packed(forest([([1, 2, 3], [4] * 601), ([1, 2, 3], [5] * 601), ([1, 2, 3], [6] * 21)]))
    agree(batch)
    masked = []
    real = branches.scaled_dot_product_attention

    def seen(query: Tensor, *args: Any, attn_mask: Tensor | None, **kwargs: Any) -> Tensor:
        masked.append((query.shape[2], attn_mask is not None))
        return real(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(branches, "scaled_dot_product_attention", seen)
    agree(batch)
    assert sorted(masked) == [(20, True), (603, False), (603, False)]


@pytest.mark.parametrize("scene", sorted(BRANCHED))
def test_all_at_once_is_each_in_turn(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is given, by a slow one in its place: causal, each row's last token beside its last key."""

    def slow(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, *longest: int, **kwargs: Any):
        assert kwargs["window_size"] == (-1, 0)
        found = []
        for row, (of_query, of_key) in enumerate(zip(starts.diff().tolist(), key_starts.diff().tolist(), strict=True)):
            assert of_query <= longest[0]
            assert of_key <= longest[1]
            own = query[starts[row] :][:of_query].transpose(0, 1)
            seen = [heads[key_starts[row] :][:of_key].transpose(0, 1) for heads in (key, value)]
            keys, values = (heads.repeat_interleave(2, dim=0) for heads in seen)
            scores = own @ keys.transpose(1, 2) * kwargs["scale"]
            ahead = torch.ones(of_query, of_key, dtype=torch.bool).triu(of_key - of_query + 1)
            found.append((scores.masked_fill(ahead, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.cat(found)

    monkeypatch.setattr(branches, "varlen_attn", slow)
    ((_, batch),) = [(steps, batch) for steps, batch in packed(SCENES[scene]) if batch.until_BT is not None]
    mask = batch.until_BT[:, None, None]
    query, key, value, _ = heads(mask.shape[-1], seed=0)
    close(
        branches._at_once(query, key, value, branches.ragged(mask), 0.7),
        attend(LAYER, query, key, value, mask, scaling=0.7)[0],
    )


def packed(segments):
    return PrefixTreePacker(branch_tokens=0).pack(segments, 10**6)


def test_other_masks_are_as_ever() -> None:
    """Bit for bit what transformers computes."""
    query, key, value, _ = heads(5, seed=1)
    added = normal(np.random.default_rng(2), 1, 1, 5, 5)
    for mask in (None, added, added > 0):
        ours, theirs = (function(LAYER, query, key, value, mask)[0] for function in (attend, sdpa_attention_forward))
        assert torch.equal(ours, theirs)


def test_autocast_computes_in_its_dtype() -> None:
    """As torch's own attention does: a GPU takes all branches at once then, though a model gives it float32."""
    [(_, batch)] = packed(SCENES["append group"])
    mask = batch.until_BT[:, None, None]
    query, key, value, _ = (one.float() for one in heads(mask.shape[-1], seed=0))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(LAYER, query, key, value, mask)
    expected, _ = attend(LAYER, *(one.bfloat16() for one in (query, key, value)), mask)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
