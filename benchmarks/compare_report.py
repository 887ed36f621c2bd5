"""Tables and pictures of ``compare_methods.py``, from its cells alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def area(cell: Cell) -> float:
    """Mean success on unseen games over the budget of environment steps: sample efficiency."""
    return float(np.interp(np.linspace(0, cell["budget"], 1001), *_curve(cell)).mean())


def final(cell: Cell) -> float:
    """Success on unseen games when the budget is spent."""
    return float(cell["evaluations"][-1]["success_rate"])


def golden_steps(task: str) -> int:
    """Coin collector's level, the length of its only route."""
    return int(task.rpartition("-")[2])


def excess_steps(cell: Cell) -> float:
    """Steps beyond the golden ones, mean over the last panel's successes; NaN if there is none."""
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


def improvement(x: dict[str, Sequence[float]], y: dict[str, Sequence[float]]) -> tuple[float, float, float]:
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


def write_report(stages: dict[str, list[Cell]], middle: str, folder: Path) -> None:
    """Writes ``report.md`` and the pictures, of the stages that have cells. ``middle``: the task of all methods."""
    folder.mkdir(parents=True, exist_ok=True)
    compare, tasks = stages["compare"], sorted({cell["task"] for cell in stages["compare"]}, key=golden_steps)
    parts = [
        "# Comparison of methods",
        "",
        "Written by `benchmarks/compare_methods.py`; read [results.md](../results.md).",
    ]
    parts += _tuning(_by_method(stages["tune"], middle))
    for task in tasks:
        parts += _table(f"{task}: {golden_steps(task)} golden steps", _by_method(compare, task))
    if compare:
        parts += _improvements(compare, middle, folder / "improvement.png")
        parts += _horizons(compare, tasks)
        _plot_curves(compare, tasks, folder)
        _plot_critics(_by_method(compare, middle), folder / "critic.png")
        _plot_bars(_by_method(compare, middle), folder / "ablation.png")
        _plot_horizons(compare, tasks, folder / "horizon.png")
    if stages["diagnose"]:
        parts += _table(f"Variants, {middle}", _by_method(stages["diagnose"], middle))
    cells = [cell for cells in stages.values() for cell in cells]
    hours = sum(cell["seconds"] for cell in cells) / 3600
    machines = sorted({f"{cell['machine']}, {cell['date']}" for cell in cells})
    parts += ["", f"{len(cells)} runs of {hours:.1f} hours in all, two at once ({'; '.join(machines)})."]
    (folder / "report.md").write_text("\n".join(parts) + "\n")


def _by_method(cells: list[Cell], task: str) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["task"] == task:
            found.setdefault(cell["method"], []).append(cell)
    order = [*NAMES, *sorted(set(found) - set(NAMES))]
    return {method: found[method] for method in order if method in found}


def _name(method: str) -> str:
    return NAMES.get(method, method)


