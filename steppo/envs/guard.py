"""Processes that end with what started them: a worker's children with the worker, all workers with the main process.

A process is known by a mark in the environment variables that it was started with. Its children have it too, whatever
session they are in and whether or not their parents live. As a script, this file is the guard that outlives a main process
which was killed; it imports little, as there is one for each pool.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from multiprocessing import resource_tracker

import psutil

_LONGEST_S = 5.0  # of killing; what is left then waits for a broken disk
_variables = threading.Lock()


def _belonging(mark: str, value: str | None, leaders: Collection[int]) -> list[psutil.Process]:
    """Living processes with the mark, or in the group of one of them or of a (dead) leader, and their descendants.

    Groups and descendants are for children that were started with environment variables of their own.
    """
    processes: dict[int, psutil.Process] = {}
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    found: set[int] = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            with process.oneshot():
                if pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                processes[pid], parents[pid], groups[pid] = process, process.ppid(), os.getpgid(pid)
            # Those of other users cannot be read.
            carried = process.environ().get(mark)
            if carried is not None and value in (None, carried):
                found.add(pid)
    found |= {pid for pid, group in groups.items() if group in found or group in leaders}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return [processes[pid] for pid in found]


def _kill(mark: str, value: str | None = None, leaders: Collection[int] = ()) -> None:
    """Kills what belongs to a mark until nothing is left, also of what was started meanwhile."""
    deadline = time.monotonic() + _LONGEST_S
    while (left := _belonging(mark, value, leaders)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


class Guard:
    """Marks processes and ends them. If this process is killed, another ends them within seconds."""

    def __init__(self) -> None:
        self._mark = f"STEPPO_{uuid.uuid4().hex}"
        command = [sys.executable, "-P", __file__, self._mark, str(os.getpid())]
        # Only this process holds the other end of its input. A session of its own: what ends the group does not end it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    @contextlib.contextmanager
    def marking(self, value: str = "") -> Iterator[None]:
        """Marks all that this process starts in here. It is also deaf to Ctrl-C until it says otherwise."""
        resource_tracker.ensure_running()  # multiprocessing's own serves this process too: started before, it has no mark
        with _variables:
            os.environ[self._mark] = value
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                del os.environ[self._mark]

    def kill(self, value: str | None = None, leaders: Collection[int] = ()) -> None:
        """Ends what was started with ``value`` (whatever was, unless given), all descendants and the leaders' groups."""
        _kill(self._mark, value, leaders)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.close()

    def close(self) -> None:
        """Ends the guard itself."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


def _watch(mark: str, parent: int) -> None:
    """Waits for the parent's end. Its pipe tells at once, unless a copy of the parent holds it open, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == parent and not select.select([0], [], [], 1.0)[0]:
        pass
    _kill(mark)


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))
