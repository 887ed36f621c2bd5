"""What the models say of a buffer's steps: log-probabilities and values, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from steppo.buffer import Scores, StepBuffer
from steppo.learner import Correction
from steppo.models import Critic, Policy
from steppo.models.policy import PolicyOutput
from steppo.types import TokenBatch

ValueKind = Literal["none", "step", "token"]


def score(
    buffer: StepBuffer,
    policy: Policy,
    reference: Callable[[TokenBatch, Tensor], PolicyOutput] | None,
    critic: Critic | None,
    needs_values: ValueKind,
    correction: Correction,
) -> Scores:
    """Log-probabilities under policy and reference, values and importance weights, of all steps of a buffer."""
    wide = torch.promote_types(policy.dtype, torch.float32)
    old_A = torch.zeros(buffer.num_tokens, dtype=wide)
    ref_A = None if reference is None else torch.zeros_like(old_A)
    value = torch.zeros(len(buffer.steps) if needs_values == "step" else buffer.num_tokens, dtype=wide)
    temperatures = buffer.temperatures() if buffer.steps else torch.zeros(0)
    for steps, actions, batch in buffer.batches():
        batch = _to(batch, policy.device)
        temperature_A = temperatures[actions].to(policy.device)
        output = policy(batch, temperature_A)
        old_A[actions] = output.logprobs_A.cpu()
        if reference is not None and ref_A is not None:
            ref_A[actions] = reference(batch, temperature_A).logprobs_A.cpu()
        if critic is not None:
            values = critic(batch, batch.value_positions(needs_values), output.hidden)
            value[steps if needs_values == "step" else actions] = values.to(wide).cpu()

    final: dict[int, float] = {}
    if critic is not None:
        for episodes, batch in buffer.final_batches():
            batch = _to(batch, policy.device)
            hidden = policy(batch).hidden if critic.needs_policy_hidden else None
            values = critic(batch, batch.value_at_N, hidden)
            final.update(zip((episode.order for episode in episodes), values.tolist(), strict=True))
    weights = correction(buffer.behaviour_logprobs().to(wide), old_A, buffer.step_of_tokens(), len(buffer.steps))
    return Scores(
        old_logprobs_A=old_A,
        ref_logprobs_A=ref_A,
        value_N=value if needs_values == "step" else None,
        value_A=value if needs_values == "token" else None,
        bootstrap_N=torch.tensor([final.get(order, 0.0) for order in buffer.order_N.tolist()], dtype=wide),
        weight_A=weights.weight_A * weights.keep_A,
    )


def _to(batch: TokenBatch, device: torch.device) -> TokenBatch:
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)