def _curve(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Steps learned from before each evaluation, and its success."""
    records = cell["evaluations"]
    return np.asarray([r["environment_steps"] for r in records]), np.asarray([r["success_rate"] for r in records])


def _interval(figures: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = figures
    return "-" if np.isnan(mean) else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _tuning(methods: dict[str, list[Cell]]) -> list[str]:
    cells = [cell for own in methods.values() for cell in own]
    rates = sorted({cell["learning_rate"] for cell in cells})
    header = ["method", *(f"{rate:g}" for rate in rates), "taken"]
    lines = ["", "## Learning rates", "", "Area under the learning curve, mean over the tuning seeds.", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, own in methods.items():
        means = {rate: np.mean([area(cell) for cell in own if cell["learning_rate"] == rate]) for rate in rates}
        taken = max(means, key=lambda rate: means[rate])
        lines.append(f"| {_name(method)} | " + " | ".join(f"{mean:.3f}" for mean in means.values()) + f" | {taken:g} |")
    hours = sum(cell["seconds"] for cell in cells) / 3600
    return [*lines, "", f"{len(cells)} runs, {hours:.1f} hours."]


def _table(title: str, methods: dict[str, list[Cell]]) -> list[str]:
    header = ["method", "seeds", "success before", "after", "area under the curve", "updates", "seconds of training"]
    lines = ["", f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, cells in methods.items():
        before = np.mean([cell["evaluations"][0]["success_rate"] for cell in cells])
        after, under = (_interval(bootstrap([metric(cell) for cell in cells])) for metric in (final, area))
        updates = np.mean([cell["evaluations"][-1]["updates"] for cell in cells])
        seconds = np.mean([_seconds(cell)[-1] for cell in cells])
        cost = f"{updates:.0f} | {seconds:.0f}"
        lines.append(f"| {_name(method)} | {len(cells)} | {before:.2f} | {after} | {under} | {cost} |")
    return lines


def _improvements(cells: list[Cell], middle: str, path: Path) -> list[str]:
    """StepPO against each, over the tasks that both were run on; and a picture of all pairs at the middle one."""
    scores: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if cell["method"] != "react":
            scores.setdefault(cell["method"], {}).setdefault(cell["task"], []).append(area(cell))
    methods = [method for method in NAMES if method in scores]
    lines = [
        "",
        "## Probability of improvement",
        "",
        "That a run of StepPO has the larger area under its learning curve.",
        "",
    ]
    lines += ["| against | tasks | probability |", "|---|---|---|"]
    for method in methods:
        if method != "steppo" and "steppo" in scores:
            tasks = len(set(scores[method]) & set(scores["steppo"]))
            lines.append(f"| {_name(method)} | {tasks} | {_interval(improvement(scores['steppo'], scores[method]))} |")
    there = {method: {middle: scores[method][middle]} for method in methods}
    grid = np.asarray([[improvement(there[row], there[column])[0] for column in methods] for row in methods])
    figure, axes = plt.subplots(figsize=(8.4, 6.6), constrained_layout=True)
    axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1)
    names = [_name(method) for method in methods]
    axes.set(
        xticks=range(len(names)), yticks=range(len(names)), title=f"P(row beats column), area under the curve, {middle}"
    )
    axes.set_xticklabels(names, rotation=40, ha="right")
    axes.set_yticklabels(names)
    for row in range(len(names)):
        for column in range(len(names)):
            axes.text(column, row, f"{grid[row, column]:.2f}", ha="center", va="center", fontsize=8)
    _save(figure, path)
    return lines


def _horizons(cells: list[Cell], tasks: list[str]) -> list[str]:
    lines = ["", "## By horizon", "", "Success after training, and steps beyond the golden ones where it succeeded.", ""]
    header = ["method"]
    for task in tasks:
        header += [f"success, {golden_steps(task)} steps", "excess"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in _at_all(cells, tasks):
        row = [_name(method)]
        for task in tasks:
            own = _by_method(cells, task)[method]
            row += [
                _interval(bootstrap([final(cell) for cell in own])),
                _interval(bootstrap([excess_steps(c) for c in own]), 1),
            ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _at_all(cells: list[Cell], tasks: list[str]) -> list[str]:
    return [method for method in NAMES if all(method in _by_method(cells, task) for task in tasks)]


def _band(axes: Any, cells: list[Cell], x_of: Any, y_of: Any, label: str, color: Any) -> None:
    """Mean over seeds of interpolated curves, and its bootstrap interval."""
    curves = [(np.asarray(x_of(cell), float), np.asarray(y_of(cell), float)) for cell in cells]
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    axes.plot(grid, values.mean(axis=0), label=label, color=color)
    axes.fill_between(grid, low, high, color=color, alpha=0.12, lw=0)


def _color(method: str) -> Any:
    return plt.get_cmap("tab20")(list(NAMES).index(method) * 2 % 20 + (list(NAMES).index(method) >= 10))


def _seconds(cell: Cell) -> np.ndarray:
    """Seconds of training (rollout, scoring, updates) before each evaluation."""
    iterations = cell["iterations"]
    return np.interp(_curve(cell)[0], [0, *iterations["train/environment_steps"]], [0, *iterations["seconds"]])


def _plot_curves(cells: list[Cell], tasks: list[str], folder: Path) -> None:
    for name, label, x_of in (
        ("curves_steps.png", "environment steps learned from", lambda cell: _curve(cell)[0]),
        ("curves_seconds.png", "seconds of training, two runs on two cores", _seconds),
    ):
        figure, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), squeeze=False, constrained_layout=True)
        for axes, task in zip(panels[0], tasks, strict=True):
            for method, own in _by_method(cells, task).items():
                if method != "react":
                    _band(axes, own, x_of, lambda cell: _curve(cell)[1], _name(method), _color(method))
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


def _plot_critics(methods: dict[str, list[Cell]], path: Path) -> None:
    """Value loss and explained variance of the methods with a critic. With gamma = lambda = 1 all targets are returns."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), constrained_layout=True)
    for method, own in methods.items():
        if "train/value_loss" not in own[0]["iterations"]:
            continue
        for axes, name in ((left, "train/value_loss"), (right, "train/explained_variance")):
            _band(
                axes,
                own,
                lambda cell: cell["iterations"]["train/environment_steps"],
                lambda cell, name=name: cell["iterations"][name],
                _name(method),
                _color(method),
            )
            axes.set(xlabel="environment steps learned from", ylabel=name.removeprefix("train/").replace("_", " "))
            axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    right.set_ylim(-0.5, 1)
    _save(figure, path)


def _plot_bars(methods: dict[str, list[Cell]], path: Path) -> None:
    """StepPO, without each of its parts, and without both (PPO)."""
    shown = [method for method in ("steppo", "steppo_no_step_gae", "steppo_no_step_is", "ppo") if method in methods]
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), constrained_layout=True)
    for axes, metric, title in ((panels[0], final, "success after training"), (panels[1], area, "area under the curve")):
        for place, method in enumerate(shown):
            mean, low, high = bootstrap([metric(cell) for cell in methods[method]])
            axes.bar(place, mean, color=_color(method), yerr=[[mean - low], [high - mean]], capsize=4)
        axes.set(xticks=range(len(shown)), title=title, ylim=(0, 1.05))
        axes.set_xticklabels([_name(method) for method in shown], rotation=15, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def _plot_horizons(cells: list[Cell], tasks: list[str], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.8), constrained_layout=True)
    horizons = [golden_steps(task) for task in tasks]
    for axes, metric, title in (
        (panels[0], final, "success after training"),
        (panels[1], excess_steps, "excess steps of successes"),
    ):
        for method in _at_all(cells, tasks):
            figures = np.asarray([bootstrap([metric(cell) for cell in _by_method(cells, task)[method]]) for task in tasks])
            bars = np.abs(figures[:, 1:].T - figures[:, 0])
            axes.errorbar(
                horizons, figures[:, 0], yerr=bars, marker="o", capsize=4, label=_name(method), color=_color(method)
            )
        axes.set(title=title, xlabel="golden steps", xticks=horizons)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05)
    panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
