"""What Lightning and its optimizers keep, and steppo must set right when a run starts or goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from steppo.errors import ConfigError
from steppo.learner.optim import OptimizerSettings


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives an Adam of sharded weights its state: torch would do so when a checkpoint is saved, and count that as a step.

    Raises:
        ConfigError: It is no Adam.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise ConfigError(f"model.optimizer: sharded weights need torch.optim.AdamW, not {type(optimizer).__name__}")
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            zeros = {name: torch.zeros_like(parameter) for name in names}
            step = torch.tensor(0.0, device=parameter.device if on_device else None)
            optimizer.state[parameter] = {"step": step, **zeros}


def take_settings(optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: Sequence[OptimizerSettings]) -> None:
    """Settings win over what a checkpoint brought back, group by group; the schedule goes on where it was."""
    groups = list(zip(optimizer.param_groups, settings, strict=False))
    schedule.base_lrs = [own.lr for _, own in groups]
    for (group, own), factor in zip(groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = own.lr
        group["lr"] = own.lr * factor(schedule.last_epoch)
        group["weight_decay"] = own.weight_decay


def start_next_iteration(checkpoint: dict[str, Any], iterations: int) -> None:
    """Wherever in Lightning's loops a checkpoint was written, the run goes on with the start of the next iteration."""
    loops = checkpoint["loops"]["fit_loop"]
    over = dict.fromkeys(("ready", "started", "processed", "completed"), iterations)
    loops["epoch_progress"] = {"total": over, "current": dict(over)}
    loops["epoch_loop.batch_progress"]["current"] = dict.fromkeys(over, 0)
