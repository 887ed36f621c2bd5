"""Episodes of several agents: credit runs within the steps of one agent, and what the episode earned counts once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from callbacks import RolloutCallback
from callbacks.transcript import as_text
from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE, whiten
from steppo.advantages.base import episode_returns
from steppo.batch import Credit, CreditBatch
from steppo.metrics import EpisodeStatistics
from steppo.models import TinyPolicy
from steppo.transcripts import episode_records
from steppo.types import Episode, StopReason
from tests.advantages.test_group_advantages import SCHEMES, advantage, by_turn, each
from tests.learner.fakes import make_episode, scored
from tests.learner.test_credit import assert_equal
from tests.numeric_helpers import FEW, close, gae, normal, to_batch
from tests.slow_credit import Ending, Turn, slow_credit

ALL: dict[str, tuple[Advantage, str]] = {
    "step": (StepGAE(0.9, 0.8, bootstrap_truncated=True), "step"),
    "token": (TokenGAE(0.9, 0.8, bootstrap_truncated=True), "token"),
    **{name: (scheme, "none") for name, (scheme, _) in SCHEMES.items()},
}
EACH = pytest.mark.parametrize(("scheme", "kind"), ALL.values(), ids=list(ALL))


# --- a planner and a worker ---


def team(
    order: int,
    agents: Sequence[str],
    rewards: Sequence[float],
    final_reward: float = 0.0,
    stop_reason: StopReason = StopReason.TERMINATED,
    tokens: Sequence[int] | None = None,
    group_size: int = 1,
) -> Episode:
    """An episode whose steps are taken by these agents, one token each unless given."""
    episode = make_episode(order, tokens or [1] * len(agents), rewards, stop_reason, group_size)
    steps = [
        dataclasses.replace(step, agent_id=agent, observation="all see this")
        for step, agent in zip(episode.steps, agents, strict=True)
    ]
    return dataclasses.replace(episode, steps=tuple(steps), final_reward=final_reward)


def credited(episodes: Sequence[Episode], scheme: Advantage, values: Tensor | None = None, after: float = 0.0) -> Any:
    """What is assigned to the episodes' steps, whose values are 0 unless given; ``after`` follows the first episode."""
    kind = scheme.needs_values
    played = scored(episodes, kind, {episodes[0].order: after})
    if kind == "step":
        played = played.replace(value_N=torch.zeros(len(played.steps), dtype=torch.float64) if values is None else values)
    if kind == "token":
        zeros = torch.zeros(played.steps.num_tokens, dtype=torch.float64)
        played = played.replace(value_A=zeros if values is None else values)
    return played.assign(scheme)


def target(credit: Credit) -> Tensor:
    """The critic's targets, by step or by token."""
    found = credit.target_A if credit.target_N is None else credit.target_N
    assert found is not None
    return found


# The planner plans, the worker works twice, the planner ends it. All get 4 at the end: the episode's return is 2 + 4.
AGENTS, REWARDS = ["planner", "worker", "worker", "planner"], [0.0, 1.0, -1.0, 2.0]
TEAM = team(0, AGENTS, REWARDS, 4.0)


def test_the_batch_by_hand() -> None:
    """Behind an episode of the worker alone, which ends in a step of two tokens."""
    alone = team(1, ["worker", "worker"], [0.5, 0.0], 8.0, tokens=[1, 2])
    batch = credited([alone, TEAM], GRPO()).batch
    assert batch.episode_N.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.chain_N.tolist() == [0, 1, 1, 0, 2, 2]
    assert batch.agent_N.tolist() == [0, 1, 1, 0, 1, 1]
    assert batch.index_N.tolist() == [0, 0, 1, 1, 0, 1]
    assert batch.last_chain_E.tolist() == [0, 2]
    assert batch.final_reward_E.tolist() == [4.0, 8.0]
    by_step, by_token = [0.0, 1.0, 3.0, 6.0, 0.5, 8.0], [0.0, 1.0, 3.0, 6.0, 0.5, 0.0, 8.0]
    assert batch.reward_N.tolist() == batch.task_reward_N.tolist() == by_step
    assert batch.reward_A.tolist() == batch.task_reward_A.tolist() == by_token
    assert episode_returns(batch).task.tolist() == [TEAM.episode_return, alone.episode_return] == [6.0, 8.5]
    planner, worker = batch.anchor_N[0].item(), batch.anchor_N[1].item()
    assert batch.anchor_N.tolist() == [planner, worker, worker, planner, worker, worker]
    assert planner != worker


