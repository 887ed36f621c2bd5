"""Every method on the same tasks, from the same start, with the same experience; the learning rate tuned alike for all.

    python benchmarks/compare_methods.py                 # everything; hours on two cores
    python benchmarks/compare_methods.py --stages report # tables and pictures again, from the cells that are there
    python benchmarks/compare_methods.py --verify 3      # three random cells once more: the same, bit for bit?

A *cell* is one run of the real command: a task, a method, a seed, a learning rate. It is a line of
``benchmarks/results/compare_methods.json``. One that is there and was made by the same command is not run again, so that
an interrupted comparison goes on. Stages:

- ``tune``: a grid of learning rates for each method, on seeds that the comparison does not use, tested on the validation
  games; the best by the area under the learning curve is taken.
- ``compare``: all trained methods and the untrained policy at the middle horizon, four of them at the other two.
- ``same_rate``: the same with the grid's middle rate for all, because two seeds are few to choose a rate by.
- ``diagnose``: variants at that rate, and some at the highest, that look for the reasons.
- ``report``: tables (Markdown) and pictures, into ``docs/results``.

Within a task all runs start from the same warm-started weights (a seed's first evaluation is checked), learn from the same
number of environment steps up to the end of an iteration, with the same KL term, and are evaluated on the same 100 games,
which they do not learn from, along the way.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from compare_report import write_report
from compare_stats import area
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compare_methods.json"
STAGES = ("tune", "compare", "same_rate", "diagnose", "report")

# Coin collector: a straight row of rooms, one coin in the last. The level is the number of golden steps.
TASKS = {
    f"coin-{level}": [f"--data.source.env.settings.level={level}", f"--data.source.env.max_steps={3 * level}"]
    for level in (4, 8, 12)
}
MIDDLE = "coin-8"
BUDGET = {"coin-4": 2_500, "coin-8": 5_000, "coin-12": 7_500}  # environment steps
METHODS = ["ppo", "reinforce_pp", "reinforce_pp_baseline", "grpo", "rloo", "gspo", "gigpo", "steppo"]
ABLATIONS = ["steppo_no_step_gae", "steppo_no_step_is"]
AT_ALL_HORIZONS = ["ppo", "grpo", "gigpo", "steppo"]
LEARNING_RATES = [2e-4, 4e-4, 8e-4]
SAME_RATE = LEARNING_RATES[1]
TUNING_SEEDS = [100, 101]
RENAMED = {  # as options were called when cells were run
    "--model.loss.kl": "--model.objective.kl",
    "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger": "--trainer.logger=CSVLogger",
    "--model.advantage.even_episodes=true": "--model.advantage.whiten_over=episodes",
}
FEW_SEEDS = 3  # of variants, and of the other horizons at the same rate


@dataclass(frozen=True)
class Variant:
    """A method with something changed, to find out why."""

    method: str
    options: tuple[str, ...] = ()


VARIANTS = {
    # Tasks played several times, with a critic; no critic (its values stay at 0); fewer in a group.
    "steppo, 8 tasks 8 times": Variant("steppo", ("--rollout.group_size=8",)),
    "steppo, untrained critic": Variant("steppo", ("--model.critic_optimizer.lr=1e-12",)),
    "grpo, groups of 4": Variant("grpo", ("--rollout.group_size=4",)),
    # The range of ratios.
    "steppo, clip 0.2": Variant("steppo", ("--model.loss.clip_low=0.2", "--model.loss.clip_high=0.2")),
    "steppo, clip 0.03": Variant("steppo", ("--model.loss.clip_low=0.03", "--model.loss.clip_high=0.03")),
    # Mistakes that neither end the episode nor cost: only its end says whether it was good.
    **{
        f"{name}, mistakes go on": Variant(name, ("--data.source.on_invalid=continue", "--data.source.invalid_penalty=0"))
        for name in AT_ALL_HORIZONS
    },
}
ALSO_LONG = "steppo, clip 0.03"  # at the longest horizon too, where StepPO fails most
LONGEST = "coin-12"
# What counts how often where advantages are normalised: PPO counts tokens, StepPO steps, GRPO episodes. At the highest rate
# too, where runs collapse.
NORMALISED = {
    "ppo, even episodes": Variant("ppo", ("--model.advantage.whiten_over=episodes",)),
    "steppo, even episodes": Variant("steppo", ("--model.advantage.whiten_over=episodes",)),
    "grpo, whitened over steps": Variant("grpo", ("--model.advantage=benchmarks.compare_credit.WhitenedGRPO",)),
}

# The same for all, whatever an overlay says. In the public scripts the KL term differs by method, which is a confound.
COMMON = [
    "--model.objective.kl=loss",
    "--model.objective.kl_coef=0.001",
    "--model.policy.seed=0",
    "--warm_start.seed=0",
    "--trainer.max_epochs=10000",
    "--trainer.check_val_every_n_epoch=3",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.name=run",
    "--trainer.callbacks=[]",
    "--transcripts.train_episodes=0",
    "--transcripts.num_shown=0",
]
CURVES = (
    "rollout/success_rate",
    "rollout/degenerate_groups",
    "train/environment_steps",
    "train/updates",
    "train/entropy",
    "train/approx_kl",
    "train/clip_fraction",
    "train/value_loss",
    "train/explained_variance",
)


@dataclass(frozen=True)
class Cell:
    """One run."""

    stage: str
    task: str
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Unique among all cells."""
        return f"{self.stage}: {self.task}, {self.method}, lr {self.learning_rate:g}, seed {self.seed}"

    def stored(self) -> dict[str, Any] | None:
        """Its result, if it is there and was made by this very command."""
        result = stored_results()["cells"].get(self.name)
        command = result["command"] if result else ""
        for old, new in RENAMED.items():
            command = command.replace(old, new)
        return result if command == self.shown() else None

    def shown(self) -> str:
        """The command as one would type it."""
        return "python " + " ".join(self.command())

    def command(self) -> list[str]:
        variant = (VARIANTS | NORMALISED).get(self.method, Variant(self.method))
        overlay = variant.method
        command = ["train.py", "fit", "--config", "configs/textworld.yaml"]
        command += ["--config", f"configs/algorithm/{overlay}.yaml", f"--seed_everything={self.seed}"]
        command += [*COMMON, *TASKS[self.task], f"--data.eval_split={'valid' if self.stage == 'tune' else 'test'}"]
        command += [f"--model.policy_optimizer.lr={self.learning_rate:g}"]
        if overlay != "react":
            command += [f"--rollout.max_environment_steps={BUDGET[self.task]}"]
        return [*command, *variant.options]


