"""ALFWorld (Shridhar et al., 2021): household tasks as text games, from the publishers' ``json_2.1.1``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing as mp
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from steppo.envs.alfworld.game import Episode, Game
from steppo.envs.alfworld.grammar import GameError, Grammar
from steppo.envs.alfworld.translation import FORMAT, keep, kept, translated
from steppo.envs.base import TextGameEnv
from steppo.envs.guard import Guard
from steppo.errors import ConfigError, require_at_least
from steppo.types import Task, Turn

_FOLDERS = {"train": "train", "valid": "valid_seen", "test": "valid_unseen"}
_FOLDERS |= {folder: folder for folder in ("valid_seen", "valid_unseen")}  # the publishers' names will do, too
_FILE = "game.tw-pddl"
_SOLVABLE = re.compile(rb'(?<!\\)"solvable"\s*:\s*true')
_MOST_GAMES = 64  # kept in memory, of about 2 MiB each
_GET_DATA = "get the data with alfworld-download, and set data or $ALFWORLD_DATA to its folder (docs/alfworld.md)"


@dataclass(frozen=True)
class _File:
    """A game's file, read."""

    path: Path
    digest: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> _File:
        try:
            text = path.read_bytes()
            content = json.loads(text)
            walkthrough = content.setdefault("walkthrough", [])
            texts = [*(content[name] for name in ("pddl_domain", "pddl_problem", "grammar")), *walkthrough]
            if not all(isinstance(each, str) for each in texts):
                raise TypeError("a text is none")
        except FileNotFoundError:
            raise ConfigError(f"AlfworldEnv: there is no {path}; {_GET_DATA}") from None
        except OSError as error:
            raise ConfigError(f"AlfworldEnv: cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"AlfworldEnv: {path} is cut off or damaged; unpack the data again") from error
        return cls(path, hashlib.sha256(text).hexdigest(), content)

    def translated(self, cache: Path) -> dict[str, Any]:
        """From the cache, or made now. Raises ``GameError``, or ``OSError`` when it cannot be kept."""
        place = cache / f"{self.digest}.json.z"
        if (data := kept(place)) is None:
            data = translated(self.content["pddl_domain"], self.content["pddl_problem"])
            keep(data, place)
        return data

    def game(self, cache: Path) -> Game:
        try:
            try:
                data = self.translated(cache)
            except OSError:  # no room to keep it
                data = translated(self.content["pddl_domain"], self.content["pddl_problem"])
            return Game(data, Grammar(self.content["grammar"]))
        except GameError as error:
            raise ConfigError(f"AlfworldEnv: {self.path} cannot be played: {error}") from error


def _translate(path: Path, cache: Path) -> None:
    """In a process of its own."""
    try:
        _File.read(path).translated(cache)
    except (GameError, ConfigError):
        pass  # its episodes will fail, and say why
    except OSError as error:
        raise ConfigError(f"AlfworldEnv: cannot keep translated games in {cache}: {error.strerror}") from error


class AlfworldEnv(TextGameEnv):
    """Household tasks in ALFWorld's text games; ``valid`` is the publishers' ``valid_seen``, ``test`` their ``valid_unseen``.

    Texts, commands and rewards are those of TextWorld, which plays these games too, but slower.

    Args:
        data: Folder that holds ``json_2.1.1`` (or is it); ``$ALFWORLD_DATA`` unless given.
        max_steps: Steps that the task allows; when they are used up it is over, unsolved. The StepPO paper's are 20, most
            others' 50.
        num_train: Number of training games; all unless given.
        num_valid: Number of games of ``valid_seen``; all unless given.
        num_test: Number of games of ``valid_unseen``; all unless given.
        cache_dir: Where translated games are kept, about 35 kB each; the user's cache folder unless given.
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
        if importlib.util.find_spec("fast_downward") is None:
            raise ConfigError('AlfworldEnv needs a translator of PDDL: pip install "steppo[alfworld]"')
        given = data or os.environ.get("ALFWORLD_DATA")
        if not given:
            raise ConfigError(f"AlfworldEnv needs ALFWorld's data: {_GET_DATA}")
        folder = Path(given).expanduser()
        self.folder = folder / "json_2.1.1" if (folder / "json_2.1.1").is_dir() else folder
        if not self.folder.is_dir():
            raise ConfigError(f"AlfworldEnv: there is no folder {folder}; {_GET_DATA}")
        self.max_steps = max_steps
        self.num_games = {"train": num_train, "valid_seen": num_valid, "valid_unseen": num_test}
        self.num_translators = num_translators
        root = Path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "alfworld"
        self._cache = root / f"{FORMAT}"
        self._games: dict[str, tuple[Game, tuple[str, ...]]] = {}

    @property
    def version(self) -> str:  # type: ignore[override]
        """The grammars of the first game of each split."""
        grammars = set()
        for folder in self.num_games:
            if (path := next(self._solvable(folder), None)) is not None:
                grammars.add(Grammar(_File.read(self.folder / path).content["grammar"]).version)
        return ", ".join(sorted(grammars))

    def tasks(self, split: str) -> list[Task]:
        if split not in _FOLDERS:
            raise ConfigError(f"AlfworldEnv has no split {split!r}; it has {', '.join(_FOLDERS)}")
        folder = _FOLDERS[split]
        limit = self.num_games[folder]
        tasks = []
        for path in self._solvable(folder):
            if len(tasks) == limit:
                return tasks
            tasks.append(Task(f"alfworld/{path.parent.as_posix()}", {"game": path.as_posix()}))
        if not tasks and limit != 0:
            raise ConfigError(f"AlfworldEnv: no solvable {_FILE} in {self.folder / folder}; {_GET_DATA}")
        return tasks

    def content(self, task: Task) -> str:
        """Domain, problem, grammar and walkthrough, wherever the file lies and however its JSON is written."""
        content = _File.read(self.folder / task.data["game"]).content
        names = ("pddl_domain", "pddl_problem", "grammar", "walkthrough")
        return json.dumps({name: content[name] for name in names}, sort_keys=True)

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Translates games that are not in the cache. One that cannot be is left: its episodes will fail."""
        paths = {self.folder / task.data["game"] for task in tasks}
        kept_already = {path.name for path in self._cache.glob("*.json.z")}
        missing = [path for path in sorted(paths) if f"{_File.read(path).digest}.json.z" not in kept_already]
        if not missing:
            return
        progress(0, len(missing))
        with Guard() as guard, ProcessPoolExecutor(self.num_translators, mp.get_context("spawn")) as pool:
            try:
                with guard.marking():
                    jobs = [pool.submit(_translate, path, self._cache) for path in missing]
                for done, job in enumerate(as_completed(jobs), start=1):
                    job.result()
                    progress(done, len(missing))
            except BaseException:
                guard.kill()  # nobody waits for what is under way
                pool.shutdown(cancel_futures=True)
                raise

    def start(self) -> None:
        self._games = {}  # for all episodes of this process

    def reset(self, task: Task) -> Turn:
        name = task.data["game"]
        if name not in self._games:
            file = _File.read(self.folder / name)
            if len(self._games) >= _MOST_GAMES:
                del self._games[next(iter(self._games))]
            self._games[name] = file.game(self._cache), tuple(file.content["walkthrough"])
        game, self._walkthrough = self._games[name]
        self._episode = Episode(game)
        self._commands = self._episode.commands()
        self._actions: list[str] = []
        before, sign, goal = self._episode.intro().partition("Your task is to: ")
        self._goal = sign + goal
        info: dict[str, str | float] = {"task_type": Path(name).parts[1].split("-")[0], "grammar": game.grammar.version}
        if self._walkthrough:
            info["golden_steps"] = len(self._walkthrough)
        # Its first paragraph is a welcome.
        return self._turn(before.strip().split("\n\n", 1)[-1], info=info)

    def command(self, command: str) -> Turn:
        command = command.strip()
        self._actions.append(command)
        operator = self._commands.get(command)
        text = "Nothing happens."
        if operator is not None:
            text = self._episode.apply(operator)
            self._commands = self._episode.commands()
        won = self._episode.won
        over = won or len(self._actions) == self.max_steps
        return self._turn(text, reward=float(won), terminated=over, success=won, action_valid=operator is not None)

    def expert_action(self) -> str | None:
        """The walkthrough's next command; none once another way was taken."""
        done = len(self._actions)
        if tuple(self._actions) != self._walkthrough[:done] or done == len(self._walkthrough):
            return None
        return self._walkthrough[done]

    def _turn(self, text: str, **outcome: Any) -> Turn:
        return Turn(text, self._goal, tuple(self._commands), **{"success": False, **outcome})

    def _solvable(self, folder: str) -> Iterator[Path]:
        """Files of a split, relative, in an order that is the same everywhere and mixes task types and rooms.

        As the publishers do, it leaves out tasks with sliced or movable things, and games that their planner did not solve.
        """
        paths = [path.relative_to(self.folder) for path in (self.folder / folder).rglob(_FILE)]
        for path in sorted(paths, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            if "movable" in path.as_posix() or "Sliced" in path.as_posix():
                continue
            text = (self.folder / path).read_bytes()
            if not text.rstrip().endswith(b"}"):
                raise ConfigError(f"AlfworldEnv: {self.folder / path} is cut off or damaged; unpack the data again")
            if _SOLVABLE.search(text):
                yield path
