"""Task samplers: streams of tasks that a seed and a cursor determine."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from steppo.errors import ConfigError
from steppo.samplers import SequentialSampler, ShuffledSampler, TaskSampler, WeightedSampler
from steppo.types import Task

TASKS = [Task(f"{kind}/{number}") for kind in ("easy", "hard") for number in range(5)]
MAKERS = [SequentialSampler, ShuffledSampler, lambda: WeightedSampler({"hard/*": 3.0, "easy/0": 0.0})]
NAMES = ["sequential", "shuffled", "weighted"]

every_sampler = pytest.mark.parametrize("make", MAKERS, ids=NAMES)


def draw(sampler: TaskSampler, count: int, seed: int = 5, tasks: list[Task] = TASKS) -> list[str]:
    return [task.id for task in sampler.next(tasks, count, seed)]


# --- all ---


@every_sampler
@pytest.mark.parametrize("sizes", [[1] * 37, [12, 12, 13], [0, 36, 1]], ids=str)
def test_portions_do_not_matter(make: Callable[[], TaskSampler], sizes: list[int]) -> None:
    whole, sampler = draw(make(), 37), make()
    assert [task for size in sizes for task in draw(sampler, size)] == whole
    assert sampler.cursor == 37


@every_sampler
@pytest.mark.parametrize("cursor", [0, 3, 10, 14, 25])
def test_a_resumed_sampler_goes_on(make: Callable[[], TaskSampler], cursor: int) -> None:
    resumed = make()
    resumed.cursor = cursor
    assert draw(resumed, 20) == draw(make(), cursor + 20)[cursor:]


@every_sampler
def test_ranks_draw_the_same(make: Callable[[], TaskSampler]) -> None:
    """Whatever each process did with its own random numbers before."""
    drawn = []
    for rank in range(2):
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        drawn.append(draw(make(), 30))
    assert drawn[0] == drawn[1]


@every_sampler
def test_the_stream_depends_on_the_tasks_given_now(make: Callable[[], TaskSampler]) -> None:
    """Not on those of an earlier call, be they as many."""
    others = [*TASKS[5:], *TASKS[:5]]
    sampler = make()
    draw(sampler, 10)
    fresh = make()
    fresh.cursor = 10
    assert draw(sampler, 20, tasks=others) == draw(fresh, 20, tasks=others)


@pytest.mark.parametrize("make", MAKERS[1:], ids=NAMES[1:])
def test_another_seed_gives_another_stream(make: Callable[[], TaskSampler]) -> None:
    assert draw(make(), 30, seed=5) != draw(make(), 30, seed=6)


# --- one by one ---


def test_sequential_goes_round() -> None:
    assert draw(SequentialSampler(), 25) == [TASKS[number % 10].id for number in range(25)]


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1], TASKS[:7]], ids=len)
def test_shuffled_plays_all_before_one_comes_again(tasks: list[Task]) -> None:
    sampler = ShuffledSampler()
    epochs = [draw(sampler, len(tasks), tasks=tasks) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == [task.id for task in tasks]
    assert len({tuple(epoch) for epoch in epochs}) == min(4, len(tasks)), "each epoch in another order, where there is one"


def test_weighted_frequencies() -> None:
    count = 6000
    drawn = Counter(draw(WeightedSampler({"hard/1": 0.0, "hard/*": 3.0, "*/4": 0.5}), count))
    weights = {task.id: 3.0 if task.id.startswith("hard") else 1.0 for task in TASKS}
    weights |= {"hard/1": 0.0, "easy/4": 0.5}  # hard/4 fits hard/* first
    for task, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(drawn[task] - count * share) <= 4 * (count * share * (1 - share)) ** 0.5, task


def test_weighted_draws_are_independent() -> None:
    """A task may come twice in a row, about as often as chance has it."""
    drawn = draw(WeightedSampler({}), 4000)
    repeats = sum(left == right for left, right in itertools.pairwise(drawn))
    assert abs(repeats - 400) < 4 * 19


@pytest.mark.parametrize(
    ("weights", "possible"),
    [
        ({"*": 0.0, "easy/2": 1.0}, []),  # the first pattern that fits counts
        ({"easy/2": 1.0, "*": 0.0}, ["easy/2"]),
        ({"hard/?": 0.0, "*/[0-3]": 0.0}, ["easy/4"]),
        ({"hard/0": 2.0, "hard": 0.0, "easy/*": 0.0}, [f"hard/{number}" for number in range(5)]),
    ],
    ids=str,
)
def test_weighted_patterns(weights: dict[str, float], possible: list[str]) -> None:
    sampler = WeightedSampler(weights)
    if possible:
        assert set(draw(sampler, 100)) == set(possible)
    else:
        with pytest.raises(ConfigError, match="every task has weight 0"):
            draw(sampler, 1)


def test_weights_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="must be at least 0 and finite, not -1"):
        WeightedSampler({"easy/*": 1.0, "hard/*": -1.0})


def test_weights_are_worked_out_once_for_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are not the same, though they may be equal or of one length, have weights of their own."""
    sampler, worked_out = WeightedSampler({"hard/*": 3.0}), []
    weight = WeightedSampler._weight
    monkeypatch.setattr(WeightedSampler, "_weight", lambda self, name: worked_out.append(name) or weight(self, name))
    expected = draw(WeightedSampler({"hard/*": 3.0}), 60)
    worked_out.clear()
    assert draw(sampler, 20) + draw(sampler, 20) + draw(sampler, 20) == expected
    assert worked_out == [task.id for task in TASKS]
    for tasks in ([Task("hard/0"), Task("easy/0")], [Task("easy/0"), Task("hard/0")], TASKS[:5], list(TASKS)):
        fresh = WeightedSampler({"hard/*": 3.0})
        fresh.cursor = sampler.cursor
        assert draw(sampler, 30, tasks=tasks) == draw(fresh, 30, tasks=tasks)
