"""Files that tasks need, made in several processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steppo.envs.guard import Guard
from steppo.errors import ConfigError


def make_all(
    make: Callable[..., object],
    jobs: Sequence[tuple[Any, ...]],
    folder: Path,
    cannot: str,
    processes: int | None,
    progress: Callable[[int, int], object],
) -> None:
    """Calls ``make(*job, scratch)`` for each job. What is interrupted leaves no process and nothing in ``scratch`` behind.

    Args:
        make: Of a module, as it goes to other processes; raises what ends all.
        jobs: Its arguments.
        folder: Where files are kept; ``scratch`` is a folder in it, so that what is done can be moved at once.
        cannot: Begins the message if that cannot be written to: ``MyEnv: cannot write games to``.
        processes: How many; one per CPU unless given.
        progress: Called with (done, total).

    Raises:
        ConfigError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise ConfigError(f"{cannot} {folder}: {error.strerror}") from error
    progress(0, len(jobs))
    with scratch as there, Guard() as guard, ProcessPoolExecutor(processes, mp.get_context("spawn")) as pool:
        try:
            with guard.marking(), _one_order_of_sets():
                futures = [pool.submit(make, *job, there) for job in jobs]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                progress(done, len(jobs))
        except BaseException:
            guard.kill()  # nobody waits for what is under way
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _one_order_of_sets() -> Iterator[None]:
    """In all processes that are started meanwhile, so that what they make of a seed does not depend on its order."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before
