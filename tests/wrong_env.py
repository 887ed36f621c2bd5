"""An environment whose every task is wrong in its own way, as a user's may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from steppo.rendering import ActionParser, ParsedAction
from steppo.types import Action, Message, Task, ToolCall, Turn
from tests.toy_env import CorridorEnv


def _with(**fields: Any) -> Callable[[Turn], Any]:
    return lambda turn: replace(turn, **fields)


def _info(**entries: Any) -> Callable[[Turn], Any]:
    return _with(info=entries)


def _message(role: Any = "tool", content: Any = "none found", tool_call_id: Any = "call_0") -> Callable[[Turn], Any]:
    return _with(messages=[Message("user", "a"), Message(role, content, tool_call_id)])


def _expert_calls(*calls: Any) -> Callable[[Turn], Any]:
    return _with(expert_action=Action(tool_calls=calls))


# By task: what becomes of the turn after the first step, and what the error says of it.
WRONG: dict[str, tuple[Callable[[Turn], Any], str]] = {
    "text-none": (_with(text=None), "the environment's text must be a string, not None"),
    "text-bytes": (_with(text=b"room"), "the environment's text must be a string, not a bytes"),
    "text-surrogate": (_with(text="a\ud800"), "the environment's text must be text that UTF-8 can hold; character 1 is"),
    "goal-list": (_with(goal=["go"]), "the environment's goal must be a string, not a list"),
    "feedback-int": (_with(feedback=7), "the environment's feedback must be a string, not 7"),
    "commands-set": (_with(commands={"left", "take"}), "commands must be a list or tuple of strings, or None, not a set"),
    "commands-str": (_with(commands="take"), "commands must be a list or tuple of strings, or None, not 'take'"),
    "commands-array": (_with(commands=np.array(["take"])), "or None, not a ndarray"),
    "commands-generator": (_with(commands=lambda: None), "or None, not a function"),
    "commands-entry": (_with(commands=["take", None]), "the environment's commands[1] must be a string, not None"),
    "messages-none": (_with(messages=None), "the environment's messages must be a list or tuple of Message, not None"),
    "messages-str": (_with(messages="none"), "the environment's messages must be a list or tuple of Message, not 'none'"),
    "messages-one": (_with(messages=Message("user", "a")), "messages must be a list or tuple of Message, not a Message"),
    "messages-dict": (
        _with(messages=[{"role": "tool", "content": "none found"}]),
        "the environment's messages[0] must be a Message, not a dict",
    ),
    "messages-role-system": (_message("system"), "the environment's messages[1].role must be user or tool, not 'system'"),
    "messages-role-own": (_message("assistant"), "the environment's messages[1].role must be user or tool, not 'assistant'"),
    "messages-role-none": (_message(None), "the environment's messages[1].role must be a string, not None"),
    "messages-content": (_message(content=None), "the environment's messages[1].content must be a string, not None"),
    "messages-surrogate": (_message(content="\ud800"), "messages[1].content must be text that UTF-8 can hold"),
    "messages-call": (_message(tool_call_id=0), "the environment's messages[1].tool_call_id must be a string, not 0"),
    "expert-int": (_with(expert_action=3), "the environment's expert_action must be a command, an Action or None, not 3"),
    "expert-call": (_with(expert_action=ToolCall("find")), "must be a command, an Action or None, not a ToolCall"),
    "expert-surrogate": (_with(expert_action="\ud800"), "the environment's expert_action must be text that UTF-8 can hold"),
    "expert-command": (
        _with(expert_action=Action(3)),
        "the command of the environment's expert_action must be a string, not 3",
    ),
    "expert-text": (
        _with(expert_action=Action(text=None)),
        "the text of the environment's expert_action must be a string, not None",
    ),
    "expert-thought": (
        _with(expert_action=Action(reasoning=b"")),
        "the reasoning of the environment's expert_action must be a string, not a bytes",
    ),
    "expert-calls": (
        _with(expert_action=Action(tool_calls="find")),
        "the tool_calls of the environment's expert_action must be a list or tuple of ToolCall, not 'find'",
    ),
    "expert-call-dict": (
        _expert_calls({"name": "a"}),
        "the class of tool call 1 of the environment's expert_action must be ToolCall: it is a dict",
    ),
    "expert-call-name": (
        _expert_calls(ToolCall("find"), ToolCall(None)),
        "the name of tool call 2 of the environment's expert_action must be a string, not None",
    ),
    "expert-call-id": (
        _expert_calls(ToolCall("find", id=1)),
        "the id of tool call 1 of the environment's expert_action must be a string, not 1",
    ),
    "expert-arguments": (
        _expert_calls(ToolCall("find", "all")),
        "the arguments of tool call 1 of the environment's expert_action must be a mapping, not 'all'",
    ),
    "expert-set": (
        _expert_calls(ToolCall("find", {"what": {1}})),
        "the arguments of tool call 1 of the environment's expert_action cannot be written as JSON: TypeError: ",
    ),
    "expert-half": (
        _expert_calls(ToolCall("find", {"what": "\ud800"})),
        "JSON: their text must be text that UTF-8 can hold",
    ),
    "expert-nan": (
        _expert_calls(ToolCall("find", {"most": float("nan")})),
        "expert_action cannot be written as JSON: ValueError: ",
    ),
    "reward-huge": (
        _with(reward=1.7e308),
        "the environment's reward must be finite and at most 1e+12 in size, not 1.7e+308",
    ),
    "reward-nan": (
        _with(reward=np.float32("nan")),
        "the environment's reward must be finite and at most 1e+12 in size, not nan",
    ),
    "reward-integer": (_with(reward=10**400), "the environment's reward must be finite and at most 1e+12 in size, not inf"),
    "reward-text": (_with(reward="1"), "the environment's reward must be a number, not '1'"),
    "reward-none": (_with(reward=None), "the environment's reward must be a number, not None"),
    "reward-array": (_with(reward=np.ones(1)), "the environment's reward must be a number, not a ndarray"),
    "terminated-int": (_with(terminated=1), "the environment's terminated must be True or False, not 1"),
    "truncated-none": (_with(truncated=None), "the environment's truncated must be True or False, not None"),
    "success-no": (_with(success="no"), "the environment's success must be True, False or None, not 'no'"),
    "success-int": (_with(success=1), "the environment's success must be True, False or None, not 1"),
    "valid-text": (_with(action_valid="yes"), "the environment's action_valid must be True or False, not 'yes'"),
    "valid-none": (_with(action_valid=None), "the environment's action_valid must be True or False, not None"),
    "key-int": (_with(state_key=3), "the environment's state_key must be a string, not 3"),
    "key-tuple": (_with(state_key=(1, 2)), "the environment's state_key must be a string, not a tuple"),
    "key-surrogate": (_with(state_key="\ud800"), "the environment's state_key must be text that UTF-8 can hold"),
    "info-none": (_with(info=None), "the environment's info must be a mapping, not None"),
    "info-success": (_info(success=True), "the environment's info cannot hold success: it is a field of the Turn"),
    "info-valid": (_info(action_valid=False), "the environment's info cannot hold action_valid: it is a field of the Turn"),
    "info-list": (
        _info(rooms=[1]),
        'the environment\'s info["rooms"] must be a number, True, False, a text or None, not a list',
    ),
    "info-array": (_info(f1=np.ones(1)), 'info["f1"] must be a number, True, False, a text or None, not a ndarray'),
    "info-function": (_info(why=lambda: None), 'info["why"] must be a number, True, False, a text or None, not a function'),
    "info-dict": (_info(episode={"r": 1}), 'info["episode"] must be a number, True, False, a text or None, not a dict'),
    "info-nan": (_info(score=np.float32("nan")), 'info["score"] must be finite and at most 1e+30 in size, not nan'),
    "info-huge": (_info(score=10**400), 'info["score"] must be finite and at most 1e+30 in size, not inf'),
    "info-long": (_info(type="x" * 257), 'info["type"] must have at most 256 characters, not 257'),
    "info-surrogate": (_info(type="\ud800"), 'info["type"] must be text that UTF-8 can hold'),
    "info-key": (_with(info={3: 1.0}), "a name in the environment's info must be a string, not 3"),
    "info-empty-name": (
        _info(**{"": 1.0}),
        "a name in the environment's info must have 1 to 64 printable characters, not be ''",
    ),
    "info-long-name": (_info(**{"x" * 65: 1.0}), "must have 1 to 64 printable characters, not be 'xxx"),
    "info-line": (_info(**{"a\nb": 1.0}), "must have 1 to 64 printable characters, not be 'a\\nb'"),
    "info-taken": (_info(dataloader_idx_0=1.0), "not be 'dataloader_idx_0'"),
    "info-many": (_info(**{str(n): n for n in range(33)}), "the environment's info may have 32 entries, not more"),
    "text-only": (lambda turn: turn.text, " must return a Turn, not '"),
    "nothing": (lambda turn: None, " must return a Turn, not None"),
    "action": (lambda turn: Action("take"), " must return a Turn, not an Action"),
    "class": (lambda turn: Turn, " must return a Turn, not a type"),
    "old-step": (lambda turn: (turn.text, 0.0, False, False, {"success": False}), " must return a Turn, not a tuple"),
    "old-reset": (lambda turn: (turn, {}), " must return a Turn, not a tuple"),
}
# In other ways than by a value.
RAISING = {"raises-badly": "BadlyError: (its message cannot be read)", "interrupts": "KeyboardInterrupt: ^C"}
# Right after a step: numpy's numbers and booleans, lists, an info that says nothing, the largest reward.
RIGHT: dict[str, Callable[[Turn], Turn]] = {
    "right-numpy": _with(reward=np.float32(0), terminated=np.bool_(False), success=np.bool_(False), text=np.str_("a")),
    "right-list": lambda turn: replace(turn, commands=list(turn.commands or ()), messages=[]),  # type: ignore[arg-type]
    "right-messages": _message(),
    "right-other": _info(why="it was so", score=np.int8(3), none=None),
    "right-none": _with(success=None, info={"nothing": None}),
    "right-key": _with(state_key="room 3"),
    "right-expert": _with(expert_action="take"),
    "right-calls": _expert_calls(ToolCall("find", {"what": ["coin", None, 1.5]})),
    "rewards": _with(reward=1e12),
    "rewards-true": _with(reward=True),
    "ends": _with(terminated=True),
    "is-cut": _with(truncated=np.bool_(True)),
}
# Of these, what is wrong before anything is done.
WRONG_AT_START = {
    "rewards": "the environment's reward cannot be 1000000000000.0 in reset: nothing is done yet",
    "rewards-true": "the environment's reward cannot be 1.0 in reset: nothing is done yet",
    "ends": "the environment's terminated cannot be True in reset: nothing is done yet",
    "is-cut": "the environment's truncated cannot be True in reset: nothing is done yet",
}


class BadlyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class WrongEnv(CorridorEnv):
    """A corridor in which the start or the first step of a task returns what its name says.

    Args:
        where: Which.
    """

    def __init__(self, where: Literal["reset", "step"] = "step") -> None:
        super().__init__(max_steps=3)
        self.where = where

    def tasks(self, split: str) -> list[Task]:
        places = super().tasks(split)
        names = [*WRONG, *RAISING, *RIGHT]
        return [Task(f"{split}/{name}", places[number % len(places)].data) for number, name in enumerate(names)]

    def reset(self, task: Task) -> Any:
        turn = super().reset(task)
        return self._answer(turn) if self.where == "reset" else turn

    def command(self, command: str) -> Any:
        turn = super().command(command)
        return self._answer(turn) if self.where == "step" else turn

    def _answer(self, turn: Turn) -> Any:
        name = self._task.id.partition("/")[2]
        if name == "raises-badly":
            raise BadlyError
        if name == "interrupts":
            raise KeyboardInterrupt("^C")
        return WRONG[name][0](turn) if name in WRONG else RIGHT[name](turn)


class NumberedEnv(CorridorEnv):
    """Numbers in place of ids."""

    def tasks(self, split: str) -> list[Task]:
        return [Task(number, task.data) for number, task in enumerate(super().tasks(split))]  # type: ignore[arg-type]


class LambdaEnv(CorridorEnv):
    """Holds a rule that does not pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = lambda: None


