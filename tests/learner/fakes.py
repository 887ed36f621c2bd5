"""Fakes to follow through the learner: every column must stay with its step.

Episodes whose token ids say where they are from: token k of step t of episode e is ``1000 e + 50 t + k``, and a step's
prompt ends with the step's own code, ``1000 e + 50 t``. All scores are functions of these codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steppo.advantages import Advantage
from steppo.batch import Credit, Segment, TokenBatch
from steppo.learner import Experience, Weights
from steppo.learner.credit import AssignedCredit, assign_credit
from steppo.learner.scoring import Scores
from steppo.learner.steps import StepTable
from steppo.minibatches import StepColumns
from steppo.packing import Packer, PaddedPacker
from steppo.types import Episode, Step, StopReason

WIDE = 10**6  # tokens: all steps in one microbatch


class ScrambledPacker(Packer):
    """Packs in an order that has nothing to do with the steps' lengths."""

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        order = np.random.default_rng(len(segments)).permutation(len(segments))
        packed = PaddedPacker().pack([segments[row] for row in order], max_tokens)
        return [(order[rows], batch) for rows, batch in reversed(packed)]


def make_episode(
    order: int,
    lengths: Sequence[int],
    rewards: Sequence[float] | None = None,
    stop_reason: StopReason = StopReason.TERMINATED,
    group_size: int = 1,
    final: bool = False,
) -> Episode:
    """Steps with so many action tokens; rewards depend on the place unless given."""
    steps = []
    for index, tokens in enumerate(lengths):
        code = 1000 * order + 50 * index
        steps.append(
            Step(
                prompt_ids=np.asarray([7] * (1 + code % 3) + [code], dtype=np.int32),
                action_ids=np.arange(code, code + tokens, dtype=np.int32),
                behaviour_logprobs=-np.arange(code, code + tokens, dtype=np.float32) / 1024,
                reward=float(np.sin(code + 1)) if rewards is None else rewards[index],
                index=index,
                finish_reason="stop",
                terminated=index == len(lengths) - 1 and stop_reason == StopReason.TERMINATED,
                truncated=index == len(lengths) - 1 and stop_reason != StopReason.TERMINATED,
                action_valid=True,
                observation=f"room {code % 4}",
                action="",
                temperature=1 + code / 1024,
                policy_version=0,
            )
        )
    return Episode(
        id=str(order),
        order=order,
        group_id=order // group_size,
        task_id="",
        steps=tuple(steps),
        stop_reason=stop_reason,
        final_prompt_ids=np.asarray([7, 7, 900_000 + order], dtype=np.int32) if final else None,
        error="broken" if stop_reason.failed else "",
    )


def codes_N(steps: StepTable) -> list[int]:
    return [int(step.prompt_ids[-1]) for step in steps.records]


def codes_A(steps: StepTable) -> Tensor:
    """Codes of all action tokens in the order of the table."""
    ids = [torch.from_numpy(step.action_ids) for step in steps.records]
    return torch.cat(ids).double() if ids else torch.zeros(0, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Steps and what fake models say of them."""

    steps: StepTable
    scores: Scores

    def replace(self, **columns: Any) -> Scored:
        """With other scores."""
        return Scored(self.steps, dataclasses.replace(self.scores, **columns))

    def assign(self, scheme: Advantage, kl_coef: float = 0.0) -> AssignedCredit:
        """Credit over all ranks."""
        return assign_credit(self.steps, self.scores, scheme, kl_coef)

    def experience(self, credit: Credit | AssignedCredit) -> Experience:
        """With credit, of this rank alone or over all; token weights are functions of the codes."""
        tokens = codes_A(self.steps)
        weights = Weights(1 + tokens / 4096, torch.ones_like(tokens).bool())
        if isinstance(credit, AssignedCredit):
            (columns, mine_N), episodes = self.steps.over_ranks(), len(credit.batch.group_E)
            return Experience(self.steps, self.scores, weights, credit.mine, mine_N, columns, episodes, {})
        places = np.arange(len(self.steps))
        columns = StepColumns(self.steps.order_N, self.steps.group_N, self.steps.lengths_N)
        return Experience(self.steps, self.scores, weights, credit, places, columns, len(self.steps.episodes), {})


def scored(episodes: Sequence[Episode], values: str = "step", bootstrap: dict[int, float] | None = None) -> Scored:
    """``bootstrap`` gives the value after the last step of some episodes, by their order."""
    table, after = StepTable.of(episodes), bootstrap or {}
    tokens = codes_A(table)
    steps = torch.tensor(codes_N(table), dtype=torch.float64)
    scores = Scores(
        old_logprobs_A=-tokens / 1024,
        left_out_A=torch.zeros_like(tokens, dtype=torch.bool),
        ref_logprobs_A=-tokens / 1024 + torch.cos(tokens),
        value_N=torch.cos(steps) if values == "step" else None,
        value_A=torch.cos(tokens) if values == "token" else None,
        bootstrap_N=torch.tensor([after.get(order, 0.0) for order in table.order_N.tolist()], dtype=torch.float64),
    )
    return Scored(table, scores)


# Lengths and endings of many kinds, broken episodes among them, and one that has no step.
EPISODES = [
    make_episode(0, [3, 1, 2]),
    make_episode(1, [2]),
    make_episode(2, [1, 4, 1, 1], stop_reason=StopReason.STEP_LIMIT, final=True),
    make_episode(3, [2, 2], stop_reason=StopReason.ENV_ERROR),
    make_episode(4, [5, 1]),
    make_episode(5, [], stop_reason=StopReason.CONTEXT_OVERFLOW),
    make_episode(6, [1, 1, 1], stop_reason=StopReason.CONTEXT_OVERFLOW),
    make_episode(7, [4], stop_reason=StopReason.ENGINE_ERROR),
    make_episode(8, [2, 6], stop_reason=StopReason.STEP_LIMIT, final=True),
    make_episode(9, [1, 1, 1, 1, 1]),
    make_episode(10, [2, 1], stop_reason=StopReason.ABORTED),
]
LEARNED = [0, 1, 2, 4, 6, 8, 9]
LEARNED_CODES = [1000 * order + 50 * index for order in LEARNED for index in range(len(EPISODES[order].steps))]
BOOTSTRAP = {2: 0.75, 8: -1.5}


def shares_of(world: int) -> list[list[Episode]]:
    """Unequal shares: whole groups in turn, as tasks are dealt out."""
    return [EPISODES[rank::world] for rank in range(world)]


SHARES = {
    "2 ranks": shares_of(2),
    "3 ranks": shares_of(3),
    "in one piece": [EPISODES[4:], EPISODES[:4]],
    "one rank without a step": [EPISODES[:3], [EPISODES[3], EPISODES[5]], EPISODES[6:], EPISODES[4:5]],
}
