"""What rows cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from steppo.batch import TokenBatch


class PackingCost(NamedTuple):
    """Counts of tokens, which add up over batches and ranks.

    Attributes:
        read: What the steps read: each its prompt and its action but for the last token.
        unique: What is computed for it: in each row, what steps begin with in common once.
        computed: The same with the padding behind it.
        branches: Of rows that branch: each attends in a call of its own.
    """

    read: int = 0
    unique: int = 0
    computed: int = 0
    branches: int = 0

    @classmethod
    def of(cls, batch: TokenBatch) -> PackingCost:
        """Of a batch whose steps have actions, and whose rows are padded on the right."""
        rows, width = batch.input_ids_BT.shape
        last_N = batch.predict_at_A[batch.step_of_A.bincount().cumsum(0) - 1]  # where each step reads its last token
        used_B = last_N.new_zeros(rows).scatter_reduce(0, last_N // width, last_N % width + 1, "amax")
        return cls(
            read=_sum(batch.position_ids_BT.flatten()[last_N] + 1),
            unique=_sum(used_B),
            computed=rows * width,
            branches=0 if batch.until_BT is None else len(batch.until_BT.unique()),
        )

    @classmethod
    def total(cls, costs: Iterable[PackingCost]) -> PackingCost:
        """Of all together."""
        return cls(*map(sum, zip(cls(), *costs, strict=True)))

    def figures(self) -> dict[str, float]:
        """By name, for people: shares and means in place of what only adds up."""
        return {
            "tokens_read": self.read,
            "tokens_unique": self.unique,
            "padding_share": (self.computed - self.unique) / max(self.computed, 1),
            "branches": self.branches,
        }


def _sum(column: Tensor) -> int:
    return int(column.sum())
