"""What a policy loss must offer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """All that a policy loss may look at: the action tokens of a microbatch, those of a step together.

    Attributes:
        logprobs_A: float, of the policy as it is now; the gradient flows here only.
        old_logprobs_A: float, of the policy when the iteration started.
        behaviour_logprobs_A: float, of the policy that sampled, as its engine computed them.
        advantage_A: float, a step's advantage at each of its tokens, or the tokens' own.
        step_of_A: int64 in [0, num_steps), the step of each token.
        num_steps: N.
        weight_A: float, what each token's loss will be multiplied by (``token_weights``, a correction's weights). A loss
            need not do so itself.
    """

    logprobs_A: Tensor
    old_logprobs_A: Tensor
    behaviour_logprobs_A: Tensor
    advantage_A: Tensor
    step_of_A: Tensor
    num_steps: int
    weight_A: Tensor


@dataclass(frozen=True)
class LossOutput:
    """What a policy loss gives.

    Attributes:
        loss_A: float, to be minimised, of each token and without its weight.
        ratio_A: float, the importance ratio; detached.
        clipped_A: bool, outside the trust region; detached.
    """

    loss_A: Tensor
    ratio_A: Tensor
    clipped_A: Tensor


class PolicyLoss(ABC):
    """The policy's part of the objective, token by token. Pure: no rank, no model, no weights of its own.

    One file and one config each. The learner weighs the tokens, adds them up and divides by the size of the update, so that
    no loss depends on how an update is split into microbatches.
    """

    @property
    def clip_range(self) -> float:
        """Smallest distance from 1 at which a ratio is clipped; infinite where none is."""
        return math.inf

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The losses of a microbatch's tokens."""

    def __str__(self) -> str:
        """What it is, in a few words, for the terminal."""
        return type(self).__name__
