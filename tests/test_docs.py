"""The examples of the documentation run as they stand there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from steppo.types import Episode, StopReason
from tests.cli_helpers import evaluations, run

ROOT = Path(__file__).parent.parent


def code(page: str, language: str, after: str) -> str:
    """The first block of a language after some words."""
    text = (ROOT / page).read_text().partition(after)[2]
    block = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block.group(1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module that can be imported by name, and by worker processes."""
    written = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("page", "after", "name", "options"),
    [
        ("README.md", "Your own environment", "echo", ["--data.source.env=echo.Echo"]),
        ("docs/add_an_environment.md", "`grid_env.py`", "grid_env", ["--data.source.env=grid_env.GridEnv"]),
        (
            "docs/add_an_algorithm.md",
            "`step_loo.py`",
            "step_loo",
            ["--model.advantage=step_loo.StepLeaveOneOut", "--rollout.group_size=2", "--model.critic=null"],
        ),
        (
            "docs/add_a_loss.md",
            "`bounded_reinforce.py`",
            "bounded_reinforce",
            ["--model.loss=bounded_reinforce.BoundedReinforce"],
        ),
    ],
)
def test_an_example_trains(page: str, after: str, name: str, options: list[str], module, tmp_path: Path) -> None:
    module(name, code(page, "python", after))
    run(tmp_path / "run", "--trainer.max_epochs=1", "--data.train_tasks=8", *options)
    assert [record["iteration"] for record in evaluations(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("name", ["grid", "notes"])
def test_an_environment_trains_by_its_config(name: str, module, tmp_path: Path) -> None:
    page = "docs/add_an_environment.md"
    module(f"{name}_env", code(page, "python", f"`{name}_env.py`"))
    config = tmp_path / f"{name}.yaml"
    config.write_text(code(page, "yaml", f"`{name}_env.py`"))
    few = ["--rollout.episodes_per_iteration=4", "--data.num_minibatches=1", "--data.eval_tasks=1", "--trainer.max_epochs=1"]
    short = ["--warm_start.updates=2", "--warm_start.episodes=4", "--warm_start.batch_size=4"]
    options = ["--config", str(config), "--trainer.logger.version=few", *few, *short]
    run(tmp_path, *options, config=ROOT / "configs/quickstart.yaml")
    assert [record["iteration"] for record in evaluations(tmp_path / name / "few")] == [0, 1]


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("docs/add_an_environment.md", "grid_env"),
        ("docs/add_an_algorithm.md", "step_loo"),
        ("docs/add_a_loss.md", "bounded_reinforce"),
    ],
)
def test_the_test_of_an_example_passes(page: str, name: str, module, tmp_path: Path) -> None:
    module(name, code(page, "python", f"`{name}.py`"))
    test = tmp_path / f"test_{name}.py"
    test.write_text(code(page, "python", "## A test to write"))
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]) == 0


def test_other_parts_train_by_the_line_that_names_them(module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = "docs/add_a_part.md"
    command = code(page, "bash", "All five examples at once")
    options = shlex.split(command.replace("\\\n", "").partition("quickstart.yaml")[2])
    assert len(options) == 10
    for name in {option.partition(".")[0] for option in options[1::2]}:
        module(name, code(page, "python", f"`{name}.py`"))
    cli = run(tmp_path / "run", "--trainer.max_epochs=1", "--data.train_tasks=8", *options)
    named = cli.model.correction, cli.datamodule.buffer.packer, cli.datamodule.buffer.minibatches, cli.model.critic
    parts = map(type, (*named, *cli.trainer.callbacks))
    assert {f"{part.__module__}.{part.__name__}" for part in parts} >= set(options[1::2])
    assert re.search(r"corridor/train/\d: \d steps, ratios up to \d.*\nvalid: ", capsys.readouterr().out)


def test_the_loop_of_ones_own_runs(module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("echo", code("README.md", "python", "Your own environment"))
    exec(code("docs/add_a_part.md", "python", "As `loop.py`"), {"__name__": "__main__"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [iteration for iteration, _ in lines] == ["0", "1", "2"]
    assert all(-0.1 <= float(mean) <= 1 for _, mean in lines)


def test_the_data_pool_takes_and_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = code("docs/data_pool.md", "python", "# The data pool").replace("16", "1")
    known = {"name": "train/0/0", "episodes": [Episode("a", 0, 0, "t", (), StopReason.TERMINATED)], "iteration": 0}
    exec(example, known | {"version": 0, "rank": 0, "ranks": 1, "__name__": "example"}, found := dict[str, Any]())
    assert [[episode.id for episode in group] for group in found["groups"]] == [["a"]]
    assert [info.state for info in found["pool"].groups()] == ["learned"]
    found["pool"].close()
