"""Credit over all ranks: the batch that it is assigned from, and each rank's share of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE, whiten
from steppo.batch import Credit, CreditBatch
from steppo.buffer import StepBuffer
from steppo.engines import HFEngine
from steppo.errors import RunError
from steppo.learner.credit import AssignedCredit
from steppo.learner.steps import StepTable
from steppo.packing import PaddedPacker
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource, ScriptedPlayer, random_action
from steppo.types import Episode, Request, RolloutConfig, StopReason, Turn, groups_of
from tests.learner.fakes import BOOTSTRAP, EPISODES, LEARNED_CODES, SHARES, codes_A, codes_N, make_episode, scored
from tests.numeric_helpers import close, steps_of
from tests.worker_envs import KeyedEnv


class EqualShares(Advantage):
    """Needs no critic: each step's reward is its advantage."""

    def __call__(self, batch: CreditBatch) -> Credit:
        return Credit(advantage_N=batch.reward_N)


class ReadsTexts(EqualShares):
    """Wants the observations' texts."""

    needs_observations = True


# --- credit ---


def test_the_batch_tells_episodes_apart() -> None:
    episodes = [make_episode(order, [1, 2], stop_reason=reason, group_size=2) for order, reason in enumerate(StopReason)]
    batch = scored(episodes).assign(StepGAE()).batch
    # TERMINATED, STEP_LIMIT, CONTEXT_OVERFLOW; the others broke
    assert batch.episode_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.index_N.tolist() == [0, 1] * 3
    assert batch.terminated_E.tolist() == [True, False, False]
    assert batch.group_E.tolist() == [0, 0, 1]
    assert batch.length_N.tolist() == [1, 2] * 3


def test_rewards_sit_on_the_last_token_of_their_step() -> None:
    buffer = scored([make_episode(0, [3, 1], rewards=[1.0, 2.0]), make_episode(1, [2], rewards=[-1.0])])
    batch = buffer.assign(StepGAE()).batch
    close(batch.reward_N, [1.0, 2.0, -1.0])
    close(batch.reward_A, [0.0, 0.0, 1.0, 2.0, 0.0, -1.0])


def test_equal_observations_have_equal_anchors() -> None:
    buffer = scored(EPISODES)
    anchors = buffer.assign(StepGAE()).batch.anchor_N
    assert anchors is not None
    texts = [step.observation for step in buffer.steps.records]
    assert len(set(texts)) == len(set(anchors.tolist())) == len(set(zip(texts, anchors.tolist(), strict=True))) == 2


