"""What the models say of steps: log-probabilities and values, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
        ref_logprobs_A: The same from the reference policy, if there is one.
        value_N: By step, if the credit wants step values.
        value_A: By action token, if it wants token values.
        bootstrap_N: Value after the last step of the step's episode, 0 where there is no state to value.
    """

    old_logprobs_A: Tensor
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
) -> Scores:
    """Log-probabilities under policy and reference, and values, in batches of at most ``max_tokens``."""
    wide = torch.promote_types(policy.dtype, torch.float32)
    old_A = torch.zeros(steps.num_tokens, dtype=wide)
    ref_A = None if reference is None else torch.zeros_like(old_A)
    value = torch.zeros(len(steps) if needs_values == "step" else steps.num_tokens, dtype=wide)
    # The prompts after the last steps lie in the same batches: where dialogues are appended they cost a few tokens.
    finals = [] if critic is None else steps.final_segments
    bootstrap: dict[int, float] = {}
    for rows, batch in packer.pack([*steps.segments, *finals], max_tokens):
        mine = torch.from_numpy(rows < len(steps))
        chosen = rows[rows < len(steps)]
        actions = steps.tokens_of(chosen)
        batch = batch.to(policy.device)
        temperature_A = steps.temperature_A[actions].to(policy.device)
        output = policy(batch, temperature_A)
        old_A[actions] = output.logprobs_A.cpu()
        if reference is not None and ref_A is not None:
            ref_A[actions] = reference(batch, temperature_A).logprobs_A.cpu()
        if critic is not None:
            ends_N = batch.value_at_N[mine.to(policy.device)]
            read_at = ends_N if needs_values == "step" else batch.predict_at_A
            at_end = batch.value_at_N[~mine.to(policy.device)]
            values = critic(batch, torch.cat([read_at, at_end]), output.hidden).to(wide).cpu()
            value[torch.from_numpy(chosen) if needs_values == "step" else actions] = values[: len(read_at)]
            orders = (finals[row - len(steps)].episode for row in rows[rows >= len(steps)].tolist())
            bootstrap.update(zip(orders, values[len(read_at) :].tolist(), strict=True))
    return Scores(
        old_logprobs_A=old_A,
        ref_logprobs_A=ref_A,
        value_N=value if needs_values == "step" else None,
        value_A=value if needs_values == "token" else None,
        bootstrap_N=torch.tensor([bootstrap.get(order, 0.0) for order in steps.order_N.tolist()], dtype=wide),
    )
