"""Writes the state of the run between iterations, so that it can be continued exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from steppo.checkpoints import iteration_checkpoints, iteration_path, iterations_of, read
from steppo.errors import ConfigError, require_at_least
from steppo.listeners import Listener
from steppo.module import AgentModule
from steppo.run_folder import CHECKPOINTS, RunTrainer, run_folder


class IterationCheckpoint(Listener):
    """Saves before the first evaluation, between iterations and at the end of the run, in ``checkpoints/`` of its folder.

    A run that was killed goes on from there as if it had never stopped: the iteration that was cut is played again, with the
    first one the evaluation before it. With ``trainer.enable_checkpointing false`` or ``trainer.fast_dev_run`` nothing is
    saved.

    Args:
        every_n_iterations: Save after every n-th iteration; so many may have to be played again.
        keep: Keep the newest so many.
    """

    # An iteration is over when its metrics are logged and every callback has seen its end: only the start of the next one is
    # late enough, and `on_iteration_start`, where the rollout moves on in the tasks, is too late.

    def __init__(self, every_n_iterations: int = 1, keep: int = 2) -> None:
        require_at_least(1, "checkpoint", every_n_iterations=every_n_iterations, keep=keep)
        self.every_n_iterations = every_n_iterations
        self.keep = keep
        self.enabled = True
        self._folder = Path()
        self._newest: Path | None = None
        self._between_iterations = False

    def setup(self, trainer: pl.Trainer, pl_module: AgentModule, stage: str) -> None:
        folder = run_folder(trainer)
        if folder is None:
            self.enabled = False
            return
        self._folder = folder / CHECKPOINTS
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:  # else some loggers have it elsewhere
                callback.dirpath = str(self._folder)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:  # else it is not known yet how far the run is
            self._refuse_to_go_back(pl_module.counters.iterations)

    def on_train_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self._refuse_to_go_back(pl_module.counters.iterations)
        if trainer.ckpt_path is None:
            return
        path = iteration_path(self._folder, pl_module.counters.iterations)
        if path.exists() and path.samefile(trainer.ckpt_path):
            self._newest = path
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                # Readers of the curves then drop what earlier files of the folder hold from this step on.
                step = pl_module.counters.updates + 1 if pl_module.counters.iterations else 0
                start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start)

    def on_weights_ready(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        if not trainer.should_stop:  # else nothing is trained
            cast(RunTrainer, trainer).can_be_continued = self.enabled
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self._between_iterations = True
        if self._newest is None or pl_module.counters.iterations % self.every_n_iterations == 0:
            self._save(trainer, pl_module)
        self._between_iterations = False

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """ModelCheckpoint saves soon after: by then the iteration is whole, if this follows its last update."""
        self._between_iterations = trainer.is_last_batch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self._between_iterations = trainer.is_last_batch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """After the last evaluation, which comes at the end of training."""
        if self._between_iterations:  # not in an iteration that a limit of steps or time has cut
            self._save(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: AgentModule, checkpoint: dict[str, Any]) -> None:
        """Whoever saves within an iteration gets the state of the last checkpoint, from which the run can go on."""
        if self._newest is not None and not self._between_iterations and trainer.is_global_zero:
            checkpoint.clear()
            checkpoint |= read(self._newest)

    def _refuse_to_go_back(self, iterations: int) -> None:
        """A run folder holds one run: what is further than this run's start would be taken for its end."""
        newest = next(reversed(iteration_checkpoints(self._folder)), None) if self.enabled else None
        if newest is not None and iterations_of(newest) > iterations:
            raise ConfigError(
                f"{self._folder.parent} holds a run that is further, {newest.name}: continue it with --ckpt_path {newest}, "
                "or give trainer.logger another version"
            )

    def _save(self, trainer: pl.Trainer, module: AgentModule) -> None:
        path = iteration_path(self._folder, module.counters.iterations)
        if not self.enabled:
            module.data.source.learned(module.counters.iterations)
        if path == self._newest or not self.enabled:
            return
        for logger in trainer.loggers:
            logger.save()  # what is logged must not be lost with the process, for it will not be logged again
        trainer.save_checkpoint(path, weights_only=False)
        self._newest = path
        checkpoints = iteration_checkpoints(self._folder)
        for old in checkpoints[: -self.keep]:
            trainer.strategy.remove_checkpoint(old)
        module.data.source.learned(min(map(iterations_of, checkpoints[-self.keep :]), default=0))
