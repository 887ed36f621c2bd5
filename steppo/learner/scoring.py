"""What the models say of steps: log-probabilities and values, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steppo.batch import TokenBatch
from steppo.learner.steps import StepTable
from steppo.models import Critic, Policy
from steppo.models.policy import PolicyOutput
from steppo.packing import Packer

ValueKind = Literal["none", "step", "token"]
Reference = Callable[[TokenBatch, Tensor], PolicyOutput]


@dataclass(frozen=True, eq=False)
class Scores:
    """What policy, reference and critic say when an iteration starts, on the CPU.

    Attributes:
        old_logprobs_A: By action token, in the order of the table.
        left_out_A: bool, where nobody has asked for them.
        ref_logprobs_A: The same from the reference policy, if there is one.
        value_N: By step, if the credit wants step values.
        value_A: By action token, if it wants token values.
        bootstrap_N: Value after the last step of the step's episode, 0 where there is no state to value.
    """

    old_logprobs_A: Tensor
    left_out_A: Tensor
    ref_logprobs_A: Tensor | None
    value_N: Tensor | None
    value_A: Tensor | None
    bootstrap_N: Tensor


def score(
    steps: StepTable,
    policy: Policy,
    reference: Reference | None,
    critic: Critic | None,
    needs_values: ValueKind,
    packer: Packer,
    max_tokens: int,
    left_out_N: np.ndarray | None = None,
) -> Scores:
    """Log-probabilities under policy and reference, and values, in batches of at most ``max_tokens``.

    ``left_out_N`` bool, the steps whose log-probabilities under the policy nobody needs now.
    """
    wide = torch.promote_types(policy.dtype, torch.float32)
    old_A = torch.full((steps.num_tokens,), torch.nan, dtype=wide)
    ref_A = None if reference is None else torch.zeros_like(old_A)
    value = torch.zeros(len(steps) if needs_values == "step" else steps.num_tokens, dtype=wide)
    # The prompts after the last steps lie in the same batches: where dialogues are appended they cost a few tokens.
    finals = [] if critic is None else steps.final_segments
    segments = [*steps.segments, *finals]
    if left_out_N is None:
        left_out_N = np.zeros(len(steps), dtype=bool)
    # Who reads which: all the same, or the policy what is not left out and the others all, once.
    everything, kept = np.arange(len(segments)), np.flatnonzero(~left_out_N)
    passes = [(everything, True, True)] if len(kept) == len(steps) else [(kept, True, False), (everything, False, True)]
    bootstrap: dict[int, float] = {}
    for places, reads_policy, reads_others in passes:
        if not reads_policy and reference is None and critic is None:
            continue
        for rows, batch in packer.pack([segments[place] for place in places], max_tokens):
            rows = places[rows]
            is_step = rows < len(steps)
            actions = steps.tokens_of(rows[is_step])
            batch = batch.to(policy.device)
            temperature_A = steps.temperature_A[actions].to(policy.device)
            hidden = None
            if reads_policy:
                hidden, logprobs_A, _ = policy(batch, temperature_A)
                old_A[actions] = logprobs_A.cpu()
            if not reads_others:
                continue
            if reference is not None and ref_A is not None:
                ref_A[actions] = reference(batch, temperature_A).logprobs_A.cpu()
            if critic is not None:
                of_step_N = torch.from_numpy(is_step).to(policy.device)
                read_at = batch.value_at_N[of_step_N] if needs_values == "step" else batch.predict_at_A
                values = critic(batch, torch.cat([read_at, batch.value_at_N[~of_step_N]]), hidden).to(wide).cpu()
                value[torch.from_numpy(rows[is_step]) if needs_values == "step" else actions] = values[: len(read_at)]
                orders = (finals[row - len(steps)].episode for row in rows[~is_step].tolist())
                bootstrap.update(zip(orders, values[len(read_at) :].tolist(), strict=True))
    return Scores(
        old_logprobs_A=old_A,
        left_out_A=torch.from_numpy(np.repeat(left_out_N, steps.lengths_N)),
        ref_logprobs_A=ref_A,
        value_N=value if needs_values == "step" else None,
        value_A=value if needs_values == "token" else None,
        bootstrap_N=torch.tensor([bootstrap.get(order, 0.0) for order in steps.order_N.tolist()], dtype=wide),
    )