def test_gae_by_hand() -> None:
    """gamma 1/2, values 0. Planner: 0 + 6/2, 2 + 4. Worker: 1 + 3/2, -1 + 4."""
    for scheme in (StepGAE(0.5), TokenGAE(0.5)):
        credit = credited([TEAM], scheme).credit
        expected = torch.tensor([3.0, 2.5, 3.0, 6.0], dtype=torch.float64)
        given = credit.advantage_A if credit.advantage_N is None else credit.advantage_N
        close(target(credit), expected)
        close(given, whiten(expected))


def test_the_next_value_by_hand() -> None:
    """gamma 1/2, lambda 0: the value of one's own next step. Planner: 0 + 8/2, 6. Worker: 1 + 4/2, 3."""
    values = torch.tensor([100.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    for scheme in (StepGAE(0.5, 0.0), TokenGAE(0.5, 0.0)):
        credit = credited([TEAM], scheme, values).credit
        close(target(credit), [4.0, 3.0, 3.0, 6.0])


@pytest.mark.parametrize("reason", [StopReason.STEP_LIMIT, StopReason.CONTEXT_OVERFLOW])
def test_what_follows_a_cut_is_the_last_steps_agents(reason: StopReason) -> None:
    """A value of 16 after it: 16/2 more for the planner's last step, 16/4 for its first, none for the worker."""
    cut = team(0, AGENTS, REWARDS, 4.0, reason)
    other = team(1, ["worker"], [9.0])
    for scheme in (StepGAE(0.5, bootstrap_truncated=True), TokenGAE(0.5, bootstrap_truncated=True)):
        credit = credited([cut, other], scheme, after=16.0).credit
        close(target(credit), [7.0, 2.5, 3.0, 14.0, 9.0])
        # Cut before the planner came again: 0 + 4 for it, and 16/2 and 16/4 more for the worker.
        steps = credited([team(0, AGENTS[:3], REWARDS[:3], 4.0, reason), other], scheme, after=16.0)
        assert steps.batch.last_chain_E.tolist() == [1, 2]
        close(target(steps.credit), [4.0, 6.5, 11.0, 9.0])


def test_token_returns_by_hand() -> None:
    """gamma 1/2; the worker's last step has two tokens: planner 3, 6; worker 1 + 1.5/2, then 3/2 and 3."""
    episode = team(0, AGENTS, REWARDS, 4.0, tokens=[1, 1, 2, 1])
    expected = torch.tensor([3.0, 1.75, 1.5, 3.0, 6.0], dtype=torch.float64)
    close(credited([episode], ReinforcePP(0.5)).credit.advantage_A, whiten(expected))
    close(credited([episode], TokenGAE(0.5)).credit.target_A, expected)


def test_groups_by_hand() -> None:
    """Returns 6, of a team, and 2, of the worker alone. All steps of an agent saw the same."""
    episodes = [
        team(0, AGENTS, REWARDS, 4.0, group_size=2),
        team(1, ["worker", "worker"], [-2.0, 0.0], 4.0, group_size=2),
    ]
    for scheme, expected in (
        (GRPO(scale_by_std=False), [2.0] * 4 + [-2.0] * 2),
        (RLOO(), [4.0] * 4 + [-4.0] * 2),
        (ReinforcePPBaseline(), whiten(torch.tensor([2.0] * 4 + [-2.0] * 2, dtype=torch.float64))),
    ):
        close(credited(episodes, scheme).credit.advantage_N, expected)
    # gamma 1/2. Planner: G = 3, 6, mean 4.5. Worker: 2.5, 3 and, alone, 0, 4; mean 2.375.
    for similarity in (1.0, 0.9):
        credit = credited(episodes, GiGPO(0.5, scale_by_std=False, similarity=similarity)).credit
        close(credit.advantage_N, [2 - 1.5, 2 + 0.125, 2 + 0.625, 2 + 1.5, -2 - 2.375, -2 + 1.625])


# --- against the loops ---

# A step: its agent and its tokens. An episode: group, how it ends, its steps.
STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=8)
FINALS = st.sampled_from([0.0, 0.0, 1.0, -0.5])
EPISODES = st.lists(st.tuples(st.sampled_from([7, 2]), st.booleans(), FINALS, STEPS), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**16)


def turns_of(episodes: list, seed: int, ties: bool = False) -> tuple[list[Turn], list[Ending]]:
    """Shuffled rows. With ``ties`` rewards are of a few sizes, so that returns are equal now and then."""
    rng = np.random.default_rng(seed)
    turns = []
    for number, (_, _, _, steps) in enumerate(episodes):
        for index, (agent, tokens) in enumerate(steps):
            rewards = rng.choice([0.0, 1.0, -0.25], size=tokens).tolist() if ties else normal(rng, tokens).tolist()
            values, penalties = normal(rng, 2, tokens).tolist()
            seen = ("", "ab", "abb", "the cellar")[rng.integers(4)]
            turns.append(Turn(number, index, rewards, values, values[0] + 1, seen, penalties, agent))
    endings = [Ending(ended, float(rng.standard_normal()), group, final) for group, ended, final, _ in episodes]
    return [turns[row] for row in rng.permutation(len(turns))], endings


@pytest.mark.parametrize("by_token", [False, True], ids=["step", "token"])
@FEW
@given(EPISODES, SEEDS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.9, 1.0]), st.booleans(), st.booleans())
def test_gae_equals_a_loop(by_token, episodes, seed, gamma, gae_lambda, bootstrap, even):
    turns, endings = turns_of(episodes, seed)
    credit = gae(by_token, gamma, gae_lambda, bootstrap, even)(to_batch(turns, endings))
    given = credit.advantage_A if by_token else credit.advantage_N
    expected, expected_target = slow_credit(turns, endings, gamma, gae_lambda, bootstrap, by_token, even)
    close(given, expected)
    close(target(credit), expected_target)


