"""What a packer must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from steppo.batch import Segment, TokenBatch


class Packer(ABC):
    """Turns the steps of one update into microbatches. Losses do not depend on how: only ``_A`` and ``_N`` leave a batch."""

    @abstractmethod
    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        """Packs steps.

        Args:
            segments: Prompt and action of each step.
            max_tokens: Most tokens, padding included, in one batch; a longer single step still gets one.

        Returns:
            For each batch the indices of its steps [N] in the order of the batch, and the batch, on the CPU. Each step is
            in exactly one batch. ``step_of_A`` counts within the batch.
        """
