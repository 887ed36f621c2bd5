"""Who chooses the actions: the policy, by its engine, or a rule, an expert, a human."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import numpy as np

from steppo.types import Completion, Observation, Request

Choose = Callable[[Observation, Request], str]


class NoAction(ValueError):
    """A rule has nothing to go by here."""


class Player(ABC):
    """Gives the action of each step. What it raises costs its episode."""

    @abstractmethod
    async def act(self, request: Request, observation: Observation) -> Completion:
        """Answers the prompt of ``request``, which was made from ``observation`` and what came before it."""


class Generates(Protocol):
    """An engine, as an episode sees it."""

    async def generate(self, request: Request) -> Completion:
        """The engine's answer; also a failed one, with ``error`` set."""


class PolicyPlayer(Player):
    """Has an engine sample each action. It sees the prompt, nothing else."""

    def __init__(self, engine: Generates) -> None:
        self._engine = engine

    async def act(self, request: Request, observation: Observation) -> Completion:
        return await self._engine.generate(request)


class ScriptedPlayer(Player):
    """Follows a rule: demonstrations, tests, baselines. No model is asked.

    Args:
        choose: (observation, request) -> text of the action, in the thread that asks for the episodes.
        encode: Text -> token ids with their stop token, such as ``ContextPolicy.encode_action``.
    """

    def __init__(self, choose: Choose, encode: Callable[[str], np.ndarray]) -> None:
        self._choose = choose
        self._encode = encode

    async def act(self, request: Request, observation: Observation) -> Completion:
        ids = self._encode(self._choose(observation, request))
        return Completion(request.id, ids, np.zeros(len(ids), dtype=np.float32), "stop")


def random_action(observation: Observation, request: Request) -> str:
    """An admissible command, each as likely as the others."""
    commands = observation.admissible_commands
    if not commands:
        raise NoAction("no admissible commands are shown here")
    return random.Random(request.seed).choice(commands)


def expert_action(observation: Observation, request: Request) -> str:
    """What the environment's expert would do; the plan must ask for it (``want_expert``)."""
    if observation.expert_action is None:
        raise NoAction("the environment has no expert here")
    return observation.expert_action
