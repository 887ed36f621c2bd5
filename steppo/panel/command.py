"""The command line of ``python -m steppo.panel``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table

from steppo import results
from steppo.cli import build_parts, errors_in_one_line, own_options
from steppo.errors import ConfigError, OptionParser
from steppo.panel.compare import Comparison, Difference, compare
from steppo.panels import Panel, write_text
from steppo.paths import user_path

_USAGE = """python -m steppo.panel make --config FILE --out FILE [options]
       python -m steppo.panel compare A.json B.json [--out FILE]"""


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (the process's own unless given)."""
    words = list(sys.argv[1:] if args is None else args)
    commands: dict[str, Callable[[Sequence[str]], None]] = {"make": _make, "compare": _compare}
    if words and words[0] in commands:
        commands[words[0]](words[1:])
    elif words and words[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\nMakes a panel (tasks with hashes of their content) or compares two results on one.")
        print("More: python -m steppo.panel make --help, python -m steppo.panel compare --help, docs/evaluation.md")
    else:
        raise ConfigError("give a command, make or compare: python -m steppo.panel --help")


def _make(args: Sequence[str]) -> None:
    parser = own_options(
        "python -m steppo.panel make",
        "Writes the panel that `validate` plays: the split's first data.eval_tasks tasks, in their order, each with a hash\n"
        "of its content. A config names it as data.eval_panel (or data.test_panel).",
        "python -m steppo.panel make --config configs/quickstart.yaml --split test --out panels/coins-test.json",
    )
    parser.add_argument("--split", help="Split of the tasks; the config's eval_split unless given.")
    parser.add_argument("--out", type=user_path, metavar="FILE", help="File to write, such as panels/<task>-<split>.json.")
    options, overrides = parser.parse_known_args(args)
    if options.out is None:
        raise ConfigError("give --out, the file to write")
    none = ["--data.eval_panel=null", "--data.test_panel=null"]  # the config may name the one that is to be made
    data = build_parts(options, [*overrides, *none]).datamodule
    split = options.split or data.splits["validate"]
    tasks = data.source.tasks(split)[: data.eval_tasks]
    if not tasks:
        raise ConfigError(f"split {split!r} of the environment is empty")
    console = Console(highlight=False, soft_wrap=True)
    try:
        with console.status("preparing tasks") as status:
            data.source.prepare(tasks, lambda done, total: status.update(f"preparing tasks, {done} of {total}"))
            status.update("reading tasks")
            panel = Panel.of(data.source, split, tasks)
    finally:
        data.source.close()
    panel.write(options.out)
    console.print(f"{options.out}: {len(tasks)} tasks of {split}, sha256 {panel.sha256}")


def _compare(args: Sequence[str]) -> None:
    parser = OptionParser(
        "python -m steppo.panel compare",
        description="The difference b - a of two results on the same panel, with a paired 95 % interval: a bootstrap over "
        "tasks. Several samples of a task are averaged first.",
        allow_abbrev=False,
    )
    parser.add_argument("a", type=user_path, metavar="A.json", help="Result of an evaluation: validate.json or test.json.")
    parser.add_argument("b", type=user_path, metavar="B.json", help="Another one.")
    parser.add_argument("--out", type=user_path, metavar="FILE", help="Write the comparison as JSON, too.")
    options = parser.parse_args(args)
    sides = [results.read(path) for path in (options.a, options.b)]
    comparison = compare(*sides)
    console = Console(highlight=False, soft_wrap=True)
    for name, result, path in zip("ab", sides, (options.a, options.b), strict=True):
        console.print(f"{name}: {results.headline(result)}, {path}", markup=False)
    _show(console, comparison)
    if options.out is not None:
        write_text(options.out, json.dumps(asdict(comparison), indent=1) + "\n")


def _show(console: Console, comparison: Comparison) -> None:
    for note in comparison.notes:
        console.print(f"not played alike: {note}", style="yellow", markup=False)
    if comparison.left_out:
        console.print(f"left out, with no healthy episode on one side: {', '.join(comparison.left_out)}", markup=False)
    figures = {"success": comparison.success, "return": comparison.by_return}
    columns = [Column(name, justify="right") for name in ("a", "b", "b - a", "95 %")]
    table = Table(f"{comparison.tasks} tasks", *columns)
    for name, difference in figures.items():
        if difference is not None:
            table.add_row(name, *_cells(difference))
    console.print(table)
    if comparison.counts:
        console.print("solved by " + ", ".join(f"{name} {count}" for name, count in comparison.counts.items()))


def _cells(difference: Difference) -> tuple[str, ...]:
    low, high = difference.interval
    return f"{difference.a:.3f}", f"{difference.b:.3f}", f"{difference.mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"
