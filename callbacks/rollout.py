"""Plays fresh episodes when an iteration starts, for the module to learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from steppo.advantages.base import Returns, centred_within
from steppo.datamodule import StepDataModule, run_seed
from steppo.distributed import gather
from steppo.errors import ConfigError, RunError, require_at_least
from steppo.learner import Experience, ReplayStatistics
from steppo.listeners import Listener
from steppo.metrics import common_failure, info_figures
from steppo.module import AgentModule
from steppo.run_folder import run_folder
from steppo.types import Episode, Group, RolloutConfig


@dataclass(eq=False)
class RolloutCallback(Listener):
    """Plays ``episodes_per_iteration`` episodes, ``group_size`` of each task, at the start of every iteration.

    Args:
        episodes_per_iteration: Over all processes; a multiple of ``group_size``.
        group_size: Episodes per task, from the same start.
        temperature: Of sampling; the learner divides its logits by the same.
        min_valid_fraction: The run stops when a smaller share of an iteration's episodes is healthy (did not fail), and
            always when none is.
        max_environment_steps: The run ends with the iteration that reaches so many steps learned from, if
            ``trainer.max_epochs`` does not end it before; 0 ends it after the first evaluation, with no training at all.
    """

    episodes_per_iteration: int = 64
    group_size: int = 1
    temperature: float = 1.0
    min_valid_fraction: float = 0.5
    max_environment_steps: int | None = None

    def __post_init__(self) -> None:
        episodes, group_size = self.episodes_per_iteration, self.group_size
        require_at_least(1, "rollout", episodes_per_iteration=episodes, group_size=group_size)
        require_at_least(0, "rollout", max_environment_steps=self.max_environment_steps)
        if episodes % group_size:
            raise ConfigError(f"rollout: episodes_per_iteration, {episodes}, must be a multiple of group_size, {group_size}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"rollout: temperature must be above 0 and finite, not {self.temperature}, or there is nothing to explore"
            )
        if not 0 <= self.min_valid_fraction <= 1:
            raise ConfigError(f"rollout: min_valid_fraction is a share, from 0 to 1, not {self.min_valid_fraction}")
        self.tasks_per_iteration = episodes // group_size

    def setup(self, trainer: pl.Trainer, pl_module: AgentModule, stage: str) -> None:
        if stage != "fit":
            return
        if pl_module.advantage.needs_groups and self.group_size < 2:
            scheme = type(pl_module.advantage).__name__
            raise ConfigError(f"{scheme} compares episodes of a group: set rollout.group_size to 2 or more")
        if trainer.world_size > self.tasks_per_iteration:
            raise ConfigError(
                f"rollout: {self.tasks_per_iteration} tasks per iteration (episodes_per_iteration / group_size) are fewer "
                f"than the {trainer.world_size} processes"
            )
        data: StepDataModule = pl_module.data
        longest, episodes = data.source.longest_episode, self.episodes_per_iteration
        if longest is not None and episodes * longest < data.buffer.num_minibatches:
            raise ConfigError(
                f"an iteration of {episodes} episodes (rollout.episodes_per_iteration) of at most {longest} steps is too "
                f"small for data.num_minibatches, {data.buffer.num_minibatches}"
            )
        data.buffer.rehearse(episodes, self.group_size)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        """Says which parts of the method are at work."""
        if self.max_environment_steps == 0:
            rank_zero_info("no training: rollout.max_environment_steps is 0")
            return
        advantage = pl_module.advantage
        critic = f"{type(pl_module.critic).__name__} read per {advantage.needs_values}" if pl_module.critic else "no critic"
        rank_zero_info(
            f"credit by {type(advantage).__name__}, {critic}, {pl_module.loss}, {pl_module.objective}, groups of "
            f"{self.group_size}"
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        budget = self.max_environment_steps
        if budget is not None and pl_module.counters.environment_steps >= budget:
            trainer.should_stop = True

    def on_run_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        data: StepDataModule = pl_module.data
        if not data.source.plays_ahead:
            return
        first, cursor, most = trainer.current_epoch, data.sampler.cursor, trainer.max_epochs

        def rounds(iteration: int) -> tuple[list[Group], RolloutConfig] | None:
            if trainer.should_stop or (most is not None and 0 <= most <= iteration):
                return None
            begins_at = cursor + (iteration - first) * self.tasks_per_iteration
            return data.groups_at(begins_at, self.tasks_per_iteration, self.group_size), self._config(iteration)

        data.source.plan(rounds, run_folder(trainer))
        self._publish(pl_module, first)

    def on_experience(
        self, trainer: pl.Trainer, pl_module: AgentModule, experience: Experience, replay: ReplayStatistics
    ) -> None:
        if pl_module.data.source.plays_ahead:
            self._publish(pl_module, trainer.current_epoch + 1)

    @staticmethod
    def _publish(module: AgentModule, iteration: int) -> None:
        """The updates before an iteration are done: whoever plays ahead gets the weights."""
        with module.timed("rollout"), module.inference_context():
            module.data.source.publish(iteration, module.counters.updates, module.policy.inference_weights())

    def _config(self, iteration: int, version: int = 0) -> RolloutConfig:
        return RolloutConfig(f"train/{iteration}", run_seed(), self.temperature, version=version)

    def on_iteration_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        pl_module.learn_from(self._play(trainer, pl_module))

    def _play(self, trainer: pl.Trainer, pl_module: AgentModule) -> list[Episode]:
        """This rank's episodes, and what is to be said of all."""
        data: StepDataModule = pl_module.data
        groups = data.next_groups(self.tasks_per_iteration, self.group_size)
        version = pl_module.counters.updates
        config = self._config(trainer.current_epoch, version)
        before = pl_module.seconds.get("rollout", 0.0)
        counts_before = data.source.counts()
        episodes, figures = pl_module.play("rollout", groups, config)
        self._check_health(figures["episodes"], figures["errors"], episodes)
        seconds = pl_module.seconds["rollout"] - before
        figures["degenerate_groups"] = self._degenerate_groups(episodes) if self.group_size > 1 else 0.0
        figures["failed_episodes"] = figures.pop("errors")
        figures["steps_per_episode"] = figures.pop("steps_mean")
        figures["steps_per_second"] = figures.pop("steps") / seconds
        figures["tokens_per_second"] = (figures.pop("prompt_tokens") + figures.pop("action_tokens")) / seconds
        for name in ("success_low", "success_high"):
            del figures[name]
        if math.isnan(figures["success_rate"]):  # unknown is not failure: there is no such figure
            del figures["success_rate"]
        counts = gather({name: count - counts_before[name] for name, count in data.source.counts().items()})
        figures |= {name: float(sum(part[name] for part in counts)) for name in counts_before}
        figures |= data.source.figures()
        figures |= {f"info/{name}": mean for name, mean in info_figures(episodes)[0].items()}
        pl_module.report({f"rollout/{name}": value for name, value in figures.items()})
        return episodes

    def _check_health(self, healthy: float, failed: float, episodes: list[Episode]) -> None:
        """Raises ``RunError`` if too few episodes are healthy. The numbers are over all ranks, so that all decide alike."""
        share = healthy / max(healthy + failed, 1)
        if healthy and share >= self.min_valid_fraction:
            return
        raise RunError(
            f"only {healthy:.0f} of {healthy + failed:.0f} episodes of the iteration are healthy ({share:.1%}; "
            f"rollout.min_valid_fraction is {self.min_valid_fraction:g}); the most common error: "
            f"{common_failure(episodes) or 'no episode was played'}"
        )

    @staticmethod
    def _degenerate_groups(episodes: list[Episode]) -> float:
        """Share of groups, over all ranks, whose episodes all have the same return: to compare them teaches nothing."""
        healthy = [episode for episode in episodes if not episode.stop_reason.failed]
        group = torch.tensor([episode.group_id for episode in healthy], dtype=torch.int64)
        task = torch.tensor([episode.episode_return for episode in healthy], dtype=torch.float64)
        summed = [abs(e.final_reward) + sum(abs(step.reward) for step in e.steps) for e in healthy]
        *_, equal = centred_within(Returns(task, torch.zeros_like(task), torch.tensor(summed, dtype=torch.float64)), group)
        parts = gather((len(group[equal].unique()), len(group.unique())))
        return sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1)
