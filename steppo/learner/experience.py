"""What an iteration learns from: episodes, and all that the learner makes of them before the first update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steppo.batch import Credit
from steppo.learner.correction import Weights
from steppo.learner.scoring import Scores
from steppo.learner.steps import StepTable
from steppo.minibatches import StepColumns
from steppo.types import Episode


@dataclass(frozen=True, eq=False)
class Experience:
    """An iteration on this rank. Nothing is written into it: what its updates find comes back as results.

    Attributes:
        steps: The steps, in logical order.
        scores: What the models say of them.
        weights: What they count for, where another policy sampled them.
        credit: Their advantages and the critic's targets; without any where none were assigned.
        mine_N: int64, places of these steps among those of all ranks, in logical order.
        columns: Of the steps of all ranks.
        num_episodes: Episodes with a step, over all ranks.
        statistics: Figures by name, the same on all ranks.
    """

    steps: StepTable
    scores: Scores
    weights: Weights
    credit: Credit
    mine_N: np.ndarray
    columns: StepColumns
    num_episodes: int
    statistics: Mapping[str, float]

    @property
    def episodes(self) -> Sequence[Episode]:
        """All that this rank played, those that broke among them."""
        return self.steps.episodes

    @property
    def num_steps(self) -> int:
        """Environment steps over all ranks."""
        return len(self.columns.length_N)
