"""OpenEnv: servers that answer well or badly, and one of its own, trained. Skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steppo.envs import OpenEnvEnv
from steppo.errors import ConfigError, WrongValue
from steppo.types import Action, Message, ToolCall, Turn
from tests.cli_helpers import evaluations, run
from tests.openenv_server import CALLS, MOVE, NUMBER, SEVERAL, TEXT, Play, observation, parrot, refusal, serving

installed = pytest.mark.skipif(
    importlib.util.find_spec("openenv") is None, reason='needs OpenEnv: pip install "steppo[openenv]"'
)


@contextmanager
def playing(
    play: Play, action: dict[str, Any] = TEXT, fields: tuple[str, ...] = ("text",), **settings: Any
) -> Iterator[OpenEnvEnv]:
    """An environment with a connection, as a worker has it."""
    with serving(play, action, fields) as server:
        env = pickle.loads(pickle.dumps(OpenEnvEnv(server, **settings)))
        env.start()
        yield env
        env.close()


def opened(env: OpenEnvEnv) -> Turn:
    return env.reset(env.tasks("train")[0])


@installed
def test_a_text_is_the_action() -> None:
    with playing(parrot, goal="Talk.", reset={"level": 2}, show=["text"], success_reward=1.0) as env:
        assert (env.name, env.version, env.tools) == ("Parrot", "7", ())
        assert opened(env) == Turn("{'seed': 0, 'level': 2}", "Talk.", success=False, info={"number": 3.0, "flag": True})
        turn = env.step(Action("hello"))
        assert (turn.text, turn.reward, turn.terminated, turn.success) == ("{'words': 'hello'}", 0.5, False, False)
        refused = env.step(Action(text="x"))
        assert (refused.text, refused.reward, refused.action_valid) == (turn.text, 0.0, False)
        assert refused.feedback == "'x' is no words: 'x' is too short."
        last = env.step(Action("bye"))
        assert (last.reward, last.terminated, last.success) == (0.5, True, True)
        assert opened(env).success is False, "each episode counts anew"


@installed
def test_values_that_are_named_are_commands() -> None:
    with playing(parrot, MOVE) as env:
        assert opened(env).commands == ("UP", "DOWN")
        assert env.step(Action("DOWN")).text.startswith("text: {'way': 'DOWN'}\nnumber: 3\nflag: true")
        assert not env.step(Action("LEFT")).action_valid


@installed
def test_numbers() -> None:
    with playing(parrot, NUMBER, commands=["0", "4"]) as env:
        assert opened(env).commands == ("0", "4")
        assert "{'column': 4}" in env.step(Action("4")).text
        for said in ("four", "-1", "[" * 9999, "true", "1.5"):
            assert not env.step(Action(said)).action_valid


@installed
def test_several_fields_are_a_tool() -> None:
    with playing(parrot, SEVERAL) as env:
        (tool,) = env.tools
        assert (tool.name, tool.description, tool.parameters["required"]) == ("act", "Buys some.", ["what", "amount"])
        assert "metadata" not in tool.parameters["properties"]
        opened(env)
        turn = env.step(
            Action(tool_calls=(ToolCall("act", {"what": "tea", "amount": 2}, "a"), ToolCall("act", {"what": "bye"}, "b")))
        )
        assert [message.tool_call_id for message in turn.messages] == ["a", "b"]
        assert "'tea'" in turn.messages[0].content
        assert (turn.reward, turn.terminated) == (1.0, True)
        assert env.step(Action(text="I would buy.")).feedback == "Call one of the tools: act."


@installed
def test_tools_of_mcp() -> None:
    tools = [{"name": "find", "description": "Finds.", "input_schema": {"type": "object", "properties": {"what": {}}}}]

    def play(what: str, given: dict[str, Any]) -> dict[str, Any]:
        if what == "reset":
            return observation({})
        if given["type"] == "list_tools":
            return observation({"tools": tools})
        found = {"data": ["a", "b"]} if given["tool_name"] == "find" else None
        error = None if found else {"message": "Unknown tool", "error_type": "tool_not_found"}
        return observation({"tool_name": given["tool_name"], "result": found, "error": error}, 1, bool(error))

    with playing(play, CALLS, goal="Find it.") as env:
        assert [tool.name for tool in env.tools] == ["find"]
        assert opened(env) == Turn("", "Find it.")
        turn = env.step(
            Action(tool_calls=(ToolCall("find", {"what": "x"}, "1"), ToolCall("lose", {}, "2"), ToolCall("find")))
        )
        assert turn.messages == (Message("tool", '["a", "b"]', "1"), Message("tool", "Error: Unknown tool", "2"))
        assert (turn.reward, turn.terminated) == (2.0, True), "nothing is called after the end"


@installed
def test_what_the_server_does_not_take_is_refused() -> None:
    def play(what: str, given: dict[str, Any]) -> dict[str, Any]:
        return refusal("Invalid message", "VALIDATION_ERROR") if "no" in given.values() else parrot(what, given)

    with playing(play) as env:
        opened(env)
        turn = env.step(Action("no"))
        assert (turn.action_valid, turn.feedback) == (False, "The environment does not take such an action.")
        assert env.step(Action("yes")).action_valid, "the episode goes on"


FAILURES: dict[str, tuple[Any, str]] = {
    "nothing in time": (lambda: time.sleep(0.6), "Parrot gave no answer to step within 0.3 s"),
    "gone": (lambda: None, "the server of Parrot has no connection for step: ConnectionClosed.*num_slots"),
    "no JSON": (lambda: "<html>", "Parrot cannot answer step: JSONDecodeError"),
    "a list": (lambda: "[1, 2]", "Parrot cannot answer step: AttributeError"),
    "its error": (
        lambda: refusal("no such level", "EXECUTION_ERROR"),
        r"Parrot cannot answer step: RuntimeError: Server error: no such level",
    ),
    "observation": (lambda: observation(["a"]), "the observation of Parrot must be a mapping, not a list"),
    "reward": (lambda: observation({}, "much"), "the reward of Parrot must be a number or null, not 'much'"),
    "done": (lambda: observation({}, 1, "maybe"), "done of Parrot must be true or false, not 'maybe'"),
}


@installed
@pytest.mark.parametrize("name", FAILURES)
def test_what_a_server_does_wrong_ends_the_episode(name: str) -> None:
    answer, message = FAILURES[name]

    def play(what: str, given: dict[str, Any]) -> Any:
        return answer() if given.get("words") == "now" else parrot(what, given)

    with playing(play, timeout=0.3) as env:
        opened(env)
        with pytest.raises(WrongValue, match=message) as error:
            env.step(Action("now"))
        assert "\n" not in str(error.value)
        env.close()  # as a worker does
        assert opened(env).text, "the next one is whole"


@installed
def test_a_connection_that_was_lost_between_episodes_is_made_anew() -> None:
    connections = itertools.count()

    def play(what: str, given: dict[str, Any]) -> Any:
        return None if next(connections) == 2 else parrot(what, given)

    with playing(play) as env:
        opened(env)
        assert env.step(Action("hello")).action_valid
        assert opened(env).text


@installed
def test_tasks_are_seeds() -> None:
    with playing(parrot, num_train=5, num_valid=3, num_test=2) as env:
        tasks = {split: env.tasks(split) for split in ("train", "valid", "test")}
        assert {split: len(found) for split, found in tasks.items()} == {"train": 5, "valid": 3, "test": 2}
        assert tasks["valid"][0].id == "Parrot/1000000"
        assert env.reset(tasks["valid"][0]).text.startswith("text: {'seed': 1000000}")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": ({"num_test": -1}, "a split holds 0 to 1,000,000 tasks"),
    "success": ({"success_reward": float("nan")}, "success_reward must be finite, not nan"),
    "timeout": ({"timeout": 0}, "timeout must be above 0 seconds and finite, not 0"),
    "seed": ({"reset": {"seed": 1}}, "reset cannot hold seed"),
}
WRONG_WITH_IT: dict[str, tuple[dict[str, Any], str]] = {
    "no URL": ({"server": "localhost:8000"}, "server must be a URL, or a command with {port} in it, not 'localhost:8000'"),
    "down": ({"server": "http://127.0.0.1:9"}, "no server of OpenEnv answers at http://127.0.0.1:9: URLError"),
    "no program": (
        {"server": "no-such-program {port}"},
        "cannot be started with 'no-such-program {port}': FileNotFoundError",
    ),
    "quotes": ({"server": "'x {port}"}, "no server of OpenEnv answers at 'x {port}: ValueError: No closing quotation"),
    "it ends": (
        {"server": f"{sys.executable} -c import_this({{port}})"},
        "the server's command ended with status 1: NameError",
    ),
    "it sleeps": (
        {"server": f"{sys.executable} -c 'import time; {{port}}; time.sleep(9)'", "start_timeout": 0.3},
        "the server that was started does not answer within 0.3 s",
    ),
    "show": ({"show": ["words"]}, "observations have no words to show, only text"),
    "commands": ({"commands": ["hello", "x"]}, "'x' is no words: 'x' is too short."),
}


@pytest.mark.parametrize("name", [*WRONG, *(pytest.param(name, marks=installed) for name in WRONG_WITH_IT)])
def test_wrong_settings_are_said_at_once(name: str) -> None:
    settings, message = (WRONG | WRONG_WITH_IT)[name]
    server = serving(parrot) if name in ("show", "commands") else None
    url = server.__enter__() if server else "http://127.0.0.1:9"
    with pytest.raises(ConfigError) as error:
        OpenEnvEnv(**({"server": url} | settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if server:
        server.__exit__(None, None, None)


def test_without_openenv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openenv", None)
    with pytest.raises(ConfigError, match=r'needs OpenEnv: pip install "steppo\[openenv\]"'):
        OpenEnvEnv("http://127.0.0.1:9")


# ---- as a user meets it ----


@installed
def test_a_server_that_dies_is_started_again() -> None:
    env = OpenEnvEnv(f"{sys.executable} -m tests.openenv_server {{port}}", show=["text"])
    env.start()
    assert opened(env).text == "{'seed': 0}"
    assert env._started is not None
    assert env._started._process is not None
    env._started._process.send_signal(signal.SIGKILL)
    with pytest.raises(WrongValue, match="the server of Parrot has no connection for step"):
        env.step(Action("hello"))
    env.close()
    assert opened(env).text == "{'seed': 0}"
    env.close()
    env._started.close()


OPTIONS = [
    "--data.source.env=OpenEnvEnv",
    "--data.source.max_steps=3",
    "--data.source.num_slots=1",
    "--data.source.env.goal=Talk.",
]
OPTIONS += ["--data.source.env.num_train=8", "--data.source.env.num_valid=2", "--rollout.episodes_per_iteration=4"]


@installed
def test_one_of_its_own_is_trained(tmp_path: Path) -> None:
    """What its own command makes. What it returns is recorded as it came: a tenth for each character of a message."""
    command = shutil.which("openenv", path=str(Path(sys.executable).parent)) or "openenv"
    subprocess.run([command, "init", "echo_env"], cwd=tmp_path, check=True, capture_output=True)
    server = f"{sys.executable} -m uvicorn --app-dir {tmp_path} echo_env.server.app:app --port {{port}}"
    settings = [f"--data.source.env.server={server}", "--data.source.env.commands=[hi,hello there]"]
    cli = run(tmp_path, *OPTIONS, *settings, "--warm_start.actions=random", "--data.num_minibatches=1")
    assert isinstance(cli.datamodule.source.env, OpenEnvEnv)
    lines = evaluations(tmp_path)
    assert [(line["iteration"], line["updates"], line["errors"]) for line in lines] == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    for line in lines:
        if line["invalid_action_rate"] == 0:
            assert 3 * 0.2 <= line["return_mean"] <= 3 * 1.1
            assert line["info"]["message_length"] in (2.0, 6.5, 11.0)


@installed
def test_a_failure_costs_its_episode(tmp_path: Path) -> None:
    def play(what: str, given: dict[str, Any]) -> Any:
        return "?" if given.get("seed") == 1_000_001 else parrot(what, given)

    with serving(play) as url:
        settings = [f"--data.source.env.server={url}", "--data.source.env.commands=[hello,bye]"]
        run(tmp_path, *OPTIONS, *settings, "--warm_start.actions=random", "--trainer.max_epochs=1")
    for line in evaluations(tmp_path):
        assert (line["episodes"], line["errors"]) == (1, 1)
        assert "Parrot cannot answer reset: JSONDecodeError" in str(line)


@installed
def test_a_server_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *OPTIONS, "--data.source.env.server=http://127.0.0.1:9")
    assert error.value.code == 2
    assert "no server of OpenEnv answers at http://127.0.0.1:9" in capsys.readouterr().err.splitlines()[-1]