@pytest.mark.parametrize(("scheme", "slow"), SCHEMES.values(), ids=list(SCHEMES))
@FEW
@given(EPISODES, SEEDS, st.booleans())
def test_schemes_equal_a_loop(scheme, slow, episodes, seed, ties):
    turns, endings = turns_of(episodes, seed, ties)
    close(advantage(scheme, turns, endings), slow(turns, endings))


@each(SCHEMES)
@FEW
@given(EPISODES, SEEDS)
def test_the_order_of_rows_does_not_matter(scheme, episodes, seed):
    turns, endings = turns_of(episodes, seed)
    rows = np.random.default_rng(seed + 1).permutation(len(turns))
    straight = by_turn(scheme, turns, endings)
    close(advantage(scheme, [turns[row] for row in rows], endings), torch.cat([straight[row] for row in rows]))


# --- what agents and chains promise ---


def played(seed: int, agents: Sequence[str] = ("agent", "critic", "searcher"), final: bool = True) -> list[Episode]:
    """Random episodes in groups of three, in any order; some are cut, some failed."""
    rng = np.random.default_rng(seed)
    episodes = []
    for order in range(12):
        steps = int(rng.integers(1, 8))
        lengths = rng.integers(1, 5, size=steps).tolist()
        rewards = rng.choice([0.0, 1.0, -0.5, 0.1], size=steps).tolist()
        reason = rng.choice([StopReason.TERMINATED, StopReason.STEP_LIMIT, StopReason.ENV_ERROR], p=[0.6, 0.3, 0.1])
        episode = make_episode(order, lengths, rewards, StopReason(reason), group_size=3)
        own = tuple(dataclasses.replace(step, agent_id=str(rng.choice(list(agents)))) for step in episode.steps)
        episodes.append(dataclasses.replace(episode, steps=own, final_reward=float(final and rng.choice([0.0, 1.0, 0.3]))))
    return [episodes[row] for row in rng.permutation(len(episodes))]


