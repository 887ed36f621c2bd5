"""A tiny policy learns a task on a CPU: it copies the expert, then goes on by reinforcement learning.

    export ALFWORLD_DATA=...
    python benchmarks/learning.py --config configs/alfworld/tiny.yaml --folder runs/learning_alfworld

The curve on the config's panel, then the policies of both ends on the first tasks of its ``valid`` and ``test`` splits, and
the paired difference. Other options go to ``train.py``. What is done stays in the folder and is not done again: start the
same command anew after an interruption. Writes a JSON to ``benchmarks/results/`` and prints tables.
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
STAGES = {"validate": "valid", "test": "test"}


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


def by_task(result: dict[str, Any], figure: str) -> dict[str, float]:
    """Mean ``success`` or ``return`` of the episodes of each task."""
    played: dict[str, list[float]] = {}
    for one in filter(results.is_healthy, result["episodes"]):
        played.setdefault(one["task"], []).append(float(one[figure] or 0.0))
    return {task: float(np.mean(values)) for task, values in played.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="such as configs/alfworld/tiny.yaml")
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--tasks", type=int, default=500, help="most tasks of a split at both ends")
    parser.add_argument("--samples", type=int, default=2, help="episodes of each task at both ends")
    options, extra = parser.parse_known_args()
    config = f"--config={options.config}"
    folder = options.folder.resolve()
    run, done = folder / "fit", folder / "fit" / "done"
    if not done.exists():
        goes_on = ["--ckpt_path=last"] if (run / "checkpoints").is_dir() else []
        train(["fit", config, *goes_on, *extra], run)
        done.touch()
    checkpoints = iteration_checkpoints(run / "checkpoints")
    ends: dict[str, dict[str, dict[str, Any]]] = {}
    for name, path in (("warm start", checkpoints[0]), ("StepPO", checkpoints[-1])):
        for stage, split in STAGES.items():
            there = folder / f"{split}-{path.stem}"
            if not (there / f"{stage}.json").exists():
                more = [f"--data.eval_tasks={options.tasks}", f"--evaluation.samples={options.samples}"]
                train([stage, config, f"--ckpt_path={path}", *extra, *more], there)
            ends.setdefault(split, {})[name] = results.read(there / f"{stage}.json")

    curve = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    for record in curve:
        low, high = record["success_ci95"]
        print(f"iteration {record['iteration']:>4}: success {record['success_rate']:.3f} [{low:.3f}, {high:.3f}]")
    found = {}
    for figure in ("success", "return"):
        pairs: list[tuple[float, float]] = []
        for split, both in ends.items():
            before, after = (by_task(result, figure) for result in both.values())
            here = [(before[task], after[task]) for task in before if task in after]
            pairs += here
            found[f"{figure}, {split}"] = compared(f"{figure}, {split}", here)
        found[f"{figure}, both"] = compared(f"{figure}, both", pairs)
    report = measuring.about() | {
        "config": options.config,
        "seconds": {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/seconds.json"))},
        "curve": curve,
        "differences": found,
        "ends": {
            f"{split}, {name}": {"panel": one["panel"], "protocol": one["protocol"], "figures": one["figures"]}
            for split, both in ends.items()
            for name, one in both.items()
        },
    }
    place = ROOT / "benchmarks" / "results" / f"learning_{Path(options.config).parent.name}.json"
    place.write_text(json.dumps(report, indent=1) + "\n")


def compared(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """A figure before and after on the same tasks."""
    before, after = np.asarray(pairs, dtype=np.float64).T
    found = difference(before, after)
    low, high = found.interval
    print(
        f"{name}, {len(pairs)} tasks: {found.a:.3f} -> {found.b:.3f}, difference {found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
    return {"tasks": len(pairs), "before": found.a, "after": found.b, "difference": found.mean, "ci95": [low, high]}


if __name__ == "__main__":
    main()
