"""What callbacks can hear of a run beside Lightning's own hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl

from steppo.learner import Experience, ReplayStatistics
from steppo.types import Episode

if TYPE_CHECKING:
    from steppo.module import AgentModule


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A panel that was played.

    Attributes:
        split: Which panel: that of ``validate`` (and ``fit``), or that of ``test``.
        episodes: This rank's share.
        record: What is written to ``evaluation.jsonl``, over all ranks. Its means are ``None`` if no episode is healthy.
    """

    split: Literal["valid", "test"]
    episodes: tuple[Episode, ...]
    record: Mapping[str, Any]


class Listener(pl.Callback):
    """A callback that hears more of a run. All ranks hear the same, so that each may ask the others.

    A listener does not change what it hears. Between listeners, and between these hooks and Lightning's of the same moment,
    no order is promised.
    """

    def on_weights_ready(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """All have seen ``on_train_start``: the weights are those that training begins or goes on with."""

    def on_run_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """All have seen ``on_weights_ready``: the state that the run begins or goes on with is on disk.

        Whoever plays episodes before training does so now.
        """

    def on_iteration_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """All have seen ``on_train_epoch_start``: the state between iterations is on disk.

        Whoever plays episodes does so now, and calls ``learn_from``.
        """

    def on_experience(
        self, trainer: pl.Trainer, pl_module: AgentModule, experience: Experience, replay: ReplayStatistics
    ) -> None:
        """An iteration's updates are done: what they learned from, and what they found."""

    def on_evaluation(self, trainer: pl.Trainer, pl_module: AgentModule, evaluation: Evaluation) -> None:
        """A panel was played: before training, whenever Lightning validates or tests, and at the end of a run."""


def announce(trainer: pl.Trainer, hook: str, *args: Any) -> None:
    """Calls a hook of all listeners."""
    callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
    for callback in callbacks:
        if isinstance(callback, Listener):
            getattr(callback, hook)(trainer, trainer.lightning_module, *args)
