"""Parsers against a million texts that nobody would write: no exception, no surprise, no slow one.

    pip install -c constraints.txt -e .
    python benchmarks/fuzz_parsers.py

Half of the texts are assembled from fragments of the forms, a quarter are damaged tool calls, a quarter are any characters.
Each goes through every parser of commands, where these are listed, open or hidden, and through the parser of tool calls,
where the prompt has opened the thinking and where it has not. Writes ``benchmarks/results/fuzz_parsers.json`` and prints a
table. Times are CPU time. Takes about six minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from jsonschema import Draft202012Validator

from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, CommandParser, HermesParser, NumberParser, ParsedAction, Renderer, ToolCallParser
from steppo.types import Action, ToolSpec, Turn

ROOT = Path(__file__).parent.parent
TURNS = {
    "listed": Turn("A room.", "", ("go west", "take Coin", "look")),
    "open": Turn("A room.", "", ("go west", "search[...]", "think: ...")),
    "hidden": Turn("A room."),
}
TOOLS = (
    ToolSpec("act", "", {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}),
    ToolSpec("find", "", {"type": "object", "properties": {"most": {"type": "integer", "maximum": 9}}}),
    ToolSpec("any", "", {"type": "object"}),
)


ARGUMENTS = {tool.name: Draft202012Validator(tool.parameters) for tool in TOOLS}


def hermes(template: str | None) -> HermesParser:
    """One that has the tools, and a model's template."""
    policy = TinyPolicy()
    policy.build(list)
    policy.tokenizer.chat_template = template
    parser, renderer = HermesParser(), Renderer()
    renderer.bind(policy.tokenizer, policy.stop_ids, TOOLS, parser.tools_text(TOOLS))
    parser.bind(TOOLS, renderer)
    return parser


def parsers() -> dict[tuple[str, str], tuple[ActionParser, Turn]]:
    """What the texts go through, by the names of parser and place."""
    commands = {
        "CommandParser": CommandParser(),
        "NumberParser": NumberParser(),
        "ToolCallParser": ToolCallParser(),
        "ToolCallParser(strict=True)": ToolCallParser(strict=True),
    }
    found: dict[tuple[str, str], tuple[ActionParser, Turn]] = {
        (name, where): (parser, turn) for name, parser in commands.items() for where, turn in TURNS.items()
    }
    opens_thinking = "{% for message in messages %}{{ message.content }}{% endfor %}<think>\n"
    found["HermesParser", "tools"] = hermes(None), Turn("A room.")
    found["HermesParser", "thinking"] = hermes(opens_thinking), Turn("A room.")
    return found


CALL = '<tool_call>\n{"name": "act", "arguments": {"command": "go west"}}\n</tool_call>'
CALLS = [
    CALL.replace("act", "find").replace('"command": "go west"', '"most": 7'),
    CALL.replace("act", "any").replace('"go west"', '[1.5e3, {"a": null}]'),
    f"{CALL}\n{CALL}",
    CALL.replace("\n{", "\n[{").replace("}\n", "}, {}]\n").replace("{}]", '{"name": "find", "arguments": {}}]'),
    CALL.replace('{"command": "go west"}', '"{\\"command\\": \\"look\\"}"'),
]
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
    *('"any"', '"find"', '{"name": "find", "arguments": ', '{"name": "any", "arguments": ', '{"most": 7}', '"a": 1.5e3'),
    *("[{", "}]", "search[", "think: ", "\n</think>\n\n", "</tool_call>\n<tool_call>", "{}"),
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
    text = rng.choice(("", "<think>\nWest.\n</think>\n\n", "<think>\n", "Here: ")) + rng.choice((CALL, CALL, *CALLS))
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(text))
        end = at + rng.choice((0, 1, 1, 2, 5, 20))
        new = rng.choice(("", text[at:end] * 2, rng.choice(FRAGMENTS), characters(rng, 2)))
        text = text[:at] + new + text[end:]
    return text


def text_of(rng: random.Random) -> str:
    kind = rng.randrange(4)
    return damaged(rng) if kind == 0 else characters(rng, 60) if kind == 1 else mixture(rng)


def wrong(action: Action, turn: Turn) -> str:
    """What is wrong with an action; empty if nothing."""
    if action.command is not None:
        if action != Action(action.command) or not action.command:
            return "more than a command, or less"
        ways = [re.escape(listed).replace(r"\.\.\.", r".*\S.*", 1) for listed in turn.commands or ("...",)]
        if not any(re.fullmatch(way, action.command) for way in ways):
            return "a command that is not possible"
    elif not (action.tool_calls or action.text):
        return "an empty action"
    for number, call in enumerate(action.tool_calls):
        if call.name not in ARGUMENTS or call.id != f"call_{number}" or not ARGUMENTS[call.name].is_valid(call.arguments):
            return "a call that is not possible"
    try:
        json.dumps([call.arguments for call in action.tool_calls], allow_nan=False, ensure_ascii=False).encode()
        f"{action}{action.text}{action.reasoning}".encode()
    except ValueError as error:  # also letters that UTF-8 cannot hold
        return f"an action that cannot be sent ({error})"
    return ""


def checked(parsed: ParsedAction, parser: ActionParser, turn: Turn) -> str:
    """What is wrong with an answer that did not raise; empty if nothing."""
    if (parsed.action is None) != bool(parsed.feedback):
        return "neither an action nor feedback, or both"
    if not encodable(parsed.feedback) or len(parsed.feedback) > 400:
        return "feedback that no prompt takes"
    if parsed.action is None:
        return ""
    if fault := wrong(parsed.action, turn):
        return fault
    again = parser.parse(parser.answer(parsed.action, turn), turn)
    return "" if again.action == parsed.action else "an action that is not read back"


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it."""
    return text.encode("utf-8", "replace").decode() == text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--texts", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_parsers.json")
    args = options.parse_args()

    rng = random.Random(args.seed)
    places = parsers()
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (name, where): {"parser": name, "commands": where, "cpu_seconds": 0.0, "exceptions": 0, "wrong": 0, "parsed": 0}
        | {"slowest_ms": 0.0, "slowest_length": 0}
        for name, where in places
    }
    faults: list[dict[str, str]] = []
    length = 0
    for _ in range(args.texts):
        text = text_of(rng)
        length += len(text)
        for (name, where), row in rows.items():
            parser, turn = places[name, where]
            start = time.process_time()
            try:
                parsed = parser.parse(text, turn)
            except Exception as error:
                row["exceptions"] += 1
                faults.append({"parser": name, "text": ascii(text), "fault": repr(error)})
                continue
            seconds = time.process_time() - start
            row["cpu_seconds"] += seconds
            row["parsed"] += parsed.action is not None
            if seconds * 1000 > row["slowest_ms"]:
                row["slowest_ms"], row["slowest_length"] = seconds * 1000, len(text)
            if fault := checked(parsed, parser, turn):
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
