"""Text environments without TextWorld, for tests: a corridor, and one that breaks on purpose."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

from steppo.envs.base import TextGameEnv
from steppo.errors import ConfigError
from steppo.types import Action, Task, Turn

_SPLITS = ("train", "valid", "test")


class CorridorEnv(TextGameEnv):
    """A corridor of numbered rooms. Walk to the goal room and take the coin; ``take`` anywhere else does nothing.

    Args:
        length: Number of rooms.
        num_tasks: Tasks in each split.
        max_steps: Steps that a task allows; reaching them ends it unsolved.
    """

    def __init__(self, length: int = 4, num_tasks: int = 8, max_steps: int = 8) -> None:
        if length < 2:
            raise ConfigError(f"CorridorEnv: length must be at least 2, not {length}")
        self.length = length
        self.num_tasks = num_tasks
        self.max_steps = max_steps
        self._task = Task("")
        self._room = 0
        self._goal = 0
        self._steps = 0

    def tasks(self, split: str) -> list[Task]:
        if split not in _SPLITS:
            raise ConfigError(f"CorridorEnv has no split {split!r}; it has {', '.join(_SPLITS)}")
        pairs = list(itertools.permutations(range(self.length), 2))
        first = _SPLITS.index(split) * self.num_tasks
        chosen = [pairs[number % len(pairs)] for number in range(first, first + self.num_tasks)]
        return [
            Task(f"corridor/{split}/{number}", {"start": start, "goal": goal}) for number, (start, goal) in enumerate(chosen)
        ]

    def reset(self, task: Task) -> Turn:
        self._task = task
        self._room, self._goal, self._steps = task.data["start"], task.data["goal"], 0
        return self._turn(f"You are in room {self._room}.", success=False)

    def command(self, command: str) -> Turn:
        self._steps += 1
        success = False
        if command not in self._commands():
            text = "Nothing happens."
        elif command == "take":
            success = self._room == self._goal
            text = "You take the coin." if success else "There is no coin here."
        else:
            self._room += 1 if command == "right" else -1
            text = f"You are in room {self._room}."
        terminated = success or self._steps == self.max_steps
        return self._turn(text, reward=float(success), terminated=terminated, success=success)

    def expert_action(self) -> str | None:
        if self._room == self._goal:
            return "take"
        return "right" if self._room < self._goal else "left"

    def _commands(self) -> tuple[str, ...]:
        ways = {"left": self._room > 0, "right": self._room < self.length - 1, "take": True}
        return tuple(command for command, possible in ways.items() if possible)

    def _turn(self, text: str, **outcome: Any) -> Turn:
        return Turn(text, f"Take the coin in room {self._goal}.", self._commands(), **outcome)


class FaultyEnv(CorridorEnv):
    """A corridor that breaks in the second step (index 1) of some tasks.

    Args:
        fail_tasks: Ids of tasks that raise.
        hang_tasks: Ids of tasks that never answer.
        die_tasks: Ids of tasks that end the process.
        length: Number of rooms.
        num_tasks: Tasks in each split.
        max_steps: Steps that a task allows; reaching them ends it unsolved.
    """

    def __init__(
        self,
        fail_tasks: list[str] | None = None,
        hang_tasks: list[str] | None = None,
        die_tasks: list[str] | None = None,
        length: int = 4,
        num_tasks: int = 8,
        max_steps: int = 8,
    ) -> None:
        super().__init__(length, num_tasks, max_steps)
        self.fail_tasks = fail_tasks or []
        self.hang_tasks = hang_tasks or []
        self.die_tasks = die_tasks or []

    def command(self, command: str) -> Turn:
        if self._steps == 1:
            if self._task.id in self.fail_tasks:
                raise RuntimeError("broken on purpose")
            if self._task.id in self.hang_tasks:
                time.sleep(3600)
            if self._task.id in self.die_tasks:
                os._exit(1)
        return super().command(command)


class UnreliableEnv(CorridorEnv):
    """A corridor whose steps raise or hang as if by chance, but decided by the task and its actions alone.

    So an episode that is played again does not break where it has passed before.

    Args:
        fail_rate: Share of steps that raise.
        hang_rate: Share of steps that never answer.
        length: Number of rooms.
        num_tasks: Tasks in each split.
        max_steps: Steps that a task allows; reaching them ends it unsolved.
    """

    def __init__(
        self, fail_rate: float = 0.0, hang_rate: float = 0.0, length: int = 4, num_tasks: int = 8, max_steps: int = 8
    ) -> None:
        super().__init__(length, num_tasks, max_steps)
        self.fail_rate = fail_rate
        self.hang_rate = hang_rate
        self._actions: list[str] = []

    def fault(self, task_id: str, actions: list[str]) -> str:
        """What happens in the last of these steps: ``fail``, ``hang`` or nothing."""
        digest = hashlib.blake2b("|".join(["chance", task_id, *actions]).encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / 2**64
        return "fail" if drawn < self.fail_rate else "hang" if drawn < self.fail_rate + self.hang_rate else ""

    def reset(self, task: Task) -> Turn:
        self._actions = []
        return super().reset(task)

    def command(self, command: str) -> Turn:
        self._actions.append(command)
        fault = self.fault(self._task.id, self._actions)
        if fault == "fail":
            raise RuntimeError("broken by chance")
        if fault == "hang":
            time.sleep(3600)
        return super().command(command)


class RestlessEnv(CorridorEnv):
    """Answers now at once and now later, each time another way."""

    def reset(self, task: Task) -> Turn:
        self.rest()
        return super().reset(task)

    def step(self, action: Action) -> Turn:
        self.rest()
        return super().step(action)

    def rest(self) -> None:
        drawn = random.SystemRandom().random()
        if drawn > 0.5:
            time.sleep(0.02 * drawn)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.001)


class PatientEnv(CorridorEnv):
    """Gives no answer before the engine has seen that it works.

    Args:
        folder: Where each of them says so.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def command(self, command: str) -> Turn:
        Path(self.folder, "environment").touch()
        wait_for(Path(self.folder, "engine"))
        return super().command(command)
