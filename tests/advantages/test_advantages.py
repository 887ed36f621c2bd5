"""Credit assignment against hand-worked numbers and a slow implementation in plain Python."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steppo.advantages import StepGAE, TokenGAE, base
from steppo.advantages.base import discounted_suffix_sums_, ends_of_runs, whiten
from steppo.batch import Credit, CreditBatch
from tests.numeric_helpers import FEW, close, gae, near, normal, to_batch
from tests.slow_credit import Ending, Turn, slow_credit, slow_whiten


def random_turns(episodes: list[tuple[list[int], bool]], seed: int) -> tuple[list[Turn], list[Ending]]:
    """Shuffled steps of episodes, each given as tokens per step and whether it terminated."""
    rng = np.random.default_rng(seed)
    turns = [
        Turn(episode, index, normal(rng, tokens).tolist(), normal(rng, tokens).tolist(), float(rng.standard_normal()))
        for episode, (lengths, _) in enumerate(episodes)
        for index, tokens in enumerate(lengths)
    ]
    # A terminated episode with a stray value after it: the value must be ignored.
    endings = [Ending(terminated, float(rng.standard_normal())) for _, terminated in episodes]
    return [turns[row] for row in rng.permutation(len(turns))], endings


def advantage_and_target(credit: Credit, by_token: bool) -> tuple[Tensor, Tensor]:
    """Of the wanted kind, the other kind being absent."""
    fields = [credit.advantage_N, credit.target_N, credit.advantage_A, credit.target_A]
    wanted, absent = (fields[2:], fields[:2]) if by_token else (fields[:2], fields[2:])
    assert absent == [None, None]
    advantage, target = wanted
    assert advantage is not None
    assert target is not None
    return advantage, target


EPISODES = st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.booleans()), min_size=1, max_size=6)
DISCOUNTS = st.sampled_from([0.0, 0.3, 0.95, 1.0])
SEEDS = st.integers(0, 2**16)
BY_TOKEN = pytest.mark.parametrize("by_token", [False, True], ids=["step", "token"])


@BY_TOKEN
@FEW
@given(EPISODES, SEEDS, DISCOUNTS, DISCOUNTS, st.booleans(), st.booleans())
def test_gae_equals_a_loop(by_token, episodes, seed, gamma, gae_lambda, bootstrap, even):
    turns, endings = random_turns(episodes, seed)
    scheme = gae(by_token, gamma, gae_lambda, bootstrap, even)
    advantage, target = advantage_and_target(scheme(to_batch(turns, endings)), by_token)
    expected_advantage, expected_target = slow_credit(turns, endings, gamma, gae_lambda, bootstrap, by_token, even)
    close(advantage, expected_advantage)
    close(target, expected_target)


@BY_TOKEN
@FEW
@given(EPISODES, SEEDS, st.randoms(use_true_random=False), st.booleans())
def test_gae_follows_the_rows(by_token, episodes, seed, random, even):
    turns, endings = random_turns(episodes, seed)
    rows = list(range(len(turns)))
    random.shuffle(rows)
    scheme = gae(by_token, 0.9, 0.8, True, even)
    straight = advantage_and_target(scheme(to_batch(turns, endings)), by_token)
    shuffled = advantage_and_target(scheme(to_batch([turns[row] for row in rows], endings)), by_token)
    lengths = [len(turn.rewards) if by_token else 1 for turn in turns]
    for before, after in zip(straight, shuffled, strict=True):
        pieces = before.split(lengths)
        close(after, torch.cat([pieces[row] for row in rows]))


@BY_TOKEN
def test_gae_in_float32(by_token):
    lengths = np.random.default_rng(1).integers(1, 30, size=(8, 40))
    turns, endings = random_turns([(row.tolist(), bool(number % 2)) for number, row in enumerate(lengths)], seed=2)
    scheme = (TokenGAE if by_token else StepGAE)(1.0, 0.95, True)
    single = advantage_and_target(scheme(to_batch(turns, endings, torch.float32)), by_token)
    double = advantage_and_target(scheme(to_batch(turns, endings)), by_token)
    for actual, expected in zip(single, double, strict=True):
        assert actual.dtype == torch.float32
        near(actual, expected, 1e-5)


@BY_TOKEN
def test_bootstrap_only_after_truncation(by_token):
    turns = [Turn(episode, 0, [1.0], [0.25], 0.25) for episode in range(2)]
    batch = to_batch(turns, [Ending(True, 8.0), Ending(False, 8.0)])
    scheme = TokenGAE if by_token else StepGAE
    close(advantage_and_target(scheme(0.5, 1.0, False)(batch), by_token)[1], [1.0, 1.0])
    close(advantage_and_target(scheme(0.5, 1.0, True)(batch), by_token)[1], [1.0, 5.0])


def test_step_gae_by_hand():
    """gamma = lambda = 1/2. The rows are out of order: second step, the other episode, first step.

    Second step: A = 1 - 0.25 = 0.75. First: delta = 0 + 0.5 * 0.25 - 0.5 = -0.375, A = -0.375 + 0.25 * 0.75 = -0.1875.
    Other episode: A = 2.6875 - 1 = 1.6875. Mean 0.75, sample std 0.9375.
    """
    turns = [
        Turn(0, 1, [1.0], [0.0], 0.25),
        Turn(1, 0, [0.0, 2.6875], [0.0, 0.0], 1.0),
        Turn(0, 0, [0.0], [0.0], 0.5),
    ]
    batch = to_batch(turns, [Ending(True, 0.0), Ending(False, 2.0)])
    credit = StepGAE(0.5, 0.5)(batch)
    close(credit.advantage_N, [0.0, 1.0, -1.0], 1e-7)
    close(credit.target_N, [1.0, 2.6875, 0.3125])
    # The other episode was cut before a state of value 2: A = 2.6875 + 0.5 * 2 - 1.
    credit = StepGAE(0.5, 0.5, bootstrap_truncated=True)(batch)
    close(credit.target_N, [1.0, 3.6875, 0.3125])


def test_token_gae_by_hand():
    """gamma = lambda = 1/2, a step of two tokens and a last step of one, values 0.5, 0.25, 0.5, final reward 1.

    From the end: A = 1 - 0.5 = 0.5; delta = 0.5 * 0.5 - 0.25 = 0, A = 0.25 * 0.5 = 0.125;
    delta = 0.5 * 0.25 - 0.5 = -0.375, A = -0.375 + 0.25 * 0.125 = -0.34375. Mean 0.09375, sample variance 0.1787109375.
    """
    turns = [Turn(0, 1, [1.0], [0.5], 9.0), Turn(0, 0, [0.0, 0.0], [0.5, 0.25], 9.0)]
    credit = TokenGAE(0.5, 0.5)(to_batch(turns, [Ending(True, 0.0)]))
    deviations = torch.tensor([0.40625, -0.4375, 0.03125], dtype=torch.float64)
    close(credit.advantage_A, deviations / 0.1787109375**0.5, 1e-7)
    close(credit.target_A, [1.0, 0.15625, 0.375])


def test_token_gae_crosses_steps():
    """A final reward reaches the first step's tokens, one discount per token, and no other episode."""
    lengths = [2, 3, 1]
    turns = [Turn(0, index, [0.0] * tokens, [0.0] * tokens, 0.0) for index, tokens in enumerate(lengths)]
    turns[-1].rewards[-1] = 1.0
    turns.append(Turn(1, 0, [0.0, 0.0], [0.0, 0.0], 0.0))
    credit = TokenGAE(0.5, 1.0)(to_batch(turns, [Ending(True, 0.0)] * 2))
    close(credit.target_A, [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 0, 0])


