"""What a user's environment hands over: each wrong value costs its episode or is one line, and is named."""

from __future__ import annotations

import collections
import io
import itertools
import json
import math
import pickle
import re
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_environments import FIELDS, Draw, draws, make_source, play
from hypothesis import given, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steppo.engines import HFEngine
from steppo.envs.checks import checked_action, checked_turn, opening_turn
from steppo.envs.given import checked_tasks, pickled
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError, RunError, WrongValue, said
from steppo.play.command import main as play_command
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource
from steppo.types import Action, Message, Task, ToolCall, Turn
from tests.cli.test_errors import fit, refused
from tests.cli_helpers import TOY, evaluations, run, weights
from tests.toy_env import CorridorEnv
from tests.wrong_env import RAISING, RIGHT, WRONG, WRONG_AT_START, LockedEnv, OnlyHere, WrongEnv

NAMES = [*WRONG, *RAISING, *RIGHT]
WRONG_ENV = ["--data.source.env=tests.wrong_env.WrongEnv", "--warm_start.updates=0"]
SOURCE = make_source()


# --- answers ---


@settings(deadline=None, max_examples=300, derandomize=True)
@given(draws())
def test_every_wrong_value_costs_its_episode_and_is_named(draw: Draw) -> None:
    play(SOURCE, draw)


def test_the_draws_are_of_both_kinds() -> None:
    """A field whose wrong values were never looked at would make the property empty."""
    right: dict[str, Any] = {name: getattr(Turn(), name) for name in FIELDS if hasattr(Turn, name)}
    right |= {"messages": [], "other": None, "info": dict, "turn": Turn, "expert": None}
    assert right.keys() == FIELDS.keys() == {*Turn.__dataclass_fields__, "other", "turn", "expert"}
    assert play(SOURCE, Draw("step", right, frozenset(), True)).error == ""
    for name in FIELDS:
        wrong = play(SOURCE, Draw("step", right | {name: 2j}, frozenset([name]), True))
        assert "not a complex" in wrong.error


def failures(folder: Path, kind: str) -> dict[str, str]:
    """What ended each failed episode, by the name of its task; the others came to an end."""
    records = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == kind and record["iteration"] == (kind == "train")]
    assert len(found) == len(NAMES)
    failed = [record for record in found if record["stop_reason"] == "env_error"]
    cut = [record["task"].partition("/")[2] for record in found if record["stop_reason"] == "step_limit"]
    assert all(record["stop_reason"] in ("env_error", "terminated", "step_limit") for record in found)
    assert set(cut) <= {"is-cut"}
    return {record["task"].partition("/")[2]: record["error"] for record in failed}


def test_one_wrong_value_of_each_kind_in_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each costs its episode, in rollouts and evaluations; the largest reward there may be breaks no update."""
    expected = {name: message for name, (_, message) in WRONG.items()} | RAISING
    cli = run(
        tmp_path,
        *WRONG_ENV,
        "--data.source.parser=tests.wrong_env.FirstParser",
        f"--rollout.episodes_per_iteration={len(NAMES)}",
        f"--data.eval_tasks={len(NAMES)}",
        "--trainer.max_epochs=1",
        "--rollout.min_valid_fraction=0",
    )
    assert "Traceback" not in "".join(capfd.readouterr())
    for kind in ("train", "valid"):
        found = failures(tmp_path, kind)
        assert found.keys() == expected.keys()
        for name, message in expected.items():
            assert message in found[name]
    figures = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in figures.Scalars("rollout/failed_episodes")] == [len(expected)]
    assert [event.value for event in figures.Scalars("train/skipped_updates")] == [0]
    assert [record["errors"] for record in evaluations(tmp_path)] == [len(expected)] * 2
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path).values())
    assert cli.model.counters.episodes == len(RIGHT)


def test_a_start_may_be_wrong_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In an evaluation, and where a tokenizer is made of the training tasks' words."""
    run(tmp_path, *WRONG_ENV, "--data.source.env.where=reset", f"--data.eval_tasks={len(NAMES)}", command="validate")
    assert "Traceback" not in "".join(capfd.readouterr())
    expected = {name: message for name, (_, message) in WRONG.items()} | RAISING | WRONG_AT_START
    [record] = evaluations(tmp_path)
    assert record["errors"] == len(expected)
    found = failures(tmp_path, "valid")
    assert found.keys() == expected.keys()
    for name, message in expected.items():
        assert message in found[name]


