"""TextWorld games (Côté et al., 2018), generated from seeds and compiled on first use."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import platformdirs

from steppo.envs.base import TextGameEnv
from steppo.envs.making import make_all
from steppo.errors import ConfigError, require_at_least
from steppo.paths import user_path
from steppo.types import Task, Turn

# textworld is imported where it is used: its interpreter must not share a process with torch.

Challenge = Literal["coin_collector", "simple", "treasure_hunter", "cooking"]

_DEFAULT_SETTINGS: dict[str, dict[str, Any]] = {
    "coin_collector": {"level": 5},
    "treasure_hunter": {"level": 5},
    "simple": {"rewards": "sparse", "goal": "brief", "test": False},
    "cooking": {
        "recipe": 1,
        "take": 1,
        "go": 6,
        "open": False,
        "cook": False,
        "cut": False,
        "drop": False,
        "recipe_seed": 0,
    },
}
# What settings may be; those that are not here are switches. Further rules are the generator's own.
_ALLOWED: dict[tuple[str, str], Sequence[Any]] = {
    ("coin_collector", "level"): range(1, 301),
    ("treasure_hunter", "level"): range(1, 31),
    ("simple", "rewards"): ("dense", "balanced", "sparse"),
    ("simple", "goal"): ("detailed", "brief", "none"),
    ("cooking", "recipe"): range(1, 6),
    ("cooking", "take"): range(6),
    ("cooking", "go"): (1, 6, 9, 12),
    ("cooking", "recipe_seed"): range(2**32),
}
_SPLITS = ("train", "valid", "test")
_SEEDS_PER_SPLIT = 1_000_000
_HEADER, _SERIAL = 64, slice(0x12, 0x18)  # of a Z-machine story file: bytes, and where the date is
_MOST_TURNS = 50_000  # kept in memory, of 1 to 2 kB each


def _make_game(challenge: str, settings: Mapping[str, Any], seed: int, path: Path, scratch: str | Path) -> None:
    """Generates and compiles one game in a folder beside it; the game file appears only when it is complete."""
    import textworld
    import textworld.generator

    maker = importlib.import_module(f"textworld.challenges.tw_{challenge}.{challenge}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        options = textworld.GameOptions()
        options.seeds = seed
        options.path = os.path.join(folder, path.name)
        options.grammar.only_last_action = True  # an objective that spells out the route would be the solution
        with _compiled_once(challenge):
            game = maker.make(settings, options)
        textworld.generator.compile_game(game, options)
        made = Path(options.path)
        os.replace(made.with_suffix(".json"), path.with_suffix(".json"))
        os.replace(made, path)


@contextlib.contextmanager
def _compiled_once(challenge: str) -> Iterator[None]:
    """TextWorld tries a game's walkthrough in a story that it compiles only for that, which doubles the cost of a game.

    Here it tries it in the game's description, which it can play too. Not all of cooking's walkthroughs go there.
    """
    from unittest import mock  # a tenth of the start of every worker, whatever it plays

    from textworld.generator.maker import GameMaker

    if challenge == "cooking":
        yield
        return

    def described(maker: Any, path: str) -> str:
        maker.build().save(path := str(Path(path).with_suffix(".json")))
        return path

    with mock.patch.object(GameMaker, "compile", described):
        yield


def _clean(text: str) -> str:
    """Strips banner, status line, score lines, the end-of-game menu and blank lines."""
    text = text[max(text.find("-= "), 0) :] if "$$" in text else text
    text = re.split(r"\n>|\*\*\*", text, maxsplit=1)[0]
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("Your score has just"))


def _clean_objective(objective: str) -> str:
    """Drops the welcome, keeps the task."""
    sentences = re.split(r"(?<=[.!?])\s+", objective.strip())
    kept = [sentence for sentence in sentences if "TextWorld" not in sentence]
    return " ".join(kept or sentences)


class TextWorldEnv(TextGameEnv):
    """Text adventures of four kinds, from seeds; train, valid and test never share one.

    Args:
        challenge: Kind of game.
        settings: The kind's own settings. coin_collector, treasure_hunter: ``level``; simple: ``rewards``, ``goal``,
            ``test``; cooking: ``recipe``, ``take``, ``go`` (number of rooms: 1, 6, 9 or 12), ``open``, ``cook``, ``cut``,
            ``drop``, ``recipe_seed``. What is left out has a default.
        num_train: Number of training games.
        num_valid: Number of validation games.
        num_test: Number of test games.
        max_steps: Steps that the task allows; when they are used up it is over, unsolved.
        show_admissible_commands: Show the commands that would work. Hidden or shown, others count as invalid.
        exclude_commands: First words of commands to leave out of those shown, such as ``examine``.
        description: ``full`` room texts, or ``brief``: the room's name (exits and things show in the commands).
        reward: ``success`` pays 1 for winning; ``score`` pays each point of the game, scaled to a sum of 1.
        cache_dir: Where games are kept; the user's cache folder unless given.
        num_generators: Processes that generate games; one per CPU unless given.
    """

    def __init__(
        self,
        challenge: Challenge = "coin_collector",
        settings: dict[str, Any] | None = None,
        num_train: int = 100,
        num_valid: int = 100,
        num_test: int = 100,
        max_steps: int = 50,
        show_admissible_commands: bool = True,
        exclude_commands: list[str] | None = None,
        description: Literal["full", "brief"] = "full",
        reward: Literal["success", "score"] = "success",
        cache_dir: str | None = None,
        num_generators: int | None = None,
    ) -> None:
        if challenge not in _DEFAULT_SETTINGS:
            raise ConfigError(f"TextWorldEnv: there is no challenge {challenge!r}, only {', '.join(_DEFAULT_SETTINGS)}")
        defaults = _DEFAULT_SETTINGS[challenge]
        unknown = sorted(set(settings or {}) - set(defaults))
        if unknown:
            raise ConfigError(f"TextWorldEnv: {challenge} has no setting {', '.join(unknown)}; it has {', '.join(defaults)}")
        for name, value in (settings or {}).items():
            allowed = _ALLOWED.get((challenge, name), (False, True))
            if value not in allowed or type(value) is not type(allowed[0]):
                wanted = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
                raise ConfigError(f"TextWorldEnv: {challenge}'s setting {name} must be one of {wanted}, not {value!r}")
        if not 0 <= min(num_train, num_valid, num_test) <= max(num_train, num_valid, num_test) <= _SEEDS_PER_SPLIT:
            raise ConfigError(f"TextWorldEnv: a split holds 0 to {_SEEDS_PER_SPLIT:,} games")
        require_at_least(1, self, num_generators=num_generators, max_steps=max_steps)
        self.challenge = challenge
        self.settings = {**defaults, **(settings or {})}
        self.num_games = {"train": num_train, "valid": num_valid, "test": num_test}
        self.max_steps = max_steps
        self.show_admissible_commands = show_admissible_commands
        self.exclude_commands = tuple(exclude_commands or ())
        self.description = description
        self.reward = reward
        self.num_generators = num_generators
        version = importlib.metadata.version("textworld")
        self.version = f"textworld {version}"
        recipe = json.dumps([challenge, self.settings, version], sort_keys=True)
        root = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "textworld"
        self._folder = root / f"{challenge}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
        self._turns: dict[tuple[int, *tuple[str, ...]], Turn] = {}
        self._game: Any = None
        self._state: Any = None
        self._goal = ""
        self._plans = False
        self._actions: list[str] = []
        self._played = 0

    def tasks(self, split: str) -> list[Task]:
        if split not in _SPLITS:
            raise ConfigError(f"TextWorldEnv has no split {split!r}; it has {', '.join(_SPLITS)}")
        start = _SPLITS.index(split) * _SEEDS_PER_SPLIT
        return [
            Task(f"{self._folder.name}/{seed}", {"seed": seed, "split": split})
            for seed in range(start, start + self.num_games[split])
        ]

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        missing = [task for task in tasks if not self._path(task).exists()]
        if not missing:
            return
        jobs = [(*self._recipe(task), self._path(task)) for task in missing]
        try:
            make_all(_make_game, jobs, self._folder, "TextWorldEnv: cannot write games to", self.num_generators, progress)
        except ConfigError:
            raise
        except Exception as error:  # each challenge has errors of its own
            raise ConfigError(f"TextWorldEnv: no {self.challenge} game from {self.settings}: {error}") from error

    def content(self, task: Task) -> str:
        """The compiled game, but for the day on which it was compiled."""
        path = self._path(task)
        try:
            game = bytearray(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"TextWorldEnv: cannot read the game {path}: {error.strerror}") from None
        length, checksum = (int.from_bytes(game[place : place + 2]) for place in (0x1A, 0x1C))
        summed = int(np.frombuffer(game[_HEADER : 8 * length], dtype=np.uint8).sum(dtype=np.int64))
        if not _HEADER <= 8 * length <= len(game) or summed % 2**16 != checksum:
            raise ConfigError(f"TextWorldEnv: the game {path} is damaged: delete it, and it is made anew")
        game[_SERIAL] = bytes(6)
        return f"{task.id} {hashlib.sha256(game).hexdigest()}"

    def start(self) -> None:
        self._turns = {}  # for all episodes of this process

    def reset(self, task: Task) -> Turn:
        self.close()
        self._task = task
        self._actions = []
        return self._known_or(self._opening)

    def command(self, command: str) -> Turn:
        self._actions.append(command)
        return self._known_or(self._carried_out)

    def expert_action(self) -> str | None:
        """First command of an optimal plan from here. Plans slow the game down, so it makes them from the first call on."""
        if not self._plans:
            self.close()
        self._catch_up(plans=True)
        plan = self._state.policy_commands
        return plan[0] if plan else None

    def _known_or(self, play: Callable[[], Turn]) -> Turn:
        """The turn after this episode's commands; what this process has seen before is not played again."""
        key = self._task.data["seed"], *self._actions
        if key not in self._turns:
            if len(self._turns) >= _MOST_TURNS:
                del self._turns[next(iter(self._turns))]
            self._turns[key] = play()
        return self._turns[key]

    def _opening(self) -> Turn:
        self._catch_up()
        return self._turn(success=False)

    def _carried_out(self) -> Turn:
        command = self._actions[-1]
        self._catch_up(len(self._actions) - 1)
        score_before = self._state.score or 0
        admissible = command in self._state.admissible_commands
        self._catch_up()
        won = bool(self._state.won)
        if self.reward == "success":
            reward = float(won)
        else:
            reward = ((self._state.score or 0) - score_before) / (self._state.max_score or 1)
        terminated = self._done or len(self._actions) == self.max_steps
        return self._turn(reward=reward, terminated=terminated, success=won, action_valid=admissible)

    def _catch_up(self, commands: int | None = None, plans: bool = False) -> None:
        """Has the game where the episode is, or after its first ``commands``."""
        if self._game is None:
            self._start(plans)
        for command in self._actions[self._played : commands]:
            self._state, _, self._done = self._game.step(command)
            self._played += 1

    def _start(self, plans: bool) -> None:
        import textworld

        path = self._path(self._task)
        if not path.exists():  # played outside of a run that prepared its tasks
            self.prepare([self._task], lambda done, total: None)
        wanted = textworld.EnvInfos(
            feedback=True,
            objective=True,
            admissible_commands=True,
            policy_commands=plans,
            won=True,
            score=True,
            max_score=True,
        )
        self._game = textworld.start(str(path), wanted)
        self._state = self._game.reset()
        self._done = False
        self._plans = plans
        self._played = 0
        self._goal = "Find the coin and take it."
        if self.challenge != "coin_collector":
            self._goal = _clean_objective(self._state.objective)

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None

    def _path(self, task: Task) -> Path:
        return self._folder / f"{task.data['seed']}.z8"

    def _recipe(self, task: Task) -> tuple[str, dict[str, Any], int]:
        settings = dict(self.settings)
        if self.challenge == "cooking":
            settings["split"] = task.data["split"]  # foods of the splits differ too
        return self.challenge, settings, task.data["seed"]

    def _turn(self, **outcome: Any) -> Turn:
        text = _clean(self._state.feedback)
        if self.description == "brief" and text.startswith("-= "):
            text = text.split("\n", 1)[0].strip("-= ")
        commands = None
        if self.show_admissible_commands:
            commands = tuple(c for c in self._state.admissible_commands if c.split()[0] not in self.exclude_commands)
        return Turn(text, self._goal, commands, **outcome)
