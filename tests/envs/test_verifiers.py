"""verifiers: a quiz that does what a test wants, and a game of others, trained. Skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steppo.envs import VerifiersEnv
from steppo.errors import ConfigError, WrongValue
from steppo.types import Action, Message, ToolCall, Turn
from tests.cli_helpers import evaluations, run
from tests.game_words import write_words

TASKSETS = Path(__file__).parent.parent / "tasksets"
SIZES = {"num_train": 2, "num_valid": 2, "num_test": 1}

installed = pytest.mark.skipif(
    importlib.util.find_spec("verifiers") is None, reason='needs verifiers: pip install "steppo[verifiers]"'
)


@pytest.fixture(autouse=True)
def _tasksets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What verifiers and the servers of its tools find by name; invented words for the game."""
    monkeypatch.syspath_prepend(TASKSETS)
    monkeypatch.setenv("PYTHONPATH", str(TASKSETS), prepend=":")
    write_words(monkeypatch, tmp_path)


def quiz(kind: str = "alone", **settings: Any) -> VerifiersEnv:
    return VerifiersEnv({"id": "quiz", "kind": kind}, **(SIZES | settings))


@contextmanager
def playing(env: VerifiersEnv) -> Iterator[VerifiersEnv]:
    """As a worker has it."""
    env = pickle.loads(pickle.dumps(env))
    env.start()
    yield env
    env.close()
    assert env._stage is not None
    env._stage.close()


@installed
def test_a_task_of_one_answer() -> None:
    with playing(quiz(success_reward=2.0)) as env:
        task = env.tasks("train")[1]
        first = env.reset(task)
        assert first == Turn("How many letters has lamp?", "Count.", success=False)
        last = env.step(Action("4"))
        assert (last.reward, last.terminated, last.success) == (2.0, True, True)
        assert last.info == {"right": 1.0, "answers": 1.0, "stop": "agent_completed"}
        assert env.reset(task) == first
        last = env.step(Action(text="five", reasoning="Let me see."))
        assert (last.reward, last.success, last.info["right"]) == (0.0, False, 0.0)


@installed
def test_tools() -> None:
    with playing(VerifiersEnv({"id": "quiz", "task": {"tools": True}}, **SIZES)) as env:
        (tool,) = env.tools
        assert (tool.name, tool.description) == ("letters_count", "Counts the letters of a word.")
        assert tool.parameters["required"] == ["word"]
        env.reset(env.tasks("train")[0])
        calls = ToolCall("letters_count", {"word": "sea"}, "a"), ToolCall("letters_count", {"word": "ocean"}, "b")
        turn = env.step(Action(tool_calls=calls, text="I count."))
        assert turn.messages == (Message("tool", "3", "a"), Message("tool", "5", "b"))
        assert (turn.text, turn.reward, turn.terminated) == ("", 0.0, False)
        last = env.step(Action(text="3"))
        assert (last.reward, last.terminated, last.info["answers"]) == (2.0, True, 2.0)


@installed
def test_slots_play_side_by_side() -> None:
    with playing(quiz()) as env:
        other = pickle.loads(pickle.dumps(quiz()))
        other._stage = env._stage  # as copies in a worker share it
        first, second = env.tasks("train")
        env.reset(first)
        assert "lamp" in other.reset(second).text
        assert (other.step(Action("4")).reward, env.step(Action("3")).reward) == (2.0, 2.0)
        other.close()


@installed
def test_splits_are_slices_of_the_taskset() -> None:
    env = quiz()
    texts = {split: [task.data["prompt"].split()[-1] for task in env.tasks(split)] for split in ("train", "valid", "test")}
    assert texts == {"train": ["sea?", "lamp?"], "valid": ["stone?", "candle?"], "test": ["lantern?"]}
    assert env.tasks("test")[0].id == "quiz/4"
    assert '"answer": "7"' in env.content(env.tasks("test")[0])
    with pytest.raises(ConfigError, match="the taskset ends with task 5: lower num_train"):
        quiz(num_test=2).tasks("test")


