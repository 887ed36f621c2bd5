"""What an inference engine must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from steppo.errors import said
from steppo.types import Completion, Request

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy


def failed(request: Request, error: Exception) -> Completion:
    """The answer to a request that could not be served."""
    nothing = np.zeros(0, dtype=np.int32)
    return Completion(request.id, nothing, nothing.astype(np.float32), "stop", said(error))


class Engine(ABC):
    """Samples actions, in ticks: requests are submitted between any two of them, and ``poll`` is one.

    ``EnvSource`` makes these calls and ``release`` in a thread of their own (``EngineThread``), one at a time; gradients are
    off there, and precision and number of threads as in the main thread.

    A request that cannot be served is a ``Completion`` with an ``error`` (see ``failed``). An exception out of ``submit``
    costs the request's episode; one out of ``poll`` costs those of all requests under way, and what comes later for them is
    ignored. So does silence: more ticks in a row without a completion than all requests under way may have tokens together.

    Attributes:
        logprob_tolerance: Largest difference to the learner's log-probabilities that is no cause for worry.
        join_share: While requests are under way, others join once so large a share of the episodes has something to ask.
    """

    logprob_tolerance: float = 1e-4
    join_share: float = 0.0

    def bind(self, policy: Policy) -> None:
        """Takes the policy before the first request. Engines of other processes take only what they need to start."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queues a request; it joins in at the next tick, or later where there is no room yet."""

    @abstractmethod
    def poll(self) -> list[Completion]:
        """One tick: the completions that are done by it.

        An engine in this process makes one token of each request under way and may give nothing. One that lives elsewhere
        waits until at least one completion is there. Only called while a request is under way.
        """

    def release(self, session_id: str) -> None:
        """An episode is over: what is cached or still queued for it may go."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the learner's weights, ``Policy.inference_weights``. Engines that share them have nothing to do."""

    def rest(self) -> None:
        """The rollouts are over for now: memory that the learner could use may go. New weights or requests end it."""

    def counts(self) -> Counter[str]:
        """What happened to it so far, always under the same names; logged by iteration."""
        return Counter()

    def close(self) -> None:
        """Frees what the engine holds."""
