"""The LightningModule: policy, step critic and optimizer, and the learner that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from steppo.advantages import Advantage
from steppo.batch import Microbatch
from steppo.checkpoints import read
from steppo.datamodule import run_seed
from steppo.distributed import average_gradients, rank_and_world, require_equal, shard, unsharded
from steppo.envs.checks import checked_episode
from steppo.errors import ConfigError, RunError
from steppo.learner import Correction, Learner, NoCorrection, OptimizerSettings, ReplayStatistics, UpdateStatistics
from steppo.learner.optim import clip_and_step, learning_rate_schedule
from steppo.listeners import announce
from steppo.losses import ClippedLoss, ObjectiveSettings, PolicyLoss
from steppo.metrics import EpisodeStatistics
from steppo.models import Critic, Policy
from steppo.models.adapters import LoRASettings
from steppo.models.identity import fingerprint, identity
from steppo.models.policy import AdapterView
from steppo.progress import phase
from steppo.rollouts import EnvSource, ScriptedPlayer
from steppo.rollouts.players import Choose
from steppo.run_folder import RunTrainer
from steppo.run_module import RunModule, fill_state, take_settings
from steppo.types import Episode, Group, RolloutConfig


class AgentModule(RunModule):
    """Trains a policy, and a critic if the credit scheme wants values, from the steps in the datamodule's buffer.

    An iteration: whoever plays episodes hands them to ``learn_from``; the learner scores them once and assigns credit over
    all ranks; the step buffer replays them as updates of one optimizer step each.

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

    learner: Learner

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
        if critic_warmup_updates < 0 or max_skipped_updates < 1:
            raise ConfigError("AgentModule: critic_warmup_updates must be at least 0 and max_skipped_updates at least 1")
        if advantage.needs_values != "none" and critic is None:
            raise ConfigError(f"{type(advantage).__name__} needs values: give the model a critic, such as SharedCritic")
        self.policy = policy
        self.advantage = advantage
        self.critic = critic if advantage.needs_values != "none" else None
        self.reference: Policy | AdapterView | None = None
        self.loss = loss
        self.objective = objective
        self.correction = correction
        self.optimizer = optimizer
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.critic_warmup_updates = critic_warmup_updates
        self.max_skipped_updates = max_skipped_updates
        self.lora: LoRASettings | None = None  # with which the models are built: what they are frozen under
        self.gradient_checkpointing = False  # keep no activations within a layer
        self._updates: list[UpdateStatistics] = []

    # ---- set-up ----

    def configure_model(self) -> None:
        """Builds the models (once), hands the policy to the episode source and everything to the learner.

        Where a script plays there is nothing to build but what writes its prompts.
        """
        if cast(RunTrainer, self.trainer).is_scripted:
            self.policy, self.critic = self._scripted().bind_script(), None
            return
        if self.policy.model is None:
            self.build_models(self.data.tokenizer_texts)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                begins_from = cast(RunTrainer, self.trainer).begins_from
                if begins_from is not None:  # of sharded weights nobody would check whether they fit
                    self.take(read(begins_from, mmap=True))
                blocks = self.policy.blocks
                for module in self._models():
                    shard(module, blocks, self.trainer.strategy.root_device.type)
        self.data.source.bind(self.policy)
        self.learner = Learner(
            self.policy,
            self.advantage,
            self.critic,
            self.reference,
            self.loss,
            self.objective,
            self.correction,
            self.data.buffer.packer,
            self.data.buffer.max_tokens,
            self.inference_context,
        )

    def _scripted(self) -> EnvSource:
        source = self.data.source.scripted
        assert source is not None, "the evaluation callback asks first"
        return source

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
        epochs, per_iteration = self.trainer.max_epochs, self.data.buffer.updates_per_iteration
        planned = math.inf if epochs is None or epochs < 0 else epochs * per_iteration
        alone = self.critic_warmup_updates if self.critic is not None else 0
        schedules = [
            learning_rate_schedule(settings, planned, alone if name == "policy" else 0) for name, _, settings in groups
        ]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)]

    def on_train_start(self) -> None:
        """Settings win over what a checkpoint brought back: a resumed run takes its learning rates from the config."""
        optimizer, schedule = self.trainer.optimizers[0], cast(Any, self.lr_schedulers())
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fill_state(optimizer)
        take_settings(optimizer, schedule, (self.policy_optimizer, self.critic_optimizer))
        announce(self.trainer, "on_weights_ready")
        announce(self.trainer, "on_run_start")

    # ---- an iteration ----

    def on_train_epoch_start(self) -> None:
        self.latest, self._updates = {}, []
        announce(self.trainer, "on_iteration_start")

    def play(
        self, name: str, groups: Sequence[Group], config: RolloutConfig, script: Choose | None = None
    ) -> tuple[list[Episode], dict[str, float]]:
        """Plays this rank's groups, a phase of that name, with the weights as they are or by a script of an ``EnvSource``.

        Gives the episodes, and all ranks' figures.
        """
        source, episodes = self.data.source, list[Episode]()
        total = sum(group.size for group in groups)
        with self.timed(name), self.inference_context(), phase(self.trainer, name, total) as advance:
            if script is None:
                source.load_weights(self.policy.inference_weights(), config.version)
                played = source.collect(groups, config)
            else:
                scripted = self._scripted()
                played = scripted.collect(groups, config, ScriptedPlayer(script, scripted.write))
            for group in played:
                episodes += map(checked_episode, group)
                advance(len(episodes))
        statistics = EpisodeStatistics().to(self.device)
        for episode in episodes:
            statistics.update(episode)
        return episodes, statistics.compute()

    def learn_from(self, episodes: Sequence[Episode]) -> None:
        """Takes this rank's episodes of an iteration; updates replay them. All ranks must ask."""
        with self.timed("score"):
            first_update = partial(self.data.buffer.first_update, seed=run_seed(), iteration=self.current_epoch)
            experience = self.learner.prepare(episodes, None if self._critic_warmup else first_update)
        self.data.buffer.hold(experience)
        self.counters.iterations += 1
        self.counters.environment_steps += experience.num_steps
        self.counters.episodes += experience.num_episodes
        self.report({f"train/{name}": value for name, value in experience.statistics.items()})

    def training_step(self, batch: list[Microbatch], batch_idx: int) -> dict[str, UpdateStatistics]:
        """One update: all its microbatches forward and backward, then one optimizer step."""
        strategy = self.trainer.strategy
        # Gradients are averaged once, in `_step`: DDP's hooks would wait for parameters that a pass leaves out.
        unhooked = strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        with self.timed("update"), unhooked:
            cast(torch.optim.Optimizer, self.optimizers()).zero_grad()
            statistics = self.learner.update(batch, self.manual_backward, self._step, not self._critic_warmup)
        self.data.buffer.take(statistics.old_logprobs)
        return {"statistics": statistics}

    def _step(self) -> dict[str, Tensor] | None:
        """An optimizer step, unless a gradient is not finite: the gradients' norms, or nothing."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
        settings = self.policy_optimizer, self.critic_optimizer
        norms = clip_and_step(optimizer, settings, resting="policy" if self._critic_warmup else None)
        self.counters.updates += 1
        self.counters.skipped_updates += norms is None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if norms is None else 0
        if self.skipped_in_a_row >= self.max_skipped_updates:
            raise RunError(
                f"{self.skipped_in_a_row} updates in a row had non-finite gradients; lower the learning rate, "
                "max_grad_norm or clip range, or train in float32"
            )
        cast(Any, self.lr_schedulers()).step()
        return norms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._updates.append(outputs["statistics"])
        if not self.trainer.is_last_batch:
            return
        experience = self.data.buffer.experience
        replay = ReplayStatistics.of(self._updates, len(experience.steps))
        self._updates = []
        announce(self.trainer, "on_experience", experience, replay)
        metrics = {name: value for name, value in replay.figures.items() if math.isfinite(value)}  # none of a resting policy
        metrics["logprob_mismatch"] = self.data.buffer.logprob_mismatch()
        self._warn_of_differences(metrics["logprob_mismatch"], replay.figures["first_ratio_spread"])
        metrics |= self.data.buffer.packing_figures()
        for group in self.trainer.optimizers[0].param_groups:
            metrics["learning_rate" if group["name"] == "policy" else f"learning_rate_{group['name']}"] = group["lr"]
        self.report_iteration(metrics)

    def _warn_of_differences(self, mismatch: float, spread: float) -> None:
        """Where the same weights gave other log-probabilities."""
        tolerance, clip_range = self.data.source.logprob_tolerance, self.loss.clip_range
        if mismatch > tolerance:
            rank_zero_warn(
                f"the sampler's log-probabilities are up to {mismatch:.2g} off the learner's, more than its tolerance of "
                f"{tolerance:.2g}: what is sampled is not quite what is learned"
            )
        if spread > 0.1 * clip_range and not self.correction.old_is_behaviour:
            rank_zero_warn(
                f"before anything was learned, importance ratios are up to {spread:.2g} from 1, by rounding alone: more "
                f"than a tenth of the clip range, {clip_range:g}. Clip further out, or compute in a higher precision"
            )

    @property
    def _critic_warmup(self) -> bool:
        return self.critic is not None and self.counters.updates < self.critic_warmup_updates

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
