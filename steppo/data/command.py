"""The command line of ``python -m steppo.data``."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steppo.cli import errors_in_one_line
from steppo.cli.config_types import class_names, find_class
from steppo.envs import Env
from steppo.envs.given import checked_tasks, content_of, splits_of, version_of
from steppo.errors import ConfigError, OptionParser, blamed_on
from steppo.panels import panel_sha256, sha256_of

_MOST_NAMED = 5


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The description's lines as they are, and what the arguments say."""


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (the process's own unless given)."""
    words = list(sys.argv[1:] if args is None else args)
    parser = OptionParser(
        "python -m steppo.data",
        usage="python -m steppo.data ENV [--split NAME] [arguments of the environment]",
        description="Checks the data of an environment, makes what it needs on disk, and prints the number of tasks of\n"
        "each split with a sha256 over their content. What is there already is not made again.",
        epilog="example:\n  python -m steppo.data textworld --challenge cooking\n\n"
        f"environments: {', '.join(class_names([Env]))}, or module.Class\n"
        "where to get the data, and the arguments: python -m steppo.data ENV --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("env", metavar="ENV", nargs="?", help="Class of the environment, such as TextWorldEnv or textworld.")
    parser.add_argument("--split", action="append", help="Only this split; may be given several times.")
    options, rest = parser.parse_known_args(words)
    if options.env is None:
        if "-h" in rest or "--help" in rest:
            parser.print_help()
            return
        raise ConfigError("give an environment, such as textworld: python -m steppo.data --help")
    env = _made(_env_class(options.env), rest)
    try:
        _prepare(env, options.split)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def _env_class(name: str) -> type:
    """By class path, class name, or that in lower case without ``Env``, with underscores or not."""
    short = {known.lower().removesuffix("env"): known for known in class_names([Env])}
    return find_class(short.get(name.lower().replace("_", ""), name), (Env,))


def _made(owner: type, words: Sequence[str]) -> Env:
    parser = ArgumentParser(
        prog=f"python -m steppo.data {owner.__name__}",
        description=(inspect.getdoc(owner) or "").partition("\nArgs:")[0],
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(owner, as_group=False)
    found = parser.instantiate_classes(parser.parse_args(list(words)))  # parts of the environment, such as a Retriever
    return owner(**found.as_dict())


def _prepare(env: Env, wanted: Sequence[str] | None) -> None:
    """Goes through the splits; what is wrong with one does not keep it from the others."""
    console = Console(highlight=False, soft_wrap=True)
    if version := version_of(env):
        console.print(f"version: {version}", markup=False)
    problems: list[str] = []
    words = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*words, *times, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")
        for split in wanted or splits_of(env):
            progress.reset(bar, description=split, total=None)
            try:
                count, sha256 = _prepared(env, split, lambda done, total: progress.update(bar, completed=done, total=total))
                console.print(f"{split}: {count} tasks, sha256 {sha256}", markup=False)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)))


def _prepared(env: Env, split: str, progress: Callable[[int, int], Any]) -> tuple[int, str]:
    """Number of tasks of a split, and ``Panel.sha256`` of all. Raises ``ConfigError``: what is missing or damaged."""
    where = f"{type(env).__name__}.tasks({split!r})"
    with blamed_on(where):
        tasks = checked_tasks(where, env.tasks(split))
    with blamed_on(f"{type(env).__name__}.prepare"):
        env.prepare(tasks, progress)
    hashed, damaged = [], []
    for done, task in enumerate(tasks, start=1):
        try:
            hashed.append((task.id, sha256_of(content_of(env, task))))
        except ConfigError as error:
            damaged.append(str(error))
        progress(done, len(tasks))
    if damaged:
        more = f"; and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
        raise ConfigError(f"{len(damaged)} of {len(tasks)} tasks of {split}: {'; '.join(damaged[:_MOST_NAMED])}{more}")
    return len(tasks), panel_sha256(version_of(env), hashed)