@pytest.mark.parametrize("where", ["reset", "step"])
def test_play_goes_on_after_a_wrong_value(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--player=random", "--split=train", f"--episodes={len(NAMES)}"]
    play_command([f"--config={TOY}", *WRONG_ENV[:1], f"--data.source.env.where={where}", *options])
    text = capsys.readouterr().out
    assert "Traceback" not in text
    assert text.count("broken (env_error): ") == len(WRONG) + len(RAISING) + len(WRONG_AT_START if where == "reset" else ())
    assert "the environment's success must be True, False or None, not 'no'" in text


@dataclass(frozen=True)
class Coloured(Turn):
    """With something of its own, for a context that knows it."""

    colour: str = ""


@dataclass(frozen=True)
class Loud(Action):
    """Said in a way that a parser and its environment know."""

    volume: int = 0


def test_what_is_right_comes_through_as_plain_values() -> None:
    label = np.str_
    given = Coloured(
        label("a"),
        commands=[label("go")],  # type: ignore[arg-type]
        messages=[Message(label("tool"), label("b"), label("c"), trusted=True)],  # type: ignore[arg-type]
        reward=np.float32(0.5),  # type: ignore[arg-type]
        terminated=np.bool_(True),  # type: ignore[arg-type]
        success=np.bool_(True),  # type: ignore[arg-type]
        state_key=label("room"),
        info={label("score"): np.int8(3), "nothing": None},  # type: ignore[dict-item]
        expert_action=label("go"),  # type: ignore[arg-type]
        colour="red",
    )
    turn = checked_turn(given)
    wanted = Coloured(
        "a", "", ("go",), (Message("tool", "b", "c"),), 0.5, True, success=True, state_key="room", colour="red"
    )
    assert turn == replace(wanted, info={"score": 3.0}, expert_action=Action("go"))
    plain = [str, str, tuple, tuple, float, bool, bool, bool, bool, str, str, dict, Action, str]
    assert [type(value) for value in vars(turn).values()] == plain
    assert turn.commands
    assert turn.state_key
    inside = [*turn.commands, *vars(turn.messages[0]).values(), turn.state_key, *turn.info, *turn.info.values()]
    assert [type(value) for value in inside] == [str, str, str, str, bool, str, str, float]
    for reward, value in [(True, 1.0), (7, 7.0), (Fraction(1, 2), 0.5), (np.int8(-3), -3.0), (-1e12, -1e12)]:
        assert checked_turn(Turn(reward=reward)).reward == value


def test_a_start_has_no_action_that_could_be_wrong() -> None:
    assert opening_turn(Turn("a", action_valid=False)) == Turn("a")


def test_actions_that_are_right_come_through_as_plain_values() -> None:
    calls = [ToolCall(np.str_("find"), {np.str_("what"): ("coin", None), 3: np.str_("x")}, np.str_("1"))]
    given = Loud(np.str_("go"), calls, np.str_("done"), np.str_("so"), volume=11)  # type: ignore[arg-type]
    action = checked_action("me", given)
    assert action == Loud("go", (ToolCall("find", {"what": ["coin", None], "3": "x"}, "1"),), "done", "so", 11)
    texts = [action.command, action.text, action.reasoning, action.tool_calls[0].name, action.tool_calls[0].id]
    assert {type(text) for text in texts} == {str}
    assert str(action.tool_calls[0]) == 'find({"what": ["coin", null], "3": "x"})'


def test_messages_are_short_and_can_be_printed() -> None:
    for text in ["long " * 10**6, "\ud800", "two\nlines", "\x1b[2J" * 1000]:
        for error in (WrongValue(text), ValueError(text)):
            said(error).encode()
            assert len(said(error)) < 3000
            assert "\n" not in said(error)
    with pytest.raises(WrongValue, match=re.escape("not '" + "x" * 60 + "...'")):
        checked_turn(Turn(reward="x" * 10**6))  # type: ignore[arg-type]


# --- limits ---


class LimitEnv(CorridorEnv):
    """Its limit is worked out when somebody asks."""

    @property
    def max_steps(self) -> Any:
        if self._limit == "raise":
            raise KeyError("no limit")
        return self._limit

    @max_steps.setter
    def max_steps(self, value: Any) -> None:
        self._limit = value


@pytest.mark.parametrize("limit", [0, -3, True, False, 2.0, math.nan, math.inf, "8", [8], np.array([8])], ids=str)
def test_a_limit_is_a_whole_number_above_0(limit: Any) -> None:
    with pytest.raises(ConfigError, match="LimitEnv: max_steps must be None or a whole number of at least 1, not "):
        EnvSource(LimitEnv(max_steps=limit), StateContext(), HFEngine(), max_steps=5)


def test_limits_that_are_right_and_one_that_raises() -> None:
    for limit in (1, np.int64(9), None):
        assert EnvSource(LimitEnv(max_steps=limit), StateContext(), HFEngine(), max_steps=5).task_limit == limit  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"LimitEnv.max_steps: KeyError: 'no limit' \(.*test_checks.py:\d+\)"):
        EnvSource(LimitEnv(max_steps="raise"), StateContext(), HFEngine(), max_steps=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["fit", "play"])
