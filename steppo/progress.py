"""Progress of long phases, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


@contextmanager
def phase(trainer: pl.Trainer | None, name: str, total: int | None = None) -> Iterator[Callable[..., Any]]:
    """Shows a phase on the trainer's progress bar, if it is one that can (``StepProgressBar``).

    Gives a function to call with (done, total, note): the last two may be left out, the note stays beside the name.
    """
    bar: Any = trainer.progress_bar_callback if trainer is not None else None
    if not hasattr(bar, "start_phase"):
        yield lambda done, total=total, note="": None
        return
    bar.start_phase(name, total)
    try:
        yield lambda done, total=total, note="": bar.advance_phase(done, total, note)
    finally:
        bar.end_phase()
