"""A run's folder: where it is, and that it belongs to one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from steppo.distributed import made_once, require_equal
from steppo.errors import ConfigError

CHECKPOINTS = "checkpoints"
_LOCK = ".lock"


class RunTrainer(pl.Trainer):
    """Lightning's trainer, with a folder for each run: ``log_dir``, where everything that a run writes goes.

    It is the folder of the first logger if that is TensorBoard's or the CSV logger, which number their runs; else, and
    without a logger, a new ``runs/version_<n>`` in ``default_root_dir``. With ``fast_dev_run`` nothing is written.

    Attributes:
        numbered: The ``runs/version_<n>`` to go on in, if it is not to be a new one.
        begins_from: The checkpoint that the run begins with. Lightning's own knows it only after models are built.
        is_scripted: A script plays and no policy is asked, so that none is built.
        can_be_continued: There is a state to go on from; ``IterationCheckpoint`` says so.
    """

    numbered: Path | None = None
    begins_from: Path | None = None
    is_scripted: bool = False
    can_be_continued: bool = False

    def _run(self, model: Any, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's, with the checkpoint that rank 0 found: the others do not look for themselves."""
        if self.world_size > 1:
            self.strategy.connect(model)
            self.strategy.setup_environment()  # from here on ranks can talk; Lightning finds it done
            ckpt_path, self.begins_from = made_once(lambda: (ckpt_path, self.begins_from))
            if ckpt_path is not None:
                size = Path(ckpt_path).stat().st_size if Path(ckpt_path).is_file() else None
                require_equal({f"checkpoint {ckpt_path} on its disk": size})
        return super()._run(model, ckpt_path, *args, **kwargs)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """As Lightning's, once there is a state to go on from: where SLURM finds no file, a requeued job begins anew."""
        if self.can_be_continued:
            super().save_checkpoint(filepath, weights_only, storage_options)
        else:
            rank_zero_info(f"{filepath} is not written: there is nothing to go on from before the run's first checkpoint")

    @property
    def log_dir(self) -> str | None:
        """The run's folder, or ``None`` if nothing is to be written. It asks all ranks, so that all must ask."""
        return self.strategy.broadcast(self.own_log_dir())

    def own_log_dir(self) -> str | None:
        """What this process takes for the run's folder; rank 0 decides."""
        if cast(Any, self).fast_dev_run:
            return None
        if isinstance(self.logger, TensorBoardLogger | CSVLogger):
            return self.logger.log_dir
        if self.numbered is None:
            root = Path(self.default_root_dir) / "runs"
            self.numbered = root / f"version_{max((number for number, _ in numbered_folders(root)), default=-1) + 1}"
        return str(self.numbered)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Where a run's files go; ``None``: nowhere. All ranks must ask."""
    folder = trainer.log_dir
    return None if folder is None else Path(folder)


def numbered_folders(root: Path) -> list[tuple[int, Path]]:
    """Number and folder of the runs in ``root``, the newest first."""
    found = [(path.name.removeprefix("version_"), path) for path in root.glob("version_*")]
    return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)


@contextmanager
def held(folder: Path | None, keeps_checkpoints: bool = False) -> Iterator[None]:
    """Keeps a run's folder for this process until the body ends. The system frees it when the process dies, however it does.

    Child processes that are started anew do not inherit it. Where the file system knows no locks, there is a warning only.
    A run that ``keeps_checkpoints`` has a place for them from the start, and loses it if it ends or fails without one. So
    ``--ckpt_path last`` knows a run that was stopped early.

    Raises:
        ConfigError: Another run has it.
    """
    if folder is None:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder / _LOCK)
    place, stopped = folder / CHECKPOINTS, False
    try:
        if keeps_checkpoints:
            with contextlib.suppress(OSError):  # who saves will say what is wrong
                place.mkdir(exist_ok=True)
        yield
    except (KeyboardInterrupt, SystemExit):
        stopped = True
        raise
    finally:  # removed before it is free: who locks it then finds that it is gone
        with contextlib.suppress(OSError):
            if keeps_checkpoints and not stopped:
                place.rmdir()
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
            if new:
                folder.rmdir()  # if the run wrote nothing
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"{path.parent} belongs to a run that is under way: wait for its end, or give this one a folder of its own "
                "(trainer.logger's version)"
            ) from None
        except OSError as error:
            rank_zero_warn(f"{path} cannot be locked ({error.strerror}): start no second run there while this one goes on")
            return descriptor
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)  # the run before has just removed it
