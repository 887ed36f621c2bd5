"""``benchmarks/scale_model.py``: its simulation where the answer is known, and that no point is predicted from itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import scale_points
from scale_points import POINTS, Point
from scale_simulation import Run, simulate

ROLLOUT = Run(groups=4, group_size=2, steps=3, tokens=10, tick=lambda held: 0.01, env_cpu=0.2, env_wait=0.7, slots=1)
SECONDS = 4 * 2 * 3 * (10 * 0.01 + 0.2 + 0.7)


@pytest.mark.parametrize("learn", [0.5 * SECONDS, 2 * SECONDS])
def test_playing_ahead_takes_the_longer_of_rollout_and_update_in_place_of_both(learn: float) -> None:
    both = replace(ROLLOUT, learn=learn)
    assert simulate(both)["seconds"] == pytest.approx(SECONDS + learn)
    assert simulate(replace(both, ahead=1), 8)["seconds"] == pytest.approx(max(SECONDS, learn))


@pytest.mark.parametrize(("cores", "slower"), [(4, 1.0), (2, 2.0), (1, 4.0)])
def test_actors_share_the_cores_that_there_are(cores: int, slower: float) -> None:
    computes = Run(groups=4, steps=5, env_cpu=0.1, actors=4, cores=cores)
    assert simulate(computes)["seconds"] == pytest.approx(5 * 0.1 * slower)
    assert simulate(replace(computes, env_cpu=0.0, env_wait=0.1))["seconds"] == pytest.approx(5 * 0.1)


def test_an_engine_slows_down_with_what_it_holds() -> None:
    held = Run(groups=6, steps=1, tokens=10, tick=lambda held: 0.1 * held, slots=3)
    assert simulate(held)["seconds"] == pytest.approx(2 * 10 * 0.3)
    assert simulate(held)["engines_busy"] == pytest.approx(1.0)


def test_all_groups_go_through_one_pool_and_weights_hold_up_both_sides() -> None:
    run = Run(groups=4, group_size=2, steps=1, env_wait=1.0, actors=4, slots=2, put=0.5, get=0.25, publish=3.0, fetch=2.0)
    assert simulate(run)["seconds"] == pytest.approx(2.0 + 1.0 + 8 * 0.5 + 8 * 0.25 + 3.0)


@pytest.mark.parametrize("learn", [0.5 * SECONDS, 2 * SECONDS])
def test_threads_that_wait_for_each_other_take_turns_with_who_plays_on_their_cores(learn: float) -> None:
    plays = Run(groups=4, env_cpu=SECONDS / 4, learn=learn, threads=2, ahead=1)
    assert simulate(plays, 10)["seconds"] == pytest.approx(SECONDS + learn)
    assert simulate(replace(plays, threads=1), 10)["seconds"] == pytest.approx(max(SECONDS, learn))


def test_actors_that_begin_apart_compute_while_others_wait() -> None:
    together = Run(groups=8, steps=100, env_cpu=1.0, env_wait=3.0, actors=8, cores=2)
    assert simulate(together, 1)["seconds"] == pytest.approx(100 * (4 * 1.0 + 3.0))
    assert simulate(replace(together, apart=4.0), 1)["seconds"] == pytest.approx(100 * 4.0, rel=0.02)


# ---- points ----


def doubled(found: Any, measured: float) -> Any:
    """With twice a number, in seconds or milliseconds, wherever it is."""
    if isinstance(found, dict):
        return {key: doubled(value, measured) for key, value in found.items()}
    if isinstance(found, list):
        return [doubled(value, measured) for value in found]
    is_it = type(found) in (int, float) and any(math.isclose(found * unit, measured, rel_tol=1e-12) for unit in (1, 1000))
    return 2 * found if is_it else found


@pytest.mark.parametrize("family", POINTS, ids=lambda family: family.__name__)
def test_no_point_is_predicted_from_itself(family: Callable[[], Iterator[Point]], monkeypatch: pytest.MonkeyPatch) -> None:
    real = scale_points.result
    for number, point in enumerate(list(family())):

        def other(*where: str | int, measured: float = point.measured) -> Any:
            return doubled(real(*where), measured)

        monkeypatch.setattr(scale_points, "result", other)
        again = list(family())[number]
        assert again.measured == pytest.approx(2 * point.measured), point.what
        assert again.predicted == pytest.approx(point.predicted), point.what
