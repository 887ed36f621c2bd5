"""What ``compare_methods.py`` measures: figures of a cell, and statistics over the cells of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = {
    "react": "ReAct (untrained)",
    "ppo": "PPO",
    "reinforce_pp": "REINFORCE++",
    "reinforce_pp_baseline": "REINFORCE++-baseline",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "gspo": "GSPO",
    "gigpo": "GiGPO",
    "steppo": "StepPO",
    "steppo_no_step_gae": "StepPO w/o step GAE",
    "steppo_no_step_is": "StepPO w/o step IS",
}
RESAMPLES = 10_000
Cell = dict[str, Any]
Scores = Mapping[str, Sequence[float]]  # of the runs, by task


def area(cell: Cell) -> float:
    """Mean success on unseen games over the budget of environment steps: sample efficiency."""
    return float(np.interp(np.linspace(0, cell["budget"], 1001), *curve(cell)).mean())


def final(cell: Cell) -> float:
    """Success on unseen games at the end: after the iteration that reached the budget."""
    return float(cell["evaluations"][-1]["success_rate"])


def golden_steps(task: str) -> int:
    """Coin collector's level, the length of its only route."""
    return int(task.rpartition("-")[2])


def excess_steps(cell: Cell) -> float:
    """Steps beyond the golden ones, mean over the last panel's games that were won; NaN if none was."""
    steps = [episode["steps"] for episode in cell["final_episodes"] if episode["success"]]
    return float(np.mean(steps)) - golden_steps(cell["task"]) if steps else float("nan")


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % percentile bootstrap interval; NaN are left out."""
    sample = np.asarray([value for value in values if not np.isnan(value)])
    if not len(sample):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = rng.choice(sample, (RESAMPLES, len(sample))).mean(axis=1)
    return float(sample.mean()), *(float(bound) for bound in np.percentile(means, [2.5, 97.5]))


def improvement(x: Scores, y: Scores) -> tuple[float, float, float]:
    """Probability that a run of X beats one of Y on a task taken at random, ties counting half, and its 95 % interval.

    As in Agarwal et al. (2021): the Mann-Whitney statistic, averaged over tasks, bootstrapped by runs within tasks.
    """
    rng = np.random.default_rng(0)
    tasks = sorted(set(x) & set(y))

    def resample(values: Sequence[float]) -> np.ndarray:
        own = np.asarray(values)
        return np.concatenate([own[None], rng.choice(own, (RESAMPLES, len(own)))])

    per_task = []
    for task in tasks:
        a, b = resample(x[task]), resample(y[task])
        difference = a[:, :, None] - b[:, None, :]
        per_task.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2)))
    probability = np.mean(per_task, axis=0)
    return float(probability[0]), *(float(bound) for bound in np.percentile(probability[1:], [2.5, 97.5]))


def by_method(cells: list[Cell], task: str) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["task"] == task:
            found.setdefault(cell["method"], []).append(cell)
    order = [*NAMES, *sorted(set(found) - set(NAMES))]
    return {method: found[method] for method in order if method in found}


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def curve(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Steps learned from before each evaluation, and its success."""
    records = cell["evaluations"]
    return np.asarray([r["environment_steps"] for r in records]), np.asarray([r["success_rate"] for r in records])


def pace(cells: list[Cell]) -> float:
    """Seconds of training (rollout, scoring, updates) per environment step: the median run's; 0 without training.

    One figure for all runs of a method, because what else the machine did meanwhile differs by run.
    """
    runs = [cell["iterations"] for cell in cells if cell["iterations"]["seconds"]]
    return float(np.median([run["seconds"][-1] / run["train/environment_steps"][-1] for run in runs])) if runs else 0.0


def at_all_horizons(cells: list[Cell], tasks: list[str]) -> list[str]:
    return [method for method in NAMES if all(method in by_method(cells, task) for task in tasks)]


def areas(cells: list[Cell]) -> dict[str, dict[str, list[float]]]:
    """Area of each run, by method and task; without the untrained policy."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if cell["method"] != "react":
            found.setdefault(cell["method"], {}).setdefault(cell["task"], []).append(area(cell))
    return found
