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
    for rows, actions, batch in steps.batches(packer, max_tokens):
        batch = batch.to(policy.device)
        temperature_A = steps.temperature_A[actions].to(policy.device)
        output = policy(batch, temperature_A)
        old_A[actions] = output.logprobs_A.cpu()
        if reference is not None and ref_A is not None:
            ref_A[actions] = reference(batch, temperature_A).logprobs_A.cpu()
        if critic is not None:
            values = critic(batch, batch.value_positions(needs_values), output.hidden)
            value[rows if needs_values == "step" else actions] = values.to(wide).cpu()

    final: dict[int, float] = {}
    if critic is not None:
        for episodes, batch in steps.final_batches(packer, max_tokens):
            batch = batch.to(policy.device)
            hidden = policy(batch).hidden if critic.needs_policy_hidden else None
            values = critic(batch, batch.value_at_N, hidden)
            final.update(zip((episode.order for episode in episodes), values.tolist(), strict=True))
    return Scores(
        old_logprobs_A=old_A,
        ref_logprobs_A=ref_A,
        value_N=value if needs_values == "step" else None,
        value_A=value if needs_values == "token" else None,
        bootstrap_N=torch.tensor([final.get(order, 0.0) for order in steps.order_N.tolist()], dtype=wide),
    )