@functools.cache
def stored_results() -> dict[str, Any]:
    """The results file as it is now: ``cells`` by their names, and ``verified``, what ``--verify`` found."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}, "verified": {}}


def store() -> None:
    """Writes ``stored_results`` whole or not at all, a cell a line."""
    results = stored_results()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in sorted(results["cells"].items()))
    part = RESULTS.with_suffix(".part")
    part.write_text(f'{{"verified": {json.dumps(results["verified"])},\n"cells": {{\n{lines}\n}}}}\n')
    os.replace(part, RESULTS)


def run(cell: Cell) -> dict[str, Any]:
    """Runs a cell in a folder of its own and gives what is worth keeping. Raises ``RuntimeError`` with its last line."""
    command = cell.command()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, f"--trainer.logger.save_dir={folder}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
        [logs] = Path(folder).glob("run/version_*")
        evaluations = [json.loads(line) for line in (logs / "evaluation.jsonl").read_text().splitlines()]
        with open(logs / "metrics.csv") as file:
            iterations = curves(list(csv.DictReader(file)))
        final = final_episodes(logs / "transcripts.jsonl", evaluations[-1]["iteration"])
    return {
        **asdict(cell),
        "budget": BUDGET[cell.task],
        "command": cell.shown(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "seconds": round(seconds, 1),
        "evaluations": evaluations,
        "iterations": iterations,
        "final_episodes": final,
    }


def curves(rows: list[dict[str, str]]) -> dict[str, list[float | None]]:
    """Columns of figures by iteration, and the seconds of training so far."""
    rows = [row for row in rows if row.get("train/environment_steps")]
    found: dict[str, list[float | None]] = {
        name: [float(row[name]) if row.get(name) else None for row in rows] for name in CURVES if rows and name in rows[0]
    }
    phases = [f"seconds/{phase}" for phase in ("rollout", "score", "update")]
    spent, total = [], 0.0
    for row in rows:
        total += sum(float(row[phase]) for phase in phases)
        spent.append(round(total, 3))
    return found | {"seconds": list(spent)}


def final_episodes(transcripts: Path, iteration: int) -> list[dict[str, Any]]:
    """Success and length of each episode of the last panel."""
    records = (json.loads(line) for line in transcripts.read_text().splitlines())
    return [
        {"success": record["success"], "steps": len(record["steps"])}
        for record in records
        if record["kind"] != "train" and record["iteration"] == iteration
    ]


def work_off(cells: list[Cell], jobs: int, console: Console) -> int:
    """Runs the cells that are not there yet, ``jobs`` at once; gives the number of those that failed."""
    wanted = [cell for cell in cells if not cell.stored()]
    failures = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as executor:
        bar = progress.add_task(cells[0].stage if cells else "", total=len(cells), completed=len(cells) - len(wanted))
        futures = {executor.submit(run, cell): cell for cell in wanted}
        for future in as_completed(futures):
            cell = futures[future]
            progress.advance(bar)
            try:
                result = future.result()
            except (RuntimeError, OSError, ValueError) as error:
                failures += 1
                progress.console.print(f"{cell.name} failed: {error}", markup=False)
                continue
            stored_results()["cells"][cell.name] = result
            store()
            rates = [record["success_rate"] for record in result["evaluations"]]
            line = f"{cell.name}: {rates[0]:.2f} -> {rates[-1]:.2f} in {result['seconds']:.0f} s"
            progress.console.print(line, markup=False)
    return failures


def read(stage: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The stage's results that are there."""
    return [result for cell in cells_of(stage, seeds) if (result := cell.stored())]


