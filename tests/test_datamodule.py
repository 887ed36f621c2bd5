"""Task lists are read once, and what can be known of a run before its first episode is said there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steppo.datamodule import StepDataModule
from steppo.types import Task
from tests.cli_helpers import evaluations, run
from tests.toy_env import CorridorEnv

SHORT = ["--warm_start.updates=0", "--trainer.max_epochs=2"]


class Source:
    """Gives the tasks of splits by name, and counts how often it was asked."""

    def __init__(self, **splits: list[str]) -> None:
        self.splits = splits
        self.asked: Counter[str] = Counter()

    def tasks(self, split: str) -> list[Task]:
        self.asked[split] += 1
        return [Task(name) for name in self.splits[split]]

    def prepare(self, tasks: Any, progress: Any) -> None: ...


def test_a_task_list_is_read_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    tasks = CorridorEnv.tasks
    monkeypatch.setattr(CorridorEnv, "tasks", lambda self, split: asked.update([split]) or tasks(self, split))
    run(tmp_path, "--warm_start.updates=1", SHORT[1])
    assert asked == {"train": 1, "valid": 1}
    assert len(evaluations(tmp_path)) == 3


def test_a_split_of_two_uses_is_read_once() -> None:
    source: Any = Source(all=["a", "b", "c"])
    data = StepDataModule(source, train_split="all", eval_split="all", test_split="all", train_tasks=2, eval_tasks=1)
    for _ in range(2):
        lists = data.tasks(), data.panel("validate"), data.panel("test")
        assert [[task.id for task in found] for found in lists] == [["a", "b"], ["a"], ["a"]]
        assert lists[0] is data.tasks()
    assert source.asked == {"all": 1}


@pytest.mark.parametrize(
    ("train", "valid", "settings", "said"),
    [
        (["a", "b", "c"], ["b", "d", "c"], {}, "2 of the 3 tasks of the panel (valid) are learned from (train), such as b"),
        (["a"], ["a"], {}, "1 of the 1 tasks of the panel (valid) are learned from (train), such as a"),
        (["a", "b"], ["c", "d"], {}, ""),
        (["a", "b"], ["c", "b"], {"train_tasks": 1}, ""),
        (["a", "b"], ["c", "b"], {"eval_tasks": 1}, ""),
        (["a", "b"], ["b", "c"], {"eval_split": "train"}, ""),  # who evaluates on what is learned wants to
        (["a", "A", "a "], [" a"], {}, ""),
    ],
)
def test_the_same_task_to_learn_from_and_to_evaluate_is_said(
    train: list[str], valid: list[str], settings: dict[str, Any], said: str, recwarn: pytest.WarningsRecorder
) -> None:
    source: Any = Source(train=train, valid=valid)
    StepDataModule(source, **settings).prepare_data()
    assert [str(warning.message).partition(":")[0] for warning in recwarn] == ([said] if said else [])


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (["--rollout.episodes_per_iteration=2", "--data.source.max_steps=3", "--data.num_minibatches=7"], "2 episodes"),
        (["--rollout.episodes_per_iteration=1", "--data.source.env.max_steps=1"], "1 episodes"),
        (["--data.source.env.max_steps=2", "--data.num_minibatches=17"], "8 episodes"),
        (["--rollout.group_size=4", "--data.source.max_steps=2", "--data.num_minibatches=17"], "8 episodes"),
        (["--data.source.max_steps=50", "--data.num_minibatches=65"], "8 episodes"),
    ],
)
def test_too_many_minibatches_are_known_before_the_first_episode(
    options: list[str], most: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppo.rollouts.EnvSource.collect", lambda *args: pytest.fail("an episode was played"))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: an iteration of {most} (rollout.episodes_per_iteration) of at most " in error
    assert "steps is too small for data.num_minibatches, " in error


def test_as_many_minibatches_as_steps_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT, "--data.source.env.max_steps=2", "--data.num_minibatches=8")
    assert len(evaluations(tmp_path)) == 3


@pytest.mark.parametrize("quiet", [False, True])
def test_failed_episodes_are_on_the_terminal(quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [f"corridor/{split}/{number}" for split in ("train", "valid") for number in (1, 4, 6)]
    faulty = ["--data.source.env=tests.worker_envs.Multiline", f"--data.source.env.fail_tasks=[{','.join(tasks)}]"]
    options = ["--data.source.parser=tests.rollouts.test_failures.AnyTextParser", f"--progress.enabled={not quiet}"]
    run(tmp_path, *SHORT, "--trainer.max_epochs=1", *faulty, *options)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "episodes failed (RuntimeError: broken on purpose and so on" in line]
    assert all(len(line) < 400 and line.endswith(" ...)") for line in said)
    starts = {"iteration", "evaluation"} if not quiet else {"evaluation"}
    assert {line.split()[0] for line in said} == starts
    for record in evaluations(tmp_path):
        assert any(f"{record['errors']} of 8 episodes failed" in line for line in said) or quiet
        assert "broken on purpose" in record["most_common_error"]


def test_nothing_is_said_of_failures_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT)
    assert "failed" not in capsys.readouterr().out
    assert not any("most_common_error" in record for record in evaluations(tmp_path))
