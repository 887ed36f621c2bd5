"""ALFWorld (Shridhar et al., 2021): household tasks as text games, from the publishers' ``json_2.1.1``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from steppo.envs.alfworld.expert import Expert
from steppo.envs.alfworld.game import Episode, Game
from steppo.envs.alfworld.grammar import GameError, Grammar
from steppo.envs.alfworld.translation import FORMAT, keep, kept, translated
from steppo.envs.base import TextGameEnv
from steppo.envs.making import make_all
from steppo.errors import ConfigError, require_at_least
from steppo.paths import user_path
from steppo.types import Task, Turn

_FOLDERS = {"train": "train", "valid": "valid_seen", "test": "valid_unseen"}
_FOLDERS |= {folder: folder for folder in ("valid_seen", "valid_unseen")}  # the publishers' names will do, too
_SOLVABLE = re.compile(rb'"solvable"\s*:\s*true')  # within a text its quotes have backslashes
_MOST_GAMES = 64  # kept in memory, of about 2 MiB each
_NO_ROOM = "AlfworldEnv: cannot keep translated games in"
_GET_DATA = "get the data with alfworld-download, and set data or $ALFWORLD_DATA to its folder (docs/alfworld.md)"


@dataclass(frozen=True)
class _File:
    """A game's file, read.

    Raises:
        ConfigError: It is missing, damaged, or no game of ALFWorld's.
    """

    path: Path
    text: bytes
    domain: str
    problem: str
    grammar: Grammar
    walkthrough: tuple[str, ...]
    content: str

    @classmethod
    def read(cls, path: Path) -> _File:
        text = _bytes(path)
        try:
            found = json.loads(text)
            parts = {name: found[name] for name in ("pddl_domain", "pddl_problem", "grammar")}
            walkthrough = tuple(found.get("walkthrough") or ())
            if not all(isinstance(each, str) for each in (*parts.values(), *walkthrough)):
                raise TypeError("a text is none")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _damaged(path) from None
        try:
            grammar = Grammar(parts["grammar"])
        except GameError as error:
            raise _unplayable(path, error) from error
        content = json.dumps(parts | {"walkthrough": walkthrough}, sort_keys=True)
        return cls(path, text, parts["pddl_domain"], parts["pddl_problem"], grammar, walkthrough, content)

    def game(self, cache: Path) -> Game:
        """Ready to play. What is not in the cache, or damaged there, is translated, and kept if there is room."""
        place = _place(self.text, cache)
        try:
            if (data := kept(place)) is None:
                data = translated(self.domain, self.problem)
                with contextlib.suppress(OSError):
                    cache.mkdir(parents=True, exist_ok=True)
                    keep(data, place, cache)
            return Game(data, self.grammar)
        except GameError as error:
            raise _unplayable(self.path, error) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"AlfworldEnv: there is no {path}; {_GET_DATA}") from None
    except OSError as error:
        raise ConfigError(f"AlfworldEnv: cannot read {path}: {error.strerror}") from error


def _place(game: bytes, cache: Path) -> Path:
    """Where the translation of a game's file is kept."""
    return cache / f"{hashlib.sha256(game).hexdigest()}.json.z"


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"AlfworldEnv: {path} is cut off or damaged; unpack the data again")


def _unplayable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"AlfworldEnv: {path} cannot be played: {error}")


def _translate(path: Path, cache: Path, scratch: str) -> None:
    """In a process of its own."""
    file = _File.read(path)
    try:
        data = translated(file.domain, file.problem)
    except GameError:
        return  # its episodes will fail, and say why
    try:
        keep(data, _place(file.text, cache), scratch)
    except OSError as error:
        raise ConfigError(f"{_NO_ROOM} {cache}: {error.strerror}") from error