def check_same_start(results: list[dict[str, Any]]) -> None:
    """Runs of a task and a seed must begin with the same policy: ``SystemExit`` names the first that do not."""
    starts: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        start = {name: value for name, value in result["evaluations"][0].items() if name != "seconds"}
        key = result["task"], result["seed"]
        if starts.setdefault(key, start) != start:
            raise SystemExit(
                f"{result['method']} began with another policy than others on {key}: {start}, not {starts[key]}"
            )


def best_learning_rates() -> dict[str, float]:
    """The winner of each method's grid; ``SystemExit`` if a grid is not complete."""
    scores: dict[str, dict[float, list[float]]] = {}
    for result in read("tune", []):
        scores.setdefault(result["method"], {}).setdefault(result["learning_rate"], []).append(area(result))
    for method in (*METHODS, *ABLATIONS):
        found = scores.get(method, {})
        if any(len(found.get(rate, [])) < len(TUNING_SEEDS) for rate in LEARNING_RATES):
            raise SystemExit(f"the learning rate of {method} is not tuned yet: run the stage tune")
    return {method: max(found, key=lambda rate: fmean(found[rate])) for method, found in scores.items()}


def cells_of(stage: str, seeds: list[int]) -> list[Cell]:
    """What a stage consists of."""
    if stage == "tune":  # which has its own seeds
        methods = [*METHODS, *ABLATIONS]
        return [Cell(stage, MIDDLE, m, lr, seed) for seed in TUNING_SEEDS for lr in LEARNING_RATES for m in methods]
    if stage == "diagnose":
        few = seeds[:FEW_SEEDS]
        found = [Cell(stage, MIDDLE, name, SAME_RATE, seed) for seed in few for name in VARIANTS]
        found += [Cell(stage, LONGEST, ALSO_LONG, SAME_RATE, seed) for seed in few]
        for rate in (SAME_RATE, LEARNING_RATES[-1]):
            for task in TASKS:  # as often as the methods themselves
                some = few if rate == SAME_RATE and task != MIDDLE else seeds
                found += [Cell(stage, task, name, rate, seed) for name in NORMALISED for seed in some]
        return found
    rates = best_learning_rates() if stage == "compare" else dict.fromkeys((*METHODS, *ABLATIONS), SAME_RATE)
    wanted = [(MIDDLE, method, seed) for seed in seeds for method in (*METHODS, *ABLATIONS)]
    wanted += [(task, "react", seed) for seed in seeds for task in TASKS]
    few = seeds if stage == "compare" else seeds[:FEW_SEEDS]
    wanted += [(task, method, seed) for seed in few for task in TASKS if task != MIDDLE for method in AT_ALL_HORIZONS]
    # Both stages keep their cells in one folder: where the tuned rate is the common one they have the same.
    return [Cell("compare", task, m, rates.get(m, LEARNING_RATES[0]), seed) for task, m, seed in wanted]


def without_time(result: dict[str, Any]) -> Any:
    """What a rerun must give again."""
    evaluations = [{k: v for k, v in record.items() if k != "seconds"} for record in result["evaluations"]]
    return [evaluations, {k: v for k, v in result["iterations"].items() if k != "seconds"}, result["final_episodes"]]


def verify(count: int, seeds: list[int]) -> bool:
    """Runs random cells of all stages once more and says whether they are the same, bit for bit."""
    cells = dict.fromkeys(cell for stage in STAGES[:-1] for cell in cells_of(stage, seeds))
    stored = [(cell, before) for cell in cells if cell.method != "react" and (before := cell.stored())]
    report = []
    for cell, before in random.Random(0).sample(stored, min(count, len(stored))):
        same = without_time(run(cell)) == without_time(before)
        report.append({"cell": cell.name, "same": same})
        print(f"{report[-1]['cell']}: {'the same' if same else 'DIFFERENT'}", flush=True)
    stored_results()["verified"] = {"date": datetime.date.today().isoformat(), "cells": report}
    store()
    return all(entry["same"] for entry in report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help=f"of the comparison; what is run fewer times takes the first {FEW_SEEDS}",
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--verify", type=int, metavar="N", help="run N random cells again and compare; nothing else")
    arguments = parser.parse_args()
    if arguments.verify is not None:
        raise SystemExit(0 if verify(arguments.verify, arguments.seeds) else 1)
    console = Console()
    for stage in arguments.stages:
        if stage == "report":
            results = {name: read(name, arguments.seeds) for name in STAGES[:-1]}
            for name in STAGES[:-2]:  # not the variants, which may begin elsewhere
                check_same_start(results[name])
            methods = {name: variant.method for name, variant in (VARIANTS | NORMALISED).items()}
            write_report(results, MIDDLE, methods, ROOT / "docs" / "results")
            continue
        if failures := work_off(cells_of(stage, arguments.seeds), arguments.jobs, console):
            raise SystemExit(f"{failures} cells failed; run the same command again for them alone")


if __name__ == "__main__":
    main()
