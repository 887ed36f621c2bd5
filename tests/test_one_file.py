"""The whole method in one file gives the library's advantages, targets, losses and gradients on the same episodes."""

from __future__ import annotations

import random

import one_file_steppo as one_file
import pytest
import torch

from steppo.advantages import StepGAE
from steppo.batch import CreditBatch
from steppo.losses import ClippedLoss, value_loss
from tests.numeric_helpers import policy_loss

GAMMA, LAMBDA, CLIP, VALUE_CLIP = 0.95, 0.9, 0.1, 0.5


@pytest.fixture
def episodes() -> list[list[one_file.Step]]:
    """Played by a policy that was cloned for a moment; then it moves, so that ratios are not 1."""
    torch.manual_seed(0)
    rng = random.Random(0)
    agent = one_file.Agent()
    one_file.clone_random_commands(agent, rng, updates=40)
    played = one_file.play(agent, [one_file.Corridor(rng) for _ in range(8)])
    for step in (step for episode in played for step in episode):
        step.old_logprobs = torch.randn(len(step.action))
        step.value = rng.gauss(0, 1)
    assert len({len(episode) for episode in played}) > 1
    return played


def credit_batch(episodes: list[list[one_file.Step]]) -> CreditBatch:
    steps = [(number, index, step) for number, episode in enumerate(episodes) for index, step in enumerate(episode)]
    count = len(episodes)
    length_N = torch.tensor([len(step.action) for _, _, step in steps])
    reward_N = torch.tensor([step.reward for _, _, step in steps], dtype=torch.float64)
    reward_A = torch.zeros(int(length_N.sum()), dtype=torch.float64)
    episode_N = torch.tensor([number for number, _, _ in steps])
    return CreditBatch(
        reward_N=reward_N,
        reward_A=reward_A,
        task_reward_N=reward_N,
        task_reward_A=reward_A,
        episode_N=episode_N,
        chain_N=episode_N,
        agent_N=torch.zeros_like(episode_N),
        group_E=torch.arange(count),
        index_N=torch.tensor([index for _, index, _ in steps]),
        length_N=length_N,
        terminated_E=torch.ones(count, dtype=torch.bool),
        bootstrap_E=torch.zeros(count, dtype=torch.float64),
        last_chain_E=torch.arange(count),
        final_reward_E=torch.zeros(count, dtype=torch.float64),
        value_N=torch.tensor([step.value for _, _, step in steps], dtype=torch.float64),
    )


def test_credit_is_the_librarys(episodes: list[list[one_file.Step]]) -> None:
    credit = StepGAE(gamma=GAMMA, gae_lambda=LAMBDA)(credit_batch(episodes))
    one_file.step_gae(episodes, GAMMA, LAMBDA)
    steps = [step for episode in episodes for step in episode]
    assert credit.advantage_N is not None
    assert credit.target_N is not None
    torch.testing.assert_close(torch.tensor([s.advantage for s in steps], dtype=torch.float64), credit.advantage_N)
    torch.testing.assert_close(torch.tensor([s.target for s in steps], dtype=torch.float64), credit.target_N)


def test_losses_and_gradients_are_the_librarys(episodes: list[list[one_file.Step]]) -> None:
    one_file.step_gae(episodes, GAMMA, LAMBDA)
    steps = [step for episode in episodes for step in episode]
    lengths = torch.tensor([len(step.action) for step in steps])
    step_of_A = torch.repeat_interleave(torch.arange(len(steps)), lengths)
    advantage_N = torch.tensor([step.advantage for step in steps])
    old_A = torch.cat([step.old_logprobs for step in steps])
    ones_N = torch.ones(len(steps))

    logprobs_A = (old_A + 0.3 * torch.randn(len(old_A))).requires_grad_()
    theirs = policy_loss(ClippedLoss("step", CLIP, CLIP), logprobs_A, old_A, advantage_N[step_of_A], step_of_A, ones_N)
    [their_gradient] = torch.autograd.grad(theirs.loss / len(steps), logprobs_A)
    ours = one_file.policy_loss(list(logprobs_A.split(lengths.tolist())), steps, CLIP)
    [our_gradient] = torch.autograd.grad(ours, logprobs_A)
    torch.testing.assert_close(ours, theirs.loss / len(steps))
    torch.testing.assert_close(our_gradient, their_gradient)
    assert 0 < float(theirs.clipped_A.float().mean()) < 1  # both sides of the trust region were met

    old_N = torch.tensor([step.value for step in steps])
    values_N = (old_N + torch.randn(len(steps))).requires_grad_()
    target_N = torch.tensor([step.target for step in steps])
    theirs_V = value_loss(values_N, old_N, target_N, ones_N, VALUE_CLIP) / len(steps)
    ours_V = one_file.value_loss(values_N, steps, VALUE_CLIP)
    torch.testing.assert_close(ours_V, theirs_V)
    gradients = [torch.autograd.grad(loss, values_N)[0] for loss in (ours_V, theirs_V)]
    torch.testing.assert_close(*gradients)


def test_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_file.Corridor, "max_steps", 3)
    assert 0.0 <= one_file.main(iterations=1, cloned=5) <= 1.0
    assert "iteration  1: success" in capsys.readouterr().out
