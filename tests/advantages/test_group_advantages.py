"""Credit without a critic against hand-worked numbers and slow implementations in plain Python, and its properties."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline
from steppo.batch import CreditBatch
from steppo.errors import ConfigError
from tests.numeric_helpers import FEW, close, near, normal, to_batch
from tests.slow_credit import (
    Ending,
    Turn,
    slow_gigpo,
    slow_grpo,
    slow_reinforce_pp,
    slow_reinforce_pp_baseline,
    slow_rloo,
    slow_whiten,
)

Slow = Callable[[list[Turn], list[Ending]], list[float]]
# Each scheme and its loop.
SCHEMES: dict[str, tuple[Advantage, Slow]] = {
    "grpo": (GRPO(), slow_grpo),
    "grpo centred": (GRPO(scale_by_std=False), partial(slow_grpo, scale_by_std=False)),
    "rloo": (RLOO(), slow_rloo),
    "gigpo": (GiGPO(), slow_gigpo),
    "gigpo centred": (
        GiGPO(0.5, 2.0, scale_by_std=False),
        partial(slow_gigpo, gamma=0.5, step_weight=2.0, scale_by_std=False),
    ),
    "gigpo 0.75": (GiGPO(1.0, similarity=0.75), partial(slow_gigpo, gamma=1.0, similarity=0.75)),
    "gigpo 0.5": (GiGPO(0.0, similarity=0.5), partial(slow_gigpo, gamma=0.0, similarity=0.5)),
    "reinforce_pp": (ReinforcePP(), slow_reinforce_pp),
    "reinforce_pp 0.5": (ReinforcePP(0.5), partial(slow_reinforce_pp, gamma=0.5)),
    "reinforce_pp_baseline": (ReinforcePPBaseline(), slow_reinforce_pp_baseline),
}
OVER_TOKENS = (ReinforcePP, ReinforcePPBaseline)  # whitened over the batch
UNWHITENED = {name: pair for name, pair in SCHEMES.items() if not isinstance(pair[0], OVER_TOKENS)}
IN_GROUPS = {name: pair for name, pair in SCHEMES.items() if not isinstance(pair[0], ReinforcePP)}


def each(schemes: dict[str, tuple[Advantage, Slow]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scheme", [scheme for scheme, _ in schemes.values()], ids=list(schemes))


def advantage(scheme: Advantage, turns: list[Turn], endings: list[Ending], dtype: torch.dtype = torch.float64) -> Tensor:
    """The scheme's advantages, all else being absent."""
    credit = scheme(to_batch(turns, endings, dtype))
    assert credit.target_N is credit.target_A is None
    wanted, absent = credit.advantage_N, credit.advantage_A
    if isinstance(scheme, ReinforcePP):
        wanted, absent = absent, wanted
    assert absent is None
    assert wanted is not None
    return wanted


def by_turn(scheme: Advantage, turns: list[Turn], endings: list[Ending]) -> list[Tensor]:
    """Each turn's advantages: one, or one per token."""
    found = advantage(scheme, turns, endings)
    return list(found.split([len(row.rewards) if isinstance(scheme, ReinforcePP) else 1 for row in turns]))


def turn(episode: int, index: int, *rewards: float, seen: str = "", penalties: Sequence[float] = ()) -> Turn:
    """A step whose values must not matter."""
    return Turn(episode, index, list(rewards), [9.0] * len(rewards), 9.0, seen, penalties)


def groups(*ids: int) -> list[Ending]:
    """Endings that must not matter, of episodes in these groups."""
    return [Ending(bool(number % 2), 8.0, group) for number, group in enumerate(ids)]


# A step: tokens, reward, penalty on each token, observation. Multiples of 1/8: sums are exact, so that ties are.
STEP = st.tuples(
    st.integers(1, 4),
    st.sampled_from([-1.0, -0.25, 0.0, 0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.0, -0.125]),
    st.sampled_from(["", "ab", "abb", "abba", "the cellar", "the cellars"]),
)
EPISODE = st.tuples(st.sampled_from([7, 2, 40, -3]), st.lists(STEP, min_size=1, max_size=5))
EPISODES = st.lists(EPISODE, min_size=1, max_size=9)
SEEDS = st.integers(0, 2**16)


