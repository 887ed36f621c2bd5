"""Which checkpoint and which run folder a command goes on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from steppo.checkpoints import iteration_checkpoints
from steppo.errors import ConfigError
from steppo.run_folder import numbered_folders


def find_checkpoint(ckpt_path: str, config: Namespace) -> Path:
    """The file that ``ckpt_path`` means."""
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not path.exists():
            raise ConfigError(f"there is no checkpoint {path}")
        return path
    folders = _run_folders(config)
    found = [path for folder in folders for path in reversed(iteration_checkpoints(folder / "checkpoints"))]
    if not found:
        raise ConfigError("there is no checkpoint to continue from: none in the run folders of trainer.logger")
    return found[0]


def goes_on(path: Path, config: Namespace) -> bool:
    """Whether a checkpoint is the newest of a run folder of the configured logger, and the logger can add to that."""
    folder = path.resolve().parent.parent
    newest = iteration_checkpoints(folder / "checkpoints")[-1:]
    return newest == [path.resolve()] and folder in [other.resolve() for other in _run_folders(config)]


def _run_folders(config: Namespace) -> list[Path]:
    """Folders that the configured runs can go on in, the newest first: see ``RunTrainer``."""
    arguments = logger_arguments(config)
    if arguments is None:
        logger = _first_logger(config)
        if isinstance(logger, Namespace) and logger.class_path.endswith(".CSVLogger"):
            return []  # it begins its files anew
        return [path for _, path in numbered_folders(Path(config.trainer.default_root_dir or ".") / "runs")]
    root = Path(os.path.expandvars(arguments.save_dir)).expanduser() / (arguments.name or "")
    if arguments.version is not None:
        return [root / (arguments.version if isinstance(arguments.version, str) else f"version_{arguments.version}")]
    return [path for _, path in numbered_folders(root)]


def logger_arguments(config: Namespace) -> Namespace | None:
    """Of the first logger, if it is TensorBoard's."""
    logger = _first_logger(config)
    return logger.init_args if isinstance(logger, Namespace) and logger.class_path.endswith(".TensorBoardLogger") else None


def _first_logger(config: Namespace) -> Any:
    logger = config.trainer.logger
    return next(iter(logger), False) if isinstance(logger, list) else logger
