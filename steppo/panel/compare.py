"""The paired difference of two results on the same panel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steppo.errors import ConfigError
from steppo.results import is_healthy

RESAMPLES = 10_000
_MOST_DRAWN = 2**20  # at once
# What may be what is compared. Who plays, and seeds, say nothing of how.
_MAY_DIFFER = (
    "max_steps",
    "context",
    "parser",
    "draws",
    "prompt_version",
    "max_prompt_tokens",
    "max_new_tokens",
    "on_invalid",
    "invalid_penalty",
)


@dataclass(frozen=True)
class Difference:
    """Of a figure, b - a.

    Attributes:
        a: Mean over the tasks.
        b: Likewise.
        mean: Of the tasks' differences.
        interval: 95 % of it.
    """

    a: float
    b: float
    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two results, task by task.

    Attributes:
        tasks: How many are compared.
        left_out: Tasks with no healthy episode on one side or the other.
        notes: In what the protocols differ.
        success: Unless there is no verdict on one side.
        counts: Tasks by who solved them (with several samples: most of them): both, only a, only b, neither.
        by_return: Of the return.
    """

    tasks: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    success: Difference | None
    counts: Mapping[str, int]
    by_return: Difference


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compares two results. Several samples of a task are averaged first.

    Raises:
        ConfigError: They are not of the same panel or way to sample, or have no task to compare.
    """
    notes = _comparable(a, b)
    per_task = [_by_task(result) for result in (a, b)]
    all_tasks = list(dict.fromkeys(one["task"] for one in a["episodes"]))
    tasks = [task for task in all_tasks if all(task in side for side in per_task)]
    if not tasks:
        raise ConfigError("there is no task with a healthy episode on both sides")
    returns, successes = (
        [np.asarray([side[task][figure] for task in tasks]) for side in per_task] for figure in ("return", "success")
    )
    known = all(result["figures"].get("success_rate") is not None for result in (a, b))
    solved_a, solved_b = (rates > 0.5 for rates in successes)
    counts = {
        "both": int((solved_a & solved_b).sum()),
        "only a": int((solved_a & ~solved_b).sum()),
        "only b": int((~solved_a & solved_b).sum()),
        "neither": int((~solved_a & ~solved_b).sum()),
    }
    return Comparison(
        len(tasks),
        tuple(task for task in all_tasks if task not in tasks),
        tuple(notes),
        difference(*successes) if known else None,
        counts if known else {},
        difference(*returns),
    )


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Of two figures of the same tasks, with a paired percentile bootstrap over tasks (Efron and Tibshirani, 1993)."""
    paired = b - a
    return Difference(float(a.mean()), float(b.mean()), float(paired.mean()), bootstrap_interval(paired))


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the mean: the same values give the same interval."""
    rng, count = np.random.default_rng(0), len(values)
    at_once = max(1, _MOST_DRAWN // count)
    sizes = [min(at_once, RESAMPLES - first) for first in range(0, RESAMPLES, at_once)]
    means = np.concatenate([values[rng.integers(count, size=(size, count))].mean(axis=1) for size in sizes])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _by_task(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean return and success of each task's healthy episodes."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for outcome in filter(is_healthy, result["episodes"]):
        groups[outcome["task"]].append(outcome)
    return {
        task: {
            "return": float(np.mean([outcome["return"] for outcome in group])),
            "success": float(np.mean([outcome["success"] is True for outcome in group])),
        }
        for task, group in groups.items()
    }


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> Sequence[str]:
    """In what they differ that may be what is compared."""
    if a["panel"].get("sha256") != b["panel"].get("sha256"):
        there = [f"{result['panel'].get('file') or 'no file'}, {result['panel'].get('sha256')}" for result in (a, b)]
        tasks = [{one["task"] for one in result["episodes"]} for result in (a, b)]
        why = "with other tasks" if tasks[0] != tasks[1] else "with the same task ids, but another content or order"
        raise ConfigError(f"the results are of two panels ({there[0]}; {there[1]}) {why}")
    protocols = [result["protocol"] for result in (a, b)]
    sampled = [protocol.get("temperature") for protocol in protocols]
    if all(protocol.get("player") == "policy" for protocol in protocols) and sampled[0] != sampled[1]:
        raise ConfigError(
            f"a policy at temperature {sampled[0]} cannot be compared with one at temperature {sampled[1]} (0 is greedy): "
            "evaluate both alike"
        )
    pairs = {name: tuple(protocol.get(name) for protocol in protocols) for name in _MAY_DIFFER}
    unlike = {name: sides for name, sides in pairs.items() if sides[0] != sides[1] and None not in sides}
    return [f"{name} is {here} in a and {there} in b" for name, (here, there) in unlike.items()]