def turns_of(episodes: list, seed: int | None = None) -> tuple[list[Turn], list[Ending]]:
    """Rows of drawn episodes, shuffled by the seed."""
    turns = [
        turn(number, index, *[0.0] * (tokens - 1), reward, seen=seen, penalties=[penalty] * tokens)
        for number, (_, steps) in enumerate(episodes)
        for index, (tokens, reward, penalty, seen) in enumerate(steps)
    ]
    order = range(len(turns)) if seed is None else np.random.default_rng(seed).permutation(len(turns))
    return [turns[row] for row in order], groups(*(group for group, _ in episodes))


def random_turns(seed: int, group_ids: list[int], steps: int = 12) -> tuple[list[Turn], list[Ending]]:
    """Normal rewards and penalties of every token, observations from a few."""
    rng = np.random.default_rng(seed)
    turns = []
    for episode in range(len(group_ids)):
        for index in range(int(rng.integers(1, steps + 1))):
            rewards, penalties = normal(rng, 2, int(rng.integers(1, 9))).tolist()
            turns.append(turn(episode, index, *rewards, seen=f"room {rng.integers(4)}", penalties=penalties))
    return [turns[row] for row in rng.permutation(len(turns))], groups(*group_ids)


# --- by hand ---


def test_grpo_by_hand():
    """Group 5: returns 0 (= 1 - 1), 1 and 2: mean 1, sample std 1. Group 3 has one episode."""
    turns = [turn(2, 1, 0.0, 1.5), turn(0, 0, 1.0), turn(3, 0, 4.0), turn(1, 0, 1.0), turn(0, 1, -1.0), turn(2, 0, 0.5)]
    endings = groups(5, 5, 5, 3)
    close(advantage(GRPO(), turns, endings), [1 / 1.000001, -1 / 1.000001, 0.0, 0.0, -1 / 1.000001, 1 / 1.000001])
    close(advantage(GRPO(scale_by_std=False), turns, endings), [1.0, -1.0, 0.0, 0.0, -1.0, 1.0])


def test_rloo_by_hand():
    """Returns 0, 1 and 2 against the others' means 1.5, 1 and 0.5; a group of two, 4 and 1; a group of one."""
    turns = [turn(number, 0, reward) for number, reward in enumerate([0.0, 4.0, 1.0, 7.0, 2.0, 1.0])]
    turns.append(turn(4, 1, 0.0, 0.0))
    close(advantage(RLOO(), turns, groups(5, 9, 5, 1, 5, 9)), [-1.5, 3.0, 0.0, 0.0, 1.5, -3.0, 1.5])


def test_reinforce_pp_by_hand():
    """gamma 1/2. A step of two tokens, then one with reward 1: returns 1/4, 1/2, 1. Another episode: 1/4.

    Mean 1/2, deviations -1/4, 0, 1/2, -1/4, sample variance 0.375 / 3 = 1/8.
    """
    turns = [turn(0, 1, 1.0), turn(1, 0, 0.25), turn(0, 0, 0.0, 0.0)]
    expected = [1.414213562, -0.707106781, -0.707106781, 0.0]
    close(advantage(ReinforcePP(0.5), turns, groups(1, 1)), expected, 1e-7)


def test_reinforce_pp_baseline_by_hand():
    """Returns 1 and 0, centred 1/2 on one token and -1/2 on three; their mean is -1/4, their sample std 1/2."""
    turns = [turn(1, 1, 0.0), turn(0, 0, 1.0), turn(1, 0, 0.0, 0.0)]
    close(advantage(ReinforcePPBaseline(), turns, groups(4, 4)), [-0.5, 1.5, -0.5], 1e-7)


