"""One progress bar for every phase of a run, a line per iteration and evaluation, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from callbacks.evaluation import EvaluationCallback
from steppo import results
from steppo.errors import ConfigError, in_short
from steppo.learner import Experience, ReplayStatistics
from steppo.listeners import Evaluation, Listener
from steppo.metrics import common_failure
from steppo.module import AgentModule
from steppo.run_folder import run_folder


class StepProgressBar(ProgressBar, Listener):
    """Shows game generation, warm start, rollouts, updates and evaluations as they go.

    Args:
        every_n_iterations: Print a line for every n-th iteration.
        enabled: Show anything at all.
    """

    def __init__(self, every_n_iterations: int = 1, enabled: bool = True) -> None:
        super().__init__()
        if every_n_iterations < 1:
            raise ConfigError("progress: every_n_iterations must be at least 1; progress.enabled false shows nothing")
        self.every_n_iterations = every_n_iterations
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._enabled = enabled
        self._failure = ""

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---- phases other than Lightning's own (steppo.progress.phase) ----

    def start_phase(self, name: str, total: int | None) -> None:
        """Shows a new phase in place of the last."""
        if not self._enabled:
            return
        self.end_phase()
        fitting = self._trainer is not None and self._trainer.fit_loop.epoch_progress.current.ready > 0
        where = f"iteration {self.trainer.current_epoch + 1} " if fitting else ""
        if not self._console.is_terminal and not fitting:
            self._console.print(f"{name} ...")
        columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            *columns,
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
        )
        self._progress.add_task(where + name, total=total, note="")
        self._progress.start()

    def advance_phase(self, done: int, total: int | None, note: str = "") -> None:
        """Moves the bar; a note takes the place of the last."""
        if self._progress is not None:
            [task] = self._progress.task_ids
            fields: dict[str, Any] = {"note": note} if note else {}
            self._progress.update(task, completed=done, total=total, **fields)

    def end_phase(self) -> None:
        """Takes the phase off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    # ---- Lightning's phases ----

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: AgentModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.start_phase("updates", int(self.total_train_batches))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: AgentModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.advance_phase(batch_idx + 1, int(self.total_train_batches))

    def on_experience(
        self, trainer: pl.Trainer, pl_module: AgentModule, experience: Experience, replay: ReplayStatistics
    ) -> None:
        if pl_module.latest.get("rollout/failed_episodes"):  # over all ranks
            self._failure = common_failure(experience.episodes)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self.end_phase()
        if not self._enabled or (trainer.current_epoch + 1) % self.every_n_iterations:
            return
        latest = pl_module.latest
        instead = {} if "rollout/success_rate" in latest else {"rollout/return_mean": "return {:.3g}"}
        figures = [form.format(latest[name]) for name, form in {**instead, **_LINE}.items() if name in latest]
        if failed := latest.get("rollout/failed_episodes"):
            played = failed + latest["rollout/episodes"]
            figures.append(_failed(int(failed), int(played), self._failure))
        self._console.print(f"iteration {trainer.current_epoch + 1:>4}  " + "  ".join(figures), soft_wrap=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self.end_phase()
        if trainer.state.fn != TrainerFn.FITTING:
            self._say_result(trainer, pl_module)

    def on_evaluation(self, trainer: pl.Trainer, pl_module: AgentModule, evaluation: Evaluation) -> None:
        if self._enabled and trainer.state.fn == TrainerFn.FITTING:
            self._console.print(in_words(evaluation.record), soft_wrap=True)

    def _say_result(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A result is never kept to itself, nor where it is."""
        self.end_phase()
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
        evaluation = next((callback for callback in callbacks if isinstance(callback, EvaluationCallback)), None)
        fitting = trainer.state.fn == TrainerFn.FITTING
        history = evaluation.history if evaluation is not None else []
        for record in [*history[:1], *history[1:][-1:]] if self._enabled and fitting else history[-1:]:
            self._console.print(in_words(record), soft_wrap=True)
        if self._enabled and evaluation is not None and evaluation.result:
            for table in results.tables(evaluation.result):
                self._console.print(results.as_rich(table))
        if self._enabled and fitting:
            self._console.print(_seconds_table(pl_module))
        if folder is None:
            return
        named = {TrainerFn.VALIDATING: "validate.md", TrainerFn.TESTING: "test.md"}
        if (place := folder / named.get(cast(TrainerFn, trainer.state.fn), "evaluation.jsonl")).exists():
            self._console.print(f"Results: {place}", soft_wrap=True)
        if self._enabled and (folder / "transcripts.html").exists():
            self._console.print(f"Episodes: {folder / 'transcripts.html'} (open it in a browser)", soft_wrap=True)
        if self._enabled and fitting and isinstance(trainer.logger, TensorBoardLogger):
            self._console.print(f"Curves:  tensorboard --logdir {trainer.logger.save_dir}", soft_wrap=True)

    on_test_end = on_fit_end = _say_result

    def on_exception(self, trainer: pl.Trainer, pl_module: AgentModule, exception: BaseException) -> None:
        self.end_phase()

    def teardown(self, trainer: pl.Trainer, pl_module: AgentModule, stage: str) -> None:
        self.end_phase()


_LONGEST_ERROR = 160
_LINE = {
    "rollout/success_rate": "success {:.2f}",
    "rollout/steps_per_episode": "steps {:.1f}",
    "rollout/invalid_action_rate": "invalid {:.3f}",
    "rollout/staleness": "stale {:.2f}",
    "train/entropy": "entropy {:.3f}",
    "train/approx_kl": "kl {:.4f}",
    "train/clip_fraction": "clipped {:.3f}",
    "train/explained_variance": "explained {:.2f}",
    "seconds/rollout": "rollout {:.1f} s",
    "seconds/update": "update {:.1f} s",
}


def in_words(record: Mapping[str, Any]) -> str:
    """An evaluation in a few words: its success, or its return where nobody says what success is, and what failed."""
    said = []
    if record["success_rate"] is not None:
        said.append(f"success {record['success_rate']:.2f} " + "[{:.2f}, {:.2f}]".format(*record["success_ci95"]))
    elif record["return_mean"] is not None:
        said.append(f"return {record['return_mean']:.3g}")
    if record["errors"]:
        played = record["errors"] + record["episodes"]
        said.append(_failed(record["errors"], played, record.get("most_common_error", "")))
    who = f"by {record['player']}" if "player" in record else f"after {record['iteration']} iterations"
    return f"evaluation on {record['split']} {who}: {'  '.join(said)}"


def _failed(failed: int, played: int, error: str) -> str:
    return f"{failed} of {played} episodes failed ({in_short(error, _LONGEST_ERROR) or 'no message'})"


def _seconds_table(module: AgentModule) -> Table:
    table = Table("phase", Column("seconds", justify="right"), title="Seconds by phase")
    for name, spent in module.seconds.items():
        table.add_row(name.replace("_", " "), f"{spent:.1f}")
    return table
