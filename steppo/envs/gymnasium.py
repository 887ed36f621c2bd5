"""Environments of Gymnasium (https://gymnasium.farama.org) that can be read, and told what to do, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np

from steppo.envs.base import TextGameEnv
from steppo.envs.checks import shown
from steppo.envs.foreign import recorded, require_sizes, require_verdict, seeds, solved
from steppo.errors import ConfigError, WrongValue, said
from steppo.types import Task, Turn

# gymnasium is imported where it is used: it is an extra, and workers of other environments do without.

_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_STYLE = re.compile(r"\x1b\[([\d;:]*)m")
_OTHER_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|[\x00-\x08\x0b-\x1f\x7f]")


class GymnasiumEnv(TextGameEnv):
    """An environment that is registered with Gymnasium. A task is a seed, and train, valid and test never share one.

    Needs ``pip install "steppo[gymnasium]"``. Its actions are a ``Discrete`` space, of which an ``info["action_mask"]`` says
    what is possible, or a ``Text`` one, which takes what it holds: unless it is told otherwise, letters and digits only.
    Gymnasium's time limit truncates.

    Args:
        id: Its id, such as ``FrozenLake-v1``; ``module:Env-v0`` imports the module that registers it.
        kwargs: What ``gymnasium.make`` takes beside the id.
        goal: What the agent is told to do.
        commands: Names of the ``Discrete`` actions, in their order; numbers unless given. Of a ``Text`` space, what to show.
        observation: ``text``: what it observes, which must be text. ``ansi``: the picture that it renders in characters;
            what has a background, such as the agent's place, stands in brackets.
        colours: What colours of characters mean: ``{blue: passenger}`` adds the line ``passenger: R``. Others are dropped.
        success_reward: Return at which an episode is solved; one of at most 0 is compared when the environment ends it.
            ``info["is_success"]`` goes first. Without either there is no verdict.
        num_train: Number of training tasks.
        num_valid: Number of validation tasks.
        num_test: Number of test tasks.
    """

    def __init__(
        self,
        id: str,
        kwargs: dict[str, Any] | None = None,
        goal: str = "",
        commands: list[str] | None = None,
        observation: Literal["text", "ansi"] = "text",
        colours: dict[str, str] | None = None,
        success_reward: float | None = None,
        num_train: int = 100,
        num_valid: int = 100,
        num_test: int = 100,
    ) -> None:
        self.num_tasks = {"train": num_train, "valid": num_valid, "test": num_test}
        require_sizes("GymnasiumEnv", self.num_tasks)
        require_verdict("GymnasiumEnv", success_reward)
        if unknown := sorted(set(colours or {}) - set(_COLOURS)):
            raise ConfigError(f"GymnasiumEnv: colours has no {', '.join(unknown)}, only {', '.join(_COLOURS)}")
        if "render_mode" in (kwargs or {}):
            raise ConfigError("GymnasiumEnv: kwargs cannot hold render_mode: observation sets it")
        self.id = id
        self.kwargs = dict(kwargs or {})
        self.goal = goal
        self.commands = None if commands is None else tuple(commands)
        self.observation = observation
        self.colours = dict(colours or {})
        self.success_reward = success_reward
        self._env: Any = None
        self._return = 0.0
        self._turn = Turn()
        self._actions = self._checked()

    def _checked(self) -> dict[str, int] | None:
        """Makes it once, so that what cannot be played is said before a model is built.

        Returns:
            The action of each command, if they are ``Discrete``.
        """
        try:
            import gymnasium
        except ImportError:
            raise ConfigError('GymnasiumEnv needs Gymnasium: pip install "steppo[gymnasium]"') from None
        try:
            env = gymnasium.make(self.id, **self.kwargs)
            try:
                self._check_observation(env)
                return self._named(env.action_space)
            finally:
                env.close()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"GymnasiumEnv: {self.id} cannot be made: {said(error)}") from None

    def _check_observation(self, env: Any) -> None:
        from gymnasium.spaces import Text

        modes = env.metadata.get("render_modes") or ()
        if self.observation == "ansi":
            if "ansi" not in modes:
                raise ConfigError(f"GymnasiumEnv: {self.id} renders no ansi, only {', '.join(modes) or 'nothing'}")
        elif not isinstance(env.observation_space, Text):  # some give text all the same
            seen, _ = env.reset(seed=0)
            if not isinstance(seen, str):
                hint = "set observation to ansi" if "ansi" in modes else "wrap it in one that does"
                raise ConfigError(f"GymnasiumEnv: {self.id} does not observe text but {shown(seen)}; {hint}")

    def _named(self, space: Any) -> dict[str, int] | None:
        from gymnasium.spaces import Discrete, Text

        given = self.commands
        if isinstance(space, Text):
            if given is not None and (wrong := [name for name in given if "..." not in name and name not in space]):
                raise ConfigError(f"GymnasiumEnv: {self.id} cannot take {shown(wrong[0])} of commands, only {space}")
            return None
        if not isinstance(space, Discrete):
            raise ConfigError(f"GymnasiumEnv: actions of {self.id} must be Discrete or Text, not {type(space).__name__}")
        numbers = range(int(space.start), int(space.start + space.n))
        names = tuple(map(str, numbers)) if given is None else given
        if len(names) != len(numbers):
            raise ConfigError(f"GymnasiumEnv: {self.id} has {len(numbers)} actions, and commands names {len(names)}")
        for name in names:
            if not name.strip() or "..." in name or names.count(name) > 1:
                raise ConfigError(f"GymnasiumEnv: {shown(name)} in commands must be a name of one action, without ...")
        return dict(zip(names, numbers, strict=True))

    def tasks(self, split: str) -> list[Task]:
        return seeds("GymnasiumEnv", self.id.rpartition(":")[2], split, self.num_tasks)

    def start(self) -> None:
        import gymnasium

        gymnasium.spec(self.id)  # imports the module that registers it

    def content(self, task: Task) -> str:
        return Task(task.id, {**task.data, "kwargs": self.kwargs, "success_reward": self.success_reward}).as_text()

    def reset(self, task: Task) -> Turn:
        import gymnasium

        if self._env is None:
            rendering = {"render_mode": "ansi"} if self.observation == "ansi" else {}
            self._env = gymnasium.make(self.id, **(self.kwargs | rendering))
        self._return = 0.0
        return self._said(*self._env.reset(seed=task.data["seed"]))

    def command(self, command: str) -> Turn:
        from gymnasium.error import InvalidAction

        if self._actions is None:
            action: str | int | None = command if command in self._env.action_space else None
        else:
            action = self._actions[command] if command in (self._turn.commands or ()) else None
        if action is None:
            return self._turn.refused(f"{shown(command)} is not possible here.")
        try:
            seen, reward, terminated, truncated, info = self._env.step(action)
        except InvalidAction as error:
            return self._turn.refused(str(error))
        return self._said(seen, info, reward=reward, terminated=terminated, truncated=truncated)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _said(self, seen: Any, info: Mapping[str, Any], **outcome: Any) -> Turn:
        text = self._env.render() if self.observation == "ansi" else seen
        if not isinstance(text, str):
            raise WrongValue(f"the observation of {self.id} must be text, not {shown(text)}")
        self._return += outcome.get("reward", 0.0)
        self._turn = Turn(
            readable(text, self.colours),
            self.goal,
            self._possible(info.get("action_mask")),
            success=self._success(info, ended=any(outcome.get(end) for end in ("terminated", "truncated"))),
            state_key=str(seen) if isinstance(seen, Integral) else None,
            info=recorded(info.items()),
            **outcome,
        )
        return self._turn

    def _possible(self, mask: Any) -> tuple[str, ...] | None:
        """Commands to show."""
        if self._actions is None or mask is None:
            return self.commands if self._actions is None else tuple(self._actions)
        flags = np.ravel(mask)
        if len(flags) != len(self._actions):
            raise WrongValue(f"the action_mask of {self.id} has {len(flags)} entries for {len(self._actions)} actions")
        possible = tuple(name for name, flag in zip(self._actions, flags, strict=True) if flag)
        return possible or tuple(self._actions)  # where nothing is, the agent must still act

    def _success(self, info: Mapping[str, Any], ended: bool) -> bool | None:
        if "is_success" in info:
            return bool(info["is_success"])
        return solved(self._return, self.success_reward, ended)


def readable(picture: str, colours: Mapping[str, str]) -> str:
    """A text for terminals as plain text: what has a background in brackets, then what characters of a colour mean."""
    parts: list[str] = []
    coloured: dict[str, list[str]] = {meaning: [] for meaning in colours.values()}
    marked, colour = False, ""
    for number, piece in enumerate(_STYLE.split(picture)):  # text, style, text, ...
        if number % 2:
            marked, colour = _styled(piece, marked, colour)
            continue
        text = _OTHER_CODES.sub("", piece)
        parts.append(re.sub("[^\n]+", r"[\g<0>]", text) if marked else text)
        if text.strip() and colour in colours:
            coloured[colours[colour]].append(text.strip())
    lines = "".join(parts).split("\n")
    meanings = [f"{meaning}: {', '.join(found)}" for meaning, found in coloured.items() if found]
    return "\n".join(("\n".join(map(str.rstrip, lines)).strip("\n"), *meanings))


def _styled(codes: str, marked: bool, colour: str) -> tuple[bool, str]:
    """Whether there is a background, and which colour, after an escape sequence."""
    numbers = [int(code or 0) for code in re.split("[;:]", codes)]
    while numbers:
        code = numbers.pop(0)
        if code == 0:
            marked, colour = False, ""
        elif code in (7, 48) or 40 <= code <= 47 or 100 <= code <= 107:
            marked = True
        elif code in (27, 49):
            marked = False
        elif 30 <= code <= 39 or 90 <= code <= 97:
            colour = _COLOURS[code % 10] if code % 10 < len(_COLOURS) else ""
        if code in (38, 48):  # followed by a number of 256 colours, or by red, green and blue
            del numbers[: {5: 2, 2: 4}.get(numbers[0] if numbers else 0, 0)]
    return marked, colour
