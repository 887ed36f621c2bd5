"""Checkpoints on disk: names, reading without running code, writing whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from steppo.errors import ConfigError, RunError, in_short
from steppo.models.identity import difference
from steppo.weight_cache import save_whole


def iteration_path(folder: Path, iterations: int) -> Path:
    """Where the state after so many iterations is kept."""
    return folder / f"iteration-{iterations:06d}.ckpt"


def iterations_of(path: Path) -> int:
    """The number in the name of an iteration's checkpoint."""
    return int(path.stem.removeprefix("iteration-"))


def iteration_checkpoints(folder: Path) -> list[Path]:
    """The iterations' checkpoints of a folder, the oldest first."""
    found = [path for path in folder.glob("iteration-*.ckpt") if path.stem.removeprefix("iteration-").isdecimal()]
    return sorted(found, key=iterations_of)


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of steppo on the CPU; with ``mmap``, tensors are read when they are looked at.

    Raises:
        ConfigError: It cannot be read, holds more than tensors, numbers and text, or is not steppo's.
    """
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        reason = "" if isinstance(checkpoint, dict) and "steppo" in checkpoint else "it was not written by steppo"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # there is no end to what a foreign or damaged file makes the loader raise
        said = "" if isinstance(error, UnpicklingError) else f" ({' '.join(str(error).split())[:60]})"
        reason = f"it is damaged or no checkpoint; only tensors, numbers and text are read{said}"
    if reason:
        raise ConfigError(f"cannot use the checkpoint {path}: {reason}")
    return checkpoint


def require_identity(checkpoint: dict[str, Any], identity: dict[str, Any]) -> None:
    """Compares what a checkpoint belongs to with the model that is to take it; an older one only warns.

    Raises:
        ConfigError: The model is another one. The message says in what.
    """
    there = checkpoint["steppo"].get("belongs_to")
    if not there:
        rank_zero_warn(
            "the checkpoint is an older one that does not say which model it belongs to: nothing but shapes is compared"
        )
    elif unlike := difference(there, identity):
        raise ConfigError(f"the checkpoint does not fit the config's model: {unlike}")


class CheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a checkpoint is whole whenever the process dies; reads weights only.

    Lightning's own writes to the temporary folder first. From there to another disk a file is copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        try:
            save_whole(checkpoint, Path(path), Path(path).with_name(f".{Path(path).name}.part"))
        except OSError as error:
            reason = error.strerror or in_short(str(error), 200)
            raise RunError(f"cannot write the checkpoint {path}: {reason}; earlier checkpoints are as they were") from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))