FAILURES = {
    "twice": "quiz does not go on with one dialogue",
    "cannot be scored": "quiz has failed: TaskError: .*no scale",
}


@installed
@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_ends_the_episode(kind: str) -> None:
    with playing(quiz(kind)) as env:
        env.reset(env.tasks("train")[0])
        with pytest.raises(WrongValue, match=FAILURES[kind]) as error:
            env.step(Action("3"))
        assert "\n" not in str(error.value)
        assert env.reset(env.tasks("train")[1]).text, "the next one is whole"


QUIZ = {"id": "quiz"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": ({"num_test": -1}, "a split holds 0 to 1,000,000 tasks"),
    "success": ({"success_reward": float("nan")}, "success_reward must be finite, not nan"),
    "twice": ({"config": {"taskset": QUIZ}}, "config cannot hold taskset: it is a setting of its own"),
}
WRONG_WITH_IT: dict[str, tuple[dict[str, Any], str]] = {
    "taskset": ({"taskset": {"id": "no_such"}}, "cannot be played: ModuleNotFoundError: taskset 'no_such' not found"),
    "none": ({"taskset": {}}, "cannot be played: ValueError: SingleAgentEnv needs a seed taskset"),
    "setting": ({"taskset": {"id": "quiz", "sort": 1}}, "taskset.sort Extra inputs are not permitted"),
    "agents": ({"config": {"other": {"model": None}}}, "of its agents (agent, other) all but one"),
    "program": ({"config": {"agent": {"harness": {"id": "codex"}}}}, "its agent is the program codex"),
    "picture": ({"taskset": QUIZ | {"kind": "picture"}}, "says something that is no text: image_url"),
    "example": ({"taskset": QUIZ | {"kind": "example"}}, "speaks as assistant, which only the policy does"),
    "fails": ({"taskset": QUIZ | {"kind": "fails"}}, "quiz has failed: EnvError: .*out of questions"),
}


@pytest.mark.parametrize("name", [*WRONG, *(pytest.param(name, marks=installed) for name in WRONG_WITH_IT)])
def test_wrong_settings_are_said_at_once(name: str) -> None:
    settings, message = (WRONG | WRONG_WITH_IT)[name]
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        VerifiersEnv(**({"taskset": QUIZ} | settings))
    assert "\n" not in str(error.value)


def test_without_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r'needs verifiers: pip install "steppo\[verifiers\]"'):
        quiz()


# ---- as a user meets it ----


@installed
def test_hangman_of_textarena_is_trained(tmp_path: Path) -> None:
    """An environment that comes with verifiers, of a game that is another's. What it returns is recorded as it came."""
    pytest.importorskip("textarena", reason="needs textarena and nltk")
    settings = [
        "taskset={id: textarena, game: Hangman-v0}",
        'commands=["[a]", "[l]", "[lamp]", "[candle]"]',
        "num_train=6",
    ]
    settings += ["success_reward=1", "num_valid=3"]
    options = ["--data.source.env=VerifiersEnv", *(f"--data.source.env.{setting}" for setting in settings)]
    options += [
        "--data.source.max_steps=8",
        "--data.source.max_prompt_tokens=1400",
        "--data.source.max_new_tokens=8",
        "--model.policy.max_positions=1536",
        "--rollout.episodes_per_iteration=4",
    ]
    options += [
        "--warm_start.episodes=6",
        "--warm_start.actions=random",
        "--data.num_minibatches=1",
        "--evaluation.temperature=1",
    ]
    cli = run(tmp_path, *options)
    assert isinstance(cli.datamodule.source.env, VerifiersEnv)
    lines = evaluations(tmp_path)
    assert [(line["iteration"], line["updates"], line["errors"]) for line in lines] == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    assert any("game_reward" in line.get("info", {}) for line in lines)
    assert all(0 <= line["return_mean"] <= 1 for line in lines)


@installed
def test_a_taskset_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "--data.source.env=VerifiersEnv", "--data.source.env.taskset={id: no_such}")
    assert error.value.code == 2
    assert "taskset 'no_such' not found" in capsys.readouterr().err.splitlines()[-1]
