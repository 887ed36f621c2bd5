"""A tiny policy learns ALFWorld on a CPU: it copies walkthroughs, then goes on by StepPO.

    export ALFWORLD_DATA=...
    python benchmarks/alfworld_learning.py --folder runs/alfworld_learning

Runs ``configs/alfworld/tiny.yaml``: the curve on its panel, then the policies of both ends on all games of valid_seen and
valid_unseen, and the paired difference. Other options go to ``train.py``. What is done stays in the folder and is not done
again: start the same command anew after an interruption. Writes ``benchmarks/results/alfworld_learning.json`` and prints
tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np

from steppo import results
from steppo.checkpoints import iteration_checkpoints
from steppo.panel.compare import difference

ROOT = Path(__file__).parent.parent
CONFIG = "configs/alfworld/tiny.yaml"
STAGES = {"validate": "valid_seen", "test": "valid_unseen"}


def train(command: list[str], folder: Path) -> None:
    """Runs train.py with its run folder there, and adds up the seconds that it took."""
    clock = folder / "seconds.json"
    folder.mkdir(parents=True, exist_ok=True)
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    names = {"save_dir": folder.parent.parent, "name": folder.parent.name, "version": folder.name}
    where = [f"--trainer.logger.init_args.{name}={value}" for name, value in names.items()]
    start = time.perf_counter()
    try:
        subprocess.run([sys.executable, "train.py", *command, *where], cwd=ROOT, check=True)
    finally:
        clock.write_text(json.dumps(spent + time.perf_counter() - start))


def success(result: dict[str, Any]) -> dict[str, float]:
    """Share of solved episodes by game."""
    played: dict[str, list[bool]] = {}
    for one in filter(results.is_healthy, result["episodes"]):
        played.setdefault(one["task"], []).append(one["success"] is True)
    return {task: float(np.mean(solved)) for task, solved in played.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "alfworld_learning", help="of the run")
    parser.add_argument("--games", type=int, default=140, help="most games of a split at both ends")
    parser.add_argument("--samples", type=int, default=2, help="episodes of each game at both ends")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "alfworld_learning.json")
    options, extra = parser.parse_known_args()
    folder = options.folder.resolve()
    run, done = folder / "fit", folder / "fit" / "done"
    if not done.exists():
        goes_on = ["--ckpt_path=last"] if (run / "checkpoints").is_dir() else []
        train(["fit", f"--config={CONFIG}", *goes_on, *extra], run)
        done.touch()
    checkpoints = iteration_checkpoints(run / "checkpoints")
    ends: dict[str, dict[str, dict[str, Any]]] = {}
    for name, path in (("warm start", checkpoints[0]), ("StepPO", checkpoints[-1])):
        for stage, split in STAGES.items():
            there = folder / f"{split}-{path.stem}"
            if not (there / f"{stage}.json").exists():
                more = [f"--data.eval_tasks={options.games}", f"--evaluation.samples={options.samples}"]
                train([stage, f"--config={CONFIG}", f"--ckpt_path={path}", *extra, *more], there)
            ends.setdefault(split, {})[name] = results.read(there / f"{stage}.json")

    curve = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    for record in curve:
        low, high = record["success_ci95"]
        print(f"iteration {record['iteration']:>4}: success {record['success_rate']:.3f} [{low:.3f}, {high:.3f}]")
    pairs: list[tuple[float, float]] = []
    found = {}
    for split, (before, after) in ((split, both.values()) for split, both in ends.items()):
        here = [(success(before)[task], success(after)[task]) for task in success(before) if task in success(after)]
        pairs += here
        found[split] = compared(split, here)
    found["both"] = compared("both", pairs)
    report = measuring.about() | {
        "config": CONFIG,
        "seconds": {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/seconds.json"))},
        "curve": curve,
        "differences": found,
        "ends": {
            f"{split}, {name}": {"panel": one["panel"], "protocol": one["protocol"], "figures": one["figures"]}
            for split, both in ends.items()
            for name, one in both.items()
        },
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


def compared(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Success before and after on the same games."""
    before, after = np.asarray(pairs, dtype=np.float64).T
    found = difference(before, after)
    low, high = found.interval
    print(
        f"{name}, {len(pairs)} games: {found.a:.3f} -> {found.b:.3f}, difference {found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
    return {"games": len(pairs), "before": found.a, "after": found.b, "difference": found.mean, "ci95": [low, high]}


if __name__ == "__main__":
    main()
