"""Pictures of ``compare_methods.py``, from its cells alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from compare_stats import (
    NAMES,
    Cell,
    area,
    at_all_horizons,
    bootstrap,
    by_method,
    curve,
    excess_steps,
    final,
    golden_steps,
    improvement,
    name_of,
    pace,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _band(axes: Any, cells: list[Cell], x_of: Any, y_of: Any, method: str, shade: bool = True) -> None:
    """Mean over seeds of interpolated curves, and its bootstrap interval. StepPO stands out."""
    curves = [(np.asarray(x_of(cell), float), np.asarray(y_of(cell), float)) for cell in cells]
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    width, color = 2.6 if method == "steppo" else 1.3, _color(method)
    axes.plot(grid, values.mean(axis=0), label=name_of(method), color=color, lw=width, zorder=3 if method == "steppo" else 2)
    if shade:
        rng = np.random.default_rng(0)
        means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
        axes.fill_between(grid, *np.percentile(means, [2.5, 97.5], axis=0), color=color, alpha=0.12, lw=0)


def _color(method: str) -> Any:
    if method == "steppo":
        return "black"
    return plt.get_cmap("tab10")([name for name in NAMES if name != "steppo"].index(method) % 10)


def plot_curves(cells: list[Cell], tasks: list[str], folder: Path) -> None:
    for name, label, by_time in (
        ("curves_steps.png", "environment steps learned from", False),
        ("curves_seconds.png", "seconds of training on one thread, at the method's median pace", True),
    ):
        figure, panels = plt.subplots(1, len(tasks), figsize=(4.8 * len(tasks), 4.4), squeeze=False, constrained_layout=True)
        for axes, task in zip(panels[0], tasks, strict=True):
            methods = by_method(cells, task)
            untrained = [final(cell) for cell in methods.pop("react", [])]
            if untrained:
                axes.axhline(np.mean(untrained), color="gray", ls="--", lw=1, label=name_of("react"))
            for method, own in methods.items():
                scale = pace(own) if by_time else 1.0
                few = len(methods) <= 5
                _band(
                    axes, own, lambda c, k=scale: k * curve(c)[0], lambda c: curve(c)[1], method, few or method == "steppo"
                )
            axes.set(title=f"{golden_steps(task)} golden steps", xlabel=label, ylim=(0, 1.02))
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("success on 100 unseen games")
        _legend(figure, panels[0])
        _save(figure, folder / name)


def _legend(figure: Any, panels: Any) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def plot_critics(methods: dict[str, list[Cell]], path: Path) -> None:
    """Value loss and explained variance of the methods with a critic. With gamma = lambda = 1 all targets are returns."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), constrained_layout=True)
    for method, own in methods.items():
        if not own[0]["iterations"].get("train/value_loss"):
            continue
        for axes, name in ((left, "train/value_loss"), (right, "train/explained_variance")):
            _band(
                axes,
                own,
                lambda cell: cell["iterations"]["train/environment_steps"],
                lambda cell, name=name: cell["iterations"][name],
                method,
            )
            axes.set(xlabel="environment steps learned from", ylabel=name.removeprefix("train/").replace("_", " "))
            axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    right.set_ylim(-0.5, 1)
    _save(figure, path)


def plot_bars(methods: dict[str, list[Cell]], path: Path) -> None:
    """StepPO, without each of its parts, and without both (PPO)."""
    shown = [method for method in ("steppo", "steppo_no_step_gae", "steppo_no_step_is", "ppo") if method in methods]
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), constrained_layout=True)
    for axes, metric, title in ((panels[0], final, "success after training"), (panels[1], area, "area under the curve")):
        for place, method in enumerate(shown):
            mean, low, high = bootstrap([metric(cell) for cell in methods[method]])
            axes.bar(place, mean, color=_color(method), yerr=[[mean - low], [high - mean]], capsize=4)
        axes.set(xticks=range(len(shown)), title=title, ylim=(0, 1.05))
        axes.set_xticklabels([name_of(method) for method in shown], rotation=15, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def plot_horizons(cells: list[Cell], tasks: list[str], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.8), constrained_layout=True)
    horizons = np.asarray([golden_steps(task) for task in tasks])
    shown = at_all_horizons(cells, tasks)
    for axes, metric, title in (
        (panels[0], final, "success after training"),
        (panels[1], excess_steps, "excess steps of the games won"),
    ):
        for place, method in enumerate(shown):
            figures = np.asarray([bootstrap([metric(cell) for cell in by_method(cells, task)[method]]) for task in tasks])
            bars = np.abs(figures[:, 1:].T - figures[:, 0])
            beside = horizons + 0.22 * (place - (len(shown) - 1) / 2)
            axes.errorbar(
                beside, figures[:, 0], yerr=bars, marker="o", capsize=3, label=name_of(method), color=_color(method)
            )
        axes.set(title=title, xlabel="golden steps", xticks=horizons)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05)
    panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_improvements(scores: dict[str, dict[str, list[float]]], task: str, path: Path) -> None:
    """All pairs at one task."""
    methods = [method for method in NAMES if task in scores.get(method, {})]
    there = {method: {task: scores[method][task]} for method in methods}
    figure, axes = plt.subplots(figsize=(8.6, 6.8), constrained_layout=True)
    names = [name_of(method) for method in methods]
    grid = np.full((len(names), len(names)), 0.5)
    for row, left in enumerate(methods):
        for column, right in enumerate(methods):
            grid[row, column], low, high = improvement(there[left], there[right])
            certain = low > 0.5 or high < 0.5
            style = {
                "fontweight": "bold" if certain else "normal",
                "color": "white" if abs(grid[row, column] - 0.5) > 0.3 else "black",
            }
            axes.text(column, row, f"{grid[row, column]:.2f}", ha="center", va="center", fontsize=8, **style)
    axes.imshow(grid, cmap="PuOr", vmin=0, vmax=1)
    axes.set(xticks=range(len(names)), yticks=range(len(names)))
    axes.set_title(f"P(row beats column), area under the curve, {task}\nbold: the 95 % interval leaves out 0.5", fontsize=10)
    axes.set_xticklabels(names, rotation=40, ha="right")
    axes.set_yticklabels(names)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
