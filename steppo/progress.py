"""Progress of long phases, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import lightning.pytorch as pl


@runtime_checkable
class ShowsPhases(Protocol):
    """A progress bar that can show a phase other than Lightning's own."""

    def start_phase(self, name: str, total: int | None) -> None: ...

    def advance_phase(self, done: int, total: int | None) -> None: ...

    def end_phase(self) -> None: ...


@contextmanager
def phase(trainer: pl.Trainer | None, name: str, total: int | None = None) -> Iterator[Callable[..., Any]]:
    """Shows a phase on the trainer's progress bar; gives a function to call with (done, total)."""
    bar = trainer.progress_bar_callback if trainer is not None else None
    if not isinstance(bar, ShowsPhases):
        yield lambda done, total=total: None
        return
    bar.start_phase(name, total)
    try:
        yield lambda done, total=total: bar.advance_phase(done, total)
    finally:
        bar.end_phase()
