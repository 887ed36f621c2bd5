"""The simulation of ``benchmarks/scale_model.py`` where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
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
