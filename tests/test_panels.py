"""A panel is the same tasks for everybody, or it is refused; and results say what was played, how and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steppo.cli import SteppoCLI
from steppo.datamodule import StepDataModule
from steppo.envs import Env
from steppo.envs.given import content_of, splits_of, version_of
from steppo.errors import ConfigError
from steppo.module import AgentModule
from steppo.panel.command import main as panel
from steppo.rollouts import EnvSource
from steppo.types import Task
from tests.cli.test_errors import refused
from tests.cli_helpers import TOY, checkpoint, evaluations, places, run
from tests.folder_env import write_tasks
from tests.toy_env import CorridorEnv

ENV = "--data.source.env"


def env(folder: Path, **settings: Any) -> list[str]:
    given = {"data": folder, **settings}
    return [f"{ENV}=tests.folder_env.FolderEnv", *(f"{ENV}.{name}={value}" for name, value in given.items())]


def made(folder: Path, *options: str) -> Path:
    path = folder / "panels" / "corridor-valid.json"
    panel(["make", f"--config={TOY}", f"--out={path}", *options])
    return path


@pytest.fixture(scope="module")
def toy_panel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(made(tmp_path_factory.mktemp("toy")).read_text())


def validated(folder: Path, *options: str, command: str = "validate") -> dict[str, Any]:
    run(folder, *options, command=command)
    return json.loads((folder / f"{command}.json").read_text())


def outcomes(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("task", "sample", "success", "return", "steps")
    return [tuple(episode[name] for name in names) for episode in result["episodes"]]


# ---- the same content ----


def test_other_file_orders_workers_and_seeds_play_the_same(tmp_path: Path) -> None:
    """Also where the data lie elsewhere."""
    path = made(tmp_path, *env(write_tasks(tmp_path / "here")))
    options = [f"--data.eval_panel={path}", "--evaluation.player=expert"]
    one = validated(tmp_path / "one", *env(tmp_path / "here"), *options)
    other = ["--data.source.num_workers=2", "--data.source.num_slots=3", "--seed_everything=7"]
    two = validated(tmp_path / "two", *env(write_tasks(tmp_path / "there"), reverse=True), *options, *other)
    assert outcomes(one) == outcomes(two)
    assert [episode["task"] for episode in two["episodes"]] == [f"valid/{name}.json" for name in "abcd"]
    assert one["panel"] == two["panel"]
    assert one["panel"]["sha256"] == json.loads(path.read_text())["sha256"]
    # Without a panel the environment's order is played, and the hash tells.
    loose = validated(tmp_path / "loose", *env(tmp_path / "here"), options[1])
    turned = validated(tmp_path / "turned", *env(tmp_path / "here", reverse=True), options[1])
    assert loose["panel"]["sha256"] == one["panel"]["sha256"] != turned["panel"]["sha256"]


def test_training_evaluates_on_the_panel(tmp_path: Path) -> None:
    path = made(tmp_path, *env(write_tasks(tmp_path / "data")))
    short = ["--trainer.max_epochs=1", "--warm_start.updates=0", f"--data.eval_panel={path}"]
    run(tmp_path / "run", *env(tmp_path / "data", reverse=True), *short)
    records = evaluations(tmp_path / "run")
    assert {record["panel_sha256"] for record in records} == {json.loads(path.read_text())["sha256"]}
    assert set(records[0]["by_golden_steps"]) == {"2", "3", "4"}
    assert not list((tmp_path / "run").glob("validate.*"))


@pytest.mark.parametrize(
    ("command", "change", "settings", "words"),
    [
        ("validate", "edit", {}, "2 of 4 tasks have another content than when it was made: valid/b.json, valid/d.json"),
        ("fit", "edit", {}, "2 of 4 tasks have another content than when it was made: valid/b.json, valid/d.json"),
        ("validate", "remove", {}, "split 'valid' lacks 2 of 4 tasks: valid/b.json, valid/d.json"),
        ("fit", "", {"version": "2"}, "is of version '1' of tests.folder_env.FolderEnv's tasks, here they are of '2'"),
        ("validate", "cut", {}, "valid/b.json is damaged"),
    ],
)
def test_what_has_changed_is_refused_and_named(
    command: str, change: str, settings: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tasks(tmp_path / "data")
    path = made(tmp_path, *env(data))
    for name in "bd":
        file = data / "valid" / f"{name}.json"
        if change == "edit":
            file.write_text('{"start": 0, "goal": 2}')
        elif change == "remove":
            file.unlink()
        elif change == "cut":
            file.write_text(file.read_text()[:5])
    options = [*env(data, **settings), f"--data.eval_panel={path}", *places(tmp_path / "run")]
    line = refused_by([command, f"--config={TOY}", *options], capsys)
    assert words in line
    assert str(path) in line or change == "cut"
    assert not list((tmp_path / "run").glob("*.json*"))


def refused_by(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    return refused(args, capsys)


def test_other_limits_and_prompts_are_told(tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data")
    options = [f"--data.eval_panel={made(tmp_path, *env(data))}", "--evaluation.player=expert"]
    with pytest.warns(UserWarning, match="is played otherwise than it was made for: max_steps is 3, in the panel 8"):
        cut = validated(tmp_path / "cut", *env(data, max_steps=3), *options)
    assert cut["panel"]["differences"] == ["max_steps is 3, in the panel 8"]
    assert cut["figures"]["success_rate"] == 0.5
    with pytest.warns(UserWarning, match="prompt_version is "):
        validated(tmp_path / "words", *env(data), *options, "--data.source.context.instructions=Go.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read the panel {path}: No such file or directory"),
        ("", "the panel {path} is not JSON"),
        ("{", "the panel {path} is not JSON"),
        ("[]", "{path} is no panel"),
        ('{"tasks": []}', "{path} is no panel"),
        ({"format": 2}, "is of format 2; this version of steppo reads 1"),
        ({"tasks": []}, "the panel {path} is empty"),
        ({"tasks": ["a"]}, "is not as `python -m steppo.panel make` writes it"),
        ({"tasks": None}, "is not as `python -m steppo.panel make` writes it"),
        ({"limits": None}, "is not as `python -m steppo.panel make` writes it"),
        ({"version": "2"}, "the panel {path} was changed: its sha256"),
        ({"tasks": [{"id": "valid/a.json", "sha256": "0"}]}, "the panel {path} was changed: its sha256"),
    ],
)
def test_files_that_are_no_panels(
    text: Any, words: str, toy_panel: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "panel.json"
    if text is not None:
        path.write_text(json.dumps(toy_panel | text) if isinstance(text, dict) else text)
    options = [f"--config={TOY}", f"--data.test_panel={path}", *places(tmp_path / "run")]
    assert words.format(path=path) in refused_by(["test", *options], capsys)


def test_a_panel_can_be_made_anew_where_the_config_names_it(tmp_path: Path) -> None:
    """Of the split's first tasks; the file need not be there."""
    named = f"--data.test_panel={tmp_path}/panels/corridor-valid.json"
    path = made(tmp_path, named, "--split=test", "--data.eval_tasks=3")
    found = json.loads(path.read_text())
    assert [task["id"] for task in found["tasks"]] == [f"corridor/test/{number}" for number in range(3)]
    assert found["limits"] == {"max_steps": 8}
    result = validated(tmp_path / "run", named, "--evaluation.player=random", command="test")
    assert (len(result["episodes"]), result["split"], result["panel"]["file"]) == (3, "test", str(path))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a command, make or compare"),
        (["mke"], "give a command, make or compare"),
        (["make", f"--config={TOY}"], "give --out, the file to write"),
        (["make", f"--config={TOY}", "--out={tmp}/x.json", "--split=dev"], "has no split 'dev'"),
        (["make", f"--config={TOY}", "--out={tmp}/file/x.json"], "cannot write {tmp}/file/x.json: "),
        (["compare", "{tmp}/file"], "the following arguments are required: B.json"),
        (["compare", "{tmp}/file", "{tmp}/file"], "the result {tmp}/file is not JSON"),
        (["compare", "{tmp}/none", "{tmp}/file"], "cannot read the result {tmp}/none: No such file"),
    ],
)
def test_mistakes_of_the_command(args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        panel([arg.format(tmp=tmp_path) for arg in args])
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words.format(tmp=tmp_path) in line


# ---- what an environment says of its tasks ----


def test_what_says_nothing_is_told_by_its_data() -> None:
    here, there = Task("a", {"goal": 1, "rooms": (1, 2)}), Task("a", {"rooms": [1, 2], "goal": 1})
    assert here.as_text() == there.as_text() != Task("b", here.data).as_text()
    assert Task("a", {(1, 2): {3}}).as_text() == "['a', {(1, 2): {3}}]"
    assert content_of(CorridorEnv(), here) == here.as_text()
    assert (splits_of(CorridorEnv()), version_of(CorridorEnv())) == (("train", "valid", "test"), "")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 4, "CorridorEnv: version must be a string, not 4"),
        ("splits", "valid", "CorridorEnv: splits must be a list or tuple of names, not 'valid'"),
        ("splits", (), "CorridorEnv: splits must be a list or tuple of names"),
        ("splits", ("a", None), "CorridorEnv: splits[1] must be a string, not None"),
        ("content", lambda task: b"", "what CorridorEnv.content('a') returns must be a string, not a bytes"),
        ("content", lambda task: "\ud800", "must be text that UTF-8 can hold"),
    ],
)
def test_wrong_answers_about_tasks(field: str, value: Any, words: str) -> None:
    def asked(wrong: Env) -> Any:
        return version_of(wrong), splits_of(wrong), content_of(wrong, Task("a"))

    wrong = CorridorEnv()
    setattr(wrong, field, value)
    with pytest.raises(ConfigError) as refusal:
        asked(wrong)
    assert words in str(refusal.value)


