"""What playing ahead is worth, and that nothing is lost or learned twice, whoever is killed when.

    pip install -c constraints.txt -e .
    python benchmarks/asynchronous.py                  # some minutes on two idle cores
    python benchmarks/asynchronous.py --kills 20       # some more

Speed: an environment waits at each step, so long that a rollout takes about 0.5, 1 and 2 times the update. Seconds of an
iteration, medians: synchronous with one and two threads, and with a producer of one thread that plays ahead by one
iteration, the learner with one and two. ``possible`` is (R + U) / max(R, U) times the iterations per hour of the faster
synchronous run, R and U being rollout and update of the one with one thread: two threads use both cores already.
Whatever the policy says is a way to go, and it hardly learns, so that all runs do the same work.

Kills: at random moments the learner, which goes on with ``--ckpt_path last``, or one of two producers is killed. Compared:
what was in the pool before each kill is there in the end; each iteration has learned from the groups of its plan, each once;
none was played with older weights than allowed; and a run that learns from the record, killed by nobody, has the same
weights, bit for bit.

Writes ``benchmarks/results/asynchronous.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from steppo.envs.base import TextGameEnv
from steppo.rendering import CommandParser, ParsedAction
from steppo.types import Action, Task, Turn

ROOT = Path(__file__).parent.parent
STEPS = 8
EPISODES = 32  # of an iteration that is timed
WAYS = ("north", "south")
OPTIONS = [
    "--config=configs/quickstart.yaml",
    "--data.source.env=asynchronous.WaitingEnv",
    "--data.source.parser=asynchronous.AnyWay",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--transcripts.num_shown=0",
    "--warm_start.updates=0",
]


class WaitingEnv(TextGameEnv):
    """Ways that lead nowhere. Each answer takes its time.

    Args:
        wait_ms: How long.
    """

    max_steps = STEPS

    def __init__(self, wait_ms: float = 0.0) -> None:
        self.wait_ms = wait_ms

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{number}") for number in range(1000)]

    def reset(self, task: Task) -> Turn:
        self._steps = 0
        return self._turn("the start", 0.0)

    def command(self, command: str) -> Turn:
        self._steps += 1
        return self._turn(command, float(command == WAYS[0]))

    def _turn(self, text: str, reward: float) -> Turn:
        time.sleep(self.wait_ms / 1000)
        seen = f"You came from {text}. " + "A door, a lamp and a chest are here. " * 2
        return Turn(seen, "Find the coin.", WAYS, reward=reward, terminated=self._steps == STEPS)


class AnyWay(CommandParser):
    """Any answer goes somewhere: a policy that has learned nothing plays, too."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        return ParsedAction(Action(text if text in WAYS else WAYS[len(text) % 2]))