class AlfworldEnv(TextGameEnv):
    """Household tasks in ALFWorld's text games; ``valid`` is the publishers' valid_seen, ``test`` their valid_unseen.

    Texts, commands and rewards are those of TextWorld, which plays these games too, but slower. The data are the publishers'
    (MIT licence): ``pip install requests tqdm && pip install --no-deps alfworld && alfworld-download``.

    Args:
        data: Folder that holds ``json_2.1.1``, or is it. Unless given ``$ALFWORLD_DATA``, or else ``~/.cache/alfworld``,
            where alfworld-download puts it.
        max_steps: Steps that the task allows; when they are used up it is over, unsolved. The StepPO paper's are 20, most
            others' 50.
        num_train: Number of training games; all unless given.
        num_valid: Number of games of ``valid_seen``; all unless given.
        num_test: Number of games of ``valid_unseen``; all unless given.
        cache_dir: Where translated games are kept, about 20 kB each; the user's cache folder unless given.
        num_translators: Processes that translate games; one per CPU unless given.
    """

    splits = ("train", "valid", "test")

    def __init__(
        self,
        data: str | None = None,
        max_steps: int = 20,
        num_train: int | None = None,
        num_valid: int | None = None,
        num_test: int | None = None,
        cache_dir: str | None = None,
        num_translators: int | None = None,
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, num_translators=num_translators)
        require_at_least(0, self, num_train=num_train, num_valid=num_valid, num_test=num_test)
        folder = user_path(data or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld")
        self.folder = folder / "json_2.1.1" if (folder / "json_2.1.1").is_dir() else folder
        if not self.folder.is_dir():
            raise ConfigError(f"AlfworldEnv: there is no folder {folder}; {_GET_DATA}")
        self.max_steps = max_steps
        self.num_games = {"train": num_train, "valid_seen": num_valid, "valid_unseen": num_test}
        self.num_translators = num_translators
        root = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "alfworld"
        self._cache = root / f"translated-{FORMAT}"
        self._games: dict[str, tuple[Game, tuple[str, ...]]] = {}

    @property
    def version(self) -> str:  # type: ignore[override]
        """The grammars of the first game of each split."""
        grammars = set()
        for folder in self.num_games:
            if (path := next(self._solvable(folder), None)) is not None:
                grammars.add(_File.read(self.folder / path).grammar.version)
        return ", ".join(sorted(grammars))

    def tasks(self, split: str) -> list[Task]:
        if split not in _FOLDERS:
            raise ConfigError(f"AlfworldEnv has no split {split!r}; it has {', '.join(_FOLDERS)}")
        folder = _FOLDERS[split]
        limit = self.num_games[folder]
        tasks: list[Task] = []
        for path in self._solvable(folder):
            if len(tasks) == limit:
                return tasks
            tasks.append(Task(f"alfworld/{path.parent.as_posix()}", {"game": path.as_posix()}))
        if not tasks and limit != 0:
            raise ConfigError(f"AlfworldEnv: no solvable game.tw-pddl in {self.folder / folder}; {_GET_DATA}")
        return tasks

    def content(self, task: Task) -> str:
        """Domain, problem, grammar and walkthrough, wherever the file lies and however its JSON is written."""
        return _File.read(self.folder / task.data["game"]).content

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Translates games that are not in the cache. One that cannot be is left: its episodes will fail."""
        paths = sorted({self.folder / task.data["game"] for task in tasks})
        missing = [path for path in paths if not _place(_bytes(path), self._cache).exists()]
        if not missing:
            return
        if importlib.util.find_spec("fast_downward") is None:
            raise ConfigError('AlfworldEnv needs a translator of PDDL: pip install "steppo[alfworld]"')
        jobs = [(path, self._cache) for path in missing]
        make_all(_translate, jobs, self._cache, _NO_ROOM, self.num_translators, progress)

    def start(self) -> None:
        self._games = {}  # for all episodes of this process

    def reset(self, task: Task) -> Turn:
        name = task.data["game"]
        if name not in self._games:
            file = _File.read(self.folder / name)
            if len(self._games) >= _MOST_GAMES:
                del self._games[next(iter(self._games))]
            self._games[name] = file.game(self._cache), file.walkthrough
        game, walkthrough = self._games[name]
        self._expert = Expert(walkthrough)
        self._steps = 0
        try:
            self._episode = Episode(game)
            self._commands = self._episode.commands()
            before, sign, goal = self._episode.intro().partition("Your task is to: ")
        except (GameError, RecursionError) as error:
            raise _unplayable(self.folder / name, error) from error
        self._goal = sign + goal
        info: dict[str, str | float] = {"task_type": Path(name).parts[1].split("-")[0], "grammar": game.grammar.version}
        if walkthrough:
            info["golden_steps"] = len(walkthrough)
        # Its first paragraph is a welcome.
        return self._turn(before.strip().split("\n\n", 1)[-1], info=info)

    def command(self, command: str) -> Turn:
        command = command.strip()
        self._steps += 1
        operator = self._commands.get(command)
        text = "Nothing happens."
        if operator is not None:
            text = self._episode.apply(operator)
            self._commands = self._episode.commands()
            self._expert.saw(command)
        won = self._episode.won
        over = won or self._steps == self.max_steps
        return self._turn(text, reward=float(won), terminated=over, success=won, action_valid=operator is not None)

    def expert_action(self) -> str | None:
        """By the walkthrough, also back to it; none once the game is solved, or cannot be that way."""
        return None if self._episode.won else self._expert.action(self._commands)

    def _turn(self, text: str, **outcome: Any) -> Turn:
        return Turn(text, self._goal, tuple(self._commands), **{"success": False, **outcome})

    def _solvable(self, folder: str) -> Iterator[Path]:
        """Files of a split, relative, in an order that is the same everywhere and mixes task types and rooms.

        As the publishers do, it leaves out tasks with sliced or movable things, and games that their planner did not solve.
        """
        paths = [path.relative_to(self.folder) for path in (self.folder / folder).glob("*/*/game.tw-pddl")]
        for path in sorted(paths, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            if "movable" in path.as_posix() or "Sliced" in path.as_posix():
                continue
            text = _bytes(self.folder / path)
            if not text.rstrip().endswith(b"}"):
                raise _damaged(self.folder / path)
            if _SOLVABLE.search(text):
                yield path
