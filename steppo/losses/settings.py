"""The objective around the policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steppo.errors import require_at_least
from steppo.losses.functional import Aggregation, KLEstimator


@dataclass(frozen=True)
class ObjectiveSettings:
    """How an update's terms are added up, and the terms beside the policy's.

    Attributes:
        aggregation: Mean over the tokens of a step, then over steps; or over all tokens alike.
        vf_coef: Weight of the value loss.
        value_clip: Largest change of a value that counts in one iteration; 0 for plain squared error.
        ent_coef: Weight of the entropy bonus.
        kl: Keep close to the policy as it was before training: not at all, by a loss, or by a penalty in the reward.
        kl_coef: Weight of that.
        kl_estimator: k3 (low variance) or k2 (unbiased gradient); of the loss and of the figure that is logged.
    """

    aggregation: Aggregation = "step-mean"
    vf_coef: float = 1.0
    value_clip: float = 0.5
    ent_coef: float = 0.0
    kl: Literal["none", "loss", "reward"] = "none"
    kl_coef: float = 0.001
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        names = ("vf_coef", "value_clip", "ent_coef", "kl_coef")
        require_at_least(0, self, **{name: getattr(self, name) for name in names})

    @property
    def reward_kl_coef(self) -> float:
        """Of the KL penalty in the reward; 0 without."""
        return self.kl_coef if self.kl == "reward" else 0.0

    def __str__(self) -> str:
        return {
            "none": "no KL",
            "loss": f"KL as a loss ({self.kl_estimator}, {self.kl_coef:g})",
            "reward": f"KL in the reward ({self.kl_coef:g})",
        }[self.kl]
