"""Scoring in one pass over packed rows: every number is that of a sequence read by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from steppo.advantages import GRPO, Advantage, StepGAE
from steppo.learner import Learner
from steppo.learner.scoring import score
from steppo.learner.steps import StepTable
from steppo.losses import ObjectiveSettings
from steppo.models import SeparateCritic, SharedCritic, TinyPolicy
from steppo.models.critic import Critic
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from steppo.types import Episode, StopReason
from tests.learner.fakes import ScrambledPacker, make_episode
from tests.numeric_helpers import close


def appended(order: int, lengths: list[int], stop_reason: StopReason, final: bool) -> Episode:
    """A dialogue in a tiny vocabulary: each prompt goes on from the one before, the final one too."""
    rng = np.random.default_rng(order)
    shown = np.arange(2, 8, dtype=np.int32)
    episode = make_episode(order, lengths, stop_reason=stop_reason)
    steps = []
    for step in episode.steps:
        shown = np.concatenate([shown, rng.integers(2, 30, 3)]).astype(np.int32)
        action = rng.integers(2, 30, len(step.action_ids)).astype(np.int32)
        steps.append(dataclasses.replace(step, prompt_ids=shown, action_ids=action, temperature=0.5 + step.index))
        shown = np.concatenate([shown, action])
    return dataclasses.replace(episode, steps=tuple(steps), final_prompt_ids=shown if final else None)


EPISODES = [
    appended(3, [2, 1, 4], StopReason.STEP_LIMIT, final=True),
    appended(1, [3], StopReason.TERMINATED, final=False),
    appended(0, [1, 1], StopReason.STEP_LIMIT, final=False),
    appended(4, [5, 2], StopReason.STEP_LIMIT, final=True),
    appended(2, [], StopReason.STEP_LIMIT, final=True),
]


@pytest.fixture
def policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    return tiny_policy.double()


def built(critic: Critic, policy: TinyPolicy) -> Critic:
    critic.build(policy)
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight)
    return critic.double()


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("packer", [PaddedPacker(), ScrambledPacker(), PrefixTreePacker()])
@pytest.mark.parametrize("critic", [SharedCritic(), SeparateCritic()])
@pytest.mark.parametrize("kind", ["step", "token"])
def test_scores_equal_sequences_read_by_themselves(kind, critic, packer: Packer, max_tokens: int, policy) -> None:
    critic = built(critic, policy)
    reference = policy.frozen_copy()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    table = StepTable.of(EPISODES)
    with torch.no_grad():
        scores = score(table, policy, reference, critic, kind, packer, max_tokens)

        trunk = policy.trunk if isinstance(critic, SharedCritic) else critic.trunk
        for row, step in enumerate(table.records):
            ids = np.concatenate([step.prompt_ids, step.action_ids]).astype(np.int64)
            at = slice(len(step.prompt_ids) - 1, -1)
            tokens = table.tokens_of(np.asarray([row]))
            for model, found in ((policy, scores.old_logprobs_A), (reference, scores.ref_logprobs_A)):
                logits = model.model(torch.from_numpy(ids)[None]).logits[0, at] / step.temperature
                expected = logits.log_softmax(-1)[
                    torch.arange(len(step.action_ids)), torch.from_numpy(step.action_ids).long()
                ]
                close(found[tokens], expected, 1e-9)
            values = critic.head(trunk(torch.from_numpy(ids)[None]).last_hidden_state[0, at])
            close(
                scores.value_N[row] if kind == "step" else scores.value_A[tokens],
                values[0] if kind == "step" else values,
                1e-9,
            )
        for row, order in enumerate(table.order_N.tolist()):
            final = next(episode.final_prompt_ids for episode in EPISODES if episode.order == order)
            value = 0.0
            if final is not None:
                value = critic.head(trunk(torch.from_numpy(final).long()[None]).last_hidden_state[0, -1])
            close(scores.bootstrap_N[row], value, 1e-9)


class Counting(PrefixTreePacker):
    """Sums the tokens of all its rows."""

    tokens = 0

    def pack(self, segments, max_tokens):
        packed = super().pack(segments, max_tokens)
        self.tokens += sum(batch.input_ids_BT.numel() for _, batch in packed)
        return packed


@pytest.mark.parametrize("kept", [[], [2], [0, 1, 3]])
def test_others_read_once_what_the_policy_leaves_out(kept: list[int], policy) -> None:
    """All of it together, or what steps begin with would be read once for those that stay and once more for the others."""
    table, critic, packer = StepTable.of([EPISODES[0], EPISODES[3]]), built(SeparateCritic(), policy), Counting()
    left_out = ~np.isin(np.arange(len(table)), kept)
    with torch.no_grad():
        expected = score(table, policy, policy, critic, "step", PrefixTreePacker(), 10_000)
        scores = score(table, policy, policy, critic, "step", packer, 10_000, left_out)
    apart = Counting()
    apart.pack([table.segments[row] for row in kept], 10_000)
    apart.pack([*table.segments, *table.final_segments], 10_000)
    assert packer.tokens == apart.tokens
    assert scores.left_out_A.tolist() == np.repeat(left_out, table.lengths_N).tolist()
    known = ~scores.left_out_A
    close(scores.old_logprobs_A[known], expected.old_logprobs_A[known], 1e-9)
    for name in ("ref_logprobs_A", "value_N", "bootstrap_N"):
        close(getattr(scores, name), getattr(expected, name), 1e-9)


@pytest.mark.parametrize(
    ("advantage", "critic", "kl", "passes"),
    [
        (GRPO(), None, "reward", (0, 0)),  # compares the episodes of a task, which an evaluation does not promise
        (StepGAE(), SeparateCritic(), "loss", (0, 0)),
        (StepGAE(), SeparateCritic(), "reward", (1, 1)),
        (StepGAE(), SharedCritic(), "loss", (1, 0)),
    ],
)
def test_an_evaluation_reads_what_it_shows_alone(
    advantage: Advantage, critic: Critic | None, kl: str, passes: tuple[int, int], policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of policy and reference: values and advantages are shown, log-probabilities are not."""
    policies = policy, policy.frozen_copy()
    calls: list[TinyPolicy] = []
    forward = TinyPolicy.forward

    def counted(self: TinyPolicy, *args: Any) -> Any:
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(TinyPolicy, "forward", counted)
    built_critic = built(critic, policy) if critic is not None else None
    objective = ObjectiveSettings(kl=kl, kl_coef=0.1)
    shown = Learner(policy, advantage, built_critic, policies[1], objective=objective).score_episodes(EPISODES)
    assert tuple(calls.count(one) for one in policies) == passes
    assert (shown.scores.value_N is not None) == (critic is not None)
    assert (shown.credit.advantage_N is not None) == (critic is not None)


def test_a_final_prompt_costs_its_new_tokens(policy) -> None:
    """Where dialogues are appended, it lies behind its episode."""
    packer, table = Counting(), StepTable.of([EPISODES[0]])
    with torch.no_grad():
        score(table, policy, None, built(SharedCritic(), policy), "step", packer, 10_000)
    assert packer.tokens == len(EPISODES[0].final_prompt_ids)


def test_without_steps_there_is_nothing(policy) -> None:
    table = StepTable.of([])
    with torch.no_grad():
        scores = score(table, policy, None, built(SharedCritic(), policy), "step", PaddedPacker(), 100)
    assert scores.old_logprobs_A.shape == scores.value_N.shape == scores.bootstrap_N.shape == (0,)
