"""Supervised fine-tuning on demonstrated actions, with the packers, losses and updates of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from steppo.batch import Microbatch, Segment
from steppo.distributed import average_gradients, rank_and_world, unsharded
from steppo.learner.optim import OptimizerSettings, clip_and_step
from steppo.learner.update import UpdateLoss, UpdateStatistics, run_update
from steppo.losses import NLL, ObjectiveSettings
from steppo.models import Policy
from steppo.packing import Packer, PaddedPacker

_ROWS = 256  # of logits at once


class Imitation(NamedTuple):
    """How close a policy is to demonstrations.

    Attributes:
        loss: Mean negative log-likelihood of an action's token.
        accuracy: Share of the actions that are said exactly: each token is the most likely one after those before it.
    """

    loss: float
    accuracy: float


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
        prompt_coef: Weight of the mean loss over the prompts' tokens, beside that over the actions'.
    """

    policy: Policy
    segments: Sequence[Segment]
    updates: int
    batch_size: int
    lr: float
    seed: int
    packer: Packer = field(default_factory=PaddedPacker)
    max_tokens: int = 16384
    prompt_coef: float = 0.0

    def fit(
        self,
        backward: Callable[[Tensor], object] = torch.Tensor.backward,
        progress: Callable[[int, UpdateStatistics], object] = lambda done, found: None,
    ) -> list[UpdateStatistics]:
        """Makes the updates; ``progress`` hears how many are done, and what the last found. What they found, one by one."""
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
            progress(update, found[-1])
        optimizer.zero_grad()
        return found

    @torch.no_grad()
    def measure(self, segments: Sequence[Segment]) -> Imitation:
        """How well the policy would say what was demonstrated; changes nothing. All ranks must ask."""
        loss, exact, tokens = 0.0, 0, sum(len(segment.action_ids) for segment in segments)
        with unsharded([self.policy]):
            for _, batch in self.packer.pack(segments, self.max_tokens):
                batch = batch.to(self.policy.device)
                states_A = self.policy.hidden(batch)[batch.predict_at_A]
                wrong_N = torch.zeros(batch.num_steps, dtype=torch.bool, device=self.policy.device)
                columns = (column.split(_ROWS) for column in (states_A, batch.target_A, batch.step_of_A))
                for states, target, step_of in zip(*columns, strict=True):
                    logits = self.policy.logits(states)
                    loss += float(cross_entropy(logits, target, reduction="sum"))
                    wrong_N[step_of[logits.argmax(-1) != target]] = True
                exact += int((~wrong_N).sum())
        return Imitation(loss / tokens, exact / len(segments))

    def _batches(self) -> Iterator[list[Microbatch]]:
        rng, segments = np.random.default_rng(self.seed), self.segments
        scale = 1.0 / rank_and_world()[1]  # each rank has the whole batch
        for _ in range(self.updates):
            chosen = rng.choice(len(segments), min(self.batch_size, len(segments)), replace=False)
            drawn = [segments[index] for index in chosen]
            update_tokens = sum(len(segment.action_ids) for segment in drawn)
            said, weights = self._said(drawn, update_tokens)
            batch = []
            for rows, tokens in self.packer.pack(said, self.max_tokens):
                ones_A = torch.ones(len(tokens.target_A))
                microbatch = Microbatch(
                    tokens=tokens,
                    temperature_A=ones_A,
                    old_logprobs_A=torch.zeros_like(ones_A),
                    behaviour_logprobs_A=torch.zeros_like(ones_A),
                    ref_logprobs_A=None,
                    advantage_A=ones_A,
                    weight_A=ones_A if weights is None else torch.cat([weights[row] for row in rows]),
                    index_N=torch.from_numpy(rows),
                    old_value=None,
                    target=None,
                    update_steps=len(chosen),
                    update_tokens=update_tokens,
                    scale=scale,
                )
                batch.append(microbatch.to(self.policy.device))
            yield batch

    def _said(self, drawn: list[Segment], update_tokens: int) -> tuple[list[Segment], list[Tensor] | None]:
        """What is learned of each segment, and how much its tokens count."""
        if not self.prompt_coef:
            return drawn, None
        prompt_tokens = sum(len(segment.prompt_ids) - 1 for segment in drawn)
        share = self.prompt_coef * update_tokens / max(1, prompt_tokens)
        wide = torch.promote_types(self.policy.dtype, torch.float32)
        said, weights = [], []
        for segment in drawn:
            said.append(Segment(segment.prompt_ids[:1], np.concatenate([segment.prompt_ids[1:], segment.action_ids])))
            weights.append(torch.ones(len(said[-1].action_ids), dtype=wide))
            weights[-1][: len(segment.prompt_ids) - 1] = share
        return said, weights
