"""What the tests of the numerical parts share: distances, random numbers, batches out of plain records."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from steppo.advantages import Advantage, StepGAE, TokenGAE
from steppo.batch import CreditBatch
from steppo.losses import LossInputs, PolicyLoss, token_weights
from steppo.losses.functional import Aggregation
from tests.slow_credit import Ending, Turn, rows_by_chain, rows_by_episode, with_final_rewards

# Property tests: few examples, the same ones on every run, no time limit on one of them.
FEW = settings(deadline=None, max_examples=25, derandomize=True)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    """Asserts equal shapes and element-wise equality, absolute or relative; for float64."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts that the norm of the difference is small beside the norm of what is expected; for float32."""
    expected = expected.double()
    assert actual.shape == expected.shape
    difference = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    assert difference <= tolerance, f"differs by {difference:.2e} of its norm"


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.from_numpy(rng.standard_normal(shape))


def gae(by_token: bool, gamma: float, gae_lambda: float, bootstrap: bool, even: bool) -> Advantage:
    """GAE by step or by token; ``even``: each episode counts once in the whitening."""
    if by_token:
        return TokenGAE(gamma, gae_lambda, bootstrap, "episodes" if even else "tokens")
    return StepGAE(gamma, gae_lambda, bootstrap, "episodes" if even else "steps")


def steps_of(lengths: list[int]) -> Tensor:
    """``step_of_A`` of steps with so many action tokens."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


class Summed(NamedTuple):
    """A policy loss over a microbatch: the weighted sum, and ``ratio_A`` and ``clipped_A`` as it gives them."""

    loss: Tensor
    ratio_A: Tensor
    clipped_A: Tensor


def policy_loss(
    loss: PolicyLoss,
    logprobs_A: Tensor,
    old_A: Tensor,
    advantage_A: Tensor,
    step_of_A: Tensor,
    weight_N: Tensor,
    aggregation: Aggregation = "step-mean",
    behaviour_A: Tensor | None = None,
) -> Summed:
    """What a loss adds up to. Sampled by the old policy unless ``behaviour_A`` is given."""
    weight_A = token_weights(step_of_A, weight_N, aggregation)
    behaviour_A = old_A if behaviour_A is None else behaviour_A
    inputs = LossInputs(logprobs_A, old_A, behaviour_A, advantage_A, step_of_A, len(weight_N), weight_A)
    output = loss(inputs)
    return Summed((output.loss_A * weight_A).sum(), output.ratio_A, output.clipped_A)


def to_batch(turns: list[Turn], endings: list[Ending], dtype: torch.dtype = torch.float64) -> CreditBatch:
    """The rows of a batch in the order given."""
    observation_N = [turn.observation for turn in turns]
    seen = [(turn.agent, turn.observation) for turn in turns]
    anchors = {pair: number for number, pair in enumerate(dict.fromkeys(seen))}
    chains = list(rows_by_chain(turns).values())
    chain_of = {row: number for number, rows in enumerate(chains) for row in rows}
    place_of = {row: place for rows in chains for place, row in enumerate(rows)}
    episodes = sorted(rows_by_episode(turns).items())
    turns = with_final_rewards(turns, endings)
    return CreditBatch(
        reward_N=torch.tensor([turn.reward + turn.penalty for turn in turns], dtype=dtype),
        reward_A=torch.tensor([reward for turn in turns for reward in turn.totals], dtype=dtype),
        task_reward_N=torch.tensor([turn.reward for turn in turns], dtype=dtype),
        task_reward_A=torch.tensor([reward for turn in turns for reward in turn.rewards], dtype=dtype),
        episode_N=torch.tensor([turn.episode for turn in turns]),
        chain_N=torch.tensor([chain_of[row] for row in range(len(turns))]),
        agent_N=torch.tensor([turn.agent for turn in turns]),
        group_E=torch.tensor([ending.group for ending in endings]),
        index_N=torch.tensor([place_of[row] for row in range(len(turns))]),
        length_N=torch.tensor([len(turn.rewards) for turn in turns]),
        terminated_E=torch.tensor([ending.terminated for ending in endings]),
        bootstrap_E=torch.tensor([ending.bootstrap for ending in endings], dtype=dtype),
        last_chain_E=torch.tensor([chain_of[rows[-1]] for _, rows in episodes]),
        final_reward_E=torch.tensor([ending.final_reward for ending in endings], dtype=dtype),
        value_N=torch.tensor([turn.value for turn in turns], dtype=dtype),
        value_A=torch.tensor([value for turn in turns for value in turn.values], dtype=dtype),
        anchor_N=torch.tensor([anchors[pair] for pair in seen]),
        observation_N=observation_N,
    )
