"""Metrics over episodes: the interval against published numbers, the statistics against hand-made episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steppo.metrics import EpisodeStatistics, wilson_interval
from steppo.types import Episode, Step, StopReason
from tests.numeric_helpers import FEW

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # said of metrics without episodes

Z = 1.959964


# --- wilson_interval ---


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand: z^2 / (n + z^2) = 3.8415 / 13.8415 with no success, its mirror image with successes only,
        # and 1/2 -+ z / (2 sqrt(n + z^2)) = 0.5 -+ 1.96 / 7.4408 in the middle.
        (0, 10, 0.0000, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0000),
    ],
)
def test_wilson_interval_of_known_cases(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_without_trials_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


COUNTS = st.integers(1, 2000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))


@FEW
@given(COUNTS)
def test_wilson_bounds_are_rates_that_the_score_test_just_accepts(counts):
    """The definition: |observed - p| is z standard errors of p."""
    successes, trials = counts
    rate = successes / trials
    for bound in wilson_interval(successes, trials):
        assert abs(rate - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / trials), abs=1e-7)


@FEW
@given(COUNTS)
def test_wilson_interval_is_a_sane_interval(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low < high <= 1.0
    assert low - 1e-12 <= successes / trials <= high + 1e-12
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    more_low, more_high = wilson_interval(4 * successes, 4 * trials)
    assert more_high - more_low < high - low
    wide_low, wide_high = wilson_interval(successes, trials, z=2.575829)
    assert wide_low <= low
    assert wide_high >= high
    assert wide_high - wide_low > high - low


# --- EpisodeStatistics ---


def make_episode(
    rewards: Sequence[float],
    stop_reason: StopReason = StopReason.TERMINATED,
    success: bool | None = None,
    refused: Sequence[int] = (),
) -> Episode:
    """Step t has a prompt of 10 + t tokens and an action of 1 + t."""
    steps = [
        Step(
            prompt_ids=np.zeros(10 + index, dtype=np.int32),
            action_ids=np.zeros(1 + index, dtype=np.int32),
            behaviour_logprobs=np.zeros(1 + index, dtype=np.float32),
            reward=reward,
            index=index,
            finish_reason="stop",
            terminated=False,
            truncated=False,
            action_valid=index not in refused,
            observation="",
            action="",
            temperature=1.0,
            policy_version=0,
        )
        for index, reward in enumerate(rewards)
    ]
    return Episode("", 0, 0, "", tuple(steps), stop_reason, success=success)


HEALTHY = [
    make_episode([0.0, 0.0, 1.0], success=True),
    make_episode([-0.25, 0.0], StopReason.STEP_LIMIT, success=False, refused=[0]),
    make_episode([0.5], StopReason.CONTEXT_OVERFLOW, success=None),
    make_episode([], StopReason.CONTEXT_OVERFLOW),
]
BROKEN = [
    make_episode([9.0, 9.0], StopReason.ENV_ERROR, success=True, refused=[0, 1]),
    make_episode([], StopReason.ENGINE_ERROR),
    make_episode([9.0], StopReason.ABORTED, success=True),
    make_episode([9.0], StopReason.ENV_ERROR),
]


def statistics_of(episodes: Sequence[Episode]) -> EpisodeStatistics:
    statistics = EpisodeStatistics()
    for episode in episodes:
        statistics.update(episode)
    return statistics


def test_statistics_of_hand_made_episodes() -> None:
    low, high = wilson_interval(1, 4)
    assert statistics_of(HEALTHY).compute() == pytest.approx(
        {
            "episodes": 4,
            "env_errors": 0,
            "engine_errors": 0,
            "errors": 0,
            "no_verdict": 2,
            "success_rate": 1 / 4,
            "success_low": low,
            "success_high": high,
            "return_mean": (1.0 - 0.25 + 0.5) / 4,
            "steps_mean": 6 / 4,
            "steps": 6,
            "invalid_action_rate": 1 / 6,
            "prompt_tokens": 33 + 21 + 10,
            "prompt_tokens_mean": (33 + 21 + 10) / 6,
            "action_tokens": 6 + 3 + 1,
            "action_tokens_mean": (6 + 3 + 1) / 6,
            "stop_terminated": 1 / 4,
            "stop_step_limit": 1 / 4,
            "stop_context_overflow": 2 / 4,
            "stop_env_error": 0,
            "stop_engine_error": 0,
            "stop_aborted": 0,
        }
    )


def test_episodes_that_broke_count_as_errors_only() -> None:
    healthy, mixed = statistics_of(HEALTHY).compute(), statistics_of([*BROKEN[:2], *HEALTHY, *BROKEN[2:]]).compute()
    counts = {"errors", "env_errors", "engine_errors"}
    about_stopping = {name for name in healthy if name.startswith("stop_")} | counts
    assert {name: mixed[name] for name in mixed if name not in about_stopping} == {
        name: healthy[name] for name in healthy if name not in about_stopping
    }
    assert mixed["errors"] == 4
    assert mixed["env_errors"] == sum(episode.stop_reason == StopReason.ENV_ERROR for episode in BROKEN)
    assert mixed["engine_errors"] == sum(episode.stop_reason == StopReason.ENGINE_ERROR for episode in BROKEN)
    shares = {name: mixed[name] for name in about_stopping - counts}
    assert shares == {
        "stop_terminated": 1 / 8,
        "stop_step_limit": 1 / 8,
        "stop_context_overflow": 2 / 8,
        "stop_env_error": 2 / 8,
        "stop_engine_error": 1 / 8,
        "stop_aborted": 1 / 8,
    }


@pytest.mark.parametrize("episodes", [[], BROKEN], ids=["no episodes", "broken ones only"])
def test_nothing_to_score(episodes: Sequence[Episode]) -> None:
    figures = statistics_of(episodes).compute()
    assert (figures["episodes"], figures["errors"]) == (0, len(episodes))
    unknown = {"success_rate", "success_low", "success_high", "invalid_action_rate"}
    unknown |= {"return_mean", "steps_mean", "prompt_tokens_mean", "action_tokens_mean"}
    assert {name for name, figure in figures.items() if not math.isfinite(figure)} == unknown


def test_unknown_is_not_failure() -> None:
    """Without a verdict there is no rate; one verdict, and the others count as not solved."""
    silent = [make_episode([1.0]), make_episode([0.0], StopReason.STEP_LIMIT)]
    figures = statistics_of(silent).compute()
    assert math.isnan(figures["success_rate"])
    assert math.isnan(figures["success_low"])
    assert math.isnan(figures["success_high"])
    assert (figures["episodes"], figures["no_verdict"], figures["return_mean"]) == (2, 2, 0.5)
    for verdict in (False, True):
        figures = statistics_of([*silent, make_episode([0.0], success=verdict)]).compute()
        assert (figures["success_rate"], figures["no_verdict"]) == (verdict / 3, 2)
        assert (figures["success_low"], figures["success_high"]) == wilson_interval(verdict, 3)
    broken = make_episode([1.0], StopReason.ENV_ERROR, success=True)
    assert math.isnan(statistics_of([*silent, broken]).compute()["success_rate"])


def test_figures_are_plain_floats() -> None:
    assert {type(figure) for figure in statistics_of(HEALTHY).compute().values()} == {float}


@pytest.mark.parametrize("first", range(9))
def test_parts_add_up(first: int) -> None:
    """In one go, in two, and merged as torchmetrics merges ranks."""
    episodes = [*HEALTHY, *BROKEN]
    expected = statistics_of(episodes).compute()

    in_two_goes = statistics_of(episodes[:first])
    in_two_goes.compute()  # must not be remembered
    for episode in episodes[first:]:
        in_two_goes.update(episode)
    assert in_two_goes.compute() == expected

    merged = statistics_of(episodes[:first])
    merged.merge_state(statistics_of(episodes[first:]))
    assert merged.compute() == expected


def test_ranks_are_summed() -> None:
    """Through torchmetrics' own synchronisation, with a gather that finds the same numbers on two ranks."""
    synchronised = EpisodeStatistics(dist_sync_fn=lambda state, group: [state, state], distributed_available_fn=lambda: True)
    for episode in [*HEALTHY, *BROKEN]:
        synchronised.update(episode)
    assert synchronised.compute() == statistics_of([*HEALTHY, *BROKEN] * 2).compute()


def test_one_rank_with_a_verdict_is_enough() -> None:
    """This rank has none; the other's state has one."""
    known = statistics_of([make_episode([1.0], success=True)])
    other = {name: getattr(known, name) for name in ("sums", "reasons")}
    names = iter(other)
    synchronised = EpisodeStatistics(
        dist_sync_fn=lambda state, group: [state, other[next(names)]], distributed_available_fn=lambda: True
    )
    synchronised.update(make_episode([0.0]))
    figures = synchronised.compute()
    assert (figures["success_rate"], figures["no_verdict"]) == (0.5, 1)


def test_reset_forgets() -> None:
    statistics = statistics_of([*HEALTHY, *BROKEN])
    statistics.reset()
    assert statistics.compute() == pytest.approx(EpisodeStatistics().compute(), nan_ok=True)