# ---- who plays ----


@pytest.mark.parametrize("player", ["expert", "random"])
def test_a_script_plays_without_a_model_and_without_training_tasks(
    player: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(AgentModule, "build_models", forbidden)
    monkeypatch.setattr(StepDataModule, "tasks", forbidden)
    # Longer than the model could read.
    options = [f"--evaluation.player={player}", "--data.source.max_prompt_tokens=8"]
    result = validated(tmp_path, *env(write_tasks(tmp_path / "data")), *options)
    text = capsys.readouterr().out
    assert f"evaluation on valid by {player}: success " in text
    assert "By golden steps" in text
    assert f"Results: {tmp_path}/validate.md" in text
    assert result["model"] is None
    assert result["protocol"]["player"] == evaluations(tmp_path)[0]["player"] == player
    if player == "expert":
        assert result["figures"]["success_rate"] == 1
        assert [episode["steps"] for episode in result["episodes"]] == [4, 2, 3, 4]
        assert (tmp_path / "validate.md").read_text().startswith("# expert on valid (4 tasks)\n")


def test_random_play_has_samples_without_a_temperature(tmp_path: Path) -> None:
    result = validated(tmp_path, "--evaluation.player=random", "--evaluation.samples=3")
    assert [episode["sample"] for episode in result["episodes"]] == [0, 1, 2] * 8
    assert len({(episode["steps"], episode["success"]) for episode in result["episodes"]}) > 2


def test_the_untrained_policy_plays_as_before_training(tmp_path: Path) -> None:
    """ReAct: ``validate`` without a checkpoint."""
    result = validated(tmp_path / "react")
    assert result["model"]["checkpoint"] is None
    assert "untrained: no checkpoint" in (tmp_path / "react" / "validate.md").read_text()
    run(tmp_path / "fit", "--warm_start.updates=0", "--rollout.max_environment_steps=0")
    record = evaluations(tmp_path / "fit")[0]
    same = ("success_rate", "return_mean", "steps_mean", "invalid_action_rate", "panel_sha256")
    assert {name: record[name] for name in same} == {name: result["figures"][name] for name in same}


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("fit", [], "evaluation.player random is for validate and test"),
        ("validate", ["--ckpt_path=x.ckpt"], "asks no policy: leave --ckpt_path out"),
        ("validate", [f"{ENV}=tests.search_env.SearchEnv"], "no episode could be played: NoAction: no commands are shown"),
        ("validate", ["--data.source=tests.test_buffer.ListedTasks"], "needs an EnvSource"),
    ],
)
def test_players_that_cannot_play(
    command: str, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused_by([command, f"--config={TOY}", *places(tmp_path), "--evaluation.player=random", *options], capsys)
    assert words in line


# ---- the result ----


def test_a_result_says_what_was_played_how_and_by_whom(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    cli, folder = toy_run
    newest = checkpoint(folder)
    result = validated(tmp_path, f"--ckpt_path={newest}")
    last = evaluations(folder)[-1]
    figures = {name: value for name, value in result["figures"].items() if name != "seconds"}
    assert figures == {name: value for name, value in last.items() if name != "seconds"}
    episodes = result["episodes"]
    assert [episode["task"] for episode in episodes] == [task.id for task in CorridorEnv().tasks("valid")]
    assert sum(episode["success"] for episode in episodes) == 8 * last["success_rate"]
    assert sum(episode["steps"] for episode in episodes) == 8 * last["steps_mean"]
    source = cli.datamodule.source
    assert isinstance(source, EnvSource)
    asked = {"player": "policy", "samples": 1, "temperature": 0.0, "seed": None}
    assert result["protocol"] == asked | source.protocol()
    assert result["model"]["identity"] == cli.model.identity
    assert result["model"]["checkpoint"] == {"file": str(newest), "iteration": 2, "chosen_by": None, "chosen_on": None}


def test_a_checkpoint_that_a_panel_chose_is_told(tmp_path: Path) -> None:
    """The best over time is no final figure on the panel that chose it."""
    best = "{class_path: ModelCheckpoint, monitor: val/return_mean, mode: max, filename: top}"
    run(tmp_path / "run", f"--trainer.callbacks+={best}", "--trainer.max_epochs=1", "--warm_start.updates=0")
    chosen = [f"--ckpt_path={tmp_path}/run/checkpoints/top.ckpt"]
    for command, words in (("validate", "this very panel, so that its figures are too good"), ("test", "the panel ")):
        found = validated(tmp_path / command, *chosen, command=command)["model"]["checkpoint"]
        assert (found["chosen_by"], found["iteration"]) == ("val/return_mean", 1)
        assert found["chosen_on"] == evaluations(tmp_path / "run")[-1]["panel_sha256"]
        said = f"the best of its run by val/return_mean on {words}"
        assert said in (tmp_path / command / f"{command}.md").read_text()
    last = validated(tmp_path / "last", f"--ckpt_path={checkpoint(tmp_path / 'run')}")
    assert last["model"]["checkpoint"]["chosen_by"] is None
