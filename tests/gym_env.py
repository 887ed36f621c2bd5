"""Environments registered with Gymnasium: one in words, and some that cannot be played so."""

from __future__ import annotations

import string
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction


class Guess(gymnasium.Env):
    """Guess a number below 10: too low, too high, right. Says everything that ``info`` may hold, and more.

    Args:
        refuse: A guess that is not accepted.
        verdict: Say ``is_success``.
        observe: What the start looks like.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    action_space = spaces.Text(2, charset=string.digits)
    observation_space: spaces.Space = spaces.Text(100, charset=string.printable + "\x1b")

    def __init__(self, refuse: str = "", verdict: bool = True, observe: Any = "Guess.") -> None:
        self.refuse, self.verdict, self.observe = refuse, verdict, observe

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number, self.guesses = int(self.np_random.integers(10)), 0
        return self.observe, {"success": "no field", "of": np.int64(10)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == self.refuse:
            raise InvalidAction(f"{action} has been guessed before.")
        self.guesses += 1
        guess = int(action)
        said = "right" if guess == self.number else "too low" if guess < self.number else "too high"
        info = {"guesses": self.guesses, "said": said, "array": np.zeros(3), "long": "x" * 999, 7: 1, "nan": float("nan")}
        many = {f"n{number}": number for number in range(99)}
        verdict = {"is_success": np.bool_(said == "right")} if self.verdict else {}
        return f"{said}\x1b[0m", 0.1, said == "right", np.bool_(self.guesses == 12), info | {"episode": {}} | many | verdict


class Plain(Guess):
    """Text, though its space does not say so."""

    observation_space = spaces.Discrete(1)


class Masked(Guess):
    """Numbers from 5; those not above the last one are not possible. Its mask may be too long, or leave nothing."""

    action_space = spaces.Discrete(3, start=5)

    def reset(self, **how: Any) -> tuple[str, dict[str, Any]]:
        super().reset(**how)
        return "Climb.", {"action_mask": [True, True, False]}

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert type(action) is int
        mask = {5: np.array([0, 1, 1], np.int8), 6: [0, 0, 0], 7: [1] * 4}[action]
        return f"at {action}", 0.1, False, False, {"action_mask": mask}


class Boxed(Guess):
    """Acts by numbers between."""

    action_space = spaces.Box(0, 1)


class Broken(Guess):
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no\nlicence")


for kind in (Guess, Plain, Masked, Boxed, Broken):
    gymnasium.register(f"{kind.__name__}-v0", kind)
