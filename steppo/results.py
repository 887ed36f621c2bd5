"""The result of an evaluation: what was played, how, by whom, and how each episode went, as JSON, Markdown and tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from steppo.distributed import gather_to_first
from steppo.errors import ConfigError
from steppo.metrics import wilson_interval
from steppo.panels import read_json, write_text
from steppo.types import Episode, StopReason

FORMAT = 1
_GOLDEN = "golden_steps"
_FAILED = {str(reason) for reason in StopReason if reason.failed}
_PARTS = {"panel": dict, "protocol": dict, "figures": dict, "episodes": list}
_PER_EPISODE = ("task", "success", "return", "stop_reason")

Outcome = dict[str, Any]


class Table(NamedTuple):
    """A table for people: the first column is text, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def outcomes_of(episodes: Iterable[Episode], samples: int) -> list[Outcome]:
    """How each episode of an evaluation went, in the panel's order: of all ranks, which must ask, and on rank 0 only.

    Args:
        episodes: This rank's.
        samples: Episodes per task.
    """
    mine = [
        (
            episode.order,
            {
                "task": episode.task_id,
                "sample": episode.order % samples,
                "success": None if episode.success is None else bool(episode.success),
                "return": episode.episode_return,
                "steps": len(episode.steps),
                "stop_reason": str(episode.stop_reason),
                **({"error": episode.error} if episode.error else {}),
                **({"info": info} if (info := episode.info) else {}),
            },
        )
        for episode in episodes
    ]
    everyone = sorted((one for part in gather_to_first(mine) for one in part), key=lambda one: one[0])
    return [outcome for _, outcome in everyone]


def is_healthy(outcome: Outcome) -> bool:
    """The episode ended and did not fail."""
    return outcome["stop_reason"] not in _FAILED


def by_golden_steps(outcomes: Iterable[Outcome], known: bool) -> dict[str, dict[str, Any]]:
    """Success and excess steps by the steps of an expert, where the environment says these (the figure ``golden_steps``).

    There is no success rate unless it is ``known``.
    """
    groups: dict[float, list[Outcome]] = defaultdict(list)
    for outcome in filter(is_healthy, outcomes):
        if (steps := _golden_steps(outcome)) is not None:
            groups[steps].append(outcome)
    found: dict[str, dict[str, Any]] = {}
    for golden, group in sorted(groups.items()):
        solved, count = sum(outcome["success"] is True for outcome in group), len(group)
        found[f"{golden:g}"] = {
            "episodes": count,
            "success_rate": solved / count if known else None,
            "success_ci95": list(wilson_interval(solved, count)) if known else None,
            "excess_steps": excess_steps(group),
        }
    return found


def excess_steps(outcomes: Iterable[Outcome]) -> float | None:
    """How many more steps than the expert the solved episodes took, mean over those whose golden steps are known."""
    solved = [outcome for outcome in outcomes if is_healthy(outcome) and outcome["success"] is True]
    excess = [outcome["steps"] - golden for outcome in solved if (golden := _golden_steps(outcome)) is not None]
    return math.fsum(excess) / len(excess) if excess else None


def _golden_steps(outcome: Outcome) -> float | None:
    golden = outcome.get("info", {}).get(_GOLDEN)
    return float(golden) if isinstance(golden, int | float) and not isinstance(golden, bool) else None


