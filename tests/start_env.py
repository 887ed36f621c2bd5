"""A corridor that loads something once per worker process, in many ways, as a user's may."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steppo.errors import ConfigError
from steppo.types import Task, Turn
from tests.toy_env import FaultyEnv


class BadlyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def _raise(error: BaseException) -> None:
    raise error


def _hold_the_lock() -> None:
    sys.setswitchinterval(1e6)
    while True:
        pass


# Starts that fail, and what is said of them.
FAILING: dict[str, tuple[Callable[[], Any], str]] = {
    "no file": (lambda: open("/nowhere/index"), "StartEnv.start: FileNotFoundError: "),  # noqa: SIM115
    "config": (lambda: _raise(ConfigError("no such grammar")), "StartEnv.start: ConfigError: no such grammar"),
    "badly": (lambda: _raise(BadlyError()), "StartEnv.start: BadlyError: (its message cannot be read)"),
    "end of file": (lambda: _raise(EOFError("cut")), "StartEnv.start: EOFError: cut"),
    "memory": (lambda: _raise(MemoryError()), "StartEnv.start: MemoryError"),
    "exit": (lambda: sys.exit(3), "StartEnv.start: SystemExit: 3"),
    "interrupt": (lambda: _raise(KeyboardInterrupt("^C")), "StartEnv.start: KeyboardInterrupt: ^C"),
    "dies": (lambda: os._exit(7), "StartEnv.start: the environment's process died (exit status 7)"),
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "StartEnv.start: the environment's process died (exit status -9)",
    ),
    "sleeps": (lambda: time.sleep(3600), "StartEnv.start: no answer within 1 s"),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "StartEnv.start: no answer within 1 s"),
    "holds the lock": (_hold_the_lock, "StartEnv.start: no answer within 1 s"),
}

# What may be loaded: it need not pickle nor copy.
LOADED: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "file": lambda: open(__file__),  # noqa: SIM115
    "generator": lambda: (number for number in range(3)),
    "module": lambda: sys,
    "function": lambda: lambda: None,
    "mapping": lambda: {"rooms": [{"name": str(number)} for number in range(1000)]},
    "none": lambda: None,
}


class StartEnv(FaultyEnv):
    """What the goals say tells which copy's load is seen.

    Args:
        how: Of ``FAILING`` or ``LOADED``.
        folder: Where each start, and each reset of its process, leaves a line, in a file named by the process.
        seconds: How long a start takes.
        fail_first: Number of the first starts that fail, over all processes.
        die_tasks: Ids of tasks that end the process.
    """

    def __init__(
        self,
        how: str = "mapping",
        folder: str = "",
        seconds: float = 0.0,
        fail_first: int = 0,
        die_tasks: list[str] | None = None,
    ) -> None:
        super().__init__(die_tasks=die_tasks)
        self.how = how
        self.folder = folder
        self.seconds = seconds
        self.fail_first = fail_first
        self.loaded: Any = "nothing"
        self.own: list[str] = []

    def start(self) -> None:
        self._note("start")
        time.sleep(self.seconds)
        if self.folder and len(notes(Path(self.folder))) <= self.fail_first:
            raise OSError("not yet")
        if self.how in FAILING:
            FAILING[self.how][0]()
        self.loaded = LOADED[self.how]()
        self.again = self.loaded

    def reset(self, task: Task) -> Turn:
        self._note(f"reset {id(self.loaded)} {self.loaded is self.again} {len(self.own)}")
        self.own.append(task.id)
        return super().reset(task)

    def _note(self, line: str) -> None:
        if self.folder:
            with open(Path(self.folder) / str(os.getpid()), "a") as file:
                file.write(line + "\n")


class UnpickledEnv(StartEnv):
    """Leaves out of its pickle what it has loaded."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("loaded", "again")}


class SettingEnv(FaultyEnv):
    """Has a setting by the name of the method."""

    def __init__(self, start: int = 3) -> None:
        super().__init__()
        self.start = start  # type: ignore[assignment,method-assign]


def notes(folder: Path) -> list[list[str]]:
    """What each process noted."""
    return [path.read_text().splitlines() for path in sorted(folder.iterdir())]