KEYS: dict[str, tuple[list[str], list[str | None]]] = {  # what is seen in four steps, and the states that it is said to be
    "one of two texts": (["a", "b", "c", "d"], ["x", "y", "x", "y"]),
    "two of one text": (["a", "a", "a", "a"], ["x", "y", "x", "y"]),
    "one of all": (["a", "b", "b", "c"], ["x"] * 4),
    "none of any": (["a", "b", "a", "b"], list("wxyz")),
    "an empty one": (["a", "b", "c", "a"], ["", "y", "", "y"]),
    "not of all": (["a", "b", "a", "c"], [None, "x", None, "x"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_state_key_is_the_anchor_in_place_of_the_observation(name: str) -> None:
    """For GiGPO it is as if the keys had been seen."""
    texts, keys = KEYS[name]
    seen = [text if key is None else key for text, key in zip(texts, keys, strict=True)]

    def credit(texts: Sequence[str], keys: Sequence[str | None]) -> AssignedCredit:
        """Of two episodes of one task."""
        played = [make_episode(order, [1, 1], [float(order), 2.0 - order], group_size=2) for order in (0, 1)]
        told = [
            [
                dataclasses.replace(s, observation=texts[2 * e.order + s.index], state_key=keys[2 * e.order + s.index])
                for s in e.steps
            ]
            for e in played
        ]
        episodes = [dataclasses.replace(e, steps=tuple(steps)) for e, steps in zip(played, told, strict=True)]
        return scored(episodes, "none").assign(GiGPO())

    keyed = credit(texts, keys)
    assert keyed.batch.anchor_N is not None
    anchors = keyed.batch.anchor_N.tolist()
    assert [anchors.index(anchor) for anchor in anchors] == [seen.index(key) for key in seen]
    assert torch.equal(keyed.credit.advantage_N, credit(seen, [None] * 4).credit.advantage_N)
    assert not torch.equal(keyed.credit.advantage_N, credit(texts, [None] * 4).credit.advantage_N)


def test_states_that_an_environment_names_are_anchors(tiny_policy: Any) -> None:
    """Also before and after an answer that never reached it."""
    source = EnvSource(KeyedEnv(), StateContext(), HFEngine(), max_prompt_tokens=400, num_slots=4)
    source.bind(tiny_policy)

    def choose(turn: Turn, request: Request) -> str:
        return "dance" if request.seed % 4 == 0 else random_action(turn, request)

    with closing(source):
        groups = groups_of(source.tasks("train")[:1], 4)
        [episodes] = source.collect(groups, RolloutConfig("train/0", 0), ScriptedPlayer(choose, source.write))
    steps = [step for episode in episodes for step in episode.steps]
    assert {step.action_valid for step in steps} == {True, False}
    anchors = scored(episodes, "none").assign(GiGPO()).batch.anchor_N
    assert anchors is not None
    rooms = [step.observation[-3:] for step in steps]
    assert len(set(rooms)) == len(set(anchors.tolist())) == len(set(zip(rooms, anchors.tolist(), strict=True))) == 4
    assert len({step.observation for step in steps}) > 4


@pytest.mark.parametrize(
    ("kl_coef", "by_token", "by_step"),
    [(0.1, [-0.05, 1.1, 1.95], [1.05, 1.95]), (0.0, [0.0, 1.0, 2.0], [1.0, 2.0])],
)
def test_kl_in_the_reward(kl_coef: float, by_token: list[float], by_step: list[float]) -> None:
    """r - kl_coef (old - ref) on each token: old - ref is 0.5, -1, 0.5."""
    for advantage, values in ((StepGAE(), "step"), (TokenGAE(), "token")):
        buffer = scored([make_episode(0, [2, 1], rewards=[1.0, 2.0])], values)
        buffer = buffer.replace(old_logprobs_A=torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64))
        buffer = buffer.replace(ref_logprobs_A=torch.tensor([-1.5, -1.0, -3.5], dtype=torch.float64))
        steps = buffer.assign(advantage, kl_coef)
        close(steps.batch.reward_A, by_token)
        close(steps.batch.reward_N, by_step)
        if values == "step":
            assert steps.mine.target_N is not None
            close(steps.mine.target_N, [sum(by_step), by_step[1]])
        else:
            assert steps.mine.target_A is not None
            close(steps.mine.target_A, [sum(by_token), sum(by_token[1:]), by_token[2]])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_kl_in_the_reward_reaches_returns(kl_coef: float) -> None:
    """Penalties 0.1 * (old - ref): 0.05, -0.1, 0.2 and 0.1. Returns of 3 stay equal: 0.15 and 0.1 less are undivided."""
    episodes = [make_episode(0, [2, 1], rewards=[1.0, 2.0], group_size=2), make_episode(1, [1], rewards=[3.0], group_size=2)]
    if kl_coef:
        penalties, by_token = [-0.15, -0.15, -0.1], [-0.15, -0.1, -0.2, -0.1]
    else:
        penalties, by_token = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    centred = torch.tensor(penalties, dtype=torch.float64) - (penalties[0] + penalties[2]) / 2
    task, penalty = torch.tensor([[3.0, 3.0, 2.0, 3.0], by_token], dtype=torch.float64)  # of tokens: a deviation of 1/2
    for advantage, expected in (
        (GRPO(scale_by_std=False), centred),
        (RLOO(), 2 * centred),
        (GRPO(), centred),
        (GiGPO(step_weight=0.0), centred),
        (ReinforcePPBaseline(), centred),
        (ReinforcePP(), whiten(task) + (penalty - penalty.mean()) / (0.5 + 1e-8)),
    ):
        buffer = scored(episodes, "none")
        buffer = buffer.replace(old_logprobs_A=torch.tensor([-1.0, -2.0, -1.0, -2.0], dtype=torch.float64))
        buffer = buffer.replace(ref_logprobs_A=torch.tensor([-1.5, -1.0, -3.0, -3.0], dtype=torch.float64))
        credit = buffer.assign(advantage, kl_coef).mine
        found = credit.advantage_A if credit.advantage_N is None else credit.advantage_N
        assert found is not None
        close(found, expected)


def test_failed_episodes_are_not_in_group_statistics() -> None:
    """Groups of three: one of the first failed, two of the second. Of the third all did."""
    broken = StopReason.ENV_ERROR
    episodes = [
        make_episode(0, [1, 2], [0.0, 1.0], group_size=3),
        make_episode(1, [1], [100.0], broken, group_size=3),
        make_episode(2, [1, 1], [2.0, 1.0], group_size=3),
        make_episode(3, [2], [50.0], StopReason.ENGINE_ERROR, group_size=3),
        make_episode(4, [1], [7.0], group_size=3),
        make_episode(5, [1], [60.0], StopReason.ABORTED, group_size=3),
        *(make_episode(order, [1], [70.0], broken, group_size=3) for order in (6, 7, 8)),
    ]
    # gamma 1/2: the first steps' returns are 1/2 and 5/2, the second ones' 1 and 1, of one observation each.
    for advantage, expected in (
        (GRPO(scale_by_std=False), [-1.0, -1.0, 1.0, 1.0, 0.0]),
        (RLOO(), [-2.0, -2.0, 2.0, 2.0, 0.0]),
        (GiGPO(0.5, scale_by_std=False), [-2.0, -1.0, 2.0, 1.0, 0.0]),
        (GiGPO(0.5, scale_by_std=False, similarity=0.99), [-2.0, -1.0, 2.0, 1.0, 0.0]),
    ):
        buffer = scored(episodes, "none")
        steps = buffer.assign(advantage)
        assert steps.batch.group_E.tolist() == [0, 0, 1]
        assert steps.mine.advantage_N is not None
        close(steps.mine.advantage_N, expected)
    credit = scored(episodes, "none").assign(ReinforcePPBaseline()).mine
    assert credit.advantage_N is not None
    compared = whiten(torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    close(credit.advantage_N, [*compared[[0, 1, 3, 4]].tolist(), 0.0])


@pytest.mark.parametrize("bootstraps", [True, False])
def test_only_truncated_episodes_are_bootstrapped(bootstraps: bool) -> None:
    endings = [StopReason.TERMINATED, StopReason.STEP_LIMIT, StopReason.CONTEXT_OVERFLOW]
    episodes = [make_episode(order, [1, 1], [1.0, 2.0], reason) for order, reason in enumerate(endings)]
    buffer = scored(episodes, bootstrap={0: 99.0, 1: 8.0})  # a stray value after the terminated one
    steps = buffer.assign(StepGAE(gamma=0.5, bootstrap_truncated=bootstraps), 0.0)
    close(steps.batch.bootstrap_E[1:], [8.0, 0.0])
    after = 8.0 if bootstraps else 0.0
    assert steps.mine.target_N is not None
    close(steps.mine.target_N, [2.0, 2.0, 1.0 + 0.5 * (2.0 + 0.5 * after), 2.0 + 0.5 * after, 2.0, 2.0])


def test_targets_are_of_the_kind_that_the_critic_reads() -> None:
    for advantage, values in ((StepGAE(), "step"), (TokenGAE(), "token"), (EqualShares(), "none")):
        episodes = scored(EPISODES, values)
        buffer = StepBuffer(PaddedPacker(), 10**6)
        buffer.hold(episodes.experience(episodes.assign(advantage)))
        [part] = buffer.microbatches(np.arange(20), 20, 37)
        shapes = [None if column is None else len(column) for column in (part.advantage_A, part.old_value, part.target)]
        assert shapes == {"step": [37, 20, 20], "token": [37, 37, 37], "none": [37, None, None]}[values]


def test_credit_is_stored_in_the_precision_of_the_scores() -> None:
    buffer = scored(EPISODES)
    buffer = buffer.replace(old_logprobs_A=buffer.scores.old_logprobs_A.float())
    steps = buffer.assign(StepGAE())
    assert steps.mine.advantage_N is not None
    assert (steps.mine.advantage_N.dtype, steps.batch.reward_N.dtype) == (torch.float32, torch.float64)


def test_nothing_to_learn_from() -> None:
    broken = [episode for episode in EPISODES if episode.stop_reason.failed]
    with pytest.raises(RunError, match="no step to learn from"):
        scored([*broken, EPISODES[5]]).assign(StepGAE())


# --- several ranks ---


def assert_equal(left: Any, right: Any) -> None:
    """The same fields with exactly the same numbers."""
    for name, column in vars(right).items():
        if column is None or isinstance(column, list):
            assert getattr(left, name) == column
        else:
            assert getattr(left, name).dtype == column.dtype
            assert getattr(left, name).tolist() == column.tolist()


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("kind", ["step", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_ranks_together_equal_a_single_process(
    on_ranks: Callable[..., list[Any]], shares: list[list[Episode]], kind: str, kl_coef: float
) -> None:
    scheme = StepGAE if kind == "step" else TokenGAE
    advantage = scheme(gamma=0.9, gae_lambda=0.8, bootstrap_truncated=True)

    def work(episodes: Sequence[Episode]) -> tuple[StepTable, AssignedCredit, np.ndarray]:
        buffer = scored(episodes, kind, BOOTSTRAP)
        columns, mine_N = buffer.steps.over_ranks()
        assert columns.length_N.tolist() == StepTable.of(EPISODES).lengths_N.tolist()
        return buffer.steps, buffer.assign(advantage, kl_coef), mine_N

    whole, expected, all_N = work(EPISODES)
    assert all_N.tolist() == list(range(20))
    found = on_ranks(len(shares), lambda rank: work(shares[rank]))
    for table, steps, mine_N in found:
        assert_equal(steps.batch, expected.batch)
        assert_equal(steps.credit, expected.credit)
        assert codes_N(table) == [LEARNED_CODES[row] for row in mine_N]
        mine_A = torch.isin(steps_of(expected.batch.length_N.tolist()), torch.from_numpy(mine_N))
        assert codes_A(table).tolist() == codes_A(whole)[mine_A].tolist()
        for name in ("advantage_N", "target_N", "advantage_A", "target_A"):
            column, of_all = getattr(steps.mine, name), getattr(expected.mine, name)
            assert (column is not None) == (of_all is not None) == name.endswith("N" if kind == "step" else "A")
            if column is not None:
                assert column.tolist() == of_all[mine_A if name.endswith("A") else mine_N].tolist()
    assert sorted(row for *_, mine_N in found for row in mine_N) == list(range(20))


# The same episodes; observations say which episode they are from, and some come again.
TELLING = [
    dataclasses.replace(
        episode,
        steps=tuple(dataclasses.replace(step, observation=f"{episode.order}: {step.index // 2}") for step in episode.steps),
    )
    for episode in EPISODES
]


@pytest.mark.parametrize("shares", [[EPISODES[::-1]], *SHARES.values()], ids=["1 rank", *SHARES])
def test_observations_come_with_their_steps(on_ranks: Callable[..., list[Any]], shares: list[list[Episode]]) -> None:
    def work(rank: int) -> tuple[CreditBatch, CreditBatch]:
        episodes = [TELLING[episode.order] for episode in shares[rank]]
        wanted, unwanted = (scored(episodes, "none").assign(s) for s in (ReadsTexts(), EqualShares()))
        return wanted.batch, unwanted.batch

    expected = [f"{code // 1000}: {code % 1000 // 50 // 2}" for code in LEARNED_CODES]
    for batch, without in on_ranks(len(shares), work):
        assert batch.observation_N == expected
        assert without.observation_N is None
        assert batch.anchor_N is not None
        anchors = batch.anchor_N.tolist()
        assert len(set(zip(anchors, expected, strict=True))) == len(set(anchors)) == len(set(expected)) < len(expected)


@pytest.mark.parametrize("advantage", [GiGPO(), GiGPO(similarity=0.8), ReinforcePPBaseline()])
def test_groups_that_ranks_share_equal_a_single_process(on_ranks: Callable[..., list[Any]], advantage: Advantage) -> None:
    episodes = [dataclasses.replace(episode, group_id=episode.order % 3) for episode in EPISODES]
    whole = scored(episodes, "none").assign(advantage)
    for steps in on_ranks(2, lambda rank: scored(episodes[rank::2], "none").assign(advantage)):
        assert_equal(steps.credit, whole.credit)
    found = whole.credit.advantage_A if whole.credit.advantage_N is None else whole.credit.advantage_N
    assert found is not None
    assert len(set(found.tolist())) > 3


def test_nothing_to_learn_from_on_any_rank(on_ranks: Callable[..., list[Any]]) -> None:
    def work(rank: int) -> str:
        with pytest.raises(RunError, match="no step to learn from") as caught:
            scored([EPISODES[3 if rank else 7]]).assign(StepGAE())
        return str(caught.value)

    assert len(on_ranks(2, work)) == 2
