"""What Lightning keeps for a run: figures, seconds, counters, checkpoints, the state of its loops and optimizers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import LambdaLR

from steppo.checkpoints import require_identity
from steppo.datamodule import StepDataModule
from steppo.distributed import require_equal
from steppo.errors import ConfigError
from steppo.learner import OptimizerSettings
from steppo.models import Policy
from steppo.rng import rng_state, set_rng_state


@dataclass
class Counters:
    """How far the run is, over all ranks: iterations begun, updates done, episodes and environment steps learned from."""

    iterations: int = 0
    updates: int = 0
    episodes: int = 0
    environment_steps: int = 0
    skipped_updates: int = 0


class RunModule(pl.LightningModule):
    """A module whose run is counted, timed, logged by iteration and continued exactly.

    Attributes:
        counters: How far it is.
        skipped_in_a_row: Updates just skipped.
        identity: What its checkpoints belong to, once the models are built.
        latest: The figures of the iteration.
        seconds: Spent in each phase of the run.
    """

    policy: Policy

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.counters = Counters()
        self.skipped_in_a_row = 0
        self.identity: dict[str, Any] = {}
        self.latest: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._phase_seconds: dict[str, float] = {}

    @property
    def data(self) -> StepDataModule:
        """The run's datamodule."""
        return cast(StepDataModule, cast(Any, self.trainer).datamodule)

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision {self.trainer.precision} would round log-probabilities and advantages; "
                "use 32-true, 64-true or bf16-mixed"
            )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation callback plays the panel when the validation epoch starts."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, likewise."""

    # ---- figures ----

    def report(self, metrics: dict[str, float]) -> None:
        """Logs figures of this iteration, already added up over ranks, and keeps them for whoever shows them."""
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self.latest |= metrics

    def report_iteration(self, metrics: dict[str, float]) -> None:
        """Logs an iteration's last figures, its counters and seconds; loggers count updates on their x axis."""
        counters = {name: float(count) for name, count in vars(self.counters).items()}
        self.report({f"train/{name}": value for name, value in (metrics | counters).items()})
        self.report({f"seconds/{name}": spent for name, spent in self._phase_seconds.items()})
        self.log("step", float(self.counters.updates), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._phase_seconds = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds to the seconds of a phase: of this iteration and of the run."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + spent

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the checkpoint does not fit the config's model: {reason}") from error
        missing = [name for name in found.missing_keys if not self._is_base_weight(name)]
        if missing or found.unexpected_keys:
            names = ", ".join([*missing, *found.unexpected_keys][:3])
            raise ConfigError(f"the checkpoint does not fit the config's model: it lacks or adds {names}")
        return found

    def _is_base_weight(self, name: str) -> bool:
        return name.startswith("policy.") and self.policy.is_base_weight(name)

    def take(self, checkpoint: dict[str, Any]) -> None:
        """Takes weights and tokenizer of a checkpoint, once the models are built; a trainer does so by itself."""
        require_identity(checkpoint, self.identity)
        self.load_state_dict(checkpoint["state_dict"], strict=self.strict_loading)
        if checkpoint["steppo"]["tokenizer"]:  # else it is the base model's
            self.policy.load_tokenizer_state(checkpoint["steppo"]["tokenizer"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "steppo" in checkpoint:  # of an earlier checkpoint: this one is taken within an iteration
            return
        checkpoint["state_dict"] = {
            name: weight for name, weight in checkpoint["state_dict"].items() if not self._is_base_weight(name)
        }
        checkpoint["steppo"] = {
            "counters": dict(vars(self.counters)),
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": dict(self.seconds),
            "tokenizer": self.policy.tokenizer_state(),
            "belongs_to": self.identity,
            "rng": rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["steppo"]
        if self.trainer.training and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint holds weights only: it can be evaluated, not continued")
        require_identity(checkpoint, self.identity)
        require_equal({"checkpoint": [state["counters"], self.identity]})
        self.counters = Counters(**state["counters"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.seconds = dict(state["seconds"])
        if state["tokenizer"]:
            self.policy.load_tokenizer_state(state["tokenizer"])
            self.data.source.bind(self.policy)
        set_rng_state(state["rng"])
        start_next_iteration(checkpoint, self.counters.iterations)


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
