"""Parsers against a million texts that nobody would write: no exception, no surprise, no slow one.

    pip install -c constraints.txt -e .
    python benchmarks/fuzz_parsers.py

Half of the texts are assembled from fragments of the forms, a quarter are damaged tool calls, a quarter are any characters.
Each goes through every parser, where commands are listed and where they are not. Writes
``benchmarks/results/fuzz_parsers.json`` and prints a table. Times are CPU time. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from steppo.rendering import ActionParser, CommandParser, ParsedAction, ToolCallParser
from steppo.types import Observation

ROOT = Path(__file__).parent.parent
PARSERS: dict[str, ActionParser] = {
    "CommandParser": CommandParser(),
    "ToolCallParser": ToolCallParser(),
    "ToolCallParser(strict=True)": ToolCallParser(strict=True),
}
OBSERVATIONS = {
    "listed": Observation("A room.", "", ("go west", "take Coin", "look")),
    "open": Observation("A room."),
}
CALL = '<tool_call>\n{"name": "act", "arguments": {"command": "go west"}}\n</tool_call>'
FRAGMENTS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_call>\n",
        "\n</tool_call>",
        "\n",
        " ",
        "```json\n",
        "```",
    ),
    *("{", "}", "[", "]", ",", ":", '"', "'", "\\", "go west", "GO LOOK", "take coin", "I think that"),
    *('"name"', '"act"', '"arguments"', '"command"', '"go west"', "None", "True", "null", "NaN", "-1e999", "1"),
    *('{"name": "act", "arguments": ', '{"command": "look"}', '"{\\"command\\": \\"look\\"}"'),
    *("\\ud800", "\ud800", "\x00", "\x1b[2J", "\u2028", "\u202e", "☂", "e\u0301", CALL, CALL.replace('"', "'")),
]
LONG = ["9" * 5000, "[" * 2000, '{"a":' * 2000, "{" * 5000, "<tool_call>{" * 1000, " " * 5000]  # in one mixture of 30


def characters(rng: random.Random, most: int) -> str:
    """Any code points: plain, wide, lone surrogates."""
    top = rng.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF))
    return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(0, most)))


def mixture(rng: random.Random) -> str:
    parts = rng.choices(FRAGMENTS, k=rng.randint(0, 12))
    if rng.randrange(30) == 0:
        parts.insert(rng.randint(0, len(parts)), rng.choice(LONG))
    return "".join(parts)


def damaged(rng: random.Random) -> str:
    """A tool call with up to four edits: something dropped, doubled, replaced or put in."""
    text = rng.choice(("", "<think>\nWest.\n</think>\n\n", "<think>\n", "Here: ")) + CALL
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(text))
        end = at + rng.choice((0, 1, 1, 2, 5, 20))
        new = rng.choice(("", text[at:end] * 2, rng.choice(FRAGMENTS), characters(rng, 2)))
        text = text[:at] + new + text[end:]
    return text


def text_of(rng: random.Random) -> str:
    kind = rng.randrange(4)
    return damaged(rng) if kind == 0 else characters(rng, 60) if kind == 1 else mixture(rng)


def wrong(parsed: ParsedAction, observation: Observation) -> str:
    """What is wrong with an answer that did not raise; empty if nothing."""
    listed = observation.admissible_commands
    if (parsed.command is None) != bool(parsed.feedback):
        return "neither a command nor feedback, or both"
    if parsed.command is not None and (not parsed.command or (listed is not None and parsed.command not in listed)):
        return "a command that is not possible"
    try:
        ((parsed.command or "") + parsed.feedback).encode()
    except UnicodeEncodeError:
        return "a text that no tokenizer takes"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_parsers.json")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (name, where): {"parser": name, "commands": where, "cpu_seconds": 0.0, "exceptions": 0, "wrong": 0, "parsed": 0}
        | {"slowest_ms": 0.0, "slowest_length": 0}
        for name in PARSERS
        for where in OBSERVATIONS
    }
    faults: list[dict[str, str]] = []
    length = 0
    for _ in range(args.texts):
        text = text_of(rng)
        length += len(text)
        for (name, where), row in rows.items():
            start = time.process_time()
            try:
                parsed = PARSERS[name].parse(text, OBSERVATIONS[where])
            except Exception as error:
                row["exceptions"] += 1
                faults.append({"parser": name, "text": ascii(text), "fault": repr(error)})
                continue
            seconds = time.process_time() - start
            row["cpu_seconds"] += seconds
            row["parsed"] += parsed.command is not None
            if seconds * 1000 > row["slowest_ms"]:
                row["slowest_ms"], row["slowest_length"] = seconds * 1000, len(text)
            if fault := wrong(parsed, OBSERVATIONS[where]):
                row["wrong"] += 1
                faults.append({"parser": name, "text": ascii(text), "fault": fault})

    print(f"{args.texts} texts of {length / args.texts:.0f} characters on average, seed {args.seed}")
    print(f"{'parser':28} {'commands':8} {'CPU s':>8} {'exceptions':>10} {'wrong':>6} {'parsed':>7}  slowest")
    for row in rows.values():
        row["parsed"] = round(row["parsed"] / args.texts, 4)
        row["cpu_seconds"], row["slowest_ms"] = round(row["cpu_seconds"], 1), round(row["slowest_ms"], 2)
        print(
            f"{row['parser']:28} {row['commands']:8} {row['cpu_seconds']:8.1f} {row['exceptions']:10d} {row['wrong']:6d} "
            f"{row['parsed']:7.2%}  {row['slowest_ms']:.1f} ms, {row['slowest_length']} characters"
        )
    report = {
        "command": " ".join(["python benchmarks/fuzz_parsers.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "python": platform.python_version(),
        "seed": args.seed,
        "texts": args.texts,
        "mean_length": round(length / args.texts, 1),
        "rows": list(rows.values()),
        "faults": faults[:20],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    if faults:
        raise SystemExit(f"{len(faults)} faults, the first: {faults[0]}")


if __name__ == "__main__":
    main()
