"""What people are used to from Lightning works here too, or is refused in one line (tests/cli/test_errors.py)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from steppo.cli import main
from tests.cli_helpers import TOY, checkpoint, evaluations, run

CALLBACKS = "lightning.pytorch.callbacks"
SHORT = ["--warm_start.updates=0", "--evaluation.before_training=false", "--data.eval_tasks=4"]
ONCE = [*SHORT, "--trainer.max_epochs=1"]
BEST = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: top, monitor: val/success_rate}}"
FILES = {"evaluation.jsonl", "transcripts.jsonl", "transcripts.html"}


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
    logger = f"{{class_path: CSVLogger, save_dir: {tmp_path}, name: '', version: ''}}"
    cli = run(
        tmp_path,
        *SHORT,
        "--trainer.logger=null",
        f"--trainer.logger={logger}",
        "--trainer.callbacks+=LearningRateMonitor",
        "--model.policy_optimizer.schedule=linear",
    )
    assert isinstance(cli.trainer.logger, CSVLogger)
    found = columns(tmp_path / "metrics.csv")
    assert found["val/success_rate"] == [record["success_rate"] for record in evaluations(tmp_path)]
    assert found["lr-AdamW/policy"] == pytest.approx([2e-3, 1e-3])  # as each iteration starts
    assert found["lr-AdamW/critic"] == pytest.approx([3e-3, 3e-3])


def test_no_logger(tmp_path: Path) -> None:
    """A run without one has a folder of its own, too; it goes on there by ``last`` or by its checkpoint's path."""
    where = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks+=" + BEST]
    folders = [tmp_path / "runs" / f"version_{number}" for number in range(3)]
    for folder in folders[:2]:
        cli = run(tmp_path / "unused", *ONCE, *where)
        assert cli.trainer.loggers == []
        assert len(evaluations(folder)) == 1
    run(tmp_path / "unused", *SHORT, *where, f"--ckpt_path={checkpoint(folders[1])}", "--trainer.max_epochs=2")
    run(tmp_path / "unused", *SHORT, *where, "--ckpt_path=last", "--trainer.max_epochs=3")
    run(tmp_path / "unused", *where, f"--ckpt_path={checkpoint(folders[0])}", command="validate")
    assert [[record["iteration"] for record in evaluations(folder)] for folder in folders] == [[1], [1, 2, 3], [1]]
    assert (folders[0] / "checkpoints" / "top.ckpt").exists()
    assert {path.name for path in folders[2].iterdir()} == {*FILES, "config.yaml", "validate.json", "validate.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_the_logger_that_lightning_takes_unless_told(tmp_path: Path) -> None:
    """Runs go on in its folders, too; and with the config that the run saved."""
    folder = tmp_path / "lightning_logs" / "version_0"
    where = [f"--trainer.default_root_dir={tmp_path}", f"--warm_start.cache_dir={tmp_path}/cache"]
    main(["fit", "--config", str(TOY), *where, *ONCE, "--trainer.logger=true"])
    last = [*SHORT, "--ckpt_path=last"]
    main(["fit", "--config", str(TOY), *where, *last, "--trainer.logger=null", "--trainer.max_epochs=2"])
    main(["fit", "--config", str(folder / "config.yaml"), *last, "--trainer.max_epochs=3"])
    assert [record["iteration"] for record in evaluations(folder)] == [1, 2, 3]
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]


class Elsewhere(Logger):
    """Keeps figures anywhere but in a folder of this run."""

    name, version = "figures", None

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("logger", ["[]", "tests.cli.test_habits.Elsewhere"])
def test_other_loggers_have_the_same_rule(logger: str, tmp_path: Path) -> None:
    where = [f"--trainer.logger={logger}", f"--trainer.default_root_dir={tmp_path}"]
    for number in range(2):
        main(["fit", "--config", str(TOY), *where, *ONCE, "--trainer.callbacks+=" + BEST])
        folder = tmp_path / "runs" / f"version_{number}"
        assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"top.ckpt", "iteration-000001.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


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


@pytest.mark.parametrize(
    ("command", "options", "updates"),
    [
        ("fit", ["--trainer.fast_dev_run=true"], 1),
        ("fit", ["--trainer.fast_dev_run=2", "--trainer.logger=false", "--trainer.callbacks+=" + BEST], 2),
        (
            "fit",
            ["--trainer.fast_dev_run=1", "--trainer.logger=false", "--trainer.logger=tests.cli.test_habits.Elsewhere"],
            1,
        ),
        ("validate", ["--trainer.fast_dev_run=true"], 0),
        ("test", ["--trainer.fast_dev_run=3", "--trainer.enable_progress_bar=false"], 0),
    ],
)
def test_fast_dev_run(
    command: str, options: list[str], updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rollout, one update (or so many), one evaluation; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOY.parent.parent)
    short = SHORT if command == "fit" else [SHORT[0], SHORT[2]]
    cli = run(tmp_path / "run", *short, *options, command=command)
    assert cli.model.counters.updates == updates
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoints(tmp_path: Path) -> None:
    cli = run(tmp_path, *ONCE, "--trainer.enable_checkpointing=false", "--trainer.callbacks+=" + BEST)
    assert cli.model.counters.updates == 2
    assert {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name} == {
        *FILES,
        "config.yaml",
        "hparams.yaml",
    }


def test_no_evaluations(tmp_path: Path) -> None:
    cli = run(tmp_path, SHORT[0], "--trainer.limit_val_batches=0", "--trainer.max_epochs=1")
    assert cli.model.counters.updates == 2
    assert not (tmp_path / "evaluation.jsonl").exists()


def test_profiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        tmp_path,
        *ONCE,
        "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler",
        f"--trainer.profiler.dirpath={tmp_path}",
        "--trainer.profiler.filename=profile",
    )
    assert "[LightningModule]AgentModule.on_train_epoch_start" in (tmp_path / "fit-profile.txt").read_text()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("option", ["--trainer.enable_progress_bar=false", "--progress.enabled=false"])
def test_quiet(command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result and its place, and nothing else."""
    run(tmp_path, *(ONCE if command == "fit" else [ONCE[0], ONCE[2]]), option, command=command)
    [record] = evaluations(tmp_path)
    split = "test" if command == "test" else "valid"
    result, place = capsys.readouterr().out.splitlines()
    assert result.startswith(
        f"evaluation on {split} after {record['iteration']} iterations: success {record['success_rate']:.2f} ["
    )
    assert place == f"Results: {tmp_path}/{'evaluation.jsonl' if command == 'fit' else f'{command}.md'}"


def test_fine_tuning_on_expert_play_first(tmp_path: Path) -> None:
    settings = ["--warm_start.actions=expert", "--warm_start.updates=150", "--trainer.max_epochs=1"]
    run(tmp_path, *settings, "--data.eval_split=train", "--model.policy.hidden_size=64")
    assert evaluations(tmp_path)[0]["success_rate"] >= 0.75
