"""Three producers and a learner on one data pool, killed again and again: what is lost, torn or learned twice.

    pip install -c constraints.txt -e .
    python benchmarks/pool.py --seconds 60 --kills 40

Each producer writes groups of 4 episodes and notes those that ``put`` took. The learner claims 16 groups an iteration,
compares each episode with what was written, notes the names, writes a checkpoint, and tells the pool. At random moments one
of the four is killed by ``kill -9``, and started again: a producer after its last note, the learner at its checkpoint. At
the end each group that a producer noted must be learned once or wait in the pool. Before, one process writes and reads by
itself. Writes ``benchmarks/results/pool.json`` and prints a table; fails if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from steppo.pool import DataPool
from steppo.pool.records import encode
from steppo.types import Episode, Step, StopReason

ROOT = Path(__file__).parent.parent
GROUP, STEPS, PROMPT = 4, 12, 400
PER_ITERATION, WAITING, KEEP = 16, 64, 64
IDS = np.random.default_rng(0).integers(0, 50_000, 2**20, dtype=np.int32)
LOGPROBS = np.random.default_rng(1).standard_normal(2**20).astype(np.float32)
fork = multiprocessing.get_context("fork")  # a killed process starts again at once


def group(name: str) -> list[Episode]:
    """The same for the same name; some 22 KB an episode."""
    rng = random.Random(name)
    episodes = []
    for sample in range(GROUP):
        steps = []
        for index in range(STEPS):
            at, length = rng.randrange(2**20 - 1000), rng.randrange(PROMPT // 2, PROMPT * 3 // 2)
            arrays = IDS[at : at + length], IDS[at + length : at + length + 8], LOGPROBS[at : at + 8]
            seen = f"You are in room {at}. " * 5
            last = index == STEPS - 1
            steps.append(Step(*arrays, rng.random(), index, "stop", last, False, True, seen, "go north", 1.0, 0))
        reason, solved = StopReason.TERMINATED, rng.random() < 0.5
        episodes.append(Episode(f"{name}/{sample}", sample, 0, name, tuple(steps), reason, success=solved))
    return episodes


def size(folder: Path) -> dict[str, int]:
    """Bytes of the pool's file and of its log of changes."""
    found = {"file": folder / "pool.sqlite", "log": folder / "pool.sqlite-wal"}
    return {name: path.stat().st_size if path.exists() else 0 for name, path in found.items()}


def opened(folder: Path) -> DataPool:
    return DataPool(folder / "pool.sqlite", max_waiting=WAITING, keep=KEEP)


def produce(folder: Path, number: int) -> None:
    """Until there is a file ``stop``."""
    pool, notes = opened(folder), folder / f"producer-{number}"
    done = notes.read_text().splitlines() if notes.exists() else []
    with open(notes, "ab", buffering=0) as file:
        place = len(done)
        while not (folder / "stop").exists():
            name = f"{number}/{place}"
            added = pool.put(name, group(name))
            file.write(b"%s %d\n" % (name.encode(), added))  # one write: a line is there or not
            place += 1
    pool.close()


def learn(folder: Path) -> None:
    """Until there is nothing to claim and a file ``stop``."""
    pool, log, checkpoint = opened(folder), folder / "learned", folder / "checkpoint"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"iterations": 0, "bytes": 0}
    with open(log, "ab", buffering=0) as file, open(folder / "served", "ab", buffering=0) as served:
        file.truncate(state["bytes"])
        while (groups := pool.claim(state["iterations"], PER_ITERATION, timeout=0.2)) or not (folder / "stop").exists():
            if not groups:
                continue
            names = [episodes[0].task_id for episodes in groups]
            served.write(f"{state['iterations']} {' '.join(names)}\n".encode())
            wrong = [name for name, episodes in zip(names, groups, strict=True) if not intact(name, episodes)]
            if wrong:
                (folder / "torn").write_text(" ".join(wrong))
            file.write("".join(f"{name}\n" for name in names).encode())
            state = {"iterations": state["iterations"] + 1, "bytes": os.fstat(file.fileno()).st_size}
            os.fsync(file.fileno())
            with open(folder / "part", "w") as part:
                part.write(json.dumps(state))
                part.flush()
                os.fsync(part.fileno())
            os.replace(folder / "part", checkpoint)
            pool.learned(state["iterations"])
    pool.close()


def intact(name: str, episodes: list[Episode]) -> bool:
    return [encode(episode) for episode in episodes] == [encode(episode) for episode in group(name)]


