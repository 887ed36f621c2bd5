"""Where the time of a quickstart iteration goes.

    pip install -c constraints.txt -e .
    python benchmarks/iteration.py                       # this checkout
    python benchmarks/iteration.py --before ../earlier   # and another one

Each run is the quickstart's own command, cut after ``--iterations``, with clocks around its phases; further options go to
it. Games and warm start come from the user's cache and do not count. ``process`` is the CPU time of the main process; that
of the environments is spent in their worker process, beside it. Medians over the iterations but the first; an evaluation is
a panel of 100 games. Where no seconds of this machine's own are to be had, as others use it, only ``process`` says much.
Writes ``benchmarks/results/iteration.json`` and prints a table. Takes about two minutes for each run on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steppo.envs.textworld import TextWorldEnv
from steppo.types import Task, Turn

ROOT = Path(__file__).parent.parent
PARTS = ["reset", "step"]  # of an environment: seconds and number of calls
CLOCKS = "STEPPO_BENCHMARK_CLOCKS"


class Clocked(TextWorldEnv):
    """Adds what its resets and steps take to a file that the main process reads."""

    def start(self) -> None:
        getattr(super(), "start", lambda: None)()
        self._clocks = np.memmap(os.environ[CLOCKS], np.float64, "r+", shape=(2, 2))

    def reset(self, task: Task) -> Turn:
        with self._added(0):
            return super().reset(task)

    def command(self, command: str) -> Turn:
        with self._added(1):
            return super().command(command)

    @contextlib.contextmanager
    def _added(self, part: int) -> Iterator[None]:
        start = time.process_time()
        yield
        self._clocks[part] += time.process_time() - start, 1


def child(arguments: list[str], out: str) -> None:
    """The quickstart with clocks around its phases, in the checkout of the working directory."""
    from steppo.cli import main
    from steppo.envs.pool import EnvPool
    from steppo.module import AgentModule
    from steppo.rollouts import EnvSource, env_source

    clocks = np.memmap(os.environ[CLOCKS], np.float64, "r+", shape=(2, 2))
    records: list[dict[str, float]] = []
    generated = np.zeros(2)

    def now() -> np.ndarray[Any, Any]:
        return np.array([time.perf_counter(), time.process_time(), *generated, *clocks.ravel()])

    timed = AgentModule.timed

    @contextlib.contextmanager
    def clocked(self: AgentModule, name: str) -> Iterator[None]:
        start = now()
        with timed(self, name):
            yield
        spent = dict(zip(("wall", "process", "generation wall", "generation"), now() - start, strict=False))
        spent |= {f"{part}{what}": value for (part, what), value in zip(_cells(), (now() - start)[4:], strict=True)}
        records.append({"phase": name, "at": float(start[0]), "process at": float(start[1]), **spent})  # type: ignore[dict-item]

    def clocked_pool(env: TextWorldEnv, *args: Any) -> EnvPool:
        env = copy.copy(env)
        env.__class__ = Clocked
        return EnvPool(env, *args)

    bind = EnvSource.bind

    @functools.wraps(bind)
    def bound(self: EnvSource, *args: Any) -> None:
        bind(self, *args)
        poll = self.engine.poll

        def polled() -> Any:
            start = np.array([time.perf_counter(), time.thread_time()])
            found = poll()
            np.add(generated, np.array([time.perf_counter(), time.thread_time()]) - start, out=generated)
            return found

        self.engine.poll = polled  # type: ignore[method-assign]

    AgentModule.timed, EnvSource.bind = clocked, bound  # type: ignore[method-assign, assignment]
    vars(env_source)["EnvPool"] = clocked_pool
    with tempfile.TemporaryDirectory() as folder:
        command = ["fit", "--config", "configs/quickstart.yaml", *arguments]
        sys.argv = ["train.py", *command, f"--trainer.logger.save_dir={folder}"]
        main()
    Path(out).write_text(json.dumps(records))


def _cells() -> list[tuple[str, str]]:
    return [(part, what) for part in PARTS for what in ("", " calls")]


def measured(checkout: Path, arguments: list[str]) -> dict[str, dict[str, float]]:
    """One run: medians over its iterations, in seconds, by what they were spent on."""
    with tempfile.TemporaryDirectory() as folder:
        np.zeros((2, 2)).tofile(clocks := os.path.join(folder, "clocks"))
        path = os.pathsep.join([str(checkout), str(ROOT / "benchmarks")])
        environment = {**os.environ, CLOCKS: clocks, "PYTHONPATH": path}
        out = os.path.join(folder, "records.json")
        program = f"import iteration; iteration.child({arguments!r}, {out!r})"
        done = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        records = json.loads(Path(out).read_text())
    starts = [number for number, record in enumerate(records) if record["phase"] == "rollout"]
    table: dict[str, list[dict[str, float]]] = {}
    for begin, end in itertools.pairwise(starts[1:]):
        spent: dict[str, dict[str, float]] = {}
        for record in records[begin:end]:
            row = spent.setdefault(record["phase"], {"wall": 0.0, "process": 0.0})
            row["wall"], row["process"] = row["wall"] + record["wall"], row["process"] + record["process"]
        whole = {
            "wall": records[end]["at"] - records[begin]["at"],
            "process": records[end]["process at"] - records[begin]["process at"],
        }
        played = records[begin]
        evaluation = spent.pop("evaluation", None)
        if evaluation is not None:
            table.setdefault("evaluation, where there is one", []).append(evaluation)
        rest = {kind: whole[kind] - sum(row[kind] for row in [*spent.values(), evaluation or {kind: 0.0}]) for kind in whole}
        rows = {
            "rollout": spent.pop("rollout"),
            "  generation": {"wall": played["generation wall"], "process": played["generation"]},
            "  environments' resets, beside": {"process": played["reset"], "calls": played["reset calls"]},
            "  environments' steps, beside": {"process": played["step"], "calls": played["step calls"]},
            **spent,
            "rest": rest,
            "whole, without evaluation": {kind: whole[kind] - (evaluation or {kind: 0.0})[kind] for kind in whole},
        }
        for name, row in rows.items():
            table.setdefault(name, []).append(row)
    return {name: {kind: statistics.median(row[kind] for row in rows) for kind in rows[0]} for name, rows in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=21)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "iteration.json")
    args, extra = parser.parse_known_args()

    import torch
    import transformers

    report: dict[str, Any] = {
        "command": "python benchmarks/iteration.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__} (1 thread), "
        f"transformers {transformers.__version__}",
    }
    checkouts = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    for label, checkout in checkouts.items():
        report[label] = measured(checkout, [f"--trainer.max_epochs={args.iterations}", *extra])
        print(f"{label}\n{'seconds, median':<34}{'wall':>8}{'process':>9}{'calls':>7}")
        for name, row in report[label].items():
            wall = f"{row['wall']:.3f}" if "wall" in row else ""
            print(f"{name:<34}{wall:>8}{row['process']:>9.3f}{row.get('calls', ''):>7}")
        args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
