"""Steps as tensors: packed for a model, gathered for credit, cut into microbatches.

Shape suffixes: ``_N`` steps, ``_E`` episodes, ``_A`` action tokens, ``_BT`` rows x tokens (flattened: ``row * T + column``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True, eq=False)
class Segment:
    """Token ids of one step, to be packed: int32 prompt and action (the action may be empty to read a value only).

    ``episode`` (its order) and ``group`` say which segments may begin alike, for packers that share such beginnings.
    """

    prompt_ids: np.ndarray
    action_ids: np.ndarray
    episode: int = 0
    group: int = 0


@dataclass
class TokenBatch:
    """Packed steps, ready for a forward pass. Only packers and models know about rows.

    Attributes:
        input_ids_BT: int64 [B, T].
        position_ids_BT: int64 [B, T].
        until_BT: int64 [1, T], where the only row branches: a token is seen from its own column on, up to this one, which
            no longer sees it. ``None`` = causal along each row.
        predict_at_A: int64, flat position whose logits predict each action token.
        target_A: int64, the action tokens.
        step_of_A: int64 in [0, N), the step of each action token, non-decreasing.
        value_at_N: int64, flat position of each prompt's last token. Several steps may point at one position.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    until_BT: Tensor | None
    predict_at_A: Tensor
    target_A: Tensor
    step_of_A: Tensor
    value_at_N: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """On another device."""
        return replace(self, **_moved(self, device))

    @property
    def num_steps(self) -> int:
        """N."""
        return self.value_at_N.shape[0]

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is to be added to attention scores, [1, 1, T, T]: 0 or -inf; ``None`` where attention is causal."""
        if self.until_BT is None:
            return None
        column_T = torch.arange(self.until_BT.shape[1], device=self.until_BT.device)
        query_T1 = column_T[:, None]
        seen = (column_T <= query_T1) & (query_T1 < self.until_BT[:, None, None, :])
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def block_mask(self) -> BlockMask:
        """The same for ``flex_attention``, which skips blocks that nobody sees; rows must branch."""
        until_BT = self.until_BT
        if until_BT is None:
            raise ValueError("no row branches: causal attention needs no mask")

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < until_BT[row, key])

        rows, width = until_BT.shape
        return create_block_mask(sees, rows, None, width, width, device=until_BT.device)

    def value_positions(self, needs_values: str) -> Tensor:
        """Flat positions where a critic is read: each prompt's end (``step``), or wherever an action token is predicted."""
        return self.value_at_N if needs_values == "step" else self.predict_at_A


@dataclass
class CreditBatch:
    """All that credit assignment may look at: the steps of one iteration over all ranks, in any order.

    An episode may hold several agents. A *chain* is the steps of one of them in one episode, in their order: a trajectory of
    its own. What follows a step is the next one of its chain; no value crosses chains. An episode of one agent is one chain.

    Attributes:
        reward_N: float, reward of each step, with the KL penalty if the reward carries it. The last step of each chain also
            has the final reward of its episode: a sum over several chains has it several times, ``episode_returns`` once.
        reward_A: float, the same by action token: a step's reward sits on its last token, the KL penalty on each.
        task_reward_N: float, reward of each step without the KL penalty.
        task_reward_A: float, the same by action token.
        episode_N: int64, number of the step's episode in [0, E).
        chain_N: int64, number of the step's chain in [0, C). Chains are numbered by episode: those of one have adjacent
            numbers, while their steps may be mixed. With one agent in each episode it is ``episode_N``.
        agent_N: int64, number of the step's agent, the same in all episodes.
        group_E: int64, group of each episode.
        index_N: int64, position of the step in its chain, from 0.
        length_N: int64, action tokens of each step; those of a step stand together, steps in the order of the rows.
        terminated_E: bool, the episode ended as part of its task.
        bootstrap_E: float, value of the state after the last step of a truncated episode; 0 where there is none. It is one
            of that step's chain; the episode's other chains end with 0.
        last_chain_E: int64, chain of each episode's last step.
        final_reward_E: float, what the rewards of each chain's last step hold beside its own.
        value_N: float, value of each step's prompt, for advantages that need step values.
        value_A: float, value before each action token, for advantages that need token values.
        anchor_N: int64, equal for steps of one agent in the same state (``state_key``, or the observation).
        observation_N: The observations' texts, for advantages that ask for them.
    """

    reward_N: Tensor
    reward_A: Tensor
    task_reward_N: Tensor
    task_reward_A: Tensor
    episode_N: Tensor
    chain_N: Tensor
    agent_N: Tensor
    group_E: Tensor
    index_N: Tensor
    length_N: Tensor
    terminated_E: Tensor
    bootstrap_E: Tensor
    last_chain_E: Tensor
    final_reward_E: Tensor
    value_N: Tensor | None = None
    value_A: Tensor | None = None
    anchor_N: Tensor | None = None
    observation_N: list[str] | None = None


@dataclass(frozen=True, eq=False)
class Credit:
    """What credit assignment gives: an advantage by step or by action token, and the critic's targets of the same kind."""

    advantage_N: Tensor | None = None
    advantage_A: Tensor | None = None
    target_N: Tensor | None = None
    target_A: Tensor | None = None


@dataclass
class Microbatch:
    """One forward and backward pass of an update.

    Attributes:
        tokens: The packed steps.
        temperature_A: float, what each action token was sampled with.
        old_logprobs_A: float, log-probabilities when the iteration started; ``None`` where it starts with this pass, whose
            own they are.
        behaviour_logprobs_A: float, those of the engine that sampled.
        ref_logprobs_A: float, the reference policy's; ``None`` without KL.
        advantage_A: float, a step's advantage repeated over its tokens, or the tokens' own.
        weight_A: float, importance weight of each action token: 1 on-policy, 0 where it is not learned from.
        index_N: int64, the steps' indices in this rank's buffer.
        old_value: float [N] or [A], as the critic reads them; ``None`` without critic.
        target: float, same shape.
        update_steps: What sums over steps are divided by: the steps of the whole update, over all microbatches and ranks, or
            of a mean one (``steppo.minibatches``).
        update_tokens: What sums over action tokens are divided by.
        scale: 1, or 0 for a microbatch that only keeps the ranks in step with each other.
    """

    tokens: TokenBatch
    temperature_A: Tensor
    old_logprobs_A: Tensor | None
    behaviour_logprobs_A: Tensor
    ref_logprobs_A: Tensor | None
    advantage_A: Tensor
    weight_A: Tensor
    index_N: Tensor
    old_value: Tensor | None
    target: Tensor | None
    update_steps: float
    update_tokens: float
    scale: float = 1.0

    def to(self, device: torch.device) -> Microbatch:
        """On another device."""
        return replace(self, **_moved(self, device))


def _moved(batch: TokenBatch | Microbatch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in vars(batch).items() if hasattr(value, "to")}