class UnreadableEnv(CorridorEnv):
    """Pickles, but does not arrive."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise OSError("no such game")


class LockedEnv(CorridorEnv):
    """Takes a lock where it arrives, which cannot be copied for each slot."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())


class OnlyHere:
    """Can be sent, but not read."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


class FirstParser(ActionParser):
    """Reads the first command into any text: random weights play, too."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        assert turn.commands
        return ParsedAction(Action(turn.commands[0]))


class VerdictEnv(CorridorEnv):
    """Gives a verdict with the start of a task, its name, and says nothing more."""

    def tasks(self, split: str) -> list[Task]:
        data = super().tasks(split)[0].data
        return [Task(str(verdict), data) for verdict in (None, True, False)]

    def reset(self, task: Task) -> Turn:
        return replace(super().reset(task), success=None if task.id == "None" else task.id == "True")

    def command(self, command: str) -> Turn:
        return replace(super().command(command), success=None)


class SilentEnv(CorridorEnv):
    """A corridor that never says whether it is solved."""

    def reset(self, task: Task) -> Turn:
        return replace(super().reset(task), success=None)

    def command(self, command: str) -> Turn:
        return replace(super().command(command), success=None)


class BoastingEnv(CorridorEnv):
    """A corridor that says so when it is solved, and nothing before."""

    def reset(self, task: Task) -> Turn:
        return replace(super().reset(task), success=None)

    def command(self, command: str) -> Turn:
        turn = super().command(command)
        return replace(turn, success=turn.success or None)
