"""Off-policy corrections: weights for actions that another policy sampled than the one the iteration starts from.

They differ where sampling ran ahead of learning, and a little wherever an engine computes in other numbers than the learner.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steppo.distributed import gather
from steppo.errors import ConfigError
from steppo.losses import log_ratios

Level = Literal["token", "step", "episode"]
_MAX_LOG_PRODUCT = 50.0  # exp() of it, squared and summed, is finite


@dataclass(frozen=True)
class CorrectionInputs:
    """What a correction may look at: all action tokens of this rank's iteration, those of a step together.

    Attributes:
        behaviour_logprobs_A: float, of the policy that sampled, as its engine computed them.
        old_logprobs_A: float, of the policy when the iteration starts.
        step_of_A: int64 in [0, num_steps), the step of each token.
        num_steps: N.
        episode_of_N: int64 from 0, the episode of each step.
    """

    behaviour_logprobs_A: Tensor
    old_logprobs_A: Tensor
    step_of_A: Tensor
    num_steps: int
    episode_of_N: Tensor

    def ratios(self, level: Level) -> Tensor:
        """``pi_old / behaviour`` of each token [A]: its own, or the geometric mean over its step's or episode's tokens."""
        pair = self.old_logprobs_A, self.behaviour_logprobs_A
        if level == "episode":
            episodes = int(self.episode_of_N.max()) + 1 if self.num_steps else 0
            return log_ratios(*pair, self.episode_of_N[self.step_of_A], episodes, "step").exp()
        return log_ratios(*pair, self.step_of_A, self.num_steps, level).exp()


class Weights(NamedTuple):
    """``weight_A``: float, multiplies a token's loss. ``keep_A``: bool, whether it is learned from at all."""

    weight_A: Tensor
    keep_A: Tensor


class Correction(ABC):
    """Log-probabilities of two policies -> weights. Pure.

    What is not kept has weight 0 in the losses of policy and critic. It stays in credit, in whitening and group statistics,
    and in the number that losses are divided by, so that the other steps weigh what they would weigh without it.

    Attributes:
        needs_old_logprobs: Whether weights depend on them; else they may be NaN, where they are not known yet.
        old_is_behaviour: Take the sampler's log-probabilities for the old ones: they are not computed.
    """

    needs_old_logprobs: bool = True
    old_is_behaviour: bool = False

    @abstractmethod
    def __call__(self, inputs: CorrectionInputs) -> Weights:
        """The weights of action tokens."""


class NoCorrection(Correction):
    """Weight 1 for all: the policies are taken for one."""

    needs_old_logprobs = False

    def __call__(self, inputs: CorrectionInputs) -> Weights:
        ones_A = torch.ones_like(inputs.old_logprobs_A)
        return Weights(ones_A, ones_A.bool())


class Bypass(NoCorrection):
    """The loss's own ratio is to the policy that sampled, not to the one that the iteration starts from.

    One trust region for both: how far sampling ran ahead, and how far updates go. It saves the pass for old
    log-probabilities, and trusts those of the engine.
    """

    old_is_behaviour = True


class ImportanceCorrection(Correction):
    """Truncated importance weights ``min(w, cap)``, ``w = pi_old / behaviour``; what is too far off is not kept.

    With ``level: step`` all tokens of a step have the geometric mean of their ratios, as in StepPO's own ratio: it does not
    grow with the length of an action, is biased, and corrects mildly. With ``token`` each has its own. Beside a loss that
    clips ``pi / pi_old`` this is decoupled PPO (Hilton et al., 2022), with ``pi_old`` as the proximal policy.
    ``docs/asynchronous.md`` has the equations.

    Args:
        level: One weight per step, or per token, or per episode; with ``none`` all are 1.
        cap: Largest weight.
        keep_low: Tokens (steps, episodes) whose ratio is below this are not kept.
        keep_high: Nor those above this.
        keep_level: Whose ratios these are; as ``level`` unless given.
    """

    def __init__(
        self,
        level: Literal["token", "step", "episode", "none"] = "step",
        cap: float = 2.0,
        keep_low: float = 0.0,
        keep_high: float = math.inf,
        keep_level: Level | None = None,
    ) -> None:
        if not 0 < cap < math.inf:
            raise ConfigError(f"ImportanceCorrection: cap must be above 0 and finite, not {cap}")
        if not 0 <= keep_low <= 1 <= keep_high:
            raise ConfigError(
                f"ImportanceCorrection: keep_low must be from 0 to 1, and keep_high at least 1, not {keep_low}, {keep_high}"
            )
        if level == "none" and keep_level is None:
            raise ConfigError(
                "ImportanceCorrection: with level none, say whose ratios keep_low and keep_high are: keep_level"
            )
        self.level = level
        self.cap = cap
        self.keep_low = keep_low
        self.keep_high = keep_high
        self.keep_level = keep_level

    def __call__(self, inputs: CorrectionInputs) -> Weights:
        ones_A = torch.ones_like(inputs.old_logprobs_A)
        ratio_A = ones_A if self.level == "none" else inputs.ratios(self.level)
        kept_A = ratio_A if self.keep_level is None else inputs.ratios(self.keep_level)
        return Weights(ratio_A.clamp(max=self.cap), (kept_A >= self.keep_low) & (kept_A <= self.keep_high))


def weight_figures(weights: Weights, inputs: CorrectionInputs) -> dict[str, float]:
    """How much the weights tell, over all ranks, of which all must ask.

    Effective sample sizes are ``(sum w)^2 / (N sum w^2)`` over steps. That of the weights says what they cost. That of the
    products of a step's token ratios, which no weight here is, says how far the policies are from each other.
    """
    log_A = (inputs.old_logprobs_A - inputs.behaviour_logprobs_A).double()
    of_step_N = log_A.new_zeros(inputs.num_steps)
    product_N = of_step_N.index_add(0, inputs.step_of_A, log_A).clamp(-_MAX_LOG_PRODUCT, _MAX_LOG_PRODUCT).exp()
    length_N = torch.bincount(inputs.step_of_A, minlength=inputs.num_steps)
    used_A = (weights.weight_A * weights.keep_A).double()
    weight_N = of_step_N.index_add(0, inputs.step_of_A, used_A) / length_N
    sums = [weight_N.sum(), weight_N.square().sum(), product_N.sum(), product_N.square().sum(), weights.keep_A.sum()]
    parts = gather([*map(float, sums), inputs.num_steps, len(weights.keep_A)])
    weight, weight_2, product, product_2, kept, steps, tokens = (sum(column) for column in zip(*parts, strict=True))
    return {
        "correction_kept": kept / tokens,
        "correction_ess": weight**2 / (steps * weight_2) if weight_2 else 0.0,
        "correction_ess_product": product**2 / (steps * product_2),
    }
