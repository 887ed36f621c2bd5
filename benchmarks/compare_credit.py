"""Credit of a variant of ``compare_methods.py``."""

from __future__ import annotations

from steppo.advantages import GRPO, whiten
from steppo.batch import Credit, CreditBatch


class WhitenedGRPO(GRPO):
    """``GRPO``, whitened over the steps of the groups that have something to compare."""

    def __call__(self, batch: CreditBatch) -> Credit:
        advantage_N = super().__call__(batch).advantage_N
        assert advantage_N is not None
        compared_N = advantage_N != 0
        advantage_N[compared_N] = whiten(advantage_N[compared_N])
        return Credit(advantage_N=advantage_N)
