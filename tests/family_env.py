"""Environments with child processes of many kinds, for tests and benchmarks of what is left of them."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

from steppo.envs.pool import EnvPool
from steppo.types import Task, Turn
from tests.toy_env import CorridorEnv

_kept: list[EnvPool] = []
_SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


def _forked() -> int:
    """A copy of this process."""
    if (child := os.fork()) == 0:
        time.sleep(600)
        os._exit(0)
    return child


def _daemon() -> int:
    """A grandchild in a session of its own whose parent has died."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            os.execv(_SLEEP[0], _SLEEP)
        os._exit(0)
    os.waitpid(child, 0)
    pid = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return pid


def _spawned() -> int:
    process = mp.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    assert process.pid is not None
    return process.pid


def _multiprocessing() -> int:
    process = mp.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    assert process.pid is not None
    return process.pid


def _shell() -> int:
    """In the background of a shell that is gone, with all files that this process has open."""
    with tempfile.NamedTemporaryFile("r") as file:
        os.system(f"sleep 600 & echo $! > {file.name}")
        return int(file.read())


def _pool() -> int:
    """A worker of the environment's own pool."""
    pool = EnvPool(CorridorEnv(), 1, 1, 60.0)
    _kept.append(pool)
    assert pool._processes[0].process.pid is not None
    return pool._processes[0].process.pid


KINDS: dict[str, Callable[[], int]] = {
    "subprocess": lambda: subprocess.Popen(_SLEEP).pid,
    "bare": lambda: subprocess.Popen(_SLEEP, env={}).pid,  # knows nothing of the environment's variables
    "deaf": lambda: subprocess.Popen(["sh", "-c", "trap '' INT TERM HUP; sleep 600; sleep 600"]).pid,
    "session": lambda: subprocess.Popen(_SLEEP, start_new_session=True).pid,
    "daemon": _daemon,
    "forked": _forked,
    "shell": _shell,
    "multiprocessing": _multiprocessing,
    "spawned": _spawned,
    "pool": _pool,
}


class FamilyEnv(CorridorEnv):
    """A corridor in which some tasks start children that do not end by themselves.

    What is started leaves its number in ``folder``, as the name of a file. ``close`` ends nothing.

    Args:
        folder: Where.
        kinds: Of ``KINDS``; all unless given.
        tasks_with: Ids of the tasks that start children at their reset; all unless given.
        then: What their second step does: hang in Python (sleep), hang in C with the interpreter's lock held, end the
            process, or go on.
        fail_tasks: Ids of tasks that raise in their second step, without children.
        num_tasks: Tasks in each split.
    """

    def __init__(
        self,
        folder: str,
        kinds: list[str] | None = None,
        tasks_with: list[str] | None = None,
        then: Literal["sleep", "lock", "die", "go on"] = "sleep",
        fail_tasks: list[str] | None = None,
        num_tasks: int = 8,
    ) -> None:
        super().__init__(num_tasks=num_tasks)
        self.folder = folder
        self.kinds = list(KINDS) if kinds is None else kinds
        self.tasks_with = tasks_with
        self.then = then
        self.fail_tasks = fail_tasks or []

    def _has_children(self) -> bool:
        return self.tasks_with is None or self._task.id in self.tasks_with

    def reset(self, task: Task) -> Turn:
        turn = super().reset(task)
        if self._has_children():
            for kind in self.kinds:
                Path(self.folder, f"{KINDS[kind]()}").write_text(kind)
        return turn

    def command(self, command: str) -> Turn:
        if self._steps == 1:
            if self._task.id in self.fail_tasks:
                raise RuntimeError("broken on purpose")
            if self._has_children():
                Path(self.folder, "second").touch()
                if self.then == "sleep":
                    time.sleep(600)
                if self.then == "lock":
                    ctypes.PyDLL(None).sleep(600)
                if self.then == "die":
                    os._exit(1)
        return super().command(command)


class LargeEnv(FamilyEnv):
    """Its worker holds too much after a few steps."""

    def command(self, command: str) -> Turn:
        self.kept = [*getattr(self, "kept", []), b"x" * 2**26]
        return super().command(command)


class NoStartEnv(FamilyEnv):
    """Starts a child on its way into a worker, and does not arrive."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset(self.tasks("train")[0])
        sys.exit(7)


def _square(number: int) -> int:
    return number * number


class ParallelEnv(CorridorEnv):
    """Has other processes do its work, one way for each command."""

    def command(self, command: str) -> Turn:
        how, _, method = command.partition(" ")
        context: Any = mp.get_context(method)
        if how == "Pool":
            with context.Pool(2) as pool:
                answer = pool.map(_square, range(4))
        elif how == "Executor":
            with ProcessPoolExecutor(2, context) as executor:
                answer = list(executor.map(_square, range(4)))
        elif how == "Manager":
            with context.Manager() as manager:
                answer = list(manager.list([0, 1, 4, 9]))
        else:
            queue = context.SimpleQueue()
            process = context.Process(target=queue.put, args=([0, 1, 4, 9],))
            process.start()
            answer = queue.get()
            process.join()
        return Turn(str(answer))
