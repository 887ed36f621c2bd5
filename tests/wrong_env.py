"""An environment whose every task is wrong in its own way, as a user's may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from steppo.rendering import ActionParser, ParsedAction
from steppo.types import Observation, Task
from tests.toy_env import CorridorEnv

Answer = tuple[Observation, Any, Any, Any, Any]


def _with(**fields: Any) -> Callable[[Answer], Any]:
    """The answer with another observation."""
    return lambda answer: (replace(answer[0], **fields), *answer[1:])


def _at(place: int, value: Any) -> Callable[[Answer], Any]:
    return lambda answer: (*answer[:place], value, *answer[place + 1 :])


def _info(**entries: Any) -> Callable[[Answer], Any]:
    return lambda answer: (*answer[:4], {**answer[4], **entries})


# By task: what becomes of the answer to the first step, and what the error says of it.
WRONG: dict[str, tuple[Callable[[Answer], Any], str]] = {
    "text-none": (_with(text=None), "the environment's text must be a string, not None"),
    "text-bytes": (_with(text=b"room"), "the environment's text must be a string, not a bytes"),
    "text-surrogate": (_with(text="a\ud800"), "the environment's text must be text that UTF-8 can hold; character 1 is"),
    "goal-list": (_with(goal=["go"]), "the environment's goal must be a string, not a list"),
    "feedback-int": (_with(feedback=7), "the environment's feedback must be a string, not 7"),
    "commands-set": (_with(admissible_commands={"left", "take"}), "admissible_commands must be a list or tuple of strings"),
    "commands-str": (
        _with(admissible_commands="take"),
        "must be a list or tuple of strings, or None, not",
    ),
    "commands-array": (_with(admissible_commands=np.array(["take"])), "or None, not a ndarray"),
    "commands-generator": (_with(admissible_commands=lambda: None), "or None, not a function"),
    "commands-entry": (_with(admissible_commands=["take", None]), "admissible_commands[1] must be a string, not None"),
    "expert-int": (_with(expert_action=3), "the environment's expert_action must be a string, not 3"),
    "reward-huge": (_at(1, 1.7e308), "the environment's reward must be finite and at most 1e+12 in size, not 1.7e+308"),
    "reward-nan": (_at(1, np.float32("nan")), "the environment's reward must be finite and at most 1e+12 in size, not nan"),
    "reward-integer": (_at(1, 10**400), "the environment's reward must be finite and at most 1e+12 in size, not inf"),
    "reward-text": (_at(1, "1"), "the environment's reward must be a number, not '1'"),
    "reward-none": (_at(1, None), "the environment's reward must be a number, not None"),
    "reward-array": (_at(1, np.ones(1)), "the environment's reward must be a number, not a ndarray"),
    "terminated-int": (_at(2, 1), "the environment's terminated must be True or False, not 1"),
    "truncated-none": (_at(3, None), "the environment's truncated must be True or False, not None"),
    "info-none": (_at(4, None), "the environment's info must be a mapping, not None"),
    "success-no": (_info(success="no"), "the environment's info[\"success\"] must be True, False or None, not 'no'"),
    "success-int": (_info(success=1), 'the environment\'s info["success"] must be True, False or None, not 1'),
    "valid-text": (_info(action_valid="yes"), 'the environment\'s info["action_valid"] must be True, False or None'),
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
    "info-key": (_at(4, {3: 1.0}), "a name in the environment's info must be a string, not 3"),
    "info-empty-name": (
        _info(**{"": 1.0}),
        "a name in the environment's info must have 1 to 64 printable characters, not be ''",
    ),
    "info-long-name": (_info(**{"x" * 65: 1.0}), "must have 1 to 64 printable characters, not be 'xxx"),
    "info-line": (_info(**{"a\nb": 1.0}), "must have 1 to 64 printable characters, not be 'a\\nb'"),
    "info-taken": (_info(dataloader_idx_0=1.0), "not be 'dataloader_idx_0'"),
    "info-many": (_info(**{str(n): n for n in range(33)}), "the environment's info may have 32 entries, not more"),
    "observation": (_at(0, "You are here."), "the environment's observation must be an Observation, not 'You are here.'"),
    "four-values": (lambda answer: answer[:4], "truncated, info), not 4 values"),
    "no-tuple": (lambda answer: answer[0], "terminated, truncated, info), not an Observation"),
}
# In other ways than by a value.
RAISING = {"raises-badly": "BadlyError: (its message cannot be read)", "interrupts": "KeyboardInterrupt: ^C"}
# Their answers are right: numpy's numbers and booleans, lists, an info with what does not pickle, the largest reward.
RIGHT = ("right-numpy", "right-list", "right-other", "right-none", "right-large")


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
        observation, info = super().reset(task)
        if self.where == "step":
            return observation, info
        answer = self._answer((observation, 0.0, False, False, info))
        return (answer[0], answer[4]) if isinstance(answer, tuple | list) and len(answer) == 5 else answer

    def step(self, action: str) -> Any:
        answer: Any = super().step(action)
        return self._answer(answer) if self.where == "step" else answer

    def _answer(self, answer: Answer) -> Any:
        name = self._task.id.partition("/")[2]
        if name == "raises-badly":
            raise BadlyError
        if name == "interrupts":
            raise KeyboardInterrupt("^C")
        if name in WRONG:
            return WRONG[name][0](answer)
        observation, reward, terminated, truncated, info = answer
        return {
            "right-numpy": (observation, np.float32(reward), np.bool_(terminated), truncated, {"success": np.bool_(False)}),
            "right-list": [replace(observation, admissible_commands=list(self._commands())), 0, terminated, truncated, info],
            "right-other": (
                observation,
                True,
                terminated,
                truncated,
                {**info, "why": "it was so", "score": np.int8(3), "none": None},
            ),
            "right-large": (observation, 1e12, terminated, truncated, info),
            "right-none": (observation, reward, terminated, truncated, {"success": None, "action_valid": None}),
        }[name]


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

    def parse(self, text: str, observation: Observation) -> ParsedAction:
        assert observation.admissible_commands
        return ParsedAction(observation.admissible_commands[0])


class VerdictEnv(CorridorEnv):
    """Gives a verdict with the start of a task, its name, and says nothing more."""

    def tasks(self, split: str) -> list[Task]:
        data = super().tasks(split)[0].data
        return [Task(str(verdict), data) for verdict in (None, True, False)]

    def reset(self, task: Task) -> tuple[Observation, dict[str, Any]]:
        observation, _ = super().reset(task)
        return observation, {} if task.id == "None" else {"success": task.id == "True"}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        return *super().step(action)[:4], {"success": None}


class SilentEnv(CorridorEnv):
    """A corridor that never says whether it is solved."""

    def reset(self, task: Task) -> tuple[Observation, dict[str, Any]]:
        return super().reset(task)[0], {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        return *super().step(action)[:4], {}


class BoastingEnv(CorridorEnv):
    """A corridor that says so when it is solved, and nothing before."""

    def reset(self, task: Task) -> tuple[Observation, dict[str, Any]]:
        return super().reset(task)[0], {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        *answer, info = super().step(action)
        return *answer, ({"success": True} if info["success"] else {})
