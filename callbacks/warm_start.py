"""Behaviour cloning before the first iteration, so that the policy knows what an action looks like."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import platformdirs
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

import steppo
from steppo.batch import Segment
from steppo.datamodule import run_seed
from steppo.distributed import gather_to_first, load_trained_state, made_once, rank_and_world, trained_state
from steppo.errors import ConfigError, RunError
from steppo.learner.credit import why_nothing
from steppo.learner.sft import SFTLearner
from steppo.learner.update import UpdateStatistics
from steppo.models import Policy
from steppo.module import AgentModule
from steppo.paths import user_path
from steppo.progress import phase
from steppo.rollouts import EnvSource, NoAction, WanderingPlayer, expert_action, random_action
from steppo.types import Episode, RolloutConfig, Step, Task, groups_of
from steppo.weight_cache import WeightCache


@dataclass(eq=False)
class WarmStartCallback(pl.Callback):
    """Fine-tunes the policy on demonstrations before iteration 0; never when a checkpoint is resumed.

    The result is kept in a cache folder under a hash of all that shapes it: settings, model, initial weights, tokens of the
    demonstrations, machine, number of processes, versions and code. The 32 most recently used results stay, as long as they
    have less than 32 GiB together; the newest always does. A damaged file is made anew. Where nothing can be written, a
    warning says so and the run goes on. Demonstrated actions that are longer than ``max_new_tokens`` are refused. Where the
    expert has no action a demonstration ends; one line says how many did.

    Loggers get the loss as it learns (``warm_start/loss``). With ``held_out``, ten times and at the end, also the loss of a
    token of actions that it does not learn from (``warm_start/held_out_loss``), and the share of these that the policy would
    say exactly, each token the most likely one after those before it (``warm_start/held_out_accuracy``): if they get worse,
    more updates only overfit. Their x axis is its own updates.

    Args:
        updates: Optimizer steps; 0 turns it off.
        actions: ``random`` admissible commands teach the form of an action and nothing of the task; ``expert`` commands
            teach both.
        detours: Most chance of a random command in place of the demonstrated one at a step; each demonstration has a chance
            of its own, between 0 and this. What was to be done is learned all the same, there and after it: how to come
            back, how to go on searching.
        episodes: Demonstrations, over the training tasks.
        batch_size: Steps per update.
        lr: Learning rate of its AdamW, falling linearly to 0.
        prompt_coef: Weight of the loss over the prompts' tokens, beside that over the actions': a model from scratch also
            learns to read by it. No use for one that is pretrained.
        held_out: Demonstrations that are not learned from: of the first so many validation tasks. It takes their time, and
            changes nothing.
        seed: Of demonstrations and batches; the run's seed unless given. With the policy's own seed, runs of any seed begin
            with the same weights.
        cache_dir: Where results are kept; the user's cache folder unless given.
    """

    updates: int = 0
    actions: Literal["random", "expert"] = "random"
    detours: float = 0.0
    episodes: int = 128
    batch_size: int = 64
    lr: float = 1e-3
    prompt_coef: float = 0.0
    held_out: int = 0
    seed: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.updates < 0 or self.held_out < 0 or self.episodes < 1 or self.batch_size < 1:
            raise ConfigError("warm_start: updates and held_out must be at least 0, episodes and batch_size at least 1")
        if not 0 <= self.detours < 1:
            raise ConfigError(f"warm_start: detours must be at least 0 and below 1, not {self.detours}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"warm_start: lr must be above 0 and finite, not {self.lr}")
        if not 0 <= self.prompt_coef < math.inf:
            raise ConfigError(f"warm_start: prompt_coef must be at least 0 and finite, not {self.prompt_coef}")
        folder = user_path(self.cache_dir) if self.cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "warm_start"
        self.cache = WeightCache(folder)

    @property
    def _own_seed(self) -> int:
        return run_seed() if self.seed is None else self.seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        if self.updates == 0 or trainer.ckpt_path is not None:
            return
        with pl_module.timed("warm_start"):
            tasks = pl_module.data.tasks()
            tasks = [tasks[index % len(tasks)] for index in range(self.episodes)]
            segments = self._demonstrations(trainer, pl_module, tasks, "warm_start")
            held_out: list[Segment] = []
            if self.held_out:
                panel = pl_module.data.panel("validate")[: self.held_out]
                held_out = self._demonstrations(trainer, pl_module, panel, "warm_start/held_out")
            learner = SFTLearner(
                pl_module.policy,
                segments,
                self.updates,
                self.batch_size,
                self.lr,
                self._own_seed,
                pl_module.data.buffer.packer,
                pl_module.data.buffer.max_tokens,
                self.prompt_coef,
            )
            key = self._key(trainer, pl_module, segments)
            weights = self.cache.load(key, pl_module.policy) if trainer.is_global_zero else None
            if not trainer.strategy.broadcast(weights is not None):  # on every rank, as a sharded policy needs them all
                self._train(trainer, learner, held_out)
                weights = trained_state(pl_module.policy)
                if trainer.is_global_zero:
                    self.cache.save(key, weights)
            load_trained_state(pl_module.policy, weights or {})
            if held_out:
                with trainer.precision_plugin.train_step_context():
                    loss, accuracy = learner.measure(held_out)
                self._log(trainer, self.updates, held_out_loss=loss, held_out_accuracy=accuracy)
                rank_zero_info(
                    f"warm_start: {accuracy:.3f} of {len(held_out)} held-out actions said exactly, loss {loss:.3f} a token"
                )
            pl_module.policy_was_initialised()

    def _train(self, trainer: pl.Trainer, learner: SFTLearner, held_out: list[Segment]) -> None:
        """Makes the updates, and tells how they go."""
        every, seldom = max(1, cast(Any, trainer).log_every_n_steps), math.ceil(self.updates / 10)
        with phase(trainer, "warm start", self.updates) as advance, trainer.precision_plugin.train_step_context():

            def progress(done: int, found: UpdateStatistics) -> None:
                note = ""
                if done % every == 0 and "policy_loss" in found.figures:
                    loss = float(sum(found.figures["policy_loss"])) * rank_and_world()[1]  # each rank has the whole batch
                    self._log(trainer, done, loss=loss)
                if held_out and done % seldom == 0 and done < self.updates:
                    loss, accuracy = learner.measure(held_out)
                    self._log(trainer, done, held_out_loss=loss, held_out_accuracy=accuracy)
                    note = f"held out: loss {loss:.3f}, exact {accuracy:.2f}"
                advance(done, note=note)

            learner.fit(progress=progress)

    @staticmethod
    def _log(trainer: pl.Trainer, update: int, **figures: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"warm_start/{name}": figure for name, figure in figures.items()}, step=update)

    def _demonstrations(self, trainer: pl.Trainer, module: AgentModule, tasks: Sequence[Task], name: str) -> list[Segment]:
        """Prompts and demonstrated actions of these tasks, the same on every rank."""
        source = module.data.source.scripted
        if source is None:
            raise ConfigError("warm_start needs an EnvSource: other sources cannot be played by a script")
        rank, world = rank_and_world()
        groups = groups_of(tasks)[rank::world]
        config = RolloutConfig(name, self._own_seed, want_expert=self.actions == "expert")
        choose = random_action if self.actions == "random" else expert_action
        player = WanderingPlayer(choose, source.write, self.detours, self._own_seed)
        mine: list[Episode] = []
        with phase(trainer, "demonstrations", len(groups)) as advance:
            for group in source.collect(groups, config, player):
                mine += [_advised(episode, player.advice.pop(episode.id, [])) for episode in group]
                advance(len(mine))
        shares = gather_to_first(mine)
        played = sorted((episode for share in shares for episode in share), key=lambda episode: episode.order)
        return made_once(lambda: self._shown(played, source))

    def _shown(self, played: Sequence[Episode], source: EnvSource) -> list[Segment]:
        steps = [step for e in played if _ended_early(e) or not e.stop_reason.failed for step in e.steps]
        self._say_what_is_missing(type(source.env).__name__, played, bool(steps))
        self._check_lengths(steps, source)
        return [Segment(step.prompt_ids, step.action_ids) for step in steps]

    def _say_what_is_missing(self, env: str, played: Sequence[Episode], any_steps: bool) -> None:
        """One line for what ended early (its steps count), one for what failed; ``RunError`` without any step."""
        early = sum(map(_ended_early, played))
        failed = [episode for episode in played if episode.stop_reason.failed and not _ended_early(episode)]
        why = f"the expert of {env} had no action" if self.actions == "expert" else f"{env} showed no commands"
        lines = []
        if early:
            lines.append(f"{early} of {len(played)} demonstrations ended early: {why}")
        if failed:
            lines.append(f"{len(failed)} of {len(played)} demonstrations failed and are left out: {why_nothing(failed)}")
        if not any_steps:
            raise RunError(f"warm_start: there is no demonstration: {'; '.join(lines) or why_nothing(played)}")
        for line in lines:
            rank_zero_info(f"warm_start: {line}")

    @staticmethod
    def _check_lengths(steps: Sequence[Step], source: EnvSource) -> None:
        """What is longer than the policy may speak would teach it to begin actions that are cut."""
        cut = [step.action_ids for step in steps if len(step.action_ids) > source.max_new_tokens]
        if cut:
            longest = max(cut, key=len)
            said = source.renderer.decode_action(longest)
            raise ConfigError(
                f"warm_start: {len(cut)} of {len(steps)} demonstrated actions have more tokens than max_new_tokens = "
                f"{source.max_new_tokens} and would always be cut; set data.source.max_new_tokens to {len(longest)} at "
                f"least, for {said if len(said) <= 100 else said[:97] + '...'!r}"
            )

    def _key(self, trainer: pl.Trainer, module: AgentModule, segments: list[Segment]) -> str:
        """A hash of all that shapes the result: own settings, model, machine, code, weights and demonstrations."""
        policy, packed = module.policy, module.data.buffer
        config = policy.model.config
        shapes = {
            "settings": asdict(replace(self, seed=self._own_seed, cache_dir=None, held_out=0)),
            "model": {name: value for name, value in config.to_dict().items() if not name.startswith("_")},
            "attention": getattr(config, "_attn_implementation", None),
            "identity": module.identity,
            "trained": [name for name, parameter in policy.named_parameters() if parameter.requires_grad],
            "gradient_checkpointing": module.gradient_checkpointing,
            "packing": [f"{type(packed.packer).__module__}.{type(packed.packer).__qualname__}", vars(packed.packer)],
            "max_tokens": packed.max_tokens,
            "machine": [module.device.type, _processor(module.device), torch.get_num_threads()],
            "processes": [type(trainer.strategy).__name__, trainer.world_size],
            "precision": [trainer.precision, torch.get_float32_matmul_precision()],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")},
        }
        digest = hashlib.sha256(json.dumps(shapes, default=str, sort_keys=True).encode())
        for file in _code(policy):
            digest.update(file.read_bytes())
        for name, weight in policy.state_dict().items():
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for segment in segments:
            digest.update(np.asarray([len(segment.prompt_ids), len(segment.action_ids)]).tobytes())
            digest.update(segment.prompt_ids.tobytes() + segment.action_ids.tobytes())
        return digest.hexdigest()[:32]


def _advised(episode: Episode, advice: Sequence[np.ndarray]) -> Episode:
    """With what was to be done at each step."""
    steps = (replace(step, action_ids=ids) for step, ids in zip(episode.steps, advice, strict=False))
    return replace(episode, steps=tuple(steps))


def _ended_early(episode: Episode) -> bool:
    """The script had no action; what it did before counts."""
    return episode.error.startswith(NoAction.__name__)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _code(policy: Policy) -> list[Path]:
    """Source files of steppo and of a policy's own class: another version may clone otherwise."""
    files = {Path(__file__), Path(inspect.getfile(type(policy))), *Path(steppo.__file__).parent.rglob("*.py")}
    return sorted(path for path in files if path.is_file())
