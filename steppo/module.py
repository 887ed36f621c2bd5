"""The LightningModule: policy, step critic, credit and loss."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from steppo.advantages import Advantage
from steppo.buffer import Scores, StepBuffer
from steppo.credit import GlobalSteps, assign_credit
from steppo.datamodule import StepDataModule
from steppo.errors import ConfigError, RunError
from steppo.losses import LossSettings, kl_penalty, policy_loss, token_weights, value_loss
from steppo.models import Critic, Policy
from steppo.optim import OptimizerSettings, learning_rate_factor
from steppo.rng import rng_state, set_rng_state
from steppo.types import Microbatch, TokenBatch


@dataclass
class Counters:
    """How far the run is, over all ranks: iterations begun, updates done, episodes and environment steps learned from."""

    iterations: int = 0
    updates: int = 0
    episodes: int = 0
    environment_steps: int = 0
    skipped_updates: int = 0


class AgentModule(pl.LightningModule):
    """Trains a policy (and a critic, if the credit scheme wants values) from the steps in the datamodule's buffer.

    Each iteration: the rollout callback fills the buffer; all steps are scored once (old log-probabilities, values); credit
    is assigned over all ranks; the loader replays the buffer as updates, one optimizer step each.

    Args:
        policy: The language model.
        advantage: Credit scheme; it alone decides whether and where a critic is read.
        critic: Where values come from; needed exactly if the scheme wants values.
        loss: The objective.
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
        loss: LossSettings = LossSettings(),
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
        self.reference: Policy | None = None
        self.loss = loss
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.critic_warmup_updates = critic_warmup_updates
        self.max_skipped_updates = max_skipped_updates
        self.counters = Counters()
        self.latest: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._phase_seconds: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
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
            self.policy.build(self.data.corpus)
            if self.critic is not None:
                self.critic.build(self.policy)
            if self.loss.kl != "none":
                self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.data.source.bind(self.policy)

    def policy_was_initialised(self) -> None:
        """The policy was changed before training (a warm start): what is a copy of it follows."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())
        if self.critic is not None:
            self.critic.follow(self.policy)

    def configure_optimizers(self) -> Any:
        groups: list[tuple[str, nn.Module, OptimizerSettings]] = [("policy", self.policy, self.policy_optimizer)]
        if self.critic is not None:
            groups.append(("critic", self.critic, self.critic_optimizer))
        optimizer = torch.optim.AdamW(
            [
                {
                    "name": name,
                    "params": [p for p in module.parameters() if p.requires_grad],
                    "lr": settings.lr,
                    "weight_decay": settings.weight_decay,
                }
                for name, module, settings in groups
            ]
        )
        schedules = [learning_rate_factor(settings, self._total_updates()) for _, _, settings in groups]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)]

    def _total_updates(self) -> float:
        epochs = self.trainer.max_epochs
        return math.inf if epochs is None or epochs < 0 else epochs * self.data.updates_per_iteration

    def on_train_start(self) -> None:
        """Settings win over what a checkpoint brought back: a resumed run takes its learning rates from the config."""
        optimizer, schedule = self.trainer.optimizers[0], cast(Any, self.lr_schedulers())
        groups = list(zip(optimizer.param_groups, (self.policy_optimizer, self.critic_optimizer), strict=False))
        schedule.base_lrs = [settings.lr for _, settings in groups]
        for (group, settings), factor in zip(groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = settings.lr
            group["lr"] = settings.lr * factor(schedule.last_epoch)
            group["weight_decay"] = settings.weight_decay

    # ---- the start of an iteration: scores and credit ----

    def on_train_epoch_start(self) -> None:
        buffer = self.data.buffer
        with self.timed("score"):
            buffer.scores = self._score(buffer)
            kl_coef = self.loss.kl_coef if self.loss.kl == "reward" else 0.0
            steps = assign_credit(buffer, self.advantage, kl_coef)
        if steps.gap > self.data.source.logprob_tolerance:
            rank_zero_warn(
                f"the sampler's log-probabilities are up to {steps.gap:.2g} off the learner's, more than its tolerance of "
                f"{self.data.source.logprob_tolerance:.2g}: what is sampled is not quite what is learned"
            )
        self.data.global_steps = steps
        infinity = torch.tensor(math.inf, device=self.device)
        self._sums = {"ratio_min": infinity, "ratio_max": -infinity}
        self.counters.iterations += 1
        self.counters.environment_steps += len(steps.lengths_N)
        self.counters.episodes += len(steps.batch.terminated_E)
        self.report(_credit_statistics(steps))

    @torch.no_grad()
    def _score(self, buffer: StepBuffer) -> Scores:
        """Old log-probabilities, reference log-probabilities and values of all steps."""
        wide = torch.promote_types(self.policy.dtype, torch.float32)
        columns = {"old": torch.zeros(buffer.num_tokens, dtype=wide)}
        if self.reference is not None:
            columns["ref"] = torch.zeros(buffer.num_tokens, dtype=wide)
        at = self.advantage.needs_values
        if at != "none":
            columns["value"] = torch.zeros(len(buffer.steps) if at == "step" else buffer.num_tokens, dtype=wide)
        temperatures = buffer.temperatures() if buffer.steps else torch.zeros(0)
        for steps, actions, batch in buffer.batches():
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            temperature_A = temperatures[actions].to(self.device)
            with self._autocast():
                hidden = self.policy.hidden(batch)
                columns["old"][actions] = self.policy.action_logprobs(hidden, batch, temperature_A)[0].cpu()
                if self.reference is not None:
                    reference = self.reference.action_logprobs(self.reference.hidden(batch), batch, temperature_A)[0]
                    columns["ref"][actions] = reference.cpu()
                if self.critic is not None:
                    columns["value"][steps if at == "step" else actions] = self._values(batch, hidden).to(wide).cpu()

        final: dict[int, float] = {}
        if self.critic is not None:
            for episodes, batch in buffer.final_batches():
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                with self._autocast():
                    states = self.policy.hidden(batch) if self.critic.needs_policy_hidden else None
                    values = self.critic.values(batch, batch.value_at_N, states)
                final.update(zip((episode.order for episode in episodes), values.tolist(), strict=True))
        return Scores(
            old_logprobs_A=columns["old"],
            ref_logprobs_A=columns.get("ref"),
            value_N=columns["value"] if at == "step" else None,
            value_A=columns["value"] if at == "token" else None,
            bootstrap_N=torch.tensor([final.get(order, 0.0) for order in buffer.order_N.tolist()], dtype=wide),
        )

    def _values(self, batch: TokenBatch, hidden: Tensor | None) -> Tensor:
        assert self.critic is not None
        positions = batch.value_at_N if self.advantage.needs_values == "step" else batch.predict_at_A
        return self.critic.values(batch, positions, hidden)

    # ---- updates ----

    def training_step(self, batch: list[Microbatch], batch_idx: int) -> None:
        """One update: all its microbatches forward and backward, then one optimizer step."""
        with self.timed("update"):
            optimizer = cast(torch.optim.Optimizer, self.optimizers())
            optimizer.zero_grad()
            for number, microbatch in enumerate(batch):
                with self._no_gradient_sync(number < len(batch) - 1):
                    self.manual_backward(self._loss(microbatch))
            self._step(optimizer)

    def _loss(self, batch: Microbatch) -> Tensor:
        """This microbatch's part of the update's mean loss; gradients are averaged over ranks, hence the factor."""
        settings, tokens = self.loss, batch.tokens
        total = batch.update_steps if settings.aggregation == "step-mean" else batch.update_tokens
        hidden = self.policy.hidden(tokens)
        logprobs_A, entropy_A = self.policy.action_logprobs(hidden, tokens, batch.temperature_A)
        surrogate = policy_loss(
            logprobs_A,
            batch.old_logprobs_A,
            batch.advantage_A,
            tokens.step_of_A,
            batch.weight_N,
            ratio=settings.ratio,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            aggregation=settings.aggregation,
        )
        weights_A = token_weights(tokens.step_of_A, torch.ones_like(batch.weight_N), settings.aggregation)
        entropy = (entropy_A * weights_A).sum()
        loss = surrogate.loss - settings.ent_coef * entropy
        sums = {"policy_loss": surrogate.loss, "entropy": entropy}
        if settings.kl == "loss":
            assert batch.ref_logprobs_A is not None
            sums["kl"] = (kl_penalty(logprobs_A, batch.ref_logprobs_A, settings.kl_estimator) * weights_A).sum()
            loss = loss + settings.kl_coef * sums["kl"]
        if self._critic_warmup:
            loss = 0.0 * loss
        log_ratio_A = (logprobs_A - batch.old_logprobs_A).detach()
        sums["approx_kl"] = ((log_ratio_A.exp() - 1 - log_ratio_A) * weights_A).sum()
        sums["clip_fraction"] = (surrogate.clipped_A * weights_A).sum()
        sums["ratio_mean"] = (surrogate.ratio_A * weights_A).sum()
        parts = {name: value.detach() / total for name, value in sums.items()}
        if self.critic is not None:
            assert batch.old_value is not None
            assert batch.target is not None
            by_step = self.advantage.needs_values == "step"
            weights = torch.ones_like(batch.target) if by_step else weights_A
            values = self._values(tokens, hidden)
            clip = settings.value_clip or None
            critic_loss = value_loss(values, batch.old_value, batch.target, weights, clip)
            # One value per step: its mean is over steps, however tokens are aggregated.
            critic_loss = critic_loss / (batch.update_steps if by_step else total)
            parts["value_loss"] = critic_loss.detach()
            loss = loss / total + settings.vf_coef * critic_loss
        else:
            loss = loss / total
        for name, value in parts.items():
            self._add(name, value * batch.scale)
        if batch.scale:
            self._sums["ratio_min"] = torch.minimum(self._sums["ratio_min"], surrogate.ratio_A.min())
            self._sums["ratio_max"] = torch.maximum(self._sums["ratio_max"], surrogate.ratio_A.max())
        return loss * (batch.scale * self.trainer.world_size)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips each group by itself and steps, unless a gradient is not finite (a non-finite loss makes them so)."""
        norms = {}
        for group, settings in zip(optimizer.param_groups, (self.policy_optimizer, self.critic_optimizer), strict=False):
            if group["name"] == "policy" and self._critic_warmup:
                for parameter in group["params"]:
                    parameter.grad = None
            norms[group["name"]] = nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm or math.inf)
        finite = all(bool(torch.isfinite(norm)) for norm in norms.values())
        if finite:
            optimizer.step()
            self._skipped_in_a_row = 0
            for name, norm in norms.items():
                self._add(f"grad_norm_{name}", norm.detach() / self.trainer.world_size)
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

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation callback plays the panel when the validation epoch starts."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, likewise."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.trainer.is_last_batch:
            return
        updates = self.data.updates_per_iteration
        metrics: dict[str, float] = {}
        for name, value in sorted(self._sums.items()):  # the same order on all ranks
            if name in ("ratio_min", "ratio_max"):
                metrics[name] = self._reduce(value, name.removeprefix("ratio_"))
            else:
                metrics[name] = self._reduce(value, "sum") / updates
        metrics["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
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

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _reduce(self, value: Tensor, operation: str) -> float:
        return float(self.trainer.strategy.reduce(value.to(self.device).clone(), reduce_op=operation))

    def _autocast(self) -> AbstractContextManager:
        return self.trainer.precision_plugin.forward_context()

    def _no_gradient_sync(self, skip: bool) -> AbstractContextManager:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if skip and block is not None else contextlib.nullcontext()

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the checkpoint does not fit the config's model: {reason}") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steppo"] = {
            "counters": dict(vars(self.counters)),
            "seconds": dict(self.seconds),
            "tokenizer": self.policy.tokenizer_state(),
            "rng": rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("steppo")
        if state is None:
            raise ConfigError("the checkpoint was not written by steppo")
        self.counters = Counters(**state["counters"])
        self.seconds = dict(state["seconds"])
        if state["tokenizer"]:
            self.policy.load_tokenizer_state(state["tokenizer"])
            self.data.source.bind(self.policy)
        set_rng_state(state["rng"])


def _credit_statistics(steps: GlobalSteps) -> dict[str, float]:
    """What the critic and the groups were worth, and how far sampler and learner are apart."""
    batch, credit = steps.batch, steps.credit
    statistics = {"train/sampler_logprob_gap": steps.gap}
    target = credit.target_N if credit.target_N is not None else credit.target_A
    value = batch.value_N if credit.target_N is not None else batch.value_A
    if target is not None and value is not None and target.numel() > 1:
        variance = float(target.var())
        explained = 1 - float((target - value).var()) / variance if variance > 0 else 0.0
        statistics |= {
            "train/explained_variance": explained,
            "train/value_mean": float(value.mean()),
            "train/target_mean": float(target.mean()),
        }
    return statistics
