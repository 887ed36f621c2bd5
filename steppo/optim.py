"""Optimizer settings and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from steppo.errors import ConfigError


@dataclass(frozen=True)
class OptimizerSettings:
    """One parameter group of the AdamW.

    Attributes:
        lr: Learning rate after warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are scaled down to this norm, this group's by themselves; 0 leaves them as they are.
        warmup_updates: Updates over which the learning rate rises from 0.
        schedule: What it does after that, until the last update.
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_updates: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"an optimizer's lr must be above 0 and finite, not {self.lr}")
        for name in ("weight_decay", "max_grad_norm", "warmup_updates"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"an optimizer's {name} must be at least 0 and finite, not {getattr(self, name)}")


def learning_rate_factor(settings: OptimizerSettings, total_updates: float) -> Callable[[int], float]:
    """Number of updates done -> factor of the learning rate.

    Args:
        settings: Warm-up and schedule.
        total_updates: Updates of the whole run; infinite when it has no end.

    Raises:
        ConfigError: A schedule that falls has no end to fall to.
    """
    if settings.schedule != "constant" and math.isinf(total_updates):
        raise ConfigError(f"the {settings.schedule} schedule needs trainer.max_epochs")
    warmup = settings.warmup_updates

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        fraction = min(1.0, (done - warmup) / max(1.0, total_updates - warmup))
        return 1 - fraction if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * fraction))

    return factor
