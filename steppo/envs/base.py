"""What an environment must offer. Subclass one of these in a file of your own and name it by ``class_path``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from steppo.types import Action, Task, ToolSpec, Turn


class Env(ABC):
    """An environment that speaks messages and tools. For one that takes a command at a time see ``TextGameEnv``.

    The constructor only stores settings: the object is copied into worker processes (so it must pickle), one copy for each
    episode that is played at the same time. Load what all of them share in ``start``; acquire an episode's own in ``reset``.

    Attributes:
        max_steps: Steps that the task itself allows, at least 1, if it has a limit. Refused actions use them up too.
        tools: What the policy may call, the same in all tasks.
        splits: What ``tasks`` knows.
        version: Of grammar or data, for records: two that play differently have different ones.
    """

    max_steps: int | None = None
    tools: Sequence[ToolSpec] = ()
    splits: Sequence[str] = ("train", "valid", "test")
    version: str = ""

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """Tasks of one of ``splits``, always in the same order. Raises ``ConfigError`` for others."""

    def content(self, task: Task) -> str:
        """Text that decides what the task is (game, goal, question with its gold answer), the same wherever it lies.

        What a panel hashes. Asked once ``prepare`` is done; raise ``ConfigError`` for what is missing or damaged. Unless
        defined it is the task's id and data, which is right where these say all.
        """
        return task.as_text()

    def start(self) -> None:
        """Loads what lasts (an index, a grammar): once in each worker process, before its first ``reset``.

        It has a time limit of its own (``EnvSource.start_timeout``). What it assigns to attributes is not copied: all
        episodes of the process share it. If it fails three times in a row the run ends.
        """

    @abstractmethod
    def reset(self, task: Task) -> Turn:
        """Starts an episode of ``task``. The same task gives the same start."""

    @abstractmethod
    def step(self, action: Action) -> Turn:
        """Carries out one action: its command, its tool calls, or its text.

        What cannot be carried out is told (``action_valid=False``), not raised: an exception ends the episode as broken. So
        does a wrong value in a field of the turn (``steppo/envs/checks.py``).
        """

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Makes what the tasks need on disk (games, indices), once per machine, before any worker starts.

        Args:
            tasks: All that will be played.
            progress: Call with (done, total).
        """

    def expert_action(self) -> str | Action | None:
        """What an expert would do now: a command, or an action with tool calls or a text. ``None``: a demonstration ends."""
        return None

    def close(self) -> None:
        """Frees what ``reset`` acquired."""


class TextGameEnv(Env):
    """An environment that takes one command at a time, such as a text adventure."""

    @abstractmethod
    def command(self, command: str) -> Turn:
        """Carries out one command. See ``step``."""

    def step(self, action: Action) -> Turn:
        return self.command(str(action))
