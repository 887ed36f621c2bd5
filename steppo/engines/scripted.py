"""An engine that follows a rule instead of a model: demonstrations, tests, baselines."""

from __future__ import annotations

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