def test_gigpo_by_hand():
    """gamma 1/2. Returns 0, 1, 2 of group 6: standardised -1, 0, 1.

    At "a" G is 0, 1/2, 1: -1, 0, 1. At "b" 1 and 2: -+0.707107. "c" is seen once in its group. Group 2, of one episode, adds
    nothing to "a", and gets 0.
    """
    turns = [
        turn(2, 1, 2.0, seen="b"),
        turn(0, 0, 0.0, seen="a"),
        turn(3, 0, 9.0, seen="a"),
        turn(1, 0, 0.0, seen="a"),
        turn(2, 0, 0.0, 0.0, seen="a"),
        turn(3, 1, 9.0, seen="a"),
        turn(1, 1, 1.0, seen="b"),
        turn(0, 1, 0.0, seen="c"),
    ]
    endings = groups(6, 6, 6, 2)
    close(advantage(GiGPO(0.5), turns, endings), [1.707107, -2.0, 0.0, 0.0, 2.0, 0.0, -0.707107, -1.0], 1e-5)
    # Centred only, the steps' part times 2: -1, 0, 1; -1/2, 0, 1/2; -1/2, 1/2.
    scheme = GiGPO(0.5, step_weight=2.0, scale_by_std=False)
    close(advantage(scheme, turns, endings), [2.0, -2.0, 0.0, 0.0, 2.0, 0.0, -1.0, -1.0])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # "aabb" is like "aaab" (6/8) but not like the cluster's first text (4/8): alone.
        (["aaaa", "aaab", "aabb"], [-1.0, 1.0, 0.0]),
        # Both others are like the first: returns 1, 3, 5 have mean 3.
        (["aaab", "aaaa", "aabb"], [-2.0, 0.0, 2.0]),
        # Exactly as similar as asked, 6/8, and just less: 4/6.
        (["aaaa", "bbbb", "aaab"], [-2.0, 0.0, 2.0]),
        (["aaa", "bbbb", "aac"], [0.0, 0.0, 0.0]),
        # Like the second cluster only; like both, when the first counts.
        (["aaaa", "aabb", "abbb"], [0.0, -1.0, 1.0]),
        (["aaaa", "aabb", "aaab"], [-2.0, 0.0, 2.0]),
    ],
)
def test_similar_anchors_by_hand(texts, expected):
    """gamma 0, equal returns 9: the steps' rewards 1, 3 and 5 are compared within clusters; the last steps even out."""
    scheme = GiGPO(0.0, scale_by_std=False, similarity=0.75)
    turns = [turn(0, 0, 1.0, seen=texts[0]), turn(0, 1, 3.0, seen=texts[1]), turn(1, 0, 5.0, seen=texts[2])]
    turns += [turn(0, 2, 5.0, seen="0000"), turn(1, 1, 4.0, seen="1111")]
    actual = advantage(scheme, turns[::-1], groups(3, 3))
    close(actual, [0.0, 0.0, *expected[::-1]])


# --- against the loops ---


@pytest.mark.parametrize(("scheme", "slow"), SCHEMES.values(), ids=list(SCHEMES))
@FEW
@given(EPISODES, SEEDS)
def test_equals_a_loop(scheme, slow, episodes, seed):
    turns, endings = turns_of(episodes, seed)
    close(advantage(scheme, turns, endings), slow(turns, endings))


