"""Tables of ``compare_methods.py``, from its cells alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from compare_plots import plot_bars, plot_critics, plot_curves, plot_horizons, plot_improvements
from compare_stats import (
    NAMES,
    Cell,
    area,
    areas,
    at_all_horizons,
    bootstrap,
    by_method,
    excess_steps,
    final,
    golden_steps,
    improvement,
    name_of,
    pace,
)


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
        parts += _tuning(by_method(stages["tune"], middle))
    if stages["compare"]:
        parts += ["", "## Each method at its tuned rate", *_comparison(stages["compare"], middle, folder / "tuned")]
    if stages["same_rate"]:
        parts += ["", "## All methods at the same rate", *_comparison(stages["same_rate"], middle, folder / "same_rate")]
    if untrained := [cell for cell in stages["compare"] if cell["method"] == "react"]:
        parts += _lengths(untrained)
    if stages["diagnose"]:
        both = {cell["command"]: cell for cell in (*stages["compare"], *stages["same_rate"])}
        parts += _variants(stages["diagnose"], list(both.values()), variants)
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
        parts += [_row(method, own) for method, own in by_method(cells, task).items()]
    parts += _inside(by_method(cells, middle), f"### What the updates did, {middle}")
    parts += _improvements(cells, middle)
    parts += _horizons(cells, tasks)
    plot_improvements(areas(cells), middle, folder / "improvement.png")
    plot_curves(cells, tasks, folder)
    plot_critics(by_method(cells, middle), folder / "critic.png")
    plot_bars(by_method(cells, middle), folder / "ablation.png")
    plot_horizons(cells, tasks, folder / "horizon.png")
    return parts


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
        lines.append(f"| {name_of(method)} | " + " | ".join(figures) + f" | {taken:g} |")
    hours = sum(cell["seconds"] for cell in cells) / 3600
    return [*lines, "", f"{len(cells)} runs, {hours:.1f} hours."]


def _header(last: str = "") -> list[str]:
    columns = ["method", "seeds", "rate", "success before", "after", "median gain", "area under the curve", "steps"]
    columns += ["s per 1,000 steps", *([last] if last else [])]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def _row(method: str, cells: list[Cell], last: str = "") -> str:
    starts = [cell["evaluations"][0]["success_rate"] for cell in cells]
    after, under = (_interval(bootstrap([metric(cell) for cell in cells])) for metric in (final, area))
    gain = np.median([final(cell) - start for cell, start in zip(cells, starts, strict=True)])
    steps = np.mean([cell["evaluations"][-1]["environment_steps"] for cell in cells])
    figures = [name_of(method), str(len(cells)), f"{cells[0]['learning_rate']:g}", f"{np.mean(starts):.2f}", after]
    figures += [f"{gain:+.2f}", under, f"{steps:.0f}", f"{1000 * spent:.1f}" if (spent := pace(cells)) else "-"]
    return "| " + " | ".join([*figures, *([last] if last else [])]) + " |"


def _inside(methods: dict[str, list[Cell]], title: str) -> list[str]:
    """What the updates did: means over iterations and runs."""
    columns = {
        "approx_kl": "KL of an iteration (approx.)",
        "clip_fraction": "clipped",
        "entropy": "entropy",
        "explained_variance": "variance explained by the critic",
        "degenerate_groups": "groups of equal returns",
    }
    lines = ["", title, "", "Means over the run; the critic's from the second half.", ""]
    lines += ["| " + " | ".join(["method", *columns.values()]) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, cells in methods.items():
        if method == "react":
            continue
        row = [name_of(method)]
        for name in columns:
            key = f"{'rollout' if name == 'degenerate_groups' else 'train'}/{name}"
            curves = [np.asarray(cell["iterations"].get(key) or [np.nan], float) for cell in cells]
            half = [curve[len(curve) // 2 :] if name == "explained_variance" else curve for curve in curves]
            mean = float(np.mean([np.mean(curve) for curve in half]))
            row.append("-" if np.isnan(mean) or (name == "degenerate_groups" and not mean) else f"{mean:.3f}")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _variants(diagnose: list[Cell], compare: list[Cell], variants: dict[str, str]) -> list[str]:
    """By task and rate: methods that have variants, each before its own, and the probability that one beats its method."""
    lines = ["", "## Variants"]
    places = {(cell["task"], cell["learning_rate"]) for cell in diagnose}
    for task, rate in sorted(places, key=lambda place: (golden_steps(place[0]), place[1])):
        there, plain = (
            by_method([cell for cell in cells if cell["learning_rate"] == rate], task) for cells in (diagnose, compare)
        )
        lines += ["", f"### Variants, {task}, rate {rate:g}", "", *_header("P(beats its method)")]
        for base in (method for method in plain if any(variants[name] == method for name in there)):
            lines.append(_row(base, plain[base], "-"))
            starts = {cell["seed"]: cell["evaluations"][0]["success_rate"] for cell in plain[base]}
            for name, cells in there.items():
                if variants[name] == base:
                    alike = all(cell["evaluations"][0]["success_rate"] == starts.get(cell["seed"]) for cell in cells)
                    own, theirs = ({"": [area(cell) for cell in some]} for some in (cells, plain[base]))
                    lines.append(_row(name, cells, _interval(improvement(own, theirs)) if alike else "another start"))
        lines += _inside(there, f"### What the updates did in the variants, {task}, rate {rate:g}")
    return lines


def _improvements(cells: list[Cell], middle: str) -> list[str]:
    """StepPO against each, at the middle horizon and over all."""
    scores = areas(cells)
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
            lines.append(f"| {name_of(method)} | {_interval(improvement(there['steppo'], there[method]))} | {over_all} |")
    return lines


def _lengths(untrained: list[Cell]) -> list[str]:
    """How long won and lost episodes are before training, and which share of all steps the won ones are."""
    lines = ["", "## Lengths of episodes, untrained", ""]
    lines += [
        "| task | won | steps of a won episode | of a lost one | share of steps in won ones |",
        "|---|---|---|---|---|",
    ]
    for task in sorted({cell["task"] for cell in untrained}, key=golden_steps):
        episodes = [episode for cell in untrained if cell["task"] == task for episode in cell["final_episodes"]]
        won, lost = ([e["steps"] for e in episodes if bool(e["success"]) == wanted] for wanted in (True, False))
        if won and lost:
            means = f"{len(won) / len(episodes):.2f} | {np.mean(won):.1f} | {np.mean(lost):.1f}"
            lines.append(f"| {task} | {means} | {sum(won) / sum(won + lost):.2f} |")
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
    for method in at_all_horizons(cells, tasks):
        row = [name_of(method)]
        for task in tasks:
            own = by_method(cells, task)[method]
            excess = [excess_steps(cell) for cell in own]
            without = int(np.isnan(excess).sum())
            row.append(_interval(bootstrap([final(cell) for cell in own])))
            row.append(_interval(bootstrap(excess), 1) + (f" ({without} of {len(own)} runs won none)" if without else ""))
        lines.append("| " + " | ".join(row) + " |")
    return lines
