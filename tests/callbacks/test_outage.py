"""A panel of which every episode fails says nothing of the policy: the run goes on, and no figure of it is the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EvaluationCallback
from steppo import results
from steppo.errors import ConfigError
from steppo.panel.compare import compare
from tests.cli_helpers import run

MEANS = ("return_mean", "steps_mean", "invalid_action_rate")
CHECKPOINT, STOPPING = (f"lightning.pytorch.callbacks.{name}" for name in ("ModelCheckpoint", "EarlyStopping"))
MONITORS = {"success_rate": "max", "steps_mean": "min", "info/score": "max"}


class Outage(Callback):
    """Takes the panel's server down for the evaluations after some numbers of iterations."""

    def __init__(self, down: str, iterations: list[int]) -> None:
        self.down = Path(down)
        self.iterations = iterations

    def setup(self, *_: Any, **__: Any) -> None:
        self._set(0)

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self._set(trainer.current_epoch + 1)

    def _set(self, iteration: int) -> None:
        if iteration in self.iterations:
            self.down.touch()
        else:
            self.down.unlink(missing_ok=True)


def options(folder: Path, down: list[int], verdict: bool = True) -> list[str]:
    """A run whose callbacks monitor a rate, a mean and a figure of the environment, with the defaults of Lightning."""
    found = ["--data.source.env=tests.worker_envs.OutageEnv", f"--data.source.env.down={folder}/down"]
    found += [f"--data.source.env.verdict={verdict}", "--warm_start.actions=expert"]
    found += [f"--trainer.callbacks+={__name__}.Outage", f"--trainer.callbacks.down={folder}/down"]
    found += [f"--trainer.callbacks.iterations={down}"]
    for name, mode in MONITORS.items():
        monitored = [f"--trainer.callbacks.monitor=val/{name}", f"--trainer.callbacks.mode={mode}"]
        file = f"--trainer.callbacks.filename={name.replace('/', '_')}"
        found += [f"--trainer.callbacks+={CHECKPOINT}", *monitored, file]
        found += [f"--trainer.callbacks+={STOPPING}", *monitored, "--trainer.callbacks.patience=9"]
    return found


def strictly(text: str) -> Any:
    """As a reader sees it that knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("verdict", "down", "resumed"),
    [(True, [0, 1], False), (False, [2], False), (False, [0, 1], False), (True, [2], True)],
    ids=["before any that was played", "without a verdict", "without a verdict yet", "after a resume"],
)
def test_the_run_goes_on_and_another_evaluation_is_the_best(
    verdict: bool, down: list[int], resumed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path, down, verdict)
    if resumed:
        run(tmp_path, *arguments, "--trainer.max_epochs=1")
        arguments.append("--ckpt_path=last")
    cli = run(tmp_path, *arguments, "--trainer.max_epochs=3")
    records = [strictly(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    failed = [record for record in records if record["iteration"] in down]
    assert [[record[name] for name in ("episodes", "errors", "success_rate", *MEANS)] for record in failed] == [
        [0, 8, None, None, None, None]
    ] * len(down)
    played = [record for record in records[1:] if record not in failed]
    assert all(record[name] is not None for record in played for name in MEANS)

    # Lightning's callbacks, by the evaluations that they see.
    checkpoints = [callback for callback in cli.trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    monitors = {"success_rate" if verdict else "return_mean": max, "steps_mean": min, "info/score": max}
    assert [callback.monitor for callback in checkpoints] == [f"val/{name}" for name in monitors]
    for callback, (name, best) in zip(checkpoints, monitors.items(), strict=True):
        figures = {record["iteration"]: ({**record, "info/score": record["info"]["score"]})[name] for record in played}
        assert float(callback.best_model_score) == pytest.approx(best(figures.values()))
        kept = torch.load(callback.best_model_path, weights_only=True)["steppo"]["counters"]["iterations"]
        assert figures[kept] == pytest.approx(best(figures.values()))
    stopping = [callback for callback in cli.trainer.callbacks if isinstance(callback, EarlyStopping)]
    assert [(callback.monitor, callback.stopped_epoch) for callback in stopping] == [(f"val/{n}", 0) for n in monitors]

    curve = EventAccumulator(str(tmp_path)).Reload().Scalars("val/return_mean")
    assert [math.isnan(point.value) for point in curve] == [record in failed for record in records]
    text = capsys.readouterr().out
    words = "evaluation on valid after {} iterations: 8 of 8 episodes failed (ConnectionError: the server is down"
    assert all(words.format(iteration) in text for iteration in down)
    assert "nan" not in text
    assert "None" not in text


def test_a_failure_says_nothing_of_verdicts(tmp_path: Path) -> None:
    """In an environment that was found to give none there is no rate, not even an unknown one."""
    run(tmp_path, *options(tmp_path, [2], verdict=False))
    assert not [tag for tag in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] if "val/success" in tag]


def test_a_result_without_a_healthy_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(tmp_path, [0]), "--warm_start.updates=0"]
    cli = run(tmp_path, *arguments, command="validate")
    text = capsys.readouterr().out
    assert "evaluation on valid after 0 iterations: 8 of 8 episodes failed" in text
    assert "nan" not in text
    [evaluation] = [callback for callback in cli.trainer.callbacks if isinstance(callback, EvaluationCallback)]
    assert strictly((tmp_path / "validate.json").read_text()) == evaluation.result
    assert "| failed episodes | 8 |" in (tmp_path / "validate.md").read_text()
    assert "| return |" not in (tmp_path / "validate.md").read_text()
    result = results.read(tmp_path / "validate.json")
    with pytest.raises(ConfigError, match="no task with a healthy episode"):
        compare(result, result)