@pytest.mark.parametrize(("scheme", "slow"), SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_on_any_rewards(scheme, slow, seed):
    turns, endings = random_turns(seed, [4, 9, 4, -1, 4, 9, 0, 4])
    close(advantage(scheme, turns, endings), slow(turns, endings))


# --- what all promise ---


@each(SCHEMES)
@FEW
@given(EPISODES, SEEDS)
def test_follows_the_rows(scheme, episodes, seed):
    turns, endings = turns_of(episodes)
    rows = np.random.default_rng(seed).permutation(len(turns))
    straight = by_turn(scheme, turns, endings)
    close(advantage(scheme, [turns[row] for row in rows], endings), torch.cat([straight[row] for row in rows]))


@each(SCHEMES)
@pytest.mark.parametrize("in_order", [False, True])
def test_the_batch_is_left_alone(scheme, in_order):
    """Rows in order, too: then no sorting makes a copy."""
    turns, endings = random_turns(3, [1, 1, 0, 1])
    if in_order:
        turns.sort(key=lambda row: (row.episode, row.index))
    batch, untouched = to_batch(turns, endings), to_batch(turns, endings)
    scheme(batch)
    for name in (field.name for field in dataclasses.fields(CreditBatch)):
        before, after = getattr(untouched, name), getattr(batch, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after


@each(SCHEMES)
def test_float32_is_near_float64(scheme):
    turns, endings = random_turns(5, [2, 1] * 12, steps=30)
    single = advantage(scheme, turns, endings, torch.float32)
    assert single.dtype == torch.float32
    near(single, advantage(scheme, turns, endings), 1e-5)


@each(IN_GROUPS)
def test_groups_of_one_teach_nothing(scheme):
    """Not even where an observation comes back within the episode."""
    turns, endings = random_turns(1, [3, 1, 7])
    assert advantage(scheme, turns, endings).eq(0).all()


@each(IN_GROUPS)
def test_a_group_of_one_gets_nothing_beside_others(scheme):
    turns, endings = random_turns(2, [3, 1, 3, 3])
    found = by_turn(scheme, turns, endings)
    assert [bool(numbers.eq(0).all()) for numbers in found] == [row.episode == 1 for row in turns]


@each({name: pair for name, pair in IN_GROUPS.items() if not isinstance(pair[0], GiGPO)})
def test_equal_returns_get_nothing_beside_others(scheme):
    """Group 1 won twice, in one step and in two; group 2 lost twice; group 3 did both, so that whitening moves its mean."""
    turns = [turn(0, 0, 1.0), turn(1, 0, 0.0, 0.0), turn(1, 1, 1.0), turn(2, 0, 0.0), turn(3, 0, 0.0, 0.0)]
    turns += [turn(4, 0, 0.0, 0.0, 0.0, 1.0), turn(5, 0, 0.0)]
    found = by_turn(scheme, turns, groups(1, 1, 2, 2, 3, 3))
    assert [bool(numbers.eq(0).all()) for numbers in found] == [True] * 5 + [False] * 2


@each(IN_GROUPS)
def test_equal_returns_teach_exactly_nothing(scheme):
    """Although 0.1 is no binary fraction, and the groups differ."""
    turns = [turn(episode, 0, 0.1 if episode % 2 else 0.7, seen="a" * (episode // 4)) for episode in range(14)]
    assert advantage(scheme, turns, groups(*[3, 8] * 7)).eq(0).all()


@each(IN_GROUPS)
@FEW
@given(EPISODES, SEEDS)
def test_names_of_groups_do_not_matter(scheme, episodes, seed):
    turns, endings = turns_of(episodes, seed)
    names = dict(zip([7, 2, 40, -3], np.random.default_rng(seed).permutation(4).tolist(), strict=True))
    renamed = [dataclasses.replace(ending, group=names[ending.group]) for ending in endings]
    close(advantage(scheme, turns, renamed), advantage(scheme, turns, endings))


@each(UNWHITENED)
@FEW
@given(EPISODES, EPISODES)
def test_other_groups_do_not_matter(scheme, episodes, others):
    """Where nothing is whitened over the batch, not even if they saw the same."""
    turns, endings = turns_of(episodes)
    more, _ = turns_of([*episodes, *((group + 100, steps) for group, steps in others)])
    endings_of_more = endings + groups(*(group + 100 for group, _ in others))
    close(advantage(scheme, more, endings_of_more)[: len(turns)], advantage(scheme, turns, endings))


@each(UNWHITENED)
@FEW
@given(EPISODES, SEEDS)
def test_numbers_of_tokens_do_not_matter(scheme, episodes, seed):
    turns, endings = turns_of(episodes, seed)
    single = [
        turn(row.episode, row.index, row.reward, seen=row.observation, penalties=[row.penalty] if row.penalties else [])
        for row in turns
    ]
    assert advantage(scheme, single, endings).tolist() == advantage(scheme, turns, endings).tolist()


def test_what_they_need():
    for scheme, _ in SCHEMES.values():
        assert scheme.needs_values == "none"
        assert scheme.needs_groups != isinstance(scheme, ReinforcePP)
        assert scheme.needs_observations == (isinstance(scheme, GiGPO) and scheme.similarity < 1)


# --- what sets them apart ---


@FEW
@given(EPISODES, SEEDS)
def test_rloo_is_scaled_centred_grpo(episodes, seed):
    """K / (K - 1) times, with K episodes in the group."""
    turns, endings = turns_of(episodes, seed)
    size = {group: sum(ending.group == group for ending in endings) for group, _ in episodes}
    sizes = [size[endings[row.episode].group] for row in turns]
    factors = [number / max(number - 1, 1) for number in sizes]
    centred = advantage(GRPO(scale_by_std=False), turns, endings)
    close(advantage(RLOO(), turns, endings), centred * torch.tensor(factors, dtype=torch.float64))


def test_reinforce_pp_links_the_steps_of_an_episode():
    """A reward at the end reaches the first step's tokens, and no other episode's."""
    turns = [turn(0, 0, 0.0, 0.0), turn(0, 1, 0.0), turn(0, 2, 0.0, 1.0), turn(1, 0, 0.0, 0.0, 0.0)]
    found = advantage(ReinforcePP(), turns, groups(0, 0))
    close(found, slow_whiten([1.0] * 5 + [0.0] * 3))
    assert (found[:5] > 0).all()
    discounted = advantage(ReinforcePP(0.5), turns, groups(0, 0))
    close(discounted, slow_whiten([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 0.0, 0.0, 0.0]))
    assert (discounted[:5] > discounted[5:].max()).all()


def test_reinforce_pp_discounts_by_token():
    """A penalty on each token stays where it is, and is carried back with the reward."""
    turns = [turn(0, 0, -0.5, -0.5), turn(0, 1, -0.5, 1.5)]
    close(advantage(ReinforcePP(0.5), turns, groups(0)), slow_whiten([-0.6875, -0.375, 0.25, 1.5]))


def test_reinforce_pp_knows_no_groups():
    turns, endings = random_turns(4, [0, 1, 0, 2])
    alone = [dataclasses.replace(ending, group=number) for number, ending in enumerate(endings)]
    assert advantage(ReinforcePP(0.9), turns, alone).tolist() == advantage(ReinforcePP(0.9), turns, endings).tolist()


def test_reinforce_pp_baseline_weighs_by_token():
    """Whitened over tokens: the more tokens the bad episode has, the less is held against each of them."""
    for tokens in (1, 4, 100):
        turns = [turn(0, 0, 1.0), turn(1, 0, *[0.0] * tokens)]
        found = advantage(ReinforcePPBaseline(), turns, groups(0, 0))
        close(found[1], found[0] / -tokens)
        close(found[0].square() + tokens * found[1].square(), float(tokens), 1e-6)  # unit variance: n - 1 of n = tokens + 1


@FEW
@given(EPISODES, SEEDS, st.booleans())
def test_gigpo_without_steps_is_grpo(episodes, seed, scale):
    turns, endings = turns_of(episodes, seed)
    close(advantage(GiGPO(0.9, 0.0, scale), turns, endings), advantage(GRPO(scale), turns, endings))


@FEW
@given(EPISODES, SEEDS)
def test_gigpo_of_texts_that_are_nothing_alike(episodes, seed):
    """Then a similarity a little below 1 asks for equal texts too."""
    texts = {"": "0" * 9, "ab": "1" * 9, "abb": "2" * 9, "abba": "3" * 9, "the cellar": "4" * 9, "the cellars": "5" * 9}
    turns, endings = turns_of(episodes, seed)
    unlike = [dataclasses.replace(row, observation=texts[row.observation]) for row in turns]
    expected = advantage(GiGPO(), unlike, endings)
    assert advantage(GiGPO(similarity=0.999), unlike, endings).tolist() == expected.tolist()


def test_gigpo_compares_an_observation_that_comes_back():
    """Twice in one episode: two steps of one anchor, with the returns 3 and 1 of two episodes that did equally well."""
    turns = [turn(0, 0, 2.0, seen="hall"), turn(0, 1, 1.0, seen="hall"), turn(1, 0, 3.0, seen="attic")]
    close(advantage(GiGPO(1.0, scale_by_std=False), turns, groups(0, 0)), [1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "GiGPO: gamma must be from 0 to 1, not 1.5"),
        ({"similarity": 0.0}, "GiGPO: similarity must be above 0 and at most 1, not 0.0"),
        ({"similarity": 1.1}, "GiGPO: similarity must be above 0 and at most 1, not 1.1"),
        ({"step_weight": -1.0}, "GiGPO: step_weight must be at least 0"),
        ({"step_weight": float("nan")}, "GiGPO: step_weight must be at least 0"),
    ],
)
def test_settings_of_gigpo_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        GiGPO(**settings)


def test_a_discount_that_cannot_be():
    with pytest.raises(ConfigError, match=r"ReinforcePP: gamma must be from 0 to 1, not -0\.1"):
        ReinforcePP(-0.1)