class Clock(Callback):
    """Writes when iterations began and how long they had no episodes.

    Args:
        path: Where.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.starts: list[float] = []
        self.rollouts: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rollouts.append(pl_module.latest["seconds/rollout"])

    def on_train_end(self, *args: Any) -> None:
        Path(self.path).write_text(json.dumps({"starts": self.starts, "rollouts": self.rollouts}))


def command(folder: Path, *args: str) -> list[str]:
    place = [f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run", "--trainer.logger.version=0"]
    return [sys.executable, "train.py", "fit", *OPTIONS, *place, *args]


def surroundings() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def run(folder: Path, *args: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command(folder, *args), cwd=ROOT, env=surroundings(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


# ---- speed ----


def measure(folder: Path, iterations: int, wait_ms: float, threads: int, *args: str) -> dict[str, float]:
    """Seconds of an iteration, the median without the first two."""
    clock = folder / "clock.json"
    counted = [f"--trainer.max_epochs={iterations}", f"--num_threads={threads}", f"--data.source.env.wait_ms={wait_ms}"]
    counted += [f"--rollout.episodes_per_iteration={EPISODES}"]
    counted += ["--data.update_epochs=4", "--model.policy_optimizer.lr=1e-9", "--model.critic_optimizer.lr=1e-9"]
    clocked = ["--trainer.callbacks=asynchronous.Clock", f"--trainer.callbacks.path={clock}"]
    run(folder, *counted, *clocked, *args)
    found = json.loads(clock.read_text())
    starts = found["starts"]
    whole = statistics.median(after - before for before, after in itertools.pairwise(starts[2:]))
    waited = statistics.median(found["rollouts"][2:])
    return {"seconds": whole, "rollout": waited, "update": whole - waited}


def speeds(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    def measured(name: str, wait_ms: float, threads: int, *more: str) -> dict[str, float]:
        return measure(folder / name, args.iterations, wait_ms, threads, *more)

    quick, slow = (measured(f"waits-{wait_ms}", wait_ms, 1) for wait_ms in (0.0, 5.0))
    per_ms = (slow["rollout"] - quick["rollout"]) / 5.0
    ahead = ["--data.asynchronous.max_staleness=1", "--data.asynchronous.num_threads=1"]
    rows = []
    for ratio in args.ratios:
        wait_ms = max(0.0, (ratio * quick["update"] - quick["rollout"]) / per_ms)
        ways = {
            f"{kind}, {threads} thread{'s'[: threads - 1]}": measured(f"{ratio}-{kind}-{threads}", wait_ms, threads, *more)
            for kind, more in (("synchronous", []), ("asynchronous", ahead))
            for threads in (1, 2)
        }
        best = {
            kind: min(way["seconds"] for name, way in ways.items() if name.startswith(kind))
            for kind in ("synchronous", "asynchronous")
        }
        one = ways["synchronous, 1 thread"]
        possible = best["synchronous"] * max(one["rollout"], one["update"]) / one["seconds"]
        rows.append(
            {"ratio": ratio, "wait_ms": wait_ms, "ways": ways, "rollout_over_update": one["rollout"] / one["update"]}
        )
        rows[-1] |= {"possible_seconds": possible, "share_of_possible": possible / best["asynchronous"]}
        rows[-1]["over_synchronous"] = best["synchronous"] / best["asynchronous"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    from measuring import markdown

    heads = [
        "rollout / update",
        "way",
        "rollout s",
        "update s",
        "iterations/h",
        "over the best synchronous",
        "of the possible",
    ]
    lines = []
    for row in rows:
        best = min(way["seconds"] for name, way in row["ways"].items() if name.startswith("synchronous"))
        for name, way in row["ways"].items():
            ahead = name.startswith("asynchronous")
            lines.append(
                [
                    f"{row['rollout_over_update']:.2f}",
                    name,
                    f"{way['rollout']:.2f}" + (" (waited)" if ahead else ""),
                    f"{way['update']:.2f}",
                    f"{3600 / way['seconds']:.0f}",
                    f"{best / way['seconds']:.2f} x",
                    f"{row['possible_seconds'] / way['seconds']:.0%}" if ahead else "",
                ]
            )
    return markdown(heads, lines)


# ---- kills ----


def producers_of(learner: int) -> list[int]:
    """Those of its children that hold a model."""
    import psutil

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(learner).children():
            with suppress(psutil.Error):
                if child.memory_info().rss > 150 * 2**20:
                    found.append(child.pid)
    return found


def there(pool: Path) -> dict[str, tuple[Any, ...]]:
    """What is known of each group that must not change but for being learned."""
    from steppo.errors import SteppoError
    from steppo.pool import DataPool

    with suppress(SteppoError), closing(DataPool(pool, create=False)) as data:
        return {info.name: info[:7] for info in data.groups()}
    return {}


def kills(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng = random.Random(args.seed)
    settings = {"max_staleness": args.staleness, "num_producers": 2, "keep": 10**6}
    size = ["--rollout.episodes_per_iteration=16", "--data.num_minibatches=2", "--data.source.num_workers=1"]
    options = [*size, f"--trainer.max_epochs={args.kill_iterations}", "--data.source.env.wait_ms=2"]
    ahead = [f"--data.asynchronous.{name}={value}" for name, value in settings.items()]
    pool, log = folder / "run" / "version_0" / "pool.sqlite", folder / "log.txt"
    folder.mkdir()
    done: list[dict[str, Any]] = []
    lost: set[str] = set()
    resume: list[str] = []
    while True:
        with open(log, "a") as file:
            line = command(folder, *options, *ahead, *resume)
            learner = subprocess.Popen(line, cwd=ROOT, env=surroundings(), stdout=file, stderr=file)
        while learner.poll() is None and len(done) < args.kills:
            before, since = there(pool), time.monotonic()
            while learner.poll() is None and there(pool) == before and time.monotonic() - since < 120:
                time.sleep(0.2)  # until it goes on: a run that never does is no test
            time.sleep(rng.uniform(0.0, 3.0))
            held, targets = there(pool), producers_of(learner.pid)
            if learner.poll() is not None or not targets:
                continue
            whom = rng.choice(("learner", "producer"))
            with suppress(ProcessLookupError):
                os.kill(learner.pid if whom == "learner" else rng.choice(targets), 9)
            done.append({"whom": whom, "groups": len(held)})
            print(f"kill {len(done)}: {whom}, {len(held)} groups in the pool", flush=True)
            if whom == "learner":
                learner.wait()
            now = there(pool)
            lost |= {name for name, known in held.items() if now.get(name) != known}
        if learner.wait() == 0:
            break
        if learner.returncode != -9:
            raise SystemExit(log.read_text()[-3000:])
        resume = ["--ckpt_path=last"]
    return {"kills": done, "lost_groups": len(lost), **checks(folder, [*options, ahead[0]], args)}


def checks(folder: Path, options: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What was learned by the run in this folder, and whether its record gives the same weights, without those who play."""
    import torch

    from steppo.checkpoints import iteration_checkpoints
    from steppo.pool import DataPool

    pool = folder / "run" / "version_0" / "pool.sqlite"
    run(folder / "again", *options, f"--data.asynchronous.replay={pool}")
    ends = [iteration_checkpoints(place / "run" / "version_0" / "checkpoints")[-1] for place in (folder, folder / "again")]
    killed, again = (torch.load(path, weights_only=True) for path in ends)
    per_iteration = killed["steppo"]["counters"]["updates"] / args.kill_iterations
    with closing(DataPool(pool)) as data:
        infos = data.groups()
        plan = {(number, f"train/{number}/{group}") for number in range(args.kill_iterations) for group in range(16)}
        learned = [(info.iteration, info.name) for info in infos if info.iteration is not None]
        ages = [int(info.name.split("/")[1]) - (info.oldest_version or 0) / per_iteration for info in infos]
    return {
        "iterations": args.kill_iterations,
        "episodes": sum(info.episodes for info in infos),
        "learned_as_planned": sorted(learned) == sorted(plan),
        "largest_staleness": max(ages),
        "max_staleness": args.staleness,
        "same_weights_as_the_record": killed["state_dict"].keys() == again["state_dict"].keys()
        and all(torch.equal(weight, again["state_dict"][name]) for name, weight in killed["state_dict"].items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10, help="of each timed run")
    parser.add_argument(
        "--ratios", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="rollout over update; none: no timing"
    )
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kill-iterations", type=int, default=60, help="of the run that is killed")
    parser.add_argument("--staleness", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "asynchronous.json")
    args = parser.parse_args()

    from measuring import about

    report = json.loads(args.results.read_text()) if args.results.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        if args.ratios:
            report["speed"] = {**about(), "iterations": args.iterations, "rows": speeds(args, Path(name))}
            print(table(report["speed"]["rows"]))
        if args.kills:
            report["kills"] = {**about(), **kills(args, Path(name) / "kills")}
            print(json.dumps({key: value for key, value in report["kills"].items() if key != "kills"}, indent=1))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