def test_step_gae_discounts_by_step_not_by_token():
    turns = [Turn(0, index, [0.0] * tokens, [0.0] * tokens, 0.0) for index, tokens in enumerate([7, 1, 4])]
    turns[-1].rewards[-1] = 1.0
    credit = StepGAE(0.5, 1.0)(to_batch(turns, [Ending(True, 0.0)]))
    close(credit.target_N, [0.25, 0.5, 1.0])


def test_long_actions_do_not_count_more():
    """Step credit depends on the steps' rewards alone; token credit is whitened over tokens."""
    short = [Turn(0, 0, [1.0], [0.0], 0.0), Turn(1, 0, [3.0], [0.0], 0.0)]
    long = [Turn(0, 0, [1.0], [0.0], 0.0), Turn(1, 0, [0.0] * 5 + [3.0], [0.0] * 6, 0.0)]
    endings = [Ending(True, 0.0)] * 2
    close(StepGAE()(to_batch(short, endings)).advantage_N, StepGAE()(to_batch(long, endings)).advantage_N)
    tokens = TokenGAE()(to_batch(long, endings)).advantage_A
    close(tokens.sum(), 0.0)
    assert tokens[0] < -2


@BY_TOKEN
def test_whitening_over_episodes_by_hand(by_token):
    """A won episode of three rows and a lost one of one: returns 1, 1, 1 and 0.

    Each episode once: mean 1/2, variance 1/4 * 4/3, so that both are as far from 0. Each row: mean 3/4, variance 1/4.
    """
    turns = [Turn(0, index, [float(index == 2)], [0.0], 0.0) for index in range(3)] + [Turn(1, 0, [0.0], [0.0], 0.0)]
    batch = to_batch(turns, [Ending(True, 0.0)] * 2)
    rows = "tokens" if by_token else "steps"
    for over, expected in (("episodes", [3**0.5 / 2] * 3 + [-(3**0.5) / 2]), (rows, [0.5] * 3 + [-1.5])):
        scheme = (TokenGAE if by_token else StepGAE)(whiten_over=over)
        close(advantage_and_target(scheme(batch), by_token)[0], expected, 1e-7)


