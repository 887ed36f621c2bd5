"""Who chooses the actions: the policy, by its engine, or a rule, an expert, a human."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Protocol

import numpy as np

from steppo.rendering import is_open
from steppo.types import Action, Completion, Request, Turn

Choose = Callable[[Turn, Request], str | Action]


class NoAction(ValueError):
    """A rule has nothing to go by here."""


class Player(ABC):
    """Gives the action of each step. What it raises costs its episode."""

    @abstractmethod
    async def act(self, request: Request, turn: Turn) -> Completion:
        """Answers the prompt of ``request``, which was made from ``turn`` and what came before it."""


class Generates(Protocol):
    """An engine, as an episode sees it."""

    async def generate(self, request: Request) -> Completion:
        """The engine's answer; also a failed one, with ``error`` set."""


class PolicyPlayer(Player):
    """Has an engine sample each action. It sees the prompt, nothing else.

    Asked again while its answer is refused, it acts by its own distribution over the answers that are not. What is learned
    from is the plain log-probability of the last one. A refused answer leaves the state as it is and costs nothing, so it
    would have advantage 0: where values are exact this is the gradient, else it also moves how often answers are refused.

    Args:
        engine: Samples.
        draws: Most answers at a step; the last one counts, whatever it is.
        is_refused: Whether an answer can be nothing on seeing this turn.
    """

    def __init__(
        self, engine: Generates, draws: int = 1, is_refused: Callable[[Completion, Turn], bool] = lambda *seen: False
    ) -> None:
        self._engine = engine
        self._draws = draws
        self._is_refused = is_refused

    async def act(self, request: Request, turn: Turn) -> Completion:
        completion = await self._engine.generate(request)
        for number in range(1, self._draws if request.sampling.temperature else 1):
            if completion.error or not self._is_refused(completion, turn):
                break
            seed = int.from_bytes(blake2b(f"{request.seed}|{number}".encode(), digest_size=8).digest(), "little")
            completion = await self._engine.generate(replace(request, seed=seed))
        return completion


class ScriptedPlayer(Player):
    """Follows a rule: demonstrations, tests, baselines. No model is asked.

    Args:
        choose: (turn, request) -> an action, or a command, in the thread that asks for the episodes.
        write: (action, turn) -> token ids with their stop token, such as ``EnvSource.write``.
    """

    def __init__(self, choose: Choose, write: Callable[[Action, Turn], np.ndarray]) -> None:
        self._choose = choose
        self._write = write

    async def act(self, request: Request, turn: Turn) -> Completion:
        chosen = self._choose(turn, request)
        ids = self._write(Action(chosen) if isinstance(chosen, str) else chosen, turn)
        return Completion(request.id, ids, np.zeros(len(ids), dtype=np.float32), "stop")


class WanderingPlayer(ScriptedPlayer):
    """Follows a rule, but now and then does something random: what the rule would do is kept, for every step.

    Demonstrations that never err do not show how to come back, nor where else to look (Ross et al., 2011; Laskey et al.,
    2017). It says what was a command at some time of the episode, and may be refused.

    Args:
        choose: As of ``ScriptedPlayer``.
        write: As of ``ScriptedPlayer``.
        detours: Chance of a random command at a step: each episode has its own, between 0 and this.
        seed: Of these chances.

    Attributes:
        advice: Episode -> what the rule would do at each of its steps, token ids.
    """

    def __init__(self, choose: Choose, write: Callable[[Action, Turn], np.ndarray], detours: float, seed: int) -> None:
        super().__init__(choose, write)
        self._detours = detours
        self._seed = seed
        self._shown: dict[str, dict[str, None]] = {}  # commands, by episode
        self.advice: dict[str, list[np.ndarray]] = {}

    async def act(self, request: Request, turn: Turn) -> Completion:
        episode = request.session_id
        right = await super().act(request, turn)
        self.advice.setdefault(episode, []).append(right.action_ids)
        shown = self._shown.setdefault(episode, {})
        shown |= dict.fromkeys(command for command in turn.commands or () if not is_open(command))
        chance = self._detours * random.Random(f"{self._seed}|{episode}").random()
        dice = random.Random(f"detour|{request.seed}")
        if shown and dice.random() < chance:
            ids = self._write(Action(dice.choice(list(shown))), turn)
            return Completion(request.id, ids, np.zeros(len(ids), dtype=np.float32), "stop")
        return right


def random_action(turn: Turn, request: Request) -> str:
    """One of the commands that are shown, each as likely as the others; never an open one."""
    commands = [command for command in turn.commands or () if not is_open(command)]
    if not commands:
        raise NoAction("no commands are shown here")
    return random.Random(request.seed).choice(commands)


def expert_action(turn: Turn, request: Request) -> Action:
    """What the environment's expert would do; the plan must ask for it (``want_expert``)."""
    if turn.expert_action is None:
        raise NoAction("the environment has no expert here")
    return turn.expert_action
