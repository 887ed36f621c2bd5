"""Supervised fine-tuning on demonstrated actions, with the packers, losses and updates of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steppo.batch import Microbatch, Segment
from steppo.distributed import average_gradients, rank_and_world
from steppo.learner.optim import OptimizerSettings, clip_and_step
from steppo.learner.update import UpdateLoss, UpdateStatistics, run_update
from steppo.losses import NLL, ObjectiveSettings
from steppo.models import Policy
from steppo.packing import Packer, PaddedPacker


@dataclass(frozen=True, eq=False)
class SFTLearner:
    """Maximum likelihood of demonstrated actions, by token. All ranks learn from the same batches.

    Attributes:
        policy: Built.
        segments: Prompts and demonstrated actions, the same on all ranks.
        updates: Optimizer steps.
        batch_size: Segments per update.
        lr: Learning rate of its AdamW, falling linearly to 0.
        seed: Of the batches.
        packer: Segments -> token batches.
        max_tokens: Most tokens in one forward and backward pass.
    """

    policy: Policy
    segments: Sequence[Segment]
    updates: int
    batch_size: int
    lr: float
    seed: int
    packer: Packer = field(default_factory=PaddedPacker)
    max_tokens: int = 16384

    def fit(
        self,
        backward: Callable[[Tensor], object] = torch.Tensor.backward,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[UpdateStatistics]:
        """Makes the updates; ``progress`` hears how many are done. What they found, one by one."""
        parameters = self.policy.trained_parameters()
        groups = [{"name": "policy", "params": parameters}]
        settings = OptimizerSettings(lr=self.lr)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.updates)
        loss = UpdateLoss(self.policy, None, "none", NLL(), ObjectiveSettings(aggregation="token-mean"))

        def step() -> dict[str, Tensor] | None:
            average_gradients(parameters)
            norms = clip_and_step(optimizer, [settings])
            decay.step()
            return norms

        found = []
        for update, batch in enumerate(self._batches(), 1):
            optimizer.zero_grad()
            found.append(run_update(loss, batch, backward, step))
            progress(update)
        optimizer.zero_grad()
        return found

    def _batches(self) -> Iterator[list[Microbatch]]:
        rng, segments = np.random.default_rng(self.seed), self.segments
        scale = 1.0 / rank_and_world()[1]  # each rank has the whole batch
        for _ in range(self.updates):
            chosen = rng.choice(len(segments), min(self.batch_size, len(segments)), replace=False)
            update_tokens = sum(len(segments[index].action_ids) for index in chosen)
            batch = []
            for rows, tokens in self.packer.pack([segments[index] for index in chosen], self.max_tokens):
                ones_A = torch.ones(len(tokens.target_A))
                microbatch = Microbatch(
                    tokens=tokens,
                    temperature_A=ones_A,
                    old_logprobs_A=torch.zeros_like(ones_A),
                    behaviour_logprobs_A=torch.zeros_like(ones_A),
                    ref_logprobs_A=None,
                    advantage_A=ones_A,
                    weight_A=ones_A,
                    index_N=torch.from_numpy(rows),
                    old_value=None,
                    target=None,
                    update_steps=len(chosen),
                    update_tokens=update_tokens,
                    scale=scale,
                )
                batch.append(microbatch.to(self.policy.device))
            yield batch
