"""What an environment must offer. Subclass it in a file of your own and name it by ``class_path``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from steppo.types import Observation, Task


class Env(ABC):
    """A text environment, in Gymnasium's manner.

    The constructor only stores settings: the object is copied into worker processes (so it must pickle), one copy for each
    episode that is played at the same time. Load what all of them share in ``start``; acquire an episode's own in ``reset``.

    Attributes:
        max_steps: Steps that the task itself allows, at least 1, if it has a limit. Refused actions use them up too.
    """

    max_steps: int | None = None

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """Tasks of ``train``, ``valid`` or ``test``, always in the same order. Raises ``ConfigError`` for others."""

    def start(self) -> None:
        """Loads what lasts (an index, a grammar): once in each worker process, before its first ``reset``.

        It has a time limit of its own (``EnvSource.start_timeout``). What it assigns to attributes is not copied: all
        episodes of the process share it. If it fails three times in a row the run ends.
        """

    @abstractmethod
    def reset(self, task: Task) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode of ``task``. The same task gives the same start."""

    @abstractmethod
    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carries out one command.

        Returns:
            Observation, reward, terminated (the task is over, nothing follows), truncated (cut from outside), info.
            ``info["success"]`` says whether the task is solved, as far as one can tell now: True or False, or ``None`` (or
            nothing) where there is no verdict. The last one counts; ``reset`` may give the first.
            ``info["action_valid"]`` (true unless given) says whether the command was one that can be carried out. Other
            entries are figures (numbers, booleans) and labels (short texts) for records and curves; under each name the
            last one is the episode's. A wrong value ends the episode as broken (``steppo/envs/checks.py``).
        """

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Makes what the tasks need on disk (games, indices), once per machine, before any worker starts.

        Args:
            tasks: All that will be played.
            progress: Call with (done, total).
        """

    def expert_action(self) -> str | None:
        """A command that an expert would give now, or ``None`` when it has none: a demonstration ends there."""
        return None

    def close(self) -> None:
        """Frees what ``reset`` acquired."""
