"""What people are used to from Lightning works here too, or is refused in one line (tests/test_cli_errors.py)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from steppo.cli import main
from tests.cli_helpers import TOY, checkpoint, evaluations, run

CALLBACKS = "lightning.pytorch.callbacks"
SHORT = ["--warm_start.updates=0", "--evaluation.before_training=false", "--data.eval_tasks=4"]
ONCE = [*SHORT, "--trainer.max_epochs=1"]


def columns(path: Path) -> dict[str, list[float]]:
    """A CSVLogger's file: the numbers in each column."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_early_stopping_and_the_best_checkpoint_by_success(tmp_path: Path) -> None:
    cli = run(
        tmp_path,
        *SHORT,
        f"--trainer.callbacks+={CALLBACKS}.EarlyStopping",
        "--trainer.callbacks.monitor=val/success_rate",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.patience=1",
        f"--trainer.callbacks+={CALLBACKS}.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/success_rate",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.filename=top",
        "--trainer.max_epochs=5",
        "--model.policy_optimizer.lr=1e-12",  # nothing is learned, so nothing gets better
        "--model.critic_optimizer.lr=1e-12",
        "--model.critic=steppo.models.SeparateCritic",
    )
    assert [record["iteration"] for record in evaluations(tmp_path)] == [1, 2]
    best = next(c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    assert Path(best.best_model_path).name == "top.ckpt"
    assert float(best.best_model_score) == evaluations(tmp_path)[0]["success_rate"]


def test_csv_logger_and_learning_rate_monitor(tmp_path: Path) -> None:
    cli = run(
        tmp_path,
        *SHORT,
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.callbacks+={CALLBACKS}.LearningRateMonitor",
        "--model.policy_optimizer.schedule=linear",
    )
    assert isinstance(cli.trainer.logger, CSVLogger)
    found = columns(tmp_path / "metrics.csv")
    assert found["val/success_rate"] == [record["success_rate"] for record in evaluations(tmp_path)]
    assert found["lr-AdamW/policy"] == pytest.approx([2e-3, 1e-3])  # as each iteration starts
    assert found["lr-AdamW/critic"] == pytest.approx([3e-3, 3e-3])


def test_no_logger(tmp_path: Path) -> None:
    cli = run(tmp_path / "unused", *ONCE, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}")
    assert cli.trainer.loggers == []
    assert len(evaluations(tmp_path)) == 1
    assert not (tmp_path / "unused").exists()


def test_several_loggers(tmp_path: Path) -> None:
    overlay = tmp_path / "loggers.yaml"
    kinds = [
        f"{{class_path: lightning.pytorch.loggers.{name}, init_args: {{save_dir: {tmp_path}/{name}}}}}"
        for name in ("TensorBoardLogger", "CSVLogger")
    ]
    overlay.write_text(f"trainer: {{logger: [{', '.join(kinds)}]}}\n")
    cli = main(["fit", "--config", str(TOY), "--config", str(overlay), *ONCE])
    assert [type(logger) for logger in cli.trainer.loggers] == [TensorBoardLogger, CSVLogger]
    success = columns(Path(cli.trainer.loggers[1].log_dir) / "metrics.csv")["val/success_rate"]
    assert success == [evaluations(Path(cli.trainer.loggers[0].log_dir))[0]["success_rate"]]


def test_time_limit(tmp_path: Path) -> None:
    """The run ends with an iteration, so that its last checkpoint can be resumed from."""
    cli = run(tmp_path, *SHORT, "--trainer.max_time=00:00:00:01", "--trainer.max_epochs=10000")
    done = cli.trainer.current_epoch
    assert 0 < done < 10000
    assert cli.model.counters.updates == 2 * done
    assert evaluations(tmp_path)[-1]["iteration"] == done
    last = f"--ckpt_path={checkpoint(tmp_path)}"
    resumed = run(tmp_path / "rest", *SHORT, last, f"--trainer.max_epochs={done + 1}")
    assert resumed.model.counters.updates == 2 * (done + 1)


def test_fast_dev_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rollout, one update, one evaluation; no curves and no checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOY.parent.parent)
    cli = run(tmp_path / "run", *SHORT, "--trainer.fast_dev_run=true")
    assert cli.model.counters.updates == 1
    assert not (tmp_path / "run").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.jsonl", "transcripts.jsonl", "transcripts.html"}


def test_profiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        tmp_path,
        *ONCE,
        "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler",
        f"--trainer.profiler.dirpath={tmp_path}",
        "--trainer.profiler.filename=profile",
    )
    assert "[LightningModule]AgentModule.on_train_epoch_start" in (tmp_path / "fit-profile.txt").read_text()


def test_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *ONCE, "--trainer.enable_progress_bar=false")
    assert capsys.readouterr().out == ""


def test_fine_tuning_on_expert_play_first(tmp_path: Path) -> None:
    settings = ["--warm_start.actions=expert", "--warm_start.updates=150", "--trainer.max_epochs=1"]
    run(tmp_path, *settings, "--data.eval_split=train", "--model.policy.hidden_size=64")
    assert evaluations(tmp_path)[0]["success_rate"] >= 0.75
