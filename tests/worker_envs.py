"""What workers of single tests need. They import this file; with a file of tests they would import torch and Lightning."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from steppo.envs import Env, TextGameEnv, TextWorldEnv
from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn
from tests.toy_env import CorridorEnv, FaultyEnv


class Multiline(FaultyEnv):
    """Its errors are long and of many lines."""

    def reset(self, task: Task) -> Any:
        if task.id in self.fail_tasks:
            raise RuntimeError("broken on purpose\n" + "and so on " * 50)
        return super().reset(task)


class StuckEnv(CorridorEnv):
    """Does not come back from a step of the second iteration, once: the file ``marker`` says that it was there."""

    def __init__(self, marker: str, after: str, length: int = 4, num_tasks: int = 8, max_steps: int = 8) -> None:
        super().__init__(length, num_tasks, max_steps)
        self.marker = Path(marker)
        self.after = Path(after)

    def command(self, command: str) -> Turn:
        if self.after.exists() and not self.marker.exists():
            self.marker.touch()
            time.sleep(600)
        return super().command(command)


class DifferingEnv(CorridorEnv):
    """A corridor of which one process sees another: it fails for some tasks there, or lists others.

    Args:
        what: Where it differs.
    """

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what

    def tasks(self, split: str) -> list[Task]:
        tasks = super().tasks(split)
        return tasks[::-1] if self.what == "tasks" and os.environ.get("LOCAL_RANK") == "1" else tasks

    def reset(self, task: Task) -> Any:
        if self.what == "fails" and os.environ.get("LOCAL_RANK") == "1" and task.id.endswith(("train/0", "train/1")):
            raise RuntimeError("broken on purpose")
        return super().reset(task)


class FallsSilentEnv(CorridorEnv):
    """Says whether a task is solved until the file ``silent`` is there."""

    def __init__(self, silent: str, length: int = 4, num_tasks: int = 8, max_steps: int = 8) -> None:
        super().__init__(length, num_tasks, max_steps)
        self.silent = Path(silent)

    def _turn(self, text: str, **outcome: Any) -> Turn:
        turn = super()._turn(text, **outcome)
        return replace(turn, success=None) if self.silent.exists() else turn


class OutageEnv(CorridorEnv):
    """A corridor in which steps cost, so that returns are below 0. The panel has a server that may be down.

    Args:
        down: It is, while there is such a file.
        verdict: Say whether a task is solved.
    """

    def __init__(self, down: str, verdict: bool = True) -> None:
        super().__init__()
        self.down = Path(down)
        self.verdict = verdict

    def reset(self, task: Task) -> Turn:
        if self.down.exists() and "/train/" not in task.id:
            raise ConnectionError("the server is down")
        return super().reset(task)

    def command(self, command: str) -> Turn:
        turn = super().command(command)
        return replace(turn, reward=turn.reward - 1, info={"score": 2.0})

    def _turn(self, text: str, **outcome: Any) -> Turn:
        turn = super()._turn(text, **outcome)
        return turn if self.verdict else replace(turn, success=None)


class KeyedEnv(CorridorEnv):
    """Says the time, so that nothing is seen twice; the state is the room."""

    def _turn(self, text: str, **outcome: Any) -> Turn:
        return super()._turn(f"It is {self._steps}. {text} ({self._room})", state_key=f"room {self._room}", **outcome)


class Desk(Env):
    """Look two words up, then answer with both. It speaks through tools, other users and itself, and counts."""

    max_steps = 3
    tools = (ToolSpec("look_up", "A word.", {"type": "object", "properties": {"word": {"type": "string"}}}),)

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"desk/{split}/{number}") for number in range(2)]

    def reset(self, task: Task) -> Turn:
        self._step = 0
        return Turn("What do \u00e0 and b mean?", info={"kind": "two\n words", "left": 2})

    def step(self, action: Action) -> Turn:
        self._step += 1
        answers = tuple(
            Message("tool", f"[{call.arguments}]\n\x1b[31mred", tool_call_id=call.id) for call in action.tool_calls
        )
        if not answers:
            return Turn("Right.", reward=1.0, terminated=True, success=True, info={"left": 0, "said": action.text})
        return Turn(messages=(*answers, Message("user", "Hurry up.")), info={"left": 1, "found": True, "share": 1 / 3})

    def expert_action(self) -> Action:
        calls = tuple(ToolCall("look_up", {"word": word}, f"call_{number}") for number, word in enumerate("\u00e0b"))
        return Action(text="a\nb") if self._step else Action(tool_calls=calls)


class Shelf(TextGameEnv):
    """Takes what is named, or goes."""

    max_steps = 2

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"shelf/{split}")]

    def reset(self, task: Task) -> Turn:
        return Turn("A shelf.", commands=("take ...", "go"))

    def command(self, command: str) -> Turn:
        return Turn(f"You {command}.", commands=("go", "[red]...[/red]"), terminated=command == "go")


class _Nothing(dict[Any, Any]):
    """Knows nothing."""

    def __contains__(self, key: object) -> bool:
        return False


class Forgetful(TextWorldEnv):
    """Plays every turn."""

    def start(self) -> None:
        self._turns = _Nothing()


def stock_game(challenge: str, settings: dict[str, Any], seed: int, path: Path, scratch: Path) -> None:
    """Makes a game as TextWorld does."""
    import textworld
    import textworld.generator

    maker = importlib.import_module(f"textworld.challenges.tw_{challenge}.{challenge}")
    options = textworld.GameOptions()
    options.seeds = seed
    options.path = str(path)
    options.grammar.only_last_action = True
    textworld.generator.compile_game(maker.make(settings, options), options)