def killed(folder: Path, seconds: float, kills: int, seed: int) -> dict[str, Any]:
    """The minute, and what is there after it."""
    rng = random.Random(seed)
    jobs = {f"producer-{number}": (produce, (folder, number)) for number in range(3)} | {"learner": (learn, (folder,))}
    running = {name: fork.Process(target=job, args=args) for name, (job, args) in jobs.items()}
    for process in running.values():
        process.start()
    start, victims, sizes = time.monotonic(), Counter[str](), []
    for moment in [*sorted(rng.uniform(0, seconds) for _ in range(kills)), seconds]:
        while (now := time.monotonic() - start) < moment:
            time.sleep(min(0.1, moment - now))
            sizes.append(size(folder))
        if moment < seconds:
            name = rng.choice(list(jobs))
            running[name].kill()
            running[name].join()
            victims[name] += running[name].exitcode == -9
            job, args = jobs[name]
            running[name] = fork.Process(target=job, args=args)
            running[name].start()
    (folder / "stop").touch()
    for process in running.values():
        process.join()
    notes = [line.split() for n in range(3) for line in (folder / f"producer-{n}").read_text().splitlines()]
    spent = time.monotonic() - start
    learned = Counter((folder / "learned").read_text().split())
    servings = defaultdict(list)
    for line in (folder / "served").read_text().splitlines():
        iteration, *names = line.split()
        servings[iteration].append(names)
    pool = opened(folder)
    waiting = {info.name: pool.read(info.number) for info in pool.groups("waiting")}
    torn = [name for name, episodes in waiting.items() if not intact(name, episodes)]
    torn += (folder / "torn").read_text().split() if (folder / "torn").exists() else []
    claimed = pool.groups("claimed")
    with sqlite3.connect(pool.path) as db:
        check = db.execute("PRAGMA integrity_check").fetchone()[0]
    return {
        "seconds": round(spent, 1),
        "kills": sum(victims.values()),
        "of": dict(sorted(victims.items())),
        "exit_codes": [process.exitcode for process in running.values()],
        "groups_noted": len(notes),
        "put_again_and_not_added": sum(added == "0" for _, added in notes),
        "iterations": len(servings),
        "iterations_served_again": sum(len(times) > 1 for times in servings.values()),
        "served_otherwise": sum(any(names != times[0] for names in times) for times in servings.values()),
        "learned": sum(learned.values()),
        "waiting": len(waiting),
        "lost": len({name for name, _ in notes} - learned.keys() - waiting.keys()),
        "torn": len(torn),
        "learned_twice": sum(count > 1 for count in learned.values()) + len(learned.keys() & waiting.keys()),
        "claimed_and_not_learned": len(claimed),
        "episodes_written_per_second": round(GROUP * len(notes) / spent, 1),
        "episodes_read_per_second": round(GROUP * sum(learned.values()) / spent, 1),
        "integrity": check,
        "largest_file_mib": round(max(now["file"] for now in sizes) / 2**20, 1),
        "largest_log_mib": round(max(now["log"] for now in sizes) / 2**20, 1),
        "file_mib_each_tenth": [round(now["file"] / 2**20, 1) for now in sizes[:: max(1, len(sizes) // 10)]],
        "written_mib": round(sum(len(text) + len(data) for text, data in map(encode, group("0/0"))) * len(notes) / 2**20, 1),
    }


def alone(folder: Path, groups: int) -> dict[str, float]:
    """Episodes a second of one process, by the clock and by its own time; making them does not count."""
    pool = DataPool(folder / "alone.sqlite", max_waiting=groups)
    made = {str(number): group(str(number)) for number in range(groups)}
    episodes, figures = groups * GROUP, {}

    def note(name: str, wall: float, process: float) -> None:
        figures[f"{name}_per_second"] = round(episodes / (time.monotonic() - wall))
        figures[f"{name}_per_process_second"] = round(episodes / (time.process_time() - process))

    wall, process = time.monotonic(), time.process_time()
    for name, one in made.items():
        pool.put(name, one)
    note("written", wall, process)
    wall, process = time.monotonic(), time.process_time()
    assert len(pool.claim(0, groups) or []) == groups
    note("read", wall, process)
    pool.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--groups", type=int, default=250, help="That one process writes and reads alone.")
    parser.add_argument("--seed", type=int, default=0, help="Of who is killed when.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "pool.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rates = alone(Path(name), args.groups)
        report = killed(Path(name), args.seconds, args.kills, args.seed)
    from measuring import about  # after the processes are forked: it imports torch

    sizes = {"episodes_in_a_group": GROUP, "groups_per_iteration": PER_ITERATION, "max_waiting": WAITING, "keep": KEEP}
    told = {
        **about(),
        "sqlite": sqlite3.sqlite_version,
        "load_average": os.getloadavg()[0],
        "seed": args.seed,
        **sizes,
        "alone": rates,
        "killed": report,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(told, indent=1) + "\n")
    for key, value in {**rates, **report}.items():
        print(f"{key:32} {value}")
    faults = ("served_otherwise", "lost", "torn", "learned_twice", "claimed_and_not_learned")
    if any(report[fault] for fault in faults) or report["integrity"] != "ok" or any(report["exit_codes"]):
        raise SystemExit("something is wrong")


if __name__ == "__main__":
    main()
