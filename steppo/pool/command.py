"""The command line of ``python -m steppo.pool``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from steppo.errors import ConfigError, OptionParser, SteppoError, in_short
from steppo.paths import user_path
from steppo.pool.records import SCHEMA
from steppo.pool.store import DataPool, GroupInfo
from steppo.types import Episode, Step

STATES = ("waiting", "claimed", "learned", "stale")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (the process's own unless given). A user's mistake is one line and exit status 2."""
    try:
        options = _parser().parse_args(args)
        with closing(DataPool(options.pool, create=False)) as pool:
            options.run(pool, options)
    except SteppoError as error:
        print(f"error: {in_short(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "python -m steppo.pool",
        description="Looks into a data pool: groups of episodes that wait for a learner, or that it has. Whoever plays or\n"
        "learns may go on meanwhile.",
        epilog="states of a group:\n"
        "  waiting   for the learner\n"
        "  claimed   for an iteration; a learner that crashes gets it again\n"
        "  learned   a checkpoint holds it; only the newest keep their episodes\n"
        "  stale     dropped: it was played by too old a policy",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[DataPool, argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        command.add_argument("pool", type=user_path, metavar="POOL", help="The pool's file.")
        command.set_defaults(run=run)
        return command

    listing = add("ls", _list, "Lists groups, the newest last, and counts them.")
    listing.add_argument("--last", type=int, default=20, metavar="N", help="The newest N (20); 0 for all.")
    showing = add("show", _show, "Shows the episodes of a group, step by step.")
    showing.add_argument("group", metavar="GROUP", help="Its number or name.")
    exporting = add("export", _export, "Writes all stored episodes to a file: one per line of JSON, or row of Parquet.")
    exporting.add_argument("--out", type=user_path, required=True, metavar="FILE", help="A new .jsonl or .parquet file.")
    for command in (listing, exporting):
        command.add_argument("--state", choices=STATES, help="Only groups in this state.")
    return parser


def _list(pool: DataPool, options: argparse.Namespace) -> None:
    groups = pool.groups(options.state)
    rows = []
    for group in groups[-options.last if options.last > 0 else 0 :]:
        versions = "" if group.oldest_version is None else f"{group.oldest_version}-{group.newest_version}"
        mean = "" if group.mean_return is None else f"{group.mean_return:.3f}"
        told = (mean, versions, group.state, group.iteration, "" if group.is_stored else "deleted")
        rows.append((group.number, group.name, group.episodes, group.steps, *told))
    _print_table(("number", "group", "episodes", "steps", "return", "versions", "state", "iteration", ""), rows)
    states = [group.state for group in groups]
    mib = sum(os.path.getsize(path) for path in (pool.path, f"{pool.path}-wal") if os.path.exists(path)) / 2**20
    print(f"{len(groups)} groups: {', '.join(f'{states.count(state)} {state}' for state in STATES)}; {mib:.1f} MiB")


def _show(pool: DataPool, options: argparse.Namespace) -> None:
    group = next((group for group in pool.groups() if options.group in (group.name, str(group.number))), None)
    if group is None:
        raise ConfigError(f"{pool.path} has no group {options.group}: python -m steppo.pool ls {pool.path}")
    if not group.is_stored:
        raise ConfigError(f"the episodes of {group.name} are deleted: it is {group.state}")
    for episode in pool.read(group.number):
        told = f"task {episode.task_id}, {episode.stop_reason}, success {episode.success}, return {episode.episode_return:g}"
        print(_safe(f"{episode.id}: {told} {episode.error}"))
        rows = [
            (s.index, s.agent_id, s.policy_version, s.reward, len(s.prompt_ids), len(s.action_ids), s.action, s.observation)
            for s in episode.steps
        ]
        _print_table(("step", "agent", "version", "reward", "prompt", "tokens", "action", "observation"), rows)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    cells = [["" if cell is None else _safe(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _safe(text: str) -> str:
    """On one line, with nothing that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in in_short(text, 100))


def _export(pool: DataPool, options: argparse.Namespace) -> None:
    out: Path = options.out
    writers = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ConfigError(f"--out must end in {' or '.join(writers)}, not {out.name}")
    if out.exists():
        raise ConfigError(f"{out} exists already")
    groups = (_rows(pool, group) for group in pool.groups(options.state) if group.is_stored)
    try:
        print(f"{out}: {writers[out.suffix](out, groups)} episodes")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error


def _rows(pool: DataPool, group: GroupInfo) -> list[dict[str, Any]]:
    known = {"group_name": group.name, "group_state": group.state, "iteration": group.iteration, "schema": SCHEMA}
    return [known | _plain(asdict(episode)) for episode in pool.read(group.number)]


def _plain(value: Any) -> Any:
    """What JSON can say: what is not finite is ``None``."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_jsonl(out: Path, groups: Iterable[list[dict[str, Any]]]) -> int:
    with open(out, "w", encoding="ascii") as file:
        return sum(file.write(json.dumps(row, allow_nan=False) + "\n") > 0 for rows in groups for row in rows)


def _write_parquet(out: Path, groups: Iterable[list[dict[str, Any]]]) -> int:
    """``metadata`` is JSON: its names are the environment's."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ConfigError('Parquet needs pyarrow: pip install "steppo[parquet]"; or export to .jsonl') from None
    numbers = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}  # others are text

    def columns(record: type[Episode] | type[Step]) -> list[Any]:
        kinds = {field.name: numbers.get(str(field.type).removesuffix(" | None"), pa.string()) for field in fields(record)}
        kinds |= {name: pa.list_(pa.int32()) for name in kinds if name.endswith("_ids")}
        kinds |= {name: pa.list_(pa.float32()) for name in kinds if name.endswith("_logprobs")}
        kinds |= {name: pa.list_(pa.struct(columns(Step))) for name in kinds if name == "steps"}
        return list(kinds.items())

    own = [("group_name", pa.string()), ("group_state", pa.string()), ("iteration", pa.int64()), ("schema", pa.int64())]
    schema, count = pa.schema([*own, *columns(Episode)]), 0
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for rows in groups:
            for record in (record for row in rows for record in (row, *row["steps"])):
                record["metadata"] = json.dumps(record["metadata"])
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
    return count
