"""What minibatches of whole episodes save, and whether they harm.

    pip install -c constraints.txt -e ".[test]"
    python benchmarks/minibatches.py

First the tokens that the updates of one pass compute: 64 episodes of *n* steps, whose prompts begin with 200 tokens and hold
the whole dialogue (observations of 60 tokens, actions of 8), in 4 and 8 minibatches.

Then learning, by shuffled steps and by whole episodes, over several seeds: a corridor of three rooms (``tests/toy.yaml``),
whose prompts hold the whole dialogue, and a policy of about a hundred thousand weights, which has seen random play. Runs of
one seed begin alike and differ in ``data.minibatches`` alone. Compared are the success rates of the rollouts, over all
iterations (how fast it learns) and over the last five (how far), by the paired differences between the seeds; and what the
updates cost. A run that is in ``--runs`` already is not made again.

Writes ``benchmarks/results/minibatches.json`` and prints tables. Takes half a minute of one core a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import about
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steppo.batch import Segment
from steppo.minibatches import ShuffledSteps, StepColumns, WholeEpisodes, checked_cut
from steppo.packing import PackingCost, PaddedPacker, PrefixTreePacker

ROOT = Path(__file__).parent.parent
BASE = "ShuffledSteps"
LAST = 5  # iterations
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees of freedom
SETTINGS = {
    "trainer.limit_val_batches": 0,
    "checkpoint.every_n_iterations": 1000,
    "rollout.episodes_per_iteration": 64,
    "warm_start.updates": 200,
    "data.source.context": "AppendContext",
    "data.source.context.instructions": "",
    "data.source.max_prompt_tokens": 700,
    "data.source.on_invalid": "end",
    "data.source.num_slots": 64,
    "data.source.env.length": 3,
    "data.source.env.num_tasks": 6,
    "data.packer": "PrefixTreePacker",
    "data.num_minibatches": 4,
    "data.update_epochs": 2,
    "model.policy.hidden_size": 64,
    "model.policy.num_layers": 2,
    "model.policy.max_positions": 1024,
    "model.policy_optimizer.lr": 1e-3,
    "model.advantage.gamma": 0.9,
}


def tokens_of_a_pass(steps: int, minibatches: int) -> dict[str, int]:
    """Tokens computed, padding included, by packer and cut."""
    rng = np.random.default_rng(0)
    head, segments = draw(rng, 200), []
    for episode in range(64):
        dialogue = head
        for _ in range(steps):
            segments.append(Segment(np.concatenate([dialogue, draw(rng, 60)]), draw(rng, 8), episode))
            dialogue = np.concatenate([segments[-1].prompt_ids, segments[-1].action_ids])
    episode_N = np.asarray([segment.episode for segment in segments])
    columns = StepColumns(episode_N, episode_N // 8, np.full(len(segments), 8))
    found = {}
    for name, packer, cut in (
        ("padded rows", PaddedPacker(), ShuffledSteps()),
        ("ShuffledSteps", PrefixTreePacker(), ShuffledSteps()),
        ("WholeEpisodes", PrefixTreePacker(), WholeEpisodes()),
    ):
        parts = checked_cut(cut, columns, minibatches, np.random.default_rng(0))
        batches = (batch for part in parts for _, batch in packer.pack([segments[row] for row in np.sort(part)], 16384))
        found[name] = PackingCost.total(map(PackingCost.of, batches)).computed
    return found


def draw(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(2, 512, length).astype(np.int32)


def play(folder: Path, cut: str, seed: int, iterations: int) -> None:
    """One run, whose process time goes beside its curves."""
    options = SETTINGS | {"seed_everything": seed, "data.minibatches": cut, "trainer.max_epochs": iterations}
    options |= {"trainer.logger.init_args.save_dir": folder, "warm_start.cache_dir": folder.parent / "warm_starts"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "train.py", "fit", "--config", "tests/toy.yaml", *arguments]
    shutil.rmtree(folder, ignore_errors=True)  # one that was stopped
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"a run failed: see {folder / 'log'}")
    (folder / "seconds").write_text(str(used.ru_utime + used.ru_stime))  # the last of all: the run is whole


def outcome(folder: Path) -> dict[str, float]:
    """A run in numbers."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curve = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    success = curve["rollout/success_rate"]
    read, unique = curve["train/tokens_read"], curve["train/tokens_unique"]
    return {
        "iterations": len(success),
        "success": statistics.fmean(success),
        "success_at_the_end": statistics.fmean(success[-LAST:]),
        "tokens_read": sum(read),
        "tokens_unique": sum(unique),
        "padding_share": statistics.fmean(curve["train/padding_share"]),
        "update_seconds": sum(curve["seconds/update"]),
        "process_seconds": float((folder / "seconds").read_text()),
    }


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    heads = [
        "minibatches",
        "seeds",
        "success, all iterations",
        f"last {LAST}",
        "tokens read",
        "computed",
        "update s",
        "CPU s",
    ]
    names = list(report["tokens"][0]["computed"])
    lines = ["| " + " | ".join(["steps", "minibatches", *names]) + " |", "|" + "---|" * (2 + len(names))]
    for row in report["tokens"]:
        counts = [f"{count / 1e3:,.0f} k" for count in row["computed"].values()]
        lines.append("| " + " | ".join([str(row["steps"]), str(row["minibatches"]), *counts]) + " |")
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for cut, runs in report["runs"].items():
        mean = {name: statistics.fmean(run[name] for run in runs.values()) for name in next(iter(runs.values()))}
        cells = [cut, str(len(runs)), f"{mean['success']:.3f}", f"{mean['success_at_the_end']:.3f}"]
        cells += [f"{mean['tokens_read'] / 1e6:.2f} M", f"{mean['tokens_unique'] / 1e6:.2f} M"]
        cells += [f"{mean['update_seconds']:.0f}", f"{mean['process_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for cut, found in report["differences"].items():
        for name, (mean, low, high) in found.items():
            lines.append(f"\n{cut} less {BASE}, {name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two to ten")
    parser.add_argument("--cuts", nargs="+", default=["WholeEpisodes"], help=f"beside {BASE}")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "minibatches")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "minibatches.json")
    args = parser.parse_args()

    folders = {(cut, seed): args.runs.absolute() / f"{cut}-{seed}" for seed in args.seeds for cut in [BASE, *args.cuts]}
    missing = [key for key, folder in folders.items() if not (folder / "seconds").exists()]
    with ThreadPoolExecutor(args.jobs) as threads:
        list(threads.map(lambda key: play(folders[key], key[0], key[1], args.iterations), missing))
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for (cut, seed), folder in folders.items():
        runs.setdefault(cut, {})[seed] = outcome(folder)
    differences = {
        cut: {
            name: interval([runs[cut][seed][name] - runs[BASE][seed][name] for seed in args.seeds])
            for name in ("success", "success_at_the_end")
        }
        for cut in args.cuts
    }
    report = {
        **(about() | {"threads": 1}),
        "tokens": [
            {"steps": steps, "minibatches": count, "computed": tokens_of_a_pass(steps, count)}
            for steps in (8, 16, 32)
            for count in (4, 8)
        ],
        "settings": SETTINGS,
        "runs": runs,
        "differences": differences,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
