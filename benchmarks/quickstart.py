"""The quickstart's claims: success before and after, wall time with cold caches, memory, the same numbers twice.

    pip install -c constraints.txt -e .
    python benchmarks/quickstart.py --seeds 0 1 2 11 12 --repeat

Each seed runs the quickstart's own command in a process of its own, with an empty cache folder. Writes
``benchmarks/results/quickstart.json`` and ``docs/quickstart.png`` and prints a table. Takes about 3 minutes per run on two
cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COMMAND = ["train.py", "fit", "--config", "configs/quickstart.yaml"]


def run(seed: int, extra: list[str]) -> dict[str, Any]:
    """One quickstart with cold caches: its evaluations, wall seconds and peak memory summed over its processes."""
    with tempfile.TemporaryDirectory() as folder:
        where = [f"--trainer.logger.init_args.save_dir={folder}", f"--seed_everything={seed}", *extra]
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        start = time.perf_counter()
        with open(Path(folder) / "log.txt", "w") as log:
            process = subprocess.Popen([sys.executable, *COMMAND, *where], cwd=ROOT, env=environment, stdout=log, stderr=log)
            peak = 0
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(1)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit((Path(folder) / "log.txt").read_text()[-2000:])
        lines = next(Path(folder).rglob("evaluation.jsonl")).read_text().splitlines()
        phases = seconds_by_phase((Path(folder) / "log.txt").read_text())
    evaluations = [json.loads(line) for line in lines]
    return {"seed": seed, "seconds": seconds, "peak_mib": peak, "phases": phases, "evaluations": evaluations}


def memory(pid: int) -> int:
    """Resident MiB of a process and its children; shared pages count in each."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total // 2**20


def seconds_by_phase(log: str) -> dict[str, float]:
    """The last table of the run's output."""
    phases = {}
    for line in log.partition("Seconds by phase")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if line.startswith("│") and len(cells) == 2:
            phases[cells[0]] = float(cells[1])
    return phases


def without_time(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in evaluations]


def cell(record: dict[str, Any]) -> str:
    low, high = record["success_ci95"]
    return f" {record['success_rate']:.2f} [{low:.2f}, {high:.2f}] "


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Success on the held-out panel against environment steps, a curve per seed with its 95 % interval."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for result in runs:
        records = result["evaluations"]
        steps = [record["environment_steps"] for record in records]
        axes.plot(steps, [record["success_rate"] for record in records], marker="o", ms=3, label=f"seed {result['seed']}")
        low, high = zip(*(record["success_ci95"] for record in records), strict=True)
        axes.fill_between(steps, low, high, alpha=0.12)
    axes.set(xlabel="environment steps learned from", ylabel="greedy success, 100 unseen games", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 11, 12])
    parser.add_argument("--repeat", action="store_true", help="run the first seed once more and compare")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "quickstart.png")
    args, extra = parser.parse_known_args()

    report: dict[str, Any] = {
        "command": "python benchmarks/quickstart.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "textworld")},
        "runs": [],
    }
    runs = report["runs"]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        runs.append(result := run(seed, extra))
        before, after = result["evaluations"][0], result["evaluations"][-1]
        print(
            f"seed {seed}: {before['success_rate']:.2f} -> {after['success_rate']:.2f} {after['success_ci95']}, "
            f"steps {before['steps_mean']:.1f} -> {after['steps_mean']:.1f}, "
            f"{result['seconds']:.0f} s, {result['peak_mib']} MiB, {result['phases']}",
            flush=True,
        )
        args.results.write_text(json.dumps(report, indent=1) + "\n")
        plot(runs, args.picture)
    rates = [result["evaluations"][-1]["success_rate"] for result in runs]
    seconds = [result["seconds"] for result in runs]
    for result in runs:  # as the README has them
        print("|".join(["", f" {result['seed']} ", *(cell(result["evaluations"][at]) for at in (0, -1)), ""]))
    print(f"success: mean {statistics.mean(rates):.3f}, lowest {min(rates):.2f}; at most {max(seconds):.0f} s")
    if args.repeat:
        again = run(args.seeds[0], extra)
        report["repeats_exactly"] = without_time(again["evaluations"]) == without_time(runs[0]["evaluations"])
        print(f"seed {args.seeds[0]} again: the same numbers: {report['repeats_exactly']}")
        args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