def test_over_episodes_of_one_length_nothing_changes():
    numbers = normal(np.random.default_rng(0), 12)
    close(whiten(numbers, torch.tensor([2, 0, 5] * 4)), whiten(numbers))


def test_one_step_alone():
    """Nothing to whiten with: no advantage, but a target."""
    batch = to_batch([Turn(0, 0, [3.0], [0.5], 0.5)], [Ending(False, 4.0)])
    for scheme, by_token in ((StepGAE, False), (TokenGAE, True)):
        advantage, target = advantage_and_target(scheme(0.5, 0.9, True)(batch), by_token)
        assert advantage.tolist() == [0.0]
        close(target, [5.0])


def test_equal_advantages_become_zero():
    turns = [Turn(episode, 0, [0.3], [0.1], 0.1) for episode in range(4)]
    batch = to_batch(turns, [Ending(True, 0.0)] * 4)
    for scheme, by_token in ((StepGAE, False), (TokenGAE, True)):
        advantage, target = advantage_and_target(scheme()(batch), by_token)
        assert advantage.tolist() == [0.0] * 4
        close(target, [0.3] * 4)


@pytest.mark.parametrize("in_order", [False, True])
def test_the_batch_is_left_alone(in_order):
    """Rows in order, too: then no sorting makes a copy."""
    turns, endings = random_turns([([2, 1], True), ([3], False)], seed=3)
    if in_order:
        turns.sort(key=lambda row: (row.episode, row.index))
    batch, untouched = to_batch(turns, endings), to_batch(turns, endings)
    StepGAE(0.9, 0.9, True)(batch)
    TokenGAE(0.9, 0.9, True)(batch)
    for name in (field.name for field in dataclasses.fields(CreditBatch)):
        before, after = getattr(untouched, name), getattr(batch, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after


@FEW
@given(
    st.lists(st.integers(1, 20) | st.integers(60, 300), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from([1, 4096]),
    SEEDS,
)
def test_suffix_sums_equal_a_loop(runs, decay, at_once, seed):
    numbers = normal(np.random.default_rng(seed), sum(runs))
    end = torch.tensor(runs).cumsum(0) - 1
    expected, following, ends = [0.0] * len(numbers), 0.0, set(end.tolist())
    for row in reversed(range(len(numbers))):
        following = float(numbers[row]) + (0.0 if row in ends else decay * following)
        expected[row] = following
    with mock.patch.object(base, "_LINES_AT_ONCE", at_once):
        close(discounted_suffix_sums_(numbers, decay, end), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_suffix_sums_of_one_run(length):
    end = torch.tensor([length - 1])
    ones = torch.ones(length, dtype=torch.float64)
    close(discounted_suffix_sums_(ones.clone(), 1.0, end), torch.arange(length, 0, -1))
    close(discounted_suffix_sums_(ones, 0.5, end)[0], 2 - 0.5 ** (length - 1))


@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_suffix_sums_of_runs_of_one(length):
    numbers = normal(np.random.default_rng(length), length)
    assert torch.equal(discounted_suffix_sums_(numbers.clone(), 0.5, torch.arange(length)), numbers)


def test_ends_of_runs():
    """A number that comes back is another run."""
    assert ends_of_runs(torch.tensor([4, 4, 1, 4, 4, 4])).tolist() == [1, 2, 5]
    assert ends_of_runs(torch.tensor([3])).tolist() == [0]


@FEW
@given(st.integers(2, 50), SEEDS, st.floats(0.1, 100), st.floats(-100, 100))
def test_whiten(size, seed, scale, shift):
    numbers = normal(np.random.default_rng(seed), size)
    white = whiten(numbers * scale + shift)
    close(white, slow_whiten((numbers * scale + shift).tolist()))
    close(white.sum(), 0.0)
    # The sample standard deviation: n - 1.
    close(white.square().sum(), float(size - 1), 1e-5)


@pytest.mark.parametrize("numbers", [[], [7.0], [0.1] * 7])
def test_whiten_without_spread_gives_zero(numbers):
    assert whiten(torch.tensor(numbers)).tolist() == [0.0] * len(numbers)
