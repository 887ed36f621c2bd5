"""SIGTERM: a run ends within seconds, wherever it is. What it leaves on disk is whole, as after ``kill -9``."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

STOPPED = 128 + signal.SIGTERM  # the exit status
_PATIENCE_S = 3.5  # schedulers give less than half a minute, some five seconds


@contextmanager
def ends_on_sigterm(trainer: pl.Trainer, say: Callable[[], None]) -> Iterator[None]:
    """A SIGTERM while the body runs raises ``SIGTERMException`` there, at once, and goes to the ranks started from here.

    Where Python does not get a word in (a long operation, a collective that waits for another rank, code that swallows the
    exception), the process ends itself a little later. ``say`` is called before the end, once. Any other exception ends the
    other ranks, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop(trainer, say)
    handler = signal.signal(signal.SIGTERM, stop.interrupt)
    cast(Any, trainer).callbacks.insert(0, _TakesBack(stop.interrupt))
    wakeup = signal.set_wakeup_fd(stop.writer, warn_on_full_buffer=False)
    stop.start()
    try:
        yield
    except SIGTERMException:
        stop.tidy()
        say()
        raise SystemExit(STOPPED) from None
    except BaseException:
        for process in stop.ranks():
            process.kill()  # it would wait for this process in a collective
        raise
    finally:
        cast(Any, trainer).callbacks.pop(0)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        stop.end()


class _TakesBack(pl.Callback):
    """Undoes Lightning's own reaction to SIGTERM, which would only take note, and wait for other ranks in the handler.

    It is put in place after everything has been set up, just before these hooks.
    """

    def __init__(self, handler: Callable[[int, Any], None]) -> None:
        self._handler = handler

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._handler)

    on_validation_start = on_test_start = on_train_start


class _Stop(threading.Thread):
    """Hears of a signal at once, whatever the main thread is doing."""

    def __init__(self, trainer: pl.Trainer, say: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self._say = say
        self._children: list[subprocess.Popen] = []
        self._interrupted = False
        self._over = threading.Event()
        self._deadline = 0.0
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    def interrupt(self, signum: int, frame: Any) -> None:
        """In the main thread; what comes after the first signal does not disturb the end."""
        if not self._interrupted:
            self._interrupted, self._deadline = True, time.monotonic() + _PATIENCE_S
            raise SIGTERMException

    def run(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM:
                for process in self.ranks():
                    process.terminate()
                if not self._over.wait(_PATIENCE_S):
                    self._say()
                    self._kill()
                    os._exit(STOPPED)
                return

    def tidy(self) -> None:
        """Gives the other ranks the time that is left, and leaves no process behind."""
        for process in self.ranks():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(self._deadline - 1.0 - time.monotonic(), 0.0))
        self._kill()

    def end(self) -> None:
        self._over.set()
        os.close(self.writer)
        self.join()
        os.close(self._reader)

    def ranks(self) -> list[subprocess.Popen]:
        """Ranks started from here. Lightning, which would kill this process when one of them ends, forgets them."""
        started = getattr(self._trainer.strategy.launcher, "procs", [])
        self._children += started
        started.clear()
        return self._children

    def _kill(self) -> None:
        for process in self.ranks():
            process.kill()
        for worker in mp.active_children():
            worker.kill()