def assign(episodes: Sequence[Episode], scheme: Advantage, kind: str, kl_coef: float = 0.05) -> Any:
    return scored(episodes, kind, {order: order - 3.0 for order in range(12)}).assign(scheme, kl_coef)


@EACH
@pytest.mark.parametrize("names", [("b", "a", "c"), ("", "\0", " "), ("agent:1", "agent", "1:agent"), ("é", "漢", "ß")])
def test_names_do_not_matter(scheme: Advantage, kind: str, names: Sequence[str]) -> None:
    """To the last bit, in the batch too but for the anchors."""
    episodes = played(1)
    to = dict(zip(("agent", "critic", "searcher"), names, strict=True))
    renamed = [
        dataclasses.replace(e, steps=tuple(dataclasses.replace(s, agent_id=to[s.agent_id]) for s in e.steps))
        for e in episodes
    ]
    before, after = assign(episodes, scheme, kind), assign(renamed, scheme, kind)
    assert len(set(before.batch.agent_N.tolist())) == 3
    assert_equal(after.credit, before.credit)
    assert_equal(dataclasses.replace(after.batch, anchor_N=before.batch.anchor_N), before.batch)


@EACH
@pytest.mark.parametrize("name", ["agent", "somebody else"])
def test_one_agent_is_one_chain(scheme: Advantage, kind: str, name: str) -> None:
    """With a final reward it is as if the last step had earned it, but for rounding."""
    episodes = played(2, [name])
    batch = assign(episodes, scheme, kind).batch
    assert batch.chain_N.tolist() == batch.episode_N.tolist()
    assert batch.last_chain_E.tolist() == list(range(len(batch.group_E)))
    assert batch.index_N.tolist() == [i for length in torch.bincount(batch.episode_N).tolist() for i in range(length)]
    assert not batch.agent_N.any()
    moved = []
    for episode in episodes:
        *before, last = episode.steps
        last = dataclasses.replace(last, reward=last.reward + episode.final_reward)
        moved.append(dataclasses.replace(episode, steps=(*before, last), final_reward=0.0))
    expected, found = assign(moved, scheme, kind).credit, assign(episodes, scheme, kind).credit
    for column in ("advantage_N", "advantage_A", "target_N", "target_A"):
        if getattr(expected, column) is not None:
            close(getattr(found, column), getattr(expected, column))


@pytest.mark.parametrize("kind", ["step", "token"])
@FEW
@given(SEEDS)
def test_agents_apart_are_episodes_apart(kind: str, seed: int) -> None:
    """What two agents of an episode get before whitening is what they would get each in one of their own."""
    scheme = (StepGAE if kind == "step" else TokenGAE)(0.9, 0.8, bootstrap_truncated=True)
    rng = np.random.default_rng(seed)
    steps = [(int(agent), int(rng.integers(1, 4))) for agent in rng.integers(0, 2, size=rng.integers(2, 9))]
    [*_, (last, _)] = steps
    turns, [ending] = turns_of([(0, False, 0.0, steps)], seed)
    together = scheme(to_batch(turns, [ending]))
    episode_of = {agent: number for number, agent in enumerate(sorted({agent for agent, _ in steps}))}
    places = {agent: [index for index, (other, _) in enumerate(steps) if other == agent] for agent in episode_of}
    apart = [
        dataclasses.replace(row, episode=episode_of[row.agent], index=places[row.agent].index(row.index), agent=0)
        for row in turns
    ]
    endings = [dataclasses.replace(ending, terminated=agent != last) for agent in episode_of]
    split = scheme(to_batch(apart, endings))
    close(target(together), target(split))


