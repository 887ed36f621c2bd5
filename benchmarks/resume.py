"""Kill -9 at random moments, continue, and compare with a run that nothing stopped, bit for bit.

    pip install -c constraints.txt -e .
    python benchmarks/resume.py --seed 0 --kills 8

One run plays through and counts the events of each phase (see ``tests/kill.py``). Each case then draws an event, kills a
run of its own there, continues it with ``--ckpt_path last``, kills that at another event, and continues once more. Compared
are all that the last checkpoint holds (weights, optimizer, schedule, counters, generators) but seconds, and
``evaluation.jsonl`` but seconds. As root, a last case runs on a disk that is too small. Writes
``benchmarks/results/resume.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from steppo.checkpoints import iteration_checkpoints

ROOT = Path(__file__).parent.parent
PHASES = ("start", "rollout", "update", "evaluation", "checkpoint")
COMMAND = [
    *("train.py", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_epochs=4"),
    *("--trainer.check_val_every_n_epoch=2", "--rollout.episodes_per_iteration=16", "--data.eval_tasks=16"),
    *("--data.source.env.num_train=32", "--data.source.env.num_valid=16", "--warm_start.updates=60"),
]


def run(folder: Path, cache: Path, log: Path, *args: str) -> tuple[int, int]:
    """One process of the command: its exit status, and how many processes it left behind."""
    where = [f"--trainer.logger.init_args.save_dir={folder}", *args]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *COMMAND, *where], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        status = process.wait()
    for _ in range(30):  # seconds: they notice that nobody talks to them any more
        if not (left := session(process.pid)):
            break
        time.sleep(1)
    return status, left


def session(leader: int) -> int:
    """Living processes of a session."""
    count = 0
    for pid in psutil.pids():
        try:
            count += os.getsid(pid) == leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return count


def kill_at(phase: str, event: int, counts: Path | None = None) -> list[str]:
    settings = {"phase": phase, "event": event} | ({"counts": counts} if counts else {})
    return [
        "--trainer.callbacks+=tests.kill.KillAt",
        *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items()),
    ]


def newest(folder: Path) -> Path | None:
    return next(reversed(iteration_checkpoints(folder / "quickstart" / "version_0" / "checkpoints")), None)


def state(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds but seconds and paths."""
    path = newest(folder)
    if path is None:
        return {}
    held = torch.load(path, weights_only=True)
    del held["steppo"]["seconds"], held["loops"], held["callbacks"]
    return held


def equal(left: Any, right: Any) -> bool:
    """Bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for path in folder.rglob("evaluation.jsonl") for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def case(first: tuple[str, int], second: tuple[str, int], whole: Path, cache: Path) -> dict[str, Any]:
    """A run killed twice and continued twice, compared with the whole one."""
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log.txt"
        result: dict[str, Any] = {"kills": [], "processes_left": 0}
        for number, (phase, event) in enumerate((first, second)):
            resume = ["--ckpt_path=last"] if number else []
            status, left = run(folder, cache, log, *kill_at(phase, event), *resume)
            path = newest(folder)
            result["kills"].append({"phase": phase, "event": event, "status": status, "newest": path.name if path else None})
            result["processes_left"] += left
        status, left = run(folder, cache, log, "--ckpt_path=last")
        result["processes_left"] += left
        result["status"] = status
        if status:
            result["log"] = log.read_text()[-2000:]
        result["same_state"] = equal(state(folder), state(whole))
        result["same_evaluations"] = evaluations(folder) == evaluations(whole)
        result["run_folders"] = len(list((folder / "quickstart").glob("version_*")))
    return result


def full_disk(whole: Path, cache: Path) -> dict[str, Any]:
    """A run on a disk with room for one checkpoint and a bit, continued where there is more."""
    path = newest(whole)
    assert path is not None
    size = int(path.stat().st_size * 2.2)
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "disk", Path(name) / "log.txt"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        try:
            status, left = run(folder, cache, log)
            error = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
            traceback = "Traceback" in log.read_text()
            kept = newest(folder)
            subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
            again, _ = run(folder, cache, log, "--ckpt_path=last")
            return {
                "status": status,
                "error": [line.replace(str(folder), "DISK") for line in error],
                "traceback": traceback,
                "processes_left": left,
                "kept": kept.name if kept else None,
                "continued": again == 0,
                "same_state": equal(state(folder), state(whole)),
                "same_evaluations": evaluations(folder) == evaluations(whole),
            }
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=8, help="cases, each of two kills; the phases take turns")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "resume.json")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, cache, counts = Path(name) / "whole", Path(name) / "cache", Path(name) / "counts.txt"
        whole.mkdir()
        status, _ = run(whole, cache, whole / "log.txt", *kill_at("update", 0, counts))
        if status:
            raise SystemExit((whole / "log.txt").read_text()[-2000:])
        events = {phase: int(count) for phase, count in (line.split() for line in counts.read_text().splitlines())}
        report: dict[str, Any] = {
            "command": "python benchmarks/resume.py " + " ".join(sys.argv[1:]),
            "run": " ".join(["python", *COMMAND]),
            "seed": args.seed,
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
            "torch": torch.__version__,
            "events": events,
            "cases": [],
        }
        print(f"events: {events}", flush=True)
        for number in range(args.kills):
            phase, then = PHASES[number % len(PHASES)], rng.choice(PHASES)
            # the second kill counts from the resumed run's start: early enough for there to be one
            first, second = (phase, rng.randint(1, events[phase])), (then, rng.randint(1, max(1, events[then] // 4)))
            result = case(first, second, whole, cache)
            report["cases"].append(result)
            kills = "  ".join(
                f"{k['phase']:<10} {k['event']:>5} of {events[k['phase']]:<5} {k['status']:>3}" for k in result["kills"]
            )
            same = f"state {result['same_state']}, evaluations {result['same_evaluations']}"
            print(f"{kills}  {same}, {result['processes_left']} processes left", flush=True)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(report, indent=1) + "\n")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            report["full_disk"] = full_disk(whole, cache)
            print(f"full disk: {report['full_disk']}")
            args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
