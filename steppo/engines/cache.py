"""Keys and values of many sequences that grow, are cut and take over from each other what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Place(NamedTuple):
    """Where the tokens of one forward pass belong.

    Attributes:
        rows: Of the cache: those of the pass's batch. As a slice they are read where they lie, else copied together.
        tokens: Flat indices of the batch's tokens that are kept, [kept]; ``None``: all.
        cells: Rows and columns of the cache that they go to, [kept] each.
        columns: Of the cache that the pass sees; ``None``: each of its rows begins here and sees itself alone.
    """

    rows: slice | Tensor
    tokens: Tensor | None
    cells: tuple[Tensor, Tensor]
    columns: int | None


class RowLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, columns, width]: those of a head lie together, as attention reads them."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._zeros(key_states)
        self.values = self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, states: Tensor) -> Tensor:
        """Cells that nobody wrote to are multiplied by 0, so they must be finite."""
        kind = states.device.type  # attention would round to this anyway
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        shape = self._cache.rows, states.shape[1], self._cache.columns, states.shape[3]
        return torch.zeros(shape, dtype=dtype, device=states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps the pass's states, [batch, heads, tokens, width], and gives what it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._cache.place
        at_row, at_column = place.cells
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            new = states.transpose(1, 2).flatten(0, 1)
            new = new if place.tokens is None else new[place.tokens]
            kept[at_row, :, at_column] = new.to(kept.dtype)
        if place.columns is None:
            return key_states, value_states
        return self.keys[:, :, : place.columns][place.rows], self.values[:, :, : place.columns][place.rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked only where rows begin

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """One sequence a row; the column of a token is its position, so what lies beyond a row's end is seen by none.

    Attributes:
        rows: Number of rows.
        columns: Number of columns.
        ids: int32 [rows, columns], the tokens.
        held: int64 [rows], how many of a row's are valid.
        place: Of the pass under way.
    """

    place: Place

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=cast(Any, partial(RowLayer, self)))
        self.rows = self.columns = 0
        self.ids = np.zeros((0, 0), dtype=np.int32)
        self.held = np.zeros(0, dtype=np.int64)

    def drop(self) -> None:
        """Forgets all and gives the memory back."""
        self.layers.clear()
        self.held[:] = 0

    def reshape(self, kept: Sequence[int], rows: int, columns: int) -> None:
        """Another size: the rows ``kept`` come first, in their order; others are empty. All that these hold must fit."""
        width = min(columns, self.columns)
        order = torch.tensor(kept, dtype=torch.int64)
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[: len(kept), :, :width] = old[:, :, :width][order.to(old.device)]
                setattr(layer, name, new)
        ids, held = np.zeros((rows, columns), dtype=np.int32), np.zeros(rows, dtype=np.int64)
        ids[: len(kept), :width] = self.ids[kept, :width]
        held[: len(kept)] = self.held[kept]
        self.rows, self.columns, self.ids, self.held = rows, columns, ids, held

    def common(self, row: int, prompt: np.ndarray) -> int:
        """How many tokens a row and a prompt begin with alike."""
        return common(self.ids[row, : self.held[row]], prompt)

    def likest(self, prompt: np.ndarray, beyond: int) -> tuple[int, int]:
        """The row that begins most like a prompt, if more than ``beyond`` tokens are alike, and how many are."""
        best = 0, beyond
        if beyond < min(len(prompt), self.columns):
            for row in np.flatnonzero((self.held > beyond) & (self.ids[:, beyond] == prompt[beyond])).tolist():
                alike = self.common(row, prompt)
                best = (row, alike) if alike > best[1] else best
        return best

    def read(self, row: int, tokens: np.ndarray) -> None:
        """A pass has read these behind what the row held."""
        start = self.held[row]
        self.ids[row, start : start + len(tokens)] = tokens
        self.held[row] += len(tokens)

    def copy(self, source: int, targets: Sequence[int], first: int, last: int) -> None:
        """Other rows take a row's columns from ``first`` until ``last``; all hold the same before."""
        for layer in cast(list[RowLayer], self.layers):
            for kept in (layer.keys, layer.values):
                kept[torch.tensor(targets, device=kept.device), :, first:last] = kept[source, :, first:last]
        self.ids[targets, first:last] = self.ids[source, first:last]
        self.held[targets] = last


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
