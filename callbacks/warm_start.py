"""Behaviour cloning before the first iteration, so that the policy knows what an action looks like."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import platformdirs
import torch
from torch.distributed.tensor import DTensor

from steppo.credit import why_nothing
from steppo.datamodule import run_seed
from steppo.distributed import load_trained_state, trained_state
from steppo.engines import ScriptedEngine, expert_action, random_action
from steppo.errors import ConfigError, RunError
from steppo.module import AgentModule
from steppo.packing import PaddedPacker
from steppo.progress import phase
from steppo.rollout import EnvSource
from steppo.types import RolloutPlan, Segment, groups_of


class WarmStartCallback(pl.Callback):
    """Fine-tunes the policy on demonstrations before iteration 0; never when a checkpoint is resumed.

    The result is kept in a cache folder under a hash of all that it depends on: the initial weights, the demonstrations'
    tokens and the settings.

    Args:
        updates: Optimizer steps; 0 turns it off.
        actions: ``random`` admissible commands teach the form of an action and nothing of the task; ``expert`` commands
            teach both.
        episodes: Demonstrations, over the training tasks.
        batch_size: Steps per update.
        lr: Learning rate of its AdamW, falling linearly to 0.
        seed: Of demonstrations and batches; the run's seed unless given. With the policy's own seed, runs of any seed begin
            with the same weights.
        cache_dir: Where results are kept; the user's cache folder unless given.
    """

    def __init__(
        self,
        updates: int = 0,
        actions: Literal["random", "expert"] = "random",
        episodes: int = 128,
        batch_size: int = 64,
        lr: float = 1e-3,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if updates < 0 or episodes < 1 or batch_size < 1:
            raise ConfigError("warm_start: updates must be at least 0, episodes and batch_size at least 1")
        if not 0 < lr < math.inf:
            raise ConfigError(f"warm_start: lr must be above 0 and finite, not {lr}")
        self.updates = updates
        self.actions = actions
        self.episodes = episodes
        self.batch_size = batch_size
        self.lr = lr
        self._seed = seed
        self.cache = Path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "warm_start"

    @property
    def seed(self) -> int:
        """Of demonstrations and batches."""
        return run_seed() if self._seed is None else self._seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AgentModule)
        if self.updates == 0 or trainer.ckpt_path is not None:
            return
        with pl_module.timed("warm_start"):
            segments = self._demonstrations(trainer, pl_module)
            path = self.cache / f"{self._key(trainer, pl_module, segments)}.pt"
            if trainer.strategy.broadcast(path.exists()):
                weights = torch.load(path, map_location="cpu", weights_only=True) if trainer.is_global_zero else {}
            else:  # on every rank, as a sharded policy needs them all
                self._clone(trainer, pl_module, segments)
                weights = trained_state(pl_module.policy)
                if trainer.is_global_zero:
                    self._save(weights, path)
            load_trained_state(pl_module.policy, weights)
            pl_module.policy_was_initialised()

    def _demonstrations(self, trainer: pl.Trainer, module: AgentModule) -> list[Segment]:
        """Prompts and demonstrated actions, the same on every rank."""
        source = module.data.source
        if not isinstance(source, EnvSource):
            raise ConfigError("warm_start needs an EnvSource: other sources cannot be played by a script")
        choose = random_action if self.actions == "random" else expert_action
        tasks = module.data.tasks()
        groups = groups_of([tasks[index % len(tasks)] for index in range(self.episodes)])
        plan = RolloutPlan("warm_start", self.seed, want_expert=self.actions == "expert")
        engine = ScriptedEngine(lambda request: source.parser.answer(choose(request)), source.context.encode_action)
        played = []
        with phase(trainer, "demonstrations", self.episodes) as advance:
            for group in source.collect(groups, plan, engine):
                played += group
                advance(len(played))
        played.sort(key=lambda episode: episode.order)
        segments = [
            Segment(step.prompt_ids, step.action_ids)
            for episode in played
            if not episode.stop_reason.failed
            for step in episode.steps
        ]
        if not segments:
            raise RunError(f"warm_start: there is no demonstration: {why_nothing(played)}")
        return segments

    def _key(self, trainer: pl.Trainer, module: AgentModule, segments: list[Segment]) -> str:
        settings = [self.updates, self.batch_size, self.lr, self.seed, torch.__version__, torch.get_num_threads()]
        digest = hashlib.sha256(json.dumps([*settings, module.device.type, trainer.precision]).encode())
        for name, weight in module.policy.state_dict().items():
            digest.update(name.encode())
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for segment in segments:
            digest.update(np.asarray([len(segment.prompt_ids), len(segment.action_ids)]).tobytes())
            digest.update(segment.prompt_ids.tobytes() + segment.action_ids.tobytes())
        return digest.hexdigest()[:32]

    def _clone(self, trainer: pl.Trainer, module: AgentModule, segments: list[Segment]) -> None:
        """Maximum likelihood of the demonstrated actions, by token."""
        policy = module.policy
        parameters = policy.trained_parameters()
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.updates)
        rng = np.random.default_rng(self.seed)
        packer = PaddedPacker()
        with phase(trainer, "warm start", self.updates) as advance:
            for update in range(1, self.updates + 1):
                chosen = rng.choice(len(segments), min(self.batch_size, len(segments)), replace=False)
                tokens = sum(len(segments[index].action_ids) for index in chosen)
                optimizer.zero_grad()
                for _, batch in packer.pack([segments[index] for index in chosen], module.data.buffer.max_tokens):
                    batch = module.transfer_batch_to_device(batch, module.device, 0)
                    with trainer.precision_plugin.forward_context():
                        ones_A = torch.ones_like(batch.target_A, dtype=torch.float32)
                        logprobs_A = policy(batch, ones_A).logprobs_A
                    (-logprobs_A.sum() / tokens).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                decay.step()
                advance(update)
        optimizer.zero_grad()

    def _save(self, weights: dict[str, torch.Tensor], path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(buffer.getvalue())
            os.replace(file.name, path)
        except OSError as error:
            raise ConfigError(f"warm_start: cannot write to {path.parent}: {error.strerror}") from error
