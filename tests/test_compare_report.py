"""The comparison's statistics, by hand, and that its report can be written from what cells may hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_methods import STAGES, cells_of
from compare_report import write_report
from compare_stats import area, bootstrap, excess_steps, final, improvement


def cell(method: str, task: str, seed: int, rates: list[float], steps: list[int], stage: str = "compare") -> dict[str, Any]:
    """A run with these successes, after so many steps, of a method with a critic, or untrained."""
    trained = len(rates) > 1
    columns = {"train/environment_steps": steps[1:], "train/value_loss": [0.1] * len(steps[1:])} if trained else {}
    columns |= {"train/explained_variance": [None] * len(steps[1:])} if trained else {}
    return {
        **{"stage": stage, "task": task, "method": method, "seed": seed, "learning_rate": 2e-4, "budget": 100},
        **{"command": f"{stage} {task} {method} {seed}", "seconds": 60.0, "machine": "here", "date": "today"},
        "evaluations": [{"environment_steps": s, "success_rate": r} for s, r in zip(steps, rates, strict=True)],
        "iterations": {**columns, "seconds": [0.01 * s for s in steps[1:]]},
        "final_episodes": [{"success": n < 10 * rates[-1], "steps": 6 + n} for n in range(10)],
    }


def test_area_and_final_by_hand() -> None:
    """0 to 1 over 80 steps, then 1 until 100; what comes after the budget counts at the end only."""
    run = cell("ppo", "coin-4", 0, [0.0, 1.0, 1.0, 0.3], [0, 80, 100, 120])
    assert area(run) == pytest.approx(0.6, abs=1e-3)
    assert final(run) == 0.3
    assert area(cell("react", "coin-4", 0, [0.7], [0])) == pytest.approx(0.7)


def test_excess_steps_are_of_games_won() -> None:
    assert excess_steps(cell("ppo", "coin-4", 0, [0.0, 0.3], [0, 100])) == 3.0  # 6, 7 and 8 steps
    assert math.isnan(excess_steps(cell("ppo", "coin-4", 0, [0.5, 0.0], [0, 100])))


def test_improvement_by_hand() -> None:
    """(1, 2) against (1, 3): a tie, a win, two losses. Over a second task with a certain win: the mean."""
    probability, low, high = improvement({"a": [1.0, 2.0]}, {"a": [1.0, 3.0]})
    assert probability == 1.5 / 4
    assert 0 <= low < probability < high <= 1
    both = improvement({"a": [1.0, 2.0], "b": [5.0]}, {"a": [1.0, 3.0], "b": [4.0], "c": [9.0]})
    assert both[0] == (1.5 / 4 + 1) / 2


def test_bootstrap_is_of_the_mean() -> None:
    mean, low, high = bootstrap([1.0, 2.0, 3.0, float("nan")])
    assert mean == 2.0
    # One of the 27 samples of three is all 1, which is more than 2.5 %; so is the one that is all 3.
    assert (low, high) == (1.0, 3.0)
    assert bootstrap([0.4]) == pytest.approx((0.4, 0.4, 0.4))
    assert np.isnan(bootstrap([float("nan")])).all()


def test_recorded_cells_are_known_as_those_of_today() -> None:
    """Or a report could not be written again, and a comparison would begin anew: whoever renames an option says so there."""
    cells = {cell for stage in STAGES[:-1] for cell in cells_of(stage, [0, 1, 2, 3, 4])}
    assert [cell.name for cell in cells if not cell.stored()] == []


def test_a_report_of_whatever_there_is(tmp_path: Path) -> None:
    """Untrained cells have no curves, a collapsed run wins nothing, a method may be missing at a horizon."""
    tasks, steps = ("coin-4", "coin-8", "coin-12"), [0, 50, 105]
    cells = [cell("react", task, seed, [0.3], [0]) for task in tasks for seed in (0, 1)]
    cells += [
        cell(m, task, seed, [0.3, 0.5, 0.5 * seed], steps) for m in ("ppo", "steppo") for task in tasks for seed in (0, 1)
    ]
    cells += [cell("gspo", "coin-8", seed, [0.3, 0.5, 0.7], steps) for seed in (0, 1)]
    stages = {
        "tune": [
            {**run, "stage": "tune", "command": "tune"}
            for run in cells
            if run["task"] == "coin-8" and run["method"] != "react"
        ],
        "compare": cells,
        "same_rate": cells,
        "diagnose": [cell("steppo, changed", "coin-8", 0, [0.3, 0.9, 1.0], steps, "diagnose")],
    }
    write_report(stages, "coin-8", {"steppo, changed": "steppo"}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| StepPO | 2 | 0.0002 | 0.30 | 0.25 [0.00, 0.50] | -0.05 |" in text
    assert "(1 of 2 runs won none)" in text
    assert "| coin-8 | 0.30 | 7.0 | 12.0 | 0.20 |" in text  # 6, 7, 8 steps won; 9 to 15 lost; 21 of 105 steps
    assert "| steppo, changed | 1 | 0.0002 | 0.30 | 1.00 [1.00, 1.00] | +0.70 |" in text
    for folder in ("tuned", "same_rate"):
        assert len(list((tmp_path / folder).glob("*.png"))) == 6
    write_report({**stages, "compare": [], "same_rate": [], "diagnose": []}, "coin-8", {}, tmp_path / "tuning")
    assert "## Learning rates" in (tmp_path / "tuning" / "report.md").read_text()
