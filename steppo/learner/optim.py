"""Optimizer settings, learning-rate schedules, and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from steppo.errors import ConfigError


@dataclass(frozen=True)
class OptimizerSettings:
    """One parameter group of the AdamW.

    Attributes:
        lr: Learning rate after warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are scaled down to this norm, this group's by themselves; 0 leaves them as they are.
        warmup_updates: Updates of this group over which the learning rate rises from 0.
        schedule: What it does after that, until the last update of ``trainer.max_epochs``.
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


def learning_rate_schedule(settings: OptimizerSettings, planned: float, alone: int = 0) -> Callable[[int], float]:
    """Number of updates done -> factor of the learning rate.

    Args:
        settings: Warm-up and schedule.
        planned: Updates of the whole run; infinite without an end.
        alone: Updates at the start of the run in which the group takes no part: its own begin after them.

    Raises:
        ConfigError: A schedule that falls has no end to fall to.
    """
    if settings.schedule != "constant" and math.isinf(planned):
        raise ConfigError(f"the {settings.schedule} schedule needs trainer.max_epochs, at which it ends")
    warmup = settings.warmup_updates

    def factor(done: int) -> float:
        own = max(0, done - alone)
        if own < warmup:
            return (own + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        fraction = min(1.0, (own - warmup) / max(1.0, planned - alone - warmup))
        return 1 - fraction if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * fraction))

    return factor


def clip_and_step(
    optimizer: Any, settings: Sequence[OptimizerSettings], resting: str | None = None
) -> dict[str, Tensor] | None:
    """Clips each group by itself and steps, unless a gradient is not finite (a non-finite loss makes them so).

    Args:
        optimizer: Its groups have a ``name``.
        settings: Of each group.
        resting: Group that is left as it is.

    Returns:
        The norms of the groups' gradients before clipping, detached; ``None`` if the weights are as they were.
    """
    norms: dict[str, Tensor] = {}
    for group, own in zip(optimizer.param_groups, settings, strict=False):
        if group["name"] == resting:
            for parameter in group["params"]:
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(group["params"], own.max_grad_norm or math.inf)
        norms[group["name"]] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()
    finite = all(bool(torch.isfinite(norm)) for norm in norms.values())
    if not finite:  # without gradients a step changes nothing, and is counted
        optimizer.zero_grad()
    optimizer.step()
    return {name: norm for name, norm in norms.items() if name != resting} if finite else None
