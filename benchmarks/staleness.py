"""What older weights cost, and what corrections change: the quickstart, played ahead, over several seeds.

    pip install -c constraints.txt -e .
    python benchmarks/staleness.py --seeds 0 1 2 3 4      # 4 ways, about 3 minutes a run on two idle cores

Ways: synchronous; at most 1 iteration old, with ``configs/trainer/async.yaml``'s correction; at most 4, with it; at most 4,
without any. Greedy success on the panel of 100 unseen games, at the end and on average along the run; intervals (t, 95 %)
are over seeds. Above 1 the clock decides how old weights are, so ``age`` says what they were. Also the share of the
effective samples that the correction's weights leave, and that the product of a step's ratios would leave.

What is done is in ``--folder`` and is not done again. Writes ``benchmarks/results/staleness.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import about, markdown
from minibatches import interval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
AHEAD = ["--config=configs/trainer/async.yaml"]
WAYS = {
    "synchronous": [],
    "at most 1, corrected": AHEAD,
    "at most 4, corrected": [*AHEAD, "--data.asynchronous.max_staleness=4"],
    "at most 4, not corrected": [*AHEAD, "--data.asynchronous.max_staleness=4", "--model.correction=NoCorrection"],
}
CURVES = {"age": "rollout/staleness", "ess": "train/correction_ess", "ess_product": "train/correction_ess_product"}


def run(folder: Path, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One run, or what it left."""
    place = [
        f"--trainer.logger.save_dir={folder.parent}",
        f"--trainer.logger.name={folder.name}",
        "--trainer.logger.version=run",
    ]
    if not (folder / "done").exists():
        goes_on = ["--ckpt_path=last"] if folder.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", "fit", "--config=configs/quickstart.yaml", *options]
        with open(folder / "log.txt", "a") as log:
            subprocess.run(
                [*command, f"--seed_everything={seed}", *place, *goes_on], cwd=ROOT, stdout=log, stderr=log, check=True
            )
        (folder / "done").touch()
    success = [json.loads(line)["success_rate"] for line in (folder / "run" / "evaluation.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    figures = {
        name: statistics.fmean(point.value for point in events.Scalars(curve))
        for name, curve in CURVES.items()
        if curve in known
    }
    return {"seed": seed, "success": success, "final": success[-1], "mean": statistics.fmean(success[1:]), **figures}


def shown(values: Sequence[float], form: str) -> str:
    return "{} [{}, {}]".format(*(format(value, form) for value in interval(list(values))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="the synchronous one comes first")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "staleness")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "staleness.json")
    args, extra = parser.parse_known_args()

    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in args.seeds:  # a seed's runs beside each other, so that a stopped comparison is a smaller one
        for way in args.ways:
            place = args.folder.resolve() / f"{way.replace(', ', '-').replace(' ', '_')}-{seed}"
            runs[way].append(run(place, seed, [*WAYS[way], *extra]))
            print(way, runs[way][-1], file=sys.stderr, flush=True)
    args.results.write_text(json.dumps({**about(), "runs": runs}, indent=1) + "\n")
    first = next(iter(runs.values()))
    rows = []
    for way, found in runs.items():
        difference = [one["final"] - other["final"] for one, other in zip(found, first, strict=True)]
        figures = [f"{statistics.fmean(one[name] for one in found):.2f}" if name in found[0] else "" for name in CURVES]
        columns = [shown([one[name] for one in found], ".3f") for name in ("final", "mean")]
        rows.append([way, *figures, *columns, "" if found is first else shown(difference, "+.3f")])
    heads = ["weights, iterations old", *CURVES, "success", "success along the run", "difference at the end"]
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
