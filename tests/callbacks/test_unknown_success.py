"""Unknown is not failure: an environment that does not say what is solved gets no rate, and nothing goes by one."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EvaluationCallback
from steppo.cli import SteppoCLI
from steppo.export import main as export
from steppo.play.command import main as play
from tests.cli_helpers import TOY, checkpoint, evaluations, run

CALLBACKS = "lightning.pytorch.callbacks"
SILENT = [
    "--data.source.env=tests.wrong_env.SilentEnv",
    "--warm_start.actions=expert",
    f"--trainer.callbacks+={CALLBACKS}.EarlyStopping",
    "--trainer.callbacks.monitor=val/success_rate",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.patience=9",
    f"--trainer.callbacks+={CALLBACKS}.ModelCheckpoint",
    "--trainer.callbacks.monitor=val/success_rate",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.filename=best",
]


@pytest.fixture(scope="module")
def silent_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteppoCLI, Path]:
    """A run with the callbacks that a config names, in an environment without a verdict."""
    folder = tmp_path_factory.mktemp("silent")
    return run(folder, *SILENT), folder


def best_of(cli: SteppoCLI) -> ModelCheckpoint:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, ModelCheckpoint))


def test_a_run_without_a_verdict_goes_by_its_return(silent_run: tuple[SteppoCLI, Path]) -> None:
    cli, folder = silent_run
    records = evaluations(folder)
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert {(record["success_rate"], record["success_ci95"], record["no_verdict"]) for record in records} == {
        (None, None, 8)
    }
    assert any(record["return_mean"] > 0 for record in records)
    tags = set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert not {tag for tag in tags if "success" in tag}
    assert {"val/return_mean", "val/no_verdict", "rollout/return_mean", "rollout/no_verdict"} <= tags
    best = best_of(cli)
    assert best.monitor == "val/return_mean"
    assert float(best.best_model_score) == pytest.approx(max(record["return_mean"] for record in records[1:]))
    [stopping] = [callback for callback in cli.trainer.callbacks if isinstance(callback, EarlyStopping)]
    assert stopping.monitor == "val/return_mean"


class Silence(Callback):
    """After the evaluation before training nobody gives a verdict any more."""

    def __init__(self, silent: str) -> None:
        self.silent = Path(silent)

    def on_train_epoch_start(self, *_: Any) -> None:
        self.silent.touch()


def test_where_verdicts_were_given_none_is_none_solved(tmp_path: Path) -> None:
    """An environment may say so only of what was solved; what monitors the rate must go on finding one."""
    silent = ["--data.source.env=tests.worker_envs.FallsSilentEnv", f"--data.source.env.silent={tmp_path}/silent"]
    silent += [f"--trainer.callbacks+={__name__}.Silence", f"--trainer.callbacks.silent={tmp_path}/silent"]
    cli = run(tmp_path, *silent, *SILENT[2:], "--warm_start.updates=0")
    first, *later = evaluations(tmp_path)
    assert first["no_verdict"] == 0
    assert [(record["no_verdict"], record["success_rate"]) for record in later] == [(8, 0.0), (8, 0.0)]
    assert later[0]["success_ci95"] == pytest.approx([0.0, 0.324], abs=1e-3)
    assert best_of(cli).monitor == "val/success_rate"


def test_play_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    play([f"--config={TOY}", *SILENT[:1], "--player=expert", "--episodes=2"])
    text = capsys.readouterr().out
    assert text.count("over: return 1 in") == 2
    assert "2 episodes: return 1, steps" in text
    assert "solved" not in text


def test_a_continued_run_finds_its_best_again(silent_run: tuple[SteppoCLI, Path], capsys) -> None:
    cli, folder = silent_run
    before = best_of(cli).best_model_score
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        more = run(folder, *SILENT, "--trainer.max_epochs=3", "--ckpt_path=last", "--model.policy_optimizer.lr=1e-12")
    assert best_of(more).monitor == "val/return_mean"
    assert best_of(more).best_model_score >= before
    assert not [warning for warning in caught if "ckpt_path" in str(warning.message)]
    text = capsys.readouterr().out
    assert re.search(r"^evaluation on valid after 3 iterations: return [-.\d]+$", text, re.MULTILINE)
    assert re.search(r"^iteration    3  return [-.\d]+  steps", text, re.MULTILINE)
    assert "success" not in text
    assert "nan" not in text


def test_the_model_card_shows_what_there_is(silent_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    _, folder = silent_run
    export([f"--ckpt_path={checkpoint(folder)}", f"--out={tmp_path / 'out'}"])
    card = (tmp_path / "out" / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("- evaluation on valid")]
    assert lines
    assert all("success" not in line for line in lines)
    assert f"return {evaluations(folder)[-1]['return_mean']:.3g}" in lines[-1]


def test_one_verdict_makes_a_rate_of_all(tmp_path: Path) -> None:
    """An environment that says so when it is solved: all others count as not solved, and are reported."""
    cli = run(
        tmp_path,
        "--data.source.env=tests.wrong_env.BoastingEnv",
        "--warm_start.actions=expert",
        "--warm_start.updates=150",
        "--data.eval_split=train",
        "--trainer.max_epochs=1",
        *SILENT[6:],
    )
    for record in evaluations(tmp_path):
        assert 0 < record["success_rate"] == (8 - record["no_verdict"]) / 8
        assert len(record["success_ci95"]) == 2
    assert best_of(cli).monitor == "val/success_rate"


class Monitoring:
    """What there is of a trainer for a callback that monitors."""

    def __init__(self, *monitors: str | None) -> None:
        self.callbacks = [type("Watcher", (), {"monitor": monitor})() for monitor in monitors] + [object()]


@pytest.mark.parametrize(
    ("rates", "monitor"),
    [
        ([], "val/success_rate"),
        ([0.0], "val/success_rate"),
        ([0.5, None], "val/success_rate"),  # the last rate that was known stays
        ([None], "val/return_mean"),
        ([None, None], "val/return_mean"),
        ([None, 0.5], "val/return_mean"),  # scores of two kinds would be compared
    ],
)
def test_the_first_evaluation_decides(rates: list[float | None], monitor: str) -> None:
    trainer = Monitoring("val/success_rate", "val/steps_mean", None, "val/success_rate")
    broken = {"success_rate": None, "episodes": 0}  # says nothing of the environment
    history = [broken, *({"success_rate": rate, "episodes": 8} for rate in rates)]
    EvaluationCallback._find_monitors(trainer, history)  # type: ignore[arg-type]
    assert [callback.monitor for callback in trainer.callbacks[:-1]] == [monitor, "val/steps_mean", None, monitor]


def test_records_are_plain_json(silent_run: tuple[SteppoCLI, Path]) -> None:
    _, folder = silent_run

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for name in ("evaluation.jsonl", "transcripts.jsonl"):
        for line in (folder / name).read_text().splitlines():
            record = json.loads(line, parse_constant=refuse)
            if name == "transcripts.jsonl":
                assert record["success"] is None
                assert math.isfinite(record["return"])
