"""Which checkpoint and which run folder a command goes on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from steppo.checkpoints import iteration_checkpoints
from steppo.errors import ConfigError
from steppo.paths import user_path
from steppo.run_folder import CHECKPOINTS, numbered_folders


def beginning(ckpt_path: str, config: Namespace, fit: bool) -> tuple[Path | None, Path | None]:
    """The checkpoint that ``ckpt_path`` means, and the run folder to go on in: ``None`` for a new one.

    A ``fit`` goes on in a checkpoint's folder if it is the newest there and the configured logger can add to it. Its
    ``last`` is the newest run: if that was stopped before its first checkpoint, there is a folder and no checkpoint.
    """
    folders = _run_folders(config)
    path = user_path(ckpt_path)
    if ckpt_path == "last":
        runs = [folder / CHECKPOINTS for folder in folders if (folder / CHECKPOINTS).is_dir()]
        if fit and runs and not iteration_checkpoints(runs[0]):
            return None, runs[0].parent
        if fit and folders and not folders[0].exists():  # the config names it: a command that is to be repeated begins it
            return None, folders[0]
        found = [path for run in runs for path in reversed(iteration_checkpoints(run))]
        if not found:
            raise ConfigError("there is no checkpoint to continue from: none in the run folders of trainer.logger")
        path = found[0]
    folder = path.resolve().parent.parent
    newest = iteration_checkpoints(folder / CHECKPOINTS)[-1:] == [path.resolve()]
    return path, folder if fit and newest and folder in [other.resolve() for other in folders] else None


def _run_folders(config: Namespace) -> list[Path]:
    """Folders that the configured runs can go on in, the newest first: see ``RunTrainer``."""
    arguments = logger_arguments(config)
    if arguments is None:
        logger = _first_logger(config)
        if isinstance(logger, Namespace) and logger.class_path.endswith(".CSVLogger"):
            return []  # it begins its files anew
        return [path for _, path in numbered_folders(user_path(config.trainer.default_root_dir or ".") / "runs")]
    root = user_path(os.path.expandvars(arguments.save_dir)) / (arguments.name or "")
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