def write(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Writes ``<name>.json`` and ``<name>.md``."""
    write_text(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / f"{name}.md", as_markdown(result))


def read(path: Path) -> dict[str, Any]:
    """A result's JSON. Raises ``ConfigError`` if it is none."""
    result = read_json(path, "result", FORMAT)
    whole = all(isinstance(result.get(name), kind) for name, kind in _PARTS.items())
    if not whole or not all(isinstance(one, dict) and one.keys() >= set(_PER_EPISODE) for one in result["episodes"]):
        raise ConfigError(f"{path} is not the JSON that an evaluation wrote")
    return result


# ---- for people ----


def headline(result: Mapping[str, Any]) -> str:
    """Who played what, on one line."""
    return f"{_player(result)} on {result['split']} ({len({one['task'] for one in result['episodes']})} tasks)"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """All figures; then by each label and by golden steps, where the environment says these."""
    figures = result["figures"]
    names = {"return_mean": "return", "steps_mean": "steps", "invalid_action_rate": "invalid actions"}
    names |= {"excess_steps": "excess steps of solved episodes", "errors": "failed episodes", "no_verdict": "no verdict"}
    rows = [("episodes", str(figures["episodes"])), ("success [95 %]", _success(figures))]
    rows += [(name, _number(figures[key])) for key, name in names.items() if figures.get(key) is not None]
    rows += [(name, _number(mean)) for name, mean in figures.get("info", {}).items()]
    found = [Table("", ("figure", "value"), [row for row in rows if row[1]])]
    for label, values in figures.get("by_label", {}).items():
        header = (label, "episodes", "success [95 %]", "return")
        parts = [
            (value, str(part["episodes"]), _success(part), _number(part["return_mean"])) for value, part in values.items()
        ]
        found.append(Table(f"By {label}", header, parts))
    if golden := figures.get("by_golden_steps"):
        header = ("golden steps", "episodes", "success [95 %]", "excess steps")
        parts = [
            (steps, str(part["episodes"]), _success(part), _number(part["excess_steps"])) for steps, part in golden.items()
        ]
        found.append(Table("By golden steps", header, parts))
    return found


def as_rich(table: Table) -> RichTable:
    """For a terminal."""
    first, *others = table.header
    shown = RichTable(first, *(Column(name, justify="right") for name in others), title=table.title or None)
    for row in table.rows:
        shown.add_row(*map(Text, row))  # no markup
    return shown


def as_markdown(result: Mapping[str, Any]) -> str:
    """A page: what was played by whom and how, and the tables."""
    lines = [f"# {headline(result)}", "", *(f"- {line}" for line in _provenance(result))]
    for table in tables(result):
        title = ["", f"## {table.title}"] if table.title else []
        rule = ["---", *(["---:"] * (len(table.header) - 1))]
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.header, *table.rows)]
        lines += [*title, "", *(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))]
    return "\n".join(lines) + "\n"


def _provenance(result: Mapping[str, Any]) -> list[str]:
    panel, protocol, model = result["panel"], result["protocol"], result["model"]
    named = f"{panel['file']}, " if panel["file"] else ""
    version = f"version {panel['version']}, " if panel["version"] else ""
    lines = [f"panel: {named}{version}sha256 {panel['sha256']}"]
    lines += [f"played otherwise than the panel says: {difference}" for difference in panel["differences"]]
    said = {name: "greedy" if (name, value) == ("temperature", 0) else f"{name} {value}" for name, value in protocol.items()}
    lines.append("protocol: " + ", ".join(text for name, text in said.items() if protocol[name] is not None))
    if model is not None:
        begun = f" on {model['base']}" if model["base"] else ""
        lines += [f"model: {model['policy']}{begun}, {_checkpoint(model['checkpoint'], panel['sha256'])}"]
    return lines


def _checkpoint(checkpoint: Mapping[str, Any] | None, panel: str) -> str:
    """Which one, and who chose it: the best over time on the panel that it is measured on is no final figure."""
    if checkpoint is None:
        return "untrained: no checkpoint"
    text = f"{checkpoint['file']} after {checkpoint['iteration']} iterations"
    if checkpoint["chosen_by"] is None:
        return text
    chosen_on = checkpoint["chosen_on"]
    where = "this very panel, so that its figures are too good" if chosen_on == panel else f"the panel {chosen_on}"
    return f"{text}, the best of its run by {checkpoint['chosen_by']} on {where}"


def _player(result: Mapping[str, Any]) -> str:
    player, model = result["protocol"]["player"], result["model"]
    if model is None:
        return player
    return f"{player} after {model['iteration']} iterations" if model["checkpoint"] else "untrained policy"


def _success(figures: Mapping[str, Any]) -> str:
    rate, interval = figures["success_rate"], figures["success_ci95"]
    return "" if rate is None else f"{rate:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
