"""Every credit scheme against the plain Python loop over steps or tokens that the tests compare it with.

    pip install -c constraints.txt -e ".[test]"
    python benchmarks/credit.py

Episodes of 1 to 50 steps, 1 to 200 action tokens a step, groups of 8 episodes that share a few rooms. Rows are in the order
of episodes and time, as ``assign_credit`` gives them. A scheme gets its batch ready made, as tensors, and its loop as
records (``tests/slow_credit.py``); only the call counts: CPU time, in float64, in one thread, without garbage collection,
the best of several calls. Both must agree first. Writes ``benchmarks/results/credit.json`` and prints a table. Takes a few
minutes and several GiB of memory.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # tests/ is not installed

from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE  # noqa: E402
from tests import slow_credit as slow  # noqa: E402
from tests.numeric_helpers import close, to_batch  # noqa: E402
from tests.slow_credit import Ending, Turn  # noqa: E402

Loop = Callable[[list[Turn], list[Ending]], Any]
# Name, credit by step or token, the scheme, its loop.
SCHEMES: list[tuple[str, str, Advantage, Loop]] = [
    ("StepGAE", "step", StepGAE(0.99, 0.95, True), lambda t, e: slow.slow_credit(t, e, 0.99, 0.95, True, False)),
    ("GRPO", "step", GRPO(), slow.slow_grpo),
    ("RLOO", "step", RLOO(), slow.slow_rloo),
    ("GiGPO", "step", GiGPO(), slow.slow_gigpo),
    ("GiGPO, similarity 0.9", "step", GiGPO(similarity=0.9), lambda t, e: slow.slow_gigpo(t, e, similarity=0.9)),
    ("TokenGAE", "token", TokenGAE(1.0, 1.0, True), lambda t, e: slow.slow_credit(t, e, 1.0, 1.0, True, True)),
    (
        "TokenGAE, lambda 0.99",
        "token",
        TokenGAE(1.0, 0.99, True),
        lambda t, e: slow.slow_credit(t, e, 1.0, 0.99, True, True),
    ),
    ("ReinforcePP", "token", ReinforcePP(), slow.slow_reinforce_pp),
    ("ReinforcePP, gamma 0.999", "token", ReinforcePP(0.999), lambda t, e: slow.slow_reinforce_pp(t, e, 0.999)),
    ("ReinforcePPBaseline", "step", ReinforcePPBaseline(), slow.slow_reinforce_pp_baseline),
]
GROUP, MOST_STEPS, MOST_TOKENS, ROOMS = 8, 50, 200, 10
PLACES = ["kitchen", "pantry", "garden", "attic", "cellar", "study", "bedroom", "corridor", "workshop", "bathroom"]
THINGS = ["knife", "apple", "coin", "lantern", "key", "cookbook", "carrot", "blanket", "teapot", "mirror", "ladder"]


def records(steps: int, rng: random.Random) -> tuple[list[Turn], list[Ending]]:
    """So many steps; a reward at some of them, and at the end of half the episodes."""
    turns: list[Turn] = []
    endings: list[Ending] = []
    texts: list[str] = []
    while len(turns) < steps:
        episode = len(endings)
        if episode % GROUP == 0:
            rooms = [(rng.choice(PLACES), rng.choice(THINGS), rng.choice(THINGS)) for _ in range(ROOMS)]
            texts = [f"You are in the {place}. You see a {a} and a {b}. What do you do?" for place, a, b in rooms]
        length = min(rng.randint(1, MOST_STEPS), steps - len(turns))
        solved, terminated = rng.random() < 0.5, rng.random() < 0.8
        for index in range(length):
            tokens = rng.randint(1, MOST_TOKENS)
            reward = float(solved and index == length - 1) - 0.1 * (rng.random() < 0.1)
            values = [rng.gauss(0.0, 1.0) for _ in range(tokens)]
            turns.append(Turn(episode, index, [0.0] * (tokens - 1) + [reward], values, values[0], rng.choice(texts)))
        endings.append(Ending(terminated, 0.0 if terminated else rng.gauss(0.0, 1.0), episode // GROUP))
    return turns, endings


def best(call: Callable[[], Any], seconds: float = 0.3, least: int = 3, most: int = 100) -> float:
    """Shortest of at least so many calls, and of as many as fit into the time."""
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        start = time.process_time()
        result = call()
        times.append(time.process_time() - start)
        del result  # not timed
    return min(times)


def compare(steps: int, seed: int) -> list[dict[str, Any]]:
    """One row per scheme."""
    turns, endings = records(steps, random.Random(seed))
    batch = to_batch(turns, endings)
    rows = []
    for name, level, scheme, loop in SCHEMES:
        credit, expected = scheme(batch), loop(turns, endings)
        advantage = credit.advantage_N if level == "step" else credit.advantage_A
        target = credit.target_N if level == "step" else credit.target_A
        assert advantage is not None
        if target is not None:
            expected, expected_target = expected
            close(target, expected_target)
        close(advantage, expected)
        del credit, advantage, target, expected
        gc.collect()
        gc.disable()
        loop_seconds = best(lambda loop=loop: loop(turns, endings))
        scheme_seconds = best(lambda scheme=scheme: scheme(batch))
        gc.enable()
        row = {
            "scheme": name,
            "credit": level,
            "steps": len(turns),
            "tokens": len(batch.reward_A),
            "episodes": len(endings),
            "loop_seconds": loop_seconds,
            "scheme_seconds": scheme_seconds,
            "ratio": loop_seconds / scheme_seconds,
        }
        rows.append(row)
        print(f"{name}, {steps} steps: {loop_seconds:.4f} s, {scheme_seconds:.5f} s, {row['ratio']:.0f}x", file=sys.stderr)
    return rows


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of the largest size over those of the one before, of loop and scheme; and how much larger it is."""
    *_, before, after = sorted({row["steps"] for row in rows})
    found = {}
    for name in dict.fromkeys(row["scheme"] for row in rows):
        one, other = (next(r for r in rows if r["scheme"] == name and r["steps"] == steps) for steps in (before, after))
        found[name] = {key: other[key] / one[key] for key in ("steps", "tokens", "loop_seconds", "scheme_seconds")}
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per scheme, its ratio at each size, its times and growth at the largest."""
    rows, sizes = report["rows"], sorted({row["steps"] for row in report["rows"]})
    heads = ["scheme", "credit by", *(f"{size:,} steps: loop, scheme" for size in sizes)]
    if "growth" in report:
        heads.append(f"growth {sizes[-2]:,} to {sizes[-1]:,}")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["scheme"] for row in rows):
        own = sorted((row for row in rows if row["scheme"] == name), key=lambda row: row["steps"])
        cells = [name, own[0]["credit"]]
        cells += [f"{1e3 * r['loop_seconds']:.3g} ms, {1e3 * r['scheme_seconds']:.3g} ms: {r['ratio']:.3g}x" for r in own]
        if "growth" in report:
            cells.append(f"{report['growth'][name]['scheme_seconds']:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "credit.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/credit.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seed": args.seed,
        "rows": [],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for steps in sorted(set(args.sizes)):
        report["rows"] += compare(steps, args.seed)
        if len({row["steps"] for row in report["rows"]}) > 1:
            report["growth"] = growth(report["rows"])
        args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