@pytest.mark.parametrize(
    ("agents", "rewards", "final"),
    [
        (["a", "b", "c"], [0.0, 0.0, 0.0], 0.3),
        (["a", "b", "a", "b"], [0.1, 0.2, -0.1, -0.2], 0.3),
        (["a", "b"], [-0.3, -0.3], 0.9),
        (["a"], [0.1], 0.2),
        (["a", "b", "c", "d"], [-1e6, 0.0, 0.0, 0.3], 1e6),
        (list("abcdefgh"), [0.0] * 8, 0.3),
        (["a"], [0.3 - 1e6], 1e6),  # what cancels leaves rounding
    ],
)
def test_a_final_reward_counts_once(agents: list[str], rewards: list[float], final: float) -> None:
    """Beside an agent alone that earned as much in one step: there is nothing to tell them apart by."""
    episode, other = team(0, agents, rewards, final, group_size=2), make_episode(1, [1], [0.3], group_size=2)
    assert episode.episode_return == pytest.approx(0.3)
    statistics = EpisodeStatistics()
    statistics.update(episode)
    assert statistics.compute()["return_mean"] == episode.episode_return
    steps = credited([episode, other], GRPO())
    close(episode_returns(steps.batch).task, [0.3, 0.3])
    for scheme in (GRPO(), RLOO(), ReinforcePPBaseline(), GiGPO(step_weight=0.0)):
        assert not credited([episode, other], scheme).credit.advantage_N.any()
    assert RolloutCallback._degenerate_groups([episode, other]) == 1.0


@EACH
def test_ranks_number_agents_alike(on_ranks: Callable[..., list[Any]], scheme: Advantage, kind: str) -> None:
    """Agents of some ranks' episodes only, too."""
    late = [team(20, ["late", "agent"], [0.0, 1.0], 0.5), team(21, ["agent", "late"], [0.5, 0.0])]
    episodes = [*played(3), *late]
    whole = assign(episodes, scheme, kind)
    assert len(set(whole.batch.agent_N.tolist())) == 4
    for world in (2, 3):
        for steps in on_ranks(world, lambda rank, world=world: assign(episodes[rank::world], scheme, kind)):
            assert_equal(steps.batch, whole.batch)
            assert_equal(steps.credit, whole.credit)


def test_a_penalty_stays_where_it_is() -> None:
    """The KL penalty is on each agent's own tokens: old - ref is -cos of the token's code."""
    batch: CreditBatch = scored([TEAM], "none").assign(GRPO(), 0.5).batch
    penalties = 0.5 * torch.cos(torch.tensor([0.0, 50.0, 100.0, 150.0], dtype=torch.float64))
    close(batch.task_reward_N, [0.0, 1.0, 3.0, 6.0])
    close(batch.reward_N - batch.task_reward_N, penalties)
    close(episode_returns(batch).penalty, penalties.sum()[None])


# --- what is written down ---


def test_transcripts_name_several_agents(tiny_policy: TinyPolicy) -> None:
    alone = make_episode(1, [1, 1])
    team_record, record = episode_records([alone, TEAM], tiny_policy.tokenizer, iteration=1)
    assert [step["agent"] for step in team_record["steps"]] == AGENTS
    assert (team_record["return"], team_record["final_reward"]) == (6.0, 4.0)
    assert "step 2, worker" in as_text(team_record)
    assert "final_reward" not in record
    assert not any("agent" in step for step in record["steps"])
    assert "step 1\n" in as_text(record)
