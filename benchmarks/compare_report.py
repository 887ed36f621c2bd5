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


def write_report(stages: dict[str, list[Cell]], middle: str, variants: dict[str, str], folder: Path) -> None:
    """Writes ``report.md`` and the pictures.

    Args:
        stages: Cells of ``tune``, ``compare``, ``same_rate`` and ``diagnose``, as far as there are any.
        middle: The task of all methods.
        variants: Method of each variant.
        folder: Where to; pictures of the two comparisons go to folders of their own in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Comparison of methods", "", "Written by `benchmarks/compare_methods.py`; read [results.md](../results.md)."]
    if stages["tune"]:
        parts += _tuning(_by_method(stages["tune"], middle))
    if stages["compare"]:
        parts += ["", "## Each method at its tuned rate", *_comparison(stages["compare"], middle, folder / "tuned")]
    if stages["same_rate"]:
        parts += ["", "## All methods at the same rate", *_comparison(stages["same_rate"], middle, folder / "same_rate")]
    if stages["diagnose"]:
        parts += _variants(_by_method(stages["diagnose"], middle), _by_method(stages["same_rate"], middle), variants)
    cells = {cell["command"]: cell for cells in stages.values() for cell in cells}.values()
    hours = sum(cell["seconds"] for cell in cells) / 3600
    machines = sorted({f"{cell['machine']}, {cell['date']}" for cell in cells})
    parts += ["", f"{len(cells)} runs, {hours:.1f} hours added up, two at once take half of it ({'; '.join(machines)})."]
    (folder / "report.md").write_text("\n".join(parts) + "\n")


def _comparison(cells: list[Cell], middle: str, folder: Path) -> list[str]:
    """The tables of one comparison; its pictures go to ``folder``."""
    folder.mkdir(exist_ok=True)
    parts, tasks = [], sorted({cell["task"] for cell in cells}, key=golden_steps)
    for task in tasks:
        parts += ["", f"### {task}: {golden_steps(task)} golden steps", "", *_header()]
        parts += [_row(method, own) for method, own in _by_method(cells, task).items()]
    parts += _improvements(cells, middle, folder / "improvement.png")
    parts += _horizons(cells, tasks)
    _plot_curves(cells, tasks, folder)
    _plot_critics(_by_method(cells, middle), folder / "critic.png")
    _plot_bars(_by_method(cells, middle), folder / "ablation.png")
    _plot_horizons(cells, tasks, folder / "horizon.png")
    return parts


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
    lines = ["", "## Learning rates", "", "Area under the learning curve: mean over the tuning seeds (and each).", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, own in methods.items():
        areas = {rate: [area(cell) for cell in own if cell["learning_rate"] == rate] for rate in rates}
        taken = max(areas, key=lambda rate: np.mean(areas[rate]))
        figures = [f"{np.mean(found):.3f} ({', '.join(f'{x:.2f}' for x in found)})" for found in areas.values()]
        lines.append(f"| {_name(method)} | " + " | ".join(figures) + f" | {taken:g} |")
    hours = sum(cell["seconds"] for cell in cells) / 3600
    return [*lines, "", f"{len(cells)} runs, {hours:.1f} hours."]


def _header(last: str = "") -> list[str]:
    columns = ["method", "seeds", "rate", "success before", "after", "area under the curve", "steps", "s per 1,000 steps"]
    columns += [last] if last else []
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def _row(method: str, cells: list[Cell], last: str = "") -> str:
    before = np.mean([cell["evaluations"][0]["success_rate"] for cell in cells])
    after, under = (_interval(bootstrap([metric(cell) for cell in cells])) for metric in (final, area))
    steps = np.mean([cell["evaluations"][-1]["environment_steps"] for cell in cells])
    figures = [
        _name(method),
        str(len(cells)),
        f"{cells[0]['learning_rate']:g}",
        f"{before:.2f}",
        after,
        under,
        f"{steps:.0f}",
    ]
    figures += [f"{1000 * pace:.1f}" if (pace := _pace(cells)) else "-", *([last] if last else [])]
    return "| " + " | ".join(figures) + " |"


def _variants(diagnose: dict[str, list[Cell]], compare: dict[str, list[Cell]], variants: dict[str, str]) -> list[str]:
    """Each method that has variants, then those, beside the probability that one beats the method itself."""
    lines = ["", "## Variants", "", "At the middle horizon, all at the same rate.", ""]
    lines += _header("P(beats its method)")
    for base in (method for method in NAMES if method in variants.values() and method in compare):
        lines.append(_row(base, compare[base], "-"))
        own = [area(cell) for cell in compare[base]]
        for name, cells in diagnose.items():
            if variants[name] == base:
                better = improvement({"": [area(cell) for cell in cells]}, {"": own})
                lines.append(_row(name, cells, _interval(better)))
    return lines


def _improvements(cells: list[Cell], middle: str, path: Path) -> list[str]:
    """StepPO against each, at the middle horizon and over all; and a picture of all pairs at the middle one."""
    scores: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if cell["method"] != "react":
            scores.setdefault(cell["method"], {}).setdefault(cell["task"], []).append(area(cell))
    methods = [method for method in NAMES if middle in scores.get(method, {})]
    there = {method: {middle: scores[method][middle]} for method in methods}
    lines = [
        "",
        "### Probability of improvement",
        "",
        "That a run of StepPO has the larger area under its learning curve.",
        "",
    ]
    lines += ["| against | at the middle horizon | over all horizons |", "|---|---|---|"]
    for method in methods if "steppo" in there else []:
        if method != "steppo":
            everywhere = len(scores[method]) > 1
            over_all = _interval(improvement(scores["steppo"], scores[method])) if everywhere else "-"
            lines.append(f"| {_name(method)} | {_interval(improvement(there['steppo'], there[method]))} | {over_all} |")
    figure, axes = plt.subplots(figsize=(8.6, 6.8), constrained_layout=True)
    names = [_name(method) for method in methods]
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
    axes.set_title(
        f"P(row beats column), area under the curve, {middle}\nbold: the 95 % interval leaves out 0.5", fontsize=10
    )
    axes.set_xticklabels(names, rotation=40, ha="right")
    axes.set_yticklabels(names)
    _save(figure, path)
    return lines


def _horizons(cells: list[Cell], tasks: list[str]) -> list[str]:
    lines = [
        "",
        "### By horizon",
        "",
        "Success after training, and steps beyond the golden ones in the games that were won: where few",
    ]
    lines += ["are won these are the easy ones, so that excess steps compare only beside like rates of success.", ""]
    header = ["method"]
    for task in tasks:
        header += [f"success, {golden_steps(task)} steps", "excess"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in _at_all(cells, tasks):
        row = [_name(method)]
        for task in tasks:
            own = _by_method(cells, task)[method]
            excess = [excess_steps(cell) for cell in own]
            without = int(np.isnan(excess).sum())
            row.append(_interval(bootstrap([final(cell) for cell in own])))
            row.append(_interval(bootstrap(excess), 1) + (f" ({without} of {len(own)} runs won none)" if without else ""))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _at_all(cells: list[Cell], tasks: list[str]) -> list[str]:
    return [method for method in NAMES if all(method in _by_method(cells, task) for task in tasks)]


def _band(axes: Any, cells: list[Cell], x_of: Any, y_of: Any, method: str, shade: bool = True) -> None:
    """Mean over seeds of interpolated curves, and its bootstrap interval. StepPO stands out."""
    curves = [(np.asarray(x_of(cell), float), np.asarray(y_of(cell), float)) for cell in cells]
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 60)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    width, color = 2.6 if method == "steppo" else 1.3, _color(method)
    axes.plot(grid, values.mean(axis=0), label=_name(method), color=color, lw=width, zorder=3 if method == "steppo" else 2)
    if shade:
        rng = np.random.default_rng(0)
        means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
        axes.fill_between(grid, *np.percentile(means, [2.5, 97.5], axis=0), color=color, alpha=0.12, lw=0)


def _color(method: str) -> Any:
    if method == "steppo":
        return "black"
    return plt.get_cmap("tab10")([name for name in NAMES if name != "steppo"].index(method) % 10)


def _pace(cells: list[Cell]) -> float:
    """Seconds of training (rollout, scoring, updates) per environment step: the median run's; 0 without training.

    One figure for all runs of a method, because what else the machine did meanwhile differs by run.
    """
    runs = [cell["iterations"] for cell in cells if cell["iterations"]["seconds"]]
    return float(np.median([run["seconds"][-1] / run["train/environment_steps"][-1] for run in runs])) if runs else 0.0


def _plot_curves(cells: list[Cell], tasks: list[str], folder: Path) -> None:
    for name, label, by_time in (
        ("curves_steps.png", "environment steps learned from", False),
        ("curves_seconds.png", "seconds of training on one thread, at the method's median pace", True),
    ):
        figure, panels = plt.subplots(1, len(tasks), figsize=(4.8 * len(tasks), 4.4), squeeze=False, constrained_layout=True)
        for axes, task in zip(panels[0], tasks, strict=True):
            methods = _by_method(cells, task)
            untrained = [final(cell) for cell in methods.pop("react", [])]
            if untrained:
                axes.axhline(np.mean(untrained), color="gray", ls="--", lw=1, label=_name("react"))
            for method, own in methods.items():
                scale = _pace(own) if by_time else 1.0
                few = len(methods) <= 5
                _band(
                    axes, own, lambda c, k=scale: k * _curve(c)[0], lambda c: _curve(c)[1], method, few or method == "steppo"
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


def _plot_critics(methods: dict[str, list[Cell]], path: Path) -> None:
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
    horizons = np.asarray([golden_steps(task) for task in tasks])
    shown = _at_all(cells, tasks)
    for axes, metric, title in (
        (panels[0], final, "success after training"),
        (panels[1], excess_steps, "excess steps of the games won"),
    ):
        for place, method in enumerate(shown):
            figures = np.asarray([bootstrap([metric(cell) for cell in _by_method(cells, task)[method]]) for task in tasks])
            bars = np.abs(figures[:, 1:].T - figures[:, 0])
            beside = horizons + 0.22 * (place - (len(shown) - 1) / 2)
            axes.errorbar(beside, figures[:, 0], yerr=bars, marker="o", capsize=3, label=_name(method), color=_color(method))
        axes.set(title=title, xlabel="golden steps", xticks=horizons)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05)
    panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
