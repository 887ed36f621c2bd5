"""The LightningModule: policy, step critic, credit and loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from steppo.advantages import Advantage
from steppo.buffer import Scores, StepBuffer
from steppo.checkpoints import read, require_identity
from steppo.datamodule import StepDataModule
from steppo.distributed import average_gradients, gather, rank_and_world, require_equal, shard, unsharded
from steppo.errors import ConfigError, RunError
from steppo.learner import Correction, Figures, NoCorrection, UpdateLoss
from steppo.learner.credit import assign_credit
from steppo.learner.optim import Horizon, OptimizerSettings, learning_rate_schedule
from steppo.learner.scoring import score
from steppo.lightning_state import fill_state, start_next_iteration, take_settings
from steppo.losses import ClippedLoss, ObjectiveSettings, PolicyLoss
from steppo.models import Critic, Policy
from steppo.models.adapters import LoRASettings
from steppo.models.identity import fingerprint, identity
from steppo.models.policy import AdapterView
from steppo.rng import rng_state, set_rng_state
from steppo.types import Episode, Microbatch


@dataclass
class Counters:
    """How far the run is, over all ranks: iterations begun, updates done, episodes and environment steps learned from."""

    iterations: int = 0
    updates: int = 0
    episodes: int = 0
    environment_steps: int = 0
    skipped_updates: int = 0


class AgentModule(pl.LightningModule):
    """Trains a policy, and a critic if the credit scheme wants values, from the steps in the datamodule's buffer.

    An iteration: the rollout callback fills the buffer, all steps are scored once, credit is assigned over all ranks, and
    the loader replays the buffer as updates of one optimizer step each.

    Args:
        policy: The language model.
        advantage: Credit scheme; it alone decides whether and where a critic is read.
        critic: Where values come from; needed exactly if the scheme wants values.
        loss: The policy's part of the objective; the clipped loss with a ratio per step unless given.
        objective: How terms are added up, and the value, entropy and KL terms.
        correction: Importance weights of what another policy sampled; none unless given.
        optimizer: Class of the optimizer, such as ``bitsandbytes.optim.AdamW8bit``; rates come from the groups' settings.
        policy_optimizer: For the policy's parameters.
        critic_optimizer: For the critic's.
        critic_warmup_updates: First updates, in which only the critic learns.
        max_skipped_updates: Stop after so many non-finite updates in a row.
    """

    def __init__(
        self,
        policy: Policy,
        advantage: Advantage,
        critic: Critic | None = None,
        loss: PolicyLoss = lazy_instance(ClippedLoss),
        objective: ObjectiveSettings = ObjectiveSettings(),
        correction: Correction = lazy_instance(NoCorrection),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        policy_optimizer: OptimizerSettings = OptimizerSettings(),
        critic_optimizer: OptimizerSettings = OptimizerSettings(lr=1e-5),
        critic_warmup_updates: int = 0,
        max_skipped_updates: int = 5,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if critic_warmup_updates < 0 or max_skipped_updates < 1:
            raise ConfigError("AgentModule: critic_warmup_updates must be at least 0 and max_skipped_updates at least 1")
        if advantage.needs_values != "none" and critic is None:
            raise ConfigError(f"{type(advantage).__name__} needs values: give the model a critic, such as SharedCritic")
        self.policy = policy
        self.advantage = advantage
        self.critic = critic if advantage.needs_values != "none" else None
        self.reference: Policy | AdapterView | None = None
        self.lora: LoRASettings | None = None
        self.gradient_checkpointing = False
        self.begins_from: Path | None = None  # Lightning's trainer knows the checkpoint only after models are built
        self.identity: dict[str, Any] = {}
        self.loss = loss
        self.objective = objective
        self.correction = correction
        self.optimizer = optimizer
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.critic_warmup_updates = critic_warmup_updates
        self.max_skipped_updates = max_skipped_updates
        self.max_environment_steps: int | None = None
        self.counters = Counters()
        self.latest: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._phase_seconds: dict[str, float] = {}
        self.figures = Figures(torch.zeros(0), torch.zeros(0))
        self._skipped_in_a_row = 0

    # ---- set-up ----

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

    def configure_model(self) -> None:
        """Builds the models (once) and hands the policy to the episode source."""
        if self.policy.model is None:
            self.build_models(self.data.tokenizer_texts)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                if self.begins_from is not None:  # of sharded weights nobody would check whether they fit
                    checkpoint = read(self.begins_from, mmap=True)
                    require_identity(checkpoint, self.identity)
                    self.load_state_dict(checkpoint["state_dict"], strict=self.strict_loading)
                blocks = self.policy.blocks
                for module in self._models():
                    shard(module, blocks, self.trainer.strategy.root_device.type)
        self.data.source.bind(self.policy)

    def build_models(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        """Makes the weights: policy, critic, reference. ``tokenizer_texts`` as for ``Policy.build``."""
        self.policy.build(tokenizer_texts)
        if self.lora is not None:
            self.policy.add_lora(self.lora)
            self.strict_loading = False  # a checkpoint does not hold the frozen base
        if self.gradient_checkpointing:
            self.policy.checkpoint_layers()
        if self.critic is not None:
            self.critic.build(self.policy)
        if self.objective.kl != "none":
            self.reference = self.policy.frozen_copy()
        self.identity = identity(self.policy) | {"critic_reads": self.advantage.needs_values}
        if rank_and_world()[1] > 1:
            tokenizer = self.policy.tokenizer_state() + self.identity["tokenizer"]
            require_equal({"initial weights": fingerprint(self), "tokenizer": tokenizer, "model config": self.identity})

    def _models(self) -> list[nn.Module]:
        return [module for module in (self.policy, self.critic, self.reference) if isinstance(module, nn.Module)]

    def policy_was_initialised(self) -> None:
        """The policy was changed before training (a warm start): what is a copy of it follows."""
        if self.reference is not None:
            self.reference.copy_weights_from(self.policy)
        if self.critic is not None:
            self.critic.copy_weights_from(self.policy)

    def configure_optimizers(self) -> Any:
        groups = [("policy", self.policy.trained_parameters(), self.policy_optimizer)]
        if self.critic is not None:
            groups.append(("critic", self.critic.trained_parameters(), self.critic_optimizer))
        parameter_groups = [
            {"name": name, "params": parameters, "lr": settings.lr, "weight_decay": settings.weight_decay}
            for name, parameters, settings in groups
        ]
        try:
            optimizer = self.optimizer(parameter_groups)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.optimizer: {error}; it must take parameter groups, as torch.optim.AdamW") from error
        epochs = self.trainer.max_epochs
        self.horizon = Horizon(
            math.inf if epochs is None or epochs < 0 else epochs * self.data.updates_per_iteration,
            self.data.updates_per_iteration,
            self.max_environment_steps,
        )
        alone = self.critic_warmup_updates if self.critic is not None else 0
        schedules = [
            learning_rate_schedule(settings, self.horizon, alone if name == "policy" else 0) for name, _, settings in groups
        ]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)]

    def on_train_start(self) -> None:
        """Settings win over what a checkpoint brought back: a resumed run takes its learning rates from the config."""
        self.horizon.begin(self.counters.updates, self.counters.environment_steps, 0)
        optimizer, schedule = self.trainer.optimizers[0], cast(Any, self.lr_schedulers())
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fill_state(optimizer)
        take_settings(optimizer, schedule, (self.policy_optimizer, self.critic_optimizer))

    # ---- the start of an iteration: scores and credit ----

    def on_train_epoch_start(self) -> None:
        buffer = self.data.buffer
        with self.timed("score"):
            with self.inference_context():
                buffer.scores = self._score(buffer)
            steps = assign_credit(buffer, self.advantage, self.objective.reward_kl_coef)
        buffer.ratio_N, buffer.clipped_N = buffer.ratio_N.to(self.device), buffer.clipped_N.to(self.device)
        if steps.logprob_mismatch > self.data.source.logprob_tolerance:
            rank_zero_warn(
                f"the sampler's log-probabilities are up to {steps.logprob_mismatch:.2g} off the learner's, more than its "
                f"tolerance of {self.data.source.logprob_tolerance:.2g}: what is sampled is not quite what is learned"
            )
        self.data.global_steps = steps
        self.figures = Figures(buffer.ratio_N, buffer.clipped_N)
        self.horizon.begin(self.counters.updates, self.counters.environment_steps, len(steps.batch.length_N))
        self.counters.iterations += 1
        self.counters.environment_steps += len(steps.batch.length_N)
        self.counters.episodes += len(steps.batch.terminated_E)
        self.report(steps.statistics())

    def score_episodes(self, episodes: Sequence[Episode]) -> StepBuffer:
        """Scores episodes that are not learned from, and assigns credit among them; training does not notice.

        All ranks must take part, each with its share of the episodes (or none). Without credit if the scheme compares the
        episodes of a task, which nobody promises here, or if there is not one step.
        """
        buffer = self.data.buffer.empty()
        buffer.fill(episodes)
        with self.inference_context():
            buffer.scores = self._score(buffer)
        if not self.advantage.needs_groups and any(gather(len(buffer.steps))):
            assign_credit(buffer, self.advantage, self.objective.reward_kl_coef)
        return buffer

    def _score(self, buffer: StepBuffer) -> Scores:
        values = self.advantage.needs_values
        return score(buffer, self.policy, self.reference, self.critic, values, self.correction)

    # ---- updates ----

    def training_step(self, batch: list[Microbatch], batch_idx: int) -> None:
        """One update: all its microbatches forward and backward, then one optimizer step."""
        loss = UpdateLoss(self.policy, self.critic, self.advantage.needs_values, self.loss, self.objective)
        with self.timed("update"), self.figures.update() as keep:
            optimizer = cast(torch.optim.Optimizer, self.optimizers())
            optimizer.zero_grad()
            strategy = self.trainer.strategy
            for microbatch in batch:
                factor = microbatch.scale * self.trainer.world_size  # gradients are averaged over ranks
                # Once, in `_step`: DDP's hooks would wait for parameters that a pass leaves out.
                with strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext():
                    for part in loss.parts(microbatch, self.figures, policy_learns=not self._critic_warmup):
                        self.manual_backward(part * factor)
            if self._step(optimizer):
                keep()

    def _step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Clips each group by itself and steps, unless a gradient is not finite (a non-finite loss makes them so).

        Returns whether it stepped.
        """
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):  # which averages in the backward pass
            average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
        norms: dict[str, Tensor] = {}
        for group, settings in zip(optimizer.param_groups, (self.policy_optimizer, self.critic_optimizer), strict=False):
            if group["name"] == "policy" and self._critic_warmup:
                for parameter in group["params"]:
                    parameter.grad = None
            norm = nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm or math.inf)
            norms[group["name"]] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = all(bool(torch.isfinite(norm)) for norm in norms.values())
        if finite:
            optimizer.step()
            self._skipped_in_a_row = 0
            for name, norm in norms.items():
                if name != "policy" or not self._critic_warmup:
                    self.figures.add(f"grad_norm_{name}", norm.detach() / self.trainer.world_size)
        else:
            # Lightning counts updates by optimizer steps: without gradients this one changes nothing.
            optimizer.zero_grad()
            optimizer.step()
            self._skipped_in_a_row += 1
            self.counters.skipped_updates += 1
            if self._skipped_in_a_row >= self.max_skipped_updates:
                raise RunError(
                    f"{self._skipped_in_a_row} updates in a row had non-finite gradients; lower the learning rate, "
                    "max_grad_norm or clip range, or train in float32"
                )
        cast(Any, self.lr_schedulers()).step()
        self.counters.updates += 1
        return finite

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation callback plays the panel when the validation epoch starts."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, likewise."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.trainer.is_last_batch:
            return
        metrics = self.figures.reduced(self._reduce)
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # no ratio in a critic's warm-up
        for group in self.trainer.optimizers[0].param_groups:
            metrics["learning_rate" if group["name"] == "policy" else f"learning_rate_{group['name']}"] = group["lr"]
        counters = {name: float(count) for name, count in vars(self.counters).items()}
        self.report({f"train/{name}": value for name, value in (metrics | counters).items()})
        self.report({f"seconds/{name}": spent for name, spent in self._phase_seconds.items()})
        self.log("step", float(self.counters.updates), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)  # x axis
        self._phase_seconds = {}

    @property
    def _critic_warmup(self) -> bool:
        return self.critic is not None and self.counters.updates < self.critic_warmup_updates

    # ---- helpers ----

    def report(self, metrics: dict[str, float]) -> None:
        """Logs figures of this iteration, already added up over ranks, and keeps them for whoever shows them."""
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self.latest |= metrics

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

    def _reduce(self, value: Tensor, operation: str) -> float:
        return float(self.trainer.strategy.reduce(value.to(self.device).clone(), reduce_op=operation))

    @contextmanager
    def inference_context(self) -> Iterator[None]:
        """For passes without gradients (sampling, scoring): each rank may make as many as it likes."""
        with (
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),
            unsharded(self._models()),
            self.policy.keeping_activations(),
        ):
            yield

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "steppo" in checkpoint:  # of an earlier checkpoint: this one is taken within an iteration
            return
        checkpoint["state_dict"] = {
            name: weight for name, weight in checkpoint["state_dict"].items() if not self._is_base_weight(name)
        }
        checkpoint["steppo"] = {
            "counters": dict(vars(self.counters)),
            "skipped_in_a_row": self._skipped_in_a_row,
            "seconds": dict(self.seconds),
            "tokenizer": self.policy.tokenizer_state(),
            "belongs_to": self.identity,
            "rng": rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["steppo"]
        if not state:
            raise ConfigError("the checkpoint was written before the first iteration: start the run anew")
        if self.trainer.training and "optimizer_states" not in checkpoint:
            raise ConfigError("the checkpoint holds weights only: it can be evaluated, not continued")
        require_identity(checkpoint, self.identity)
        require_equal({"checkpoint": [state["counters"], self.identity]})
        self.counters = Counters(**state["counters"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.seconds = dict(state["seconds"])
        if state["tokenizer"]:
            self.policy.load_tokenizer_state(state["tokenizer"])
            self.data.source.bind(self.policy)
        set_rng_state(state["rng"])
        start_next_iteration(checkpoint, self.counters.iterations)