def test_a_limit_of_0_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--data.source.env.max_steps=0"
    if command == "fit":
        assert "CorridorEnv: max_steps must be None or" in refused(fit(tmp_path, option), capsys)
        return
    with pytest.raises(SystemExit) as stopped:
        play_command([f"--config={TOY}", "--player=random", option])
    assert stopped.value.code == 2
    assert "CorridorEnv: max_steps must be None or" in capsys.readouterr().err


def test_a_penalty_is_bounded_as_rewards_are() -> None:
    for penalty in (-0.1, 1e13, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"invalid_penalty must be from 0 to 1e\+12"):
            EnvSource(CorridorEnv(), StateContext(), HFEngine(), invalid_penalty=penalty)


# --- tasks ---


class MyId(str):
    """A text of a class of its own."""


TASKS: dict[str, tuple[Any, str]] = {
    "none": (None, "must return a list of tasks, not None"),
    "string": ("tasks", "must return a list of tasks, not 'tasks'"),
    "set": ({1}, "must return a list of tasks, not a set"),
    "dict": ({"a": Task("a")}, "must return a list of tasks, not a dict"),
    "generator": ((Task(str(number)) for number in range(3)), "must return a list of tasks, not a generator"),
    "no task": ([Task("a"), "b"], "entry 1 must be a Task, not 'b'"),
    "id number": ([Task("a"), Task(7)], "task 1 is wrong: its id must be a string, not 7"),  # type: ignore[arg-type]
    "id none": ([Task(None)], "task 0 is wrong: its id must be a string, not None"),  # type: ignore[arg-type]
    "id empty": ([Task("")], "task 0 is wrong: its id is empty"),
    "id surrogate": ([Task("a\udfff")], "task 0 is wrong: its id must be text that UTF-8 can hold"),
    "id twice": ([Task("a"), Task("b"), Task("a")], "task 2 is wrong: its id 'a' is that of task 0"),
    "data list": ([Task("a", [1])], "task 0 is wrong: its data must be a mapping, not a list"),  # type: ignore[arg-type]
    "data none": ([Task("a", None)], "task 0 is wrong: its data must be a mapping, not None"),  # type: ignore[arg-type]
    "lambda": (
        [Task("a"), Task("b", {"seed": 1, "rule": lambda: None})],
        "task 1 cannot be sent to worker processes: its data['rule'] is a function (",
    ),
    "lock": (
        [Task("a", {"lock": threading.Lock()})],
        "task 0 cannot be sent to worker processes: its data['lock'] is a lock",
    ),
    "iterator": (
        [Task("a", {"n": (letter for letter in "a")})],
        "task 0 cannot be sent to worker processes: its data['n'] is a generator (",
    ),
    "mapping": (
        [Task("a", types.MappingProxyType({}))],
        "task 0 cannot be sent to worker processes: TypeError: cannot pickle 'mappingproxy' object",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_that_are_none(name: str) -> None:
    tasks, message = TASKS[name]
    with pytest.raises(ConfigError, match=re.escape(f"MyEnv.tasks('train'){'' if 'return' in message else ':'} {message}")):
        checked_tasks("MyEnv.tasks('train')", tasks)


def test_tasks_that_are_right() -> None:
    tasks = checked_tasks("here", (Task(MyId("a"), {"seed": 1}), Task("b", collections.OrderedDict())))
    assert tasks == [Task("a", {"seed": 1}), Task("b")]
    assert type(tasks[0].id) is str
    assert checked_tasks("here", []) == []


ENVS = {
    "NumberedEnv": "NumberedEnv.tasks('train'): task 0 is wrong: its id must be a string, not 0",
    "LambdaEnv": "LambdaEnv cannot be sent to worker processes: its attribute rule is a function (",
    "UnreadableEnv": "UnreadableEnv cannot be read in a worker process: OSError: no such game",
}


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_that_cannot_be_used_is_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of what worker processes print."""
    assert ENVS[name] in refused(fit(tmp_path, f"--data.source.env=tests.wrong_env.{name}"), capfd)


# --- what must pickle ---


class HoldingEnv(CorridorEnv):
    """Holds something."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


HELD: dict[str, tuple[Callable[[], Any], str]] = {
    "lambda": (lambda: lambda: None, "a function"),
    "file": (lambda: open(__file__), "a TextIOWrapper"),  # noqa: SIM115
    "lock": (threading.Lock, "a lock"),
    "generator": (lambda: (x for x in "a"), "a generator"),
    "nested": (lambda: {"rules": [lambda: None]}, "a dict"),
    "module": (lambda: sys, "a module"),
    "buffer": (lambda: memoryview(b""), "a memoryview"),
}


@pytest.mark.parametrize("name", HELD)
def test_what_does_not_pickle_is_named(name: str) -> None:
    make, kind = HELD[name]
    held = make()
    with pytest.raises(
        ConfigError, match=f"HoldingEnv cannot be sent to worker processes: its attribute held is {kind} "
    ) as told:
        EnvSource(HoldingEnv(held), StateContext(), HFEngine())
    assert len(str(told.value)) < 400
    if isinstance(held, io.IOBase):
        held.close()


def test_a_class_in_a_function_cannot_be_sent() -> None:
    class LocalEnv(CorridorEnv):
        pass

    with pytest.raises(ConfigError, match=r"LocalEnv cannot be sent .*: its class is defined in a function"):
        pickled(LocalEnv())


def test_a_class_that_workers_cannot_import(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As one of a notebook, or of a script that is not a file."""
    module = types.ModuleType("of_this_process_only")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.NotebookEnv = type("NotebookEnv", (CorridorEnv,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    pool = EnvPool(module.NotebookEnv(), 1, 1, 30.0)
    try:
        pool.reset(0, Task("a"))
        with pytest.raises(ConfigError, match=r"NotebookEnv cannot be read in a worker process: ModuleNotFoundError"):
            pool.receive(0)
    finally:
        pool.close()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_a_worker_cannot_read_or_copy_costs_an_episode() -> None:
    pool = EnvPool(CorridorEnv(), 2, 1, 30.0)
    locked = EnvPool(LockedEnv(), 1, 1, 30.0)
    try:
        pool.reset(0, Task("a", {"n": OnlyHere()}))
        pool.reset(1, CorridorEnv().tasks("train")[0])
        assert "ValueError: invalid literal for int()" in pool.receive(0).error
        assert pool.receive(1).error == ""
        assert pool.counts["replaced_workers"] == 0
        locked.reset(0, CorridorEnv().tasks("train")[0])
        assert "cannot be copied in its worker process: its attribute lock is a lock (" in locked.receive(0).error
    finally:
        pool.close()
        locked.close()


def test_tasks_and_environments_of_the_tests_pass() -> None:
    env = WrongEnv()
    assert len(checked_tasks("here", env.tasks("train"))) == len(NAMES)
    assert pickle.loads(pickled(env)).where == "step"
    ids = [{task.id for task in env.tasks(split)} for split in ("train", "valid", "test")]
    assert not any(a & b for a, b in itertools.combinations(ids, 2))
