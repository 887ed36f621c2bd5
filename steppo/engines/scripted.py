"""An engine that follows a rule instead of a model: demonstrations, tests, baselines."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from steppo.engines.base import Engine, failed
from steppo.types import Completion, Request


class ScriptedEngine(Engine):
    """Answers each request with the text that ``choose`` gives.

    Args:
        choose: Request -> text of the action. A request that it raises on fails, as it would in any engine.
        encode: Text -> token ids with their stop token, such as ``ContextPolicy.encode_action``.
    """

    def __init__(self, choose: Callable[[Request], str], encode: Callable[[str], np.ndarray]) -> None:
        self._choose = choose
        self._encode = encode
        self._queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def poll(self) -> list[Completion]:
        queue, self._queue = self._queue, []
        return [self._answer(request) for request in queue]

    def _answer(self, request: Request) -> Completion:
        try:
            ids = self._encode(self._choose(request))
        except Exception as error:
            return failed(request, error)
        return Completion(request.id, ids, np.zeros(len(ids), dtype=np.float32), "stop")


def random_action(request: Request) -> str:
    """An admissible command, each as likely as the others."""
    assert request.observation is not None
    commands = request.observation.admissible_commands
    if not commands:
        raise ValueError("no admissible commands are shown here")
    return random.Random(request.seed).choice(commands)


def expert_action(request: Request) -> str:
    """What the environment's expert would do; the plan must ask for it (``want_expert``)."""
    assert request.observation is not None
    if request.observation.expert_action is None:
        raise ValueError("the environment has no expert here")
    return request.observation.expert_action
