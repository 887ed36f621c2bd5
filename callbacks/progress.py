"""One progress bar for every phase of a run, a line per iteration, a table at the end."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from callbacks.evaluation import EvaluationCallback
from steppo.module import AgentModule


class StepProgressBar(ProgressBar):
    """Shows game generation, warm start, rollouts, updates and evaluations as they go.

    Args:
        every_n_iterations: Print a line for every n-th iteration.
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        super().__init__()
        self.every_n_iterations = max(1, every_n_iterations)
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---- phases other than Lightning's own (steppo.progress.ShowsPhases) ----

    def start_phase(self, name: str, total: int | None) -> None:
        """Shows a new phase in place of the last."""
        if not self._enabled:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._progress.start()
        self.end_phase()
        fitting = self._trainer is not None and self._trainer.training
        where = f"iteration {self.trainer.current_epoch + 1} " if fitting else ""
        self._task = self._progress.add_task(where + name, total=total)

    def advance_phase(self, done: int, total: int | None) -> None:
        """Moves the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def end_phase(self) -> None:
        """Takes the phase off the screen."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._task = None

    # ---- Lightning's phases ----

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.start_phase("updates", int(self.total_train_batches))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.advance_phase(batch_idx + 1, int(self.total_train_batches))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_phase()
        if not self._enabled or (trainer.current_epoch + 1) % self.every_n_iterations:
            return
        seen = trainer.callback_metrics
        parts = [f"iteration {trainer.current_epoch + 1:>4}"]
        for label, name, form in (
            ("success", "rollout/success_rate", "{:.2f}"),
            ("steps", "rollout/steps_per_episode", "{:.1f}"),
            ("invalid", "rollout/invalid_action_rate", "{:.3f}"),
            ("entropy", "train/entropy", "{:.2f}"),
            ("kl", "train/approx_kl", "{:.4f}"),
            ("explained var", "train/explained_variance", "{:.2f}"),
            ("seconds", "seconds/rollout", "{:.1f}"),
            ("+", "seconds/update", "{:.1f}"),
        ):
            if name in seen:
                parts.append(f"{label} {form.format(float(seen[name]))}")
        self._console.print("  ".join(parts))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_phase()
        if self._enabled and trainer.training:
            record = _evaluations(trainer)[-1]
            low, high = record["success_ci95"]
            self._console.print(
                f"[bold]evaluation[/] on {record['split']}: success {record['success_rate']:.2f} [{low:.2f}, {high:.2f}]"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        if self._enabled and isinstance(pl_module, AgentModule):
            self._console.print(_result_table(_evaluations(trainer)))
            self._console.print(_seconds_table(pl_module))
            self._say_where(trainer)

    def on_validate_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluated(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        if self._enabled:
            self._console.print(_result_table(_evaluations(trainer)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _on_evaluated(self, trainer: pl.Trainer) -> None:
        self._stop()
        if self._enabled:
            self._console.print(_result_table(_evaluations(trainer)))

    def _say_where(self, trainer: pl.Trainer) -> None:
        if trainer.log_dir:
            self._console.print(f"Results: {trainer.log_dir}/evaluation.jsonl")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._console.print(f"Curves:  tensorboard --logdir {logger.save_dir}")


def _evaluations(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return next((c.history for c in trainer.callbacks if isinstance(c, EvaluationCallback)), [])


def _result_table(history: list[dict[str, Any]]) -> Table:
    """Before and after, or the one evaluation there is."""
    table = Table(title="Evaluation")
    for name in ("", "iteration", "environment steps", "split", "episodes", "success", "95 % interval", "return", "steps"):
        table.add_column(name, justify="left" if name in ("", "split") else "right")
    rows = [("before", history[0]), ("after", history[-1])] if len(history) > 1 else [("", record) for record in history]
    for label, record in rows:
        low, high = record["success_ci95"]
        table.add_row(
            label,
            str(record["iteration"]),
            f"{record['environment_steps']:,}",
            record["split"],
            str(record["episodes"]),
            f"{record['success_rate']:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{record['return_mean']:.3f}",
            f"{record['steps_mean']:.1f}",
        )
    return table


def _seconds_table(module: AgentModule) -> Table:
    table = Table(title="Seconds by phase")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, spent in module.seconds.items():
        table.add_row(name.replace("_", " "), f"{spent:.1f}")
    return table
