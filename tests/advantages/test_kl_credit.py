"""What schemes without a critic make of a KL penalty in the reward, and of returns that differ by rounding only."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from callbacks import RolloutCallback
from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline, whiten
from steppo.advantages.base import Returns, centred_within, standardised_within
from steppo.types import StopReason
from tests.advantages.test_group_advantages import (
    EPISODES,
    IN_GROUPS,
    SCHEMES,
    UNWHITENED,
    advantage,
    each,
    groups,
    turn,
    turns_of,
)
from tests.learner.fakes import make_episode
from tests.numeric_helpers import FEW, close, normal, to_batch
from tests.slow_credit import Ending, Turn

ROOT2 = math.sqrt(2.0)
NOISE = 1e-4


def without_penalties(turns: list[Turn]) -> list[Turn]:
    return [dataclasses.replace(row, penalties=()) for row in turns]


def scaled(turns: list[Turn], factor: float) -> list[Turn]:
    return [dataclasses.replace(row, penalties=[factor * penalty for penalty in row.penalties]) for row in turns]


# --- by hand ---

# Group 5: returns 0 and 2, penalties -1 and -2. Group 3: returns 4 and 4, penalties 0 and -0.2. Group 7: one episode.
BY_HAND = [
    turn(0, 0, 0.0, penalties=[-1.0]),
    turn(1, 0, 2.0, penalties=[-2.0]),
    turn(2, 0, 1.0, seen="a", penalties=[0.0]),
    turn(2, 1, 3.0, seen="b", penalties=[0.0]),
    turn(3, 0, 3.0, seen="a", penalties=[-0.2]),
    turn(3, 1, 1.0, seen="b", penalties=[0.0]),
    turn(4, 0, 5.0, penalties=[-9.0]),
]
ENDINGS = groups(5, 5, 3, 3, 7)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        # Group 5: -1 and 1, penalties 1/2 and -1/2, all over the std of 0 and 2. Group 3: 0.1 and -0.1, over 1.
        (GRPO(), [-0.5 / ROOT2, 0.5 / ROOT2, 0.1, 0.1, -0.1, -0.1, 0.0]),
        (GRPO(scale_by_std=False), [-0.5, 0.5, 0.1, 0.1, -0.1, -0.1, 0.0]),
        # Against the other one: -1 against 0, 4 against 3.8.
        (RLOO(), [-1.0, 1.0, 0.2, 0.2, -0.2, -0.2, 0.0]),
        # All tokens of group 5 have mean 0 and std root 2; group 3 is not among them.
        (ReinforcePPBaseline(), [-0.5 / ROOT2, 0.5 / ROOT2, *[0.1 / ROOT2] * 2, *[-0.1 / ROOT2] * 2, 0.0]),
        # gamma 0. At "a" rewards 1 and 3 with penalties 0 and -0.2: -+0.9 over root 2; at "b" 3 and 1: +-1 over root 2.
        (
            GiGPO(0.0),
            [-1 / ROOT2, 1 / ROOT2, 0.1 - 0.9 / ROOT2, 0.1 + 1 / ROOT2, -0.1 + 0.9 / ROOT2, -0.1 - 1 / ROOT2, 0.0],
        ),
        # gamma 1. At "a" 4 and 4 with penalties 0 and -0.2: +-0.1, over 1. At "b" as before.
        (
            GiGPO(1.0),
            [-1 / ROOT2, 1 / ROOT2, 0.1 + 0.1, 0.1 + 1 / ROOT2, -0.1 - 0.1, -0.1 - 1 / ROOT2, 0.0],
        ),
    ],
)
def test_groups_by_hand(scheme: Advantage, expected: list[float]) -> None:
    close(advantage(scheme, BY_HAND[::-1], ENDINGS), expected[::-1], 2e-6)


def test_reinforce_pp_by_hand() -> None:
    """gamma 1/2: returns 1/2 and 1, penalties -5/8 and -1/4: minus 3/4 and -7/16, over a std of root 1/8."""
    found = advantage(ReinforcePP(0.5), [turn(0, 0, 0.0, 1.0, penalties=[-0.5, -0.25])], groups(0))
    close(found, [-0.4375 * math.sqrt(8.0), 0.4375 * math.sqrt(8.0)], 1e-6)


def test_reinforce_pp_divides_nothing_where_all_returns_are_equal() -> None:
    """Two episodes won alike, with penalties of -1/2 and 0."""
    turns = [turn(0, 0, 0.0, 1.0, penalties=[-0.25, -0.25]), turn(1, 0, 1.0, penalties=[0.0])]
    close(advantage(ReinforcePP(), turns, groups(0, 1)), [-0.25, 0.0, 0.25])  # sums -1/2, -1/4, 0: mean -1/4


# --- a little noise stays little ---


def noisy(lost: list[int], seed: int) -> list[Turn]:
    """Episodes of four one-token steps with a penalty of about 1e-4 a token, won unless listed."""
    rng = np.random.default_rng(seed)
    return [
        turn(
            episode,
            index,
            float(index == 3 and episode not in lost),
            seen=str(index) * 9,
            penalties=(NOISE * normal(rng, 1)).tolist(),
        )
        for episode in range(8)
        for index in range(4)
    ]


@each(SCHEMES)
@pytest.mark.parametrize("lost", [[], list(range(8))], ids=["won", "lost"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_verdict_where_all_did_alike(scheme: Advantage, lost: list[int], seed: int) -> None:
    """One group of eight, or two of four: scaled to unit size the noise would be 0.7 and more."""
    for endings in (groups(*[1] * 8), groups(*[1, 2] * 4)):
        turns = noisy(lost, seed)
        found = advantage(scheme, turns, endings)
        if isinstance(scheme, ReinforcePP) and scheme.gamma < 1 and not lost:
            found = found - advantage(scheme, without_penalties(turns), endings)  # discounted returns do differ
        assert 0 < found.abs().max() < 40 * NOISE


@each(IN_GROUPS)
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_verdict_beside_a_group_that_differs(scheme: Advantage, seed: int) -> None:
    """Groups 2 and 3 lost all; in group 1 the winner is one of two."""
    found = advantage(scheme, noisy(list(range(1, 8)), seed), groups(1, 1, 2, 2, 2, 3, 3, 3))
    assert found[:8].abs().max() > 0.4
    assert 0 < found[8:].abs().max() < 40 * NOISE


# --- what all promise ---


@each(SCHEMES)
@FEW
@given(EPISODES, st.integers(0, 2**16))
def test_a_penalty_adds_by_its_size(scheme: Advantage, episodes: list, seed: int) -> None:
    """Twice the penalty, twice the difference that it makes: it decides about no spread."""
    turns, endings = turns_of(episodes, seed)
    plain, once, twice = (advantage(scheme, scaled(turns, factor), endings) for factor in (0.0, 1.0, 2.0))
    close(twice - plain, 2 * (once - plain))
    assert torch.equal(plain, advantage(scheme, without_penalties(turns), endings))


@each(UNWHITENED)
@FEW
@given(EPISODES)
def test_an_equal_penalty_adds_nothing(scheme: Advantage, episodes: list) -> None:
    """One for all episodes, on their last steps, seen alike: there is nothing to centre."""
    turns, endings = turns_of(episodes)
    last = {row.episode: row.index for row in turns}
    turns = [
        dataclasses.replace(row, observation="end", penalties=[0.0] * (len(row.rewards) - 1) + [-3.0])
        if row.index == last[row.episode]
        else dataclasses.replace(row, observation=f"{row.episode}-{row.index}" * 9, penalties=())
        for row in turns
    ]
    close(advantage(scheme, turns, endings), advantage(scheme, without_penalties(turns), endings))


# --- equal but for rounding ---

ALIKE = [
    ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]),
    ([0.1] * 10, [1.0]),
    ([0.7, -0.7, 0.1], [0.1, 0.7, -0.7]),
    ([1e8, 0.1, -1e8], [0.1]),
    ([0.1, 0.2, -0.3], [0.0]),
    ([1e30, 2e29, 3e29], [3e29, 2e29, 1e30]),
    ([1e-200, 2e-200, 3e-200], [3e-200, 2e-200, 1e-200]),
    ([0.0], [-0.0]),
    ([-0.1, -0.2, -0.3], [-0.3, -0.2, -0.1]),
    ([0.01] * 3000, [30.0]),
]
UNLIKE = [
    ([1.0], [1.0 + 1e-9]),
    ([1e6], [1e6 + 1e-3]),
    ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1 + 1e-10]),
    ([1e-200], [2e-200]),
    ([0.0], [1e-300]),
    ([1e30], [1e30 + 1e20]),
    ([1.0, -1.0], [1e-6]),
]


def pair(left: list[float], right: list[float]) -> tuple[list[Turn], list[Ending]]:
    """Two episodes of one group, one-token steps."""
    turns = [
        turn(episode, index, r, seen=f"{index}") for episode, own in enumerate((left, right)) for index, r in enumerate(own)
    ]
    return turns, groups(4, 4)


@pytest.mark.parametrize(("left", "right"), ALIKE)
def test_returns_summed_in_another_order_are_equal(left: list[float], right: list[float]) -> None:
    turns, endings = pair(left, right)
    for scheme in (GRPO(), GRPO(scale_by_std=False), ReinforcePPBaseline(), GiGPO(step_weight=0.0)):
        assert advantage(scheme, turns, endings).eq(0).all()
    assert advantage(RLOO(), turns, endings).eq(0).all()
    episodes = [
        make_episode(order, [1] * len(own), own, group_size=2) for order, own in enumerate((left, right, [1.0], [2.0]))
    ]
    assert RolloutCallback._degenerate_groups(episodes) == 0.5


@pytest.mark.parametrize(("left", "right"), UNLIKE)
def test_returns_that_differ_are_told_apart_as_ever(left: list[float], right: list[float]) -> None:
    turns, endings = pair(left, right)
    returns = torch.zeros(2, dtype=torch.float64).index_add(
        0, torch.tensor([row.episode for row in turns]), to_batch(turns, endings).reward_N
    )
    centred = (returns - returns.sum() / 2)[[row.episode for row in turns]]
    assert torch.equal(advantage(GRPO(scale_by_std=False), turns, endings), centred)
    episodes = [make_episode(order, [1] * len(own), own, group_size=2) for order, own in enumerate((left, right))]
    assert RolloutCallback._degenerate_groups(episodes) == 0.0


def test_discounted_returns_that_are_equal_but_for_rounding() -> None:
    """gamma 1/2, at "0": 0.1 + 0.2 / 2 + 0.4 / 4 is 0.3, by another rounding. Then REINFORCE++: all of it at once."""
    assert 0.1 + 0.5 * (0.2 + 0.5 * 0.4) != 0.3
    turns, endings = pair([0.1, 0.2, 0.4], [0.3])
    found = advantage(GiGPO(0.5), turns, endings) - advantage(GRPO(), turns, endings)
    assert found.eq(0).all()
    turns = [turn(0, 0, 0.1), turn(0, 1, 0.2), turn(0, 2, -0.3), turn(1, 0, 0.0)]
    assert advantage(ReinforcePP(0.0), turns, groups(0, 1)).ne(0).any()
    same = [turn(0, 0, 0.0, 0.1 + 0.2), turn(1, 0, 0.3)]
    assert advantage(ReinforcePP(), same, groups(0, 1)).eq(0).all()


def test_an_early_large_reward_does_not_hide_later_differences() -> None:
    """At "1" returns of 1 and 2 differ, whatever came before."""
    turns, endings = pair([1e15, 1.0], [1e15, 2.0])
    found = advantage(GiGPO(1.0, scale_by_std=False), turns, endings)
    close(found[[1, 3]], [-0.5, 0.5])


def test_whitening_numbers_that_are_equal_but_for_rounding() -> None:
    x = torch.tensor([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6], dtype=torch.float64)
    assert len(set(x.tolist())) > 1
    assert whiten(x).eq(0).all()
    assert whiten(-x, torch.tensor([0, 0, 1])).eq(0).all()
    assert whiten(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)).ne(0).all()


def test_groups_of_their_own_kind() -> None:
    """Equal but for rounding, different, and of one."""
    x, group = torch.tensor([0.3, 0.1 + 0.2, 1.0, 2.0, 9.0], dtype=torch.float64), torch.tensor([5, 5, -1, -1, 2])
    assert standardised_within(Returns(x, torch.zeros_like(x), x.abs()), group, False).tolist() == [0.0, 0.0, -0.5, 0.5, 0.0]
    penalty = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    task, centred, equal = centred_within(Returns(x, penalty, x.abs()), group)
    assert task.tolist() == [0.0, 0.0, -0.5, 0.5, 0.0]
    assert centred.tolist() == [-0.5, 0.5, -0.5, 0.5, 0.0]
    assert equal.tolist() == [True, True, False, False, True]


def test_failed_episodes_decide_about_no_group() -> None:
    broken = make_episode(1, [1], [7.0], StopReason.ENV_ERROR, group_size=3)
    episodes = [make_episode(0, [2], [0.3], group_size=3), broken, make_episode(2, [1, 1], [0.1, 0.2], group_size=3)]
    assert RolloutCallback._degenerate_groups(episodes) == 1.0
    assert RolloutCallback._degenerate_groups([broken]) == 0.0
