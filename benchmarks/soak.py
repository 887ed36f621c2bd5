"""Thousands of episodes, some of which hang or raise: what is left of them, and of a run that is killed.

    pip install -c constraints.txt -e .
    python benchmarks/soak.py

One of a hundred tasks starts children of four kinds (a program, multiprocessing, a session of its own, a daemon whose parent
is gone) and hangs in its second step; five of a hundred raise. A script plays them all through EnvSource and its workers.
Processes, open files, threads and memory after the first 100 episodes are compared with those at the end. Then ``train.py
fit`` runs on environments with such children: to its end, and killed by ``kill -9`` while they hang, in Python or with the
interpreter's lock held. Writes ``benchmarks/results/soak.json`` and fails if something grew or is left. Takes minutes.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from steppo.rollouts import EnvSource
    from steppo.types import Request, Turn

# Workers import this file too. What they do not need, such as torch, is imported where it is used.

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the environment is one of the tests'
KINDS = ["subprocess", "multiprocessing", "session", "daemon"]
FIRST = 100  # episodes of an iteration; there is a look after each
SLACK_MIB = 8  # in which memory may differ: that of an allocator, not of two thousand episodes
WORKERS = 2


def walk(turn: Turn, request: Request) -> str:
    """Any way but the end, so that each episode reaches its second step."""
    ways = [command for command in turn.commands or () if command != "take"]
    return ways[request.seed % len(ways)]


def held(source: EnvSource) -> dict[str, float]:
    """What the main process and its workers hold between episodes."""
    gc.collect()
    main = psutil.Process()
    workers = [psutil.Process(process.process.pid) for process in source.pool._processes]
    return {
        "processes": len([child for child in main.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]),
        "open_files": main.num_fds(),
        "threads": main.num_threads(),
        "mib": round(main.memory_info().rss / 2**20, 1),
        "worker_open_files": max(worker.num_fds() for worker in workers),
        "worker_threads": max(worker.num_threads() for worker in workers),
        "worker_mib": round(max(worker.memory_info().rss for worker in workers) / 2**20, 1),
    }


def grown(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """Names of what there is more of."""
    return [name for name, value in last.items() if value > first[name] + (SLACK_MIB if name.endswith("mib") else 0)]


def play(episodes: int, folder: Path) -> dict[str, Any]:
    """All episodes, and what was held after the first and the last."""
    from rich.progress import track

    from steppo.engines import HFEngine
    from steppo.models import TinyPolicy
    from steppo.rendering import StateContext
    from steppo.rollouts import EnvSource, ScriptedPlayer
    from steppo.types import RolloutConfig, StopReason, groups_of
    from tests.family_env import FamilyEnv

    names = [task.id for task in FamilyEnv(str(folder), num_tasks=episodes).tasks("train")]
    env = FamilyEnv(str(folder), KINDS, tasks_with=names[50::100], fail_tasks=names[7::20], num_tasks=episodes)
    policy = TinyPolicy()
    policy.build(list)
    sizes = {"num_slots": 16, "num_workers": WORKERS, "max_prompt_tokens": 2**20}
    source = EnvSource(env, StateContext(), HFEngine(), env_timeout=3.0, **sizes)
    source.bind_tokenizer(policy.tokenizer, policy.stop_ids)
    player = ScriptedPlayer(walk, source.write)
    start, healthy, broken = time.monotonic(), 0, 0
    looks = []
    tasks = env.tasks("train")
    for first in track(range(0, episodes, FIRST), "episodes"):
        groups = groups_of(tasks[first : first + FIRST])
        for (episode,) in source.collect(groups, RolloutConfig(f"train/{first}", 0, 1.0), player):
            broken += episode.stop_reason == StopReason.ENV_ERROR
            healthy += episode.stop_reason == StopReason.TERMINATED
        looks.append(held(source))
    counts = dict(source.counts())
    source.close()
    return {
        "episodes": episodes,
        "workers": WORKERS,
        "seconds": round(time.monotonic() - start, 1),
        "ended_as_they_should": healthy,
        "failed": broken,
        **counts,
        "children_started": len([path for path in folder.iterdir() if path.name.isdecimal()]),
        f"after_{FIRST}": looks[0],
        "at_the_end": looks[-1],
        "mib": [look["mib"] for look in looks],
        "grown": grown(looks[0], looks[-1]),
        "left": alive(folder) + [child.name() for child in psutil.Process().children(recursive=True) if not tracks(child)],
    }


def tracks(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's resource tracker, of which each program has one until it ends."""
    return "resource_tracker" in " ".join(process.cmdline())


def alive(folder: Path) -> list[str]:
    """What is alive of the children in ``folder``, and of the processes that know of it."""
    found = []
    numbers = {path.name for path in folder.iterdir()}
    for process in psutil.process_iter():
        try:
            known = str(process.pid) in numbers or process.environ().get("SOAK") == str(folder)
            if known and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[-60:])
        except psutil.Error:
            continue
    return found


def fit(then: str, killed: bool, folder: Path) -> dict[str, Any]:
    """A training run of the command line, and what is left of it."""
    settings = {
        "trainer.logger.init_args.save_dir": folder,
        "warm_start.updates": 0,
        "data.source.env": "tests.family_env.FamilyEnv",
        "data.source.env.folder": folder,
        "data.source.env.kinds": f"[{','.join(KINDS)}]",
        "data.source.env.then": then,
    }
    command = [sys.executable, "train.py", "fit", "--config=tests/toy.yaml"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    variables = {**os.environ, "SOAK": str(folder), "PYTHONPATH": str(ROOT)}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
        if killed:
            while not (folder / "second").exists() and process.poll() is None:
                time.sleep(0.1)
            before = len(alive(folder))
            process.kill()
        status = process.wait()
    start = time.monotonic()
    while (left := alive(folder)) and time.monotonic() - start < 10:
        time.sleep(0.05)
    result: dict[str, Any] = {"environment": then, "killed": killed, "status": status}
    if killed:
        result |= {"alive_before": before, "seconds_until_none": round(time.monotonic() - start, 2)}
    if not killed and status:
        result["log"] = (folder / "log.txt").read_text()[-2000:]
    started = len([path for path in folder.iterdir() if path.name.isdecimal()])
    return result | {"children_started": started, "left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        episodes = play(args.episodes, Path(name))
    runs = []
    for then, killed in (("go on", False), ("sleep", True), ("lock", True)):
        with tempfile.TemporaryDirectory() as name:
            runs.append(fit(then, killed, Path(name)))
        print(runs[-1], flush=True)
    report = {
        "command": " ".join(["python benchmarks/soak.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "python": platform.python_version(),
        "seed": 0,
        "slack_mib": SLACK_MIB,
        "episodes": episodes,
        "runs": runs,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'':20}{f'after {FIRST}':>12}{'at the end':>12}")
    for name, value in episodes["at_the_end"].items():
        print(f"{name:20}{episodes[f'after_{FIRST}'][name]:12}{value:12}")
    wanted = len(range(50, args.episodes, 100)) + len(range(7, args.episodes, 20))
    faults = [f"more {name}" for name in episodes["grown"]]
    faults += [f"{episodes['failed']} episodes failed, not {wanted}"] * (episodes["failed"] != wanted)
    faults += [f"alive: {left}" for part in (episodes, *runs) for left in part["left"]]
    faults += [f"exit status {run['status']}" for run in runs if run["status"] != (-9 if run["killed"] else 0)]
    if faults:
        raise SystemExit("\n".join(faults))
    print("nothing grew, nothing is left")


if __name__ == "__main__":
    main()
