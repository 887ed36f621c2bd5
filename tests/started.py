"""``python train.py`` in processes that begin with what another has imported once: that takes seconds of each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["steppo.cli", "tests.breaking_source"])


class Started:
    """A run of the real command, which leads a session of its own.

    Args:
        words: Of the command line.
        cwd: Where it runs.
        variables: Its environment variables; those of this process, unless given.
    """

    def __init__(self, *words: str, cwd: Path = ROOT, variables: Mapping[str, str] | None = None) -> None:
        self._errors, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (words, cwd, dict(os.environ if variables is None else variables), theirs)
        self.process = CONTEXT.Process(target=_main, args=arguments)
        self.process.start()
        theirs.close()

    def errors(self, seconds: float = 280) -> str:
        """Its standard error, when it has ended and whoever else writes there, such as its other ranks."""
        said, deadline = b"", time.monotonic() + seconds
        while wait([self._errors], max(deadline - time.monotonic(), 0)):
            if not (part := os.read(self._errors.fileno(), 2**16)):
                self.process.join()
                return said.decode()
            said += part
        raise TimeoutError(said.decode())

    @property
    def status(self) -> int | None:
        """Its exit status, or the negative number of the signal that ended it; ``None`` while it lives."""
        return self.process.exitcode

    def wait_for(self, file: Path) -> None:
        """Waits until it has made a file."""
        while not file.exists():
            assert self.status is None, self.errors()
            time.sleep(0.05)

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends its whole session, if it lives."""
        if self.status is None:
            assert self.process.pid is not None
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()


def started_by_torchrun(*words: str, nodes: Sequence[Path] = ()) -> list[Started]:
    """Two ranks of one run: on the same node, or on one each with a working directory of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "toy", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        local, group, size, cwd = (0, rank, 1, nodes[rank]) if nodes else (rank, 0, 2, ROOT)
        own = {"RANK": f"{rank}", "LOCAL_RANK": f"{local}", "GROUP_RANK": f"{group}", "LOCAL_WORLD_SIZE": f"{size}"}
        ranks.append(Started(*words, cwd=cwd, variables={**os.environ, **world, **own}))
    return ranks


def _main(words: tuple[str, ...], cwd: Path, variables: dict[str, str], errors: Connection) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(errors.fileno(), 2)
    errors.close()
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")
