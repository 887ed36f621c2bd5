"""Producers as Ray's actors, on a cluster of two nodes on this machine: what they play, what a lost node costs, how fast.

    pip install -c constraints.txt -e ".[ray]"
    python benchmarks/ray_fleet.py --episodes --fit --kills 20   # some minutes on two idle cores
    python benchmarks/ray_fleet.py --speed                       # as many
    python benchmarks/ray_fleet.py --weights                     # as many, and 12 GiB of memory

``--episodes``: an iteration in float64, by ``EnvSource`` and by four actors on two nodes, also where the second node is
killed in the midst of it and brought back: the episodes are compared byte by byte, as a pool stores them.

``--speed``: steps per second of 1, 2, 4 and 8 actors of one slot each, of an environment that waits 50 ms at each step and
of one that computes 20 ms. The policy is tiny. Actors have played before the clock starts.

``--fit``: three iterations by the command line, which joins the cluster by ``RAY_ADDRESS``.

``--kills``: an asynchronous run with two actors. At random moments one of them is killed, or the second node, which comes
back. Compared is what ``benchmarks/asynchronous.py --kills`` compares.

``--weights``: from the learner to 1, 2 and 4 actors, until each has copied all of them: seconds, median; bytes through the
loopback device, bytes written by the learner and read by the actors. By Ray's object store and by a folder on disk. Tensors
have the shapes of SmolLM2-135M in float32 and of Qwen2.5-1.5B in bfloat16, and random values.

Writes ``benchmarks/results/ray_fleet.json`` and prints tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import asynchronous
import psutil

from steppo.types import Episode, Group, RolloutConfig, Turn, groups_of

ACTORS = (1, 2, 4, 8)
MODELS = {
    "SmolLM2-135M, float32": ("float32", 49152, 576, 30, 1536, 192),
    "Qwen2.5-1.5B, bfloat16": ("bfloat16", 151936, 1536, 28, 8960, 256),
}


class BusyEnv(asynchronous.WaitingEnv):
    """Computes where the other waits."""

    def _turn(self, text: str, reward: float) -> Turn:
        until = time.process_time() + self.wait_ms / 1000
        while time.process_time() < until:
            pass
        waited, self.wait_ms = self.wait_ms, 0.0
        turn = super()._turn(text, reward)
        self.wait_ms = waited
        return turn


# ---- a cluster ----


class TwoNodes:
    """A head and another node.

    Args:
        cpus: Of each, as Ray counts.
        store: Bytes of each one's object store.
    """

    def __init__(self, cpus: int, store: int = 300 * 2**20) -> None:
        from ray.cluster_utils import Cluster

        self._settings = {"num_cpus": cpus, "object_store_memory": store, "node_ip_address": "127.0.0.1"}
        self._cluster = Cluster(initialize_head=True, head_node_args={**self._settings, "include_dashboard": False})
        self.address = self._cluster.address
        self.begin()

    def begin(self) -> None:
        """Begins the second node."""
        self._second = self._cluster.add_node(**self._settings)

    def kill(self) -> None:
        """Ends the second node, and what runs there."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def joined(cpus: int, store: int = 300 * 2**20) -> Iterator[TwoNodes]:
    """Two nodes, and this process is a learner on the first."""
    import ray

    with closing(TwoNodes(cpus, store)) as nodes:
        ray.init(nodes.address, log_to_driver=False, logging_level="error")
        try:
            yield nodes
        finally:
            ray.shutdown()


def actors() -> list[psutil.Process]:
    """All of Ray's actors here."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "ray::_Actor" in " ".join(process.info["cmdline"] or ())]


# ---- episodes ----


def env_source(env: Any) -> Any:
    from steppo.engines import HFEngine
    from steppo.rendering import StateContext
    from steppo.rollouts import EnvSource

    context = StateContext(instructions="Look for the coin.")
    return EnvSource(
        env, context, HFEngine(), max_prompt_tokens=400, max_new_tokens=4, num_slots=1, parser=asynchronous.AnyWay()
    )


def tiny_policy(dtype: str) -> Any:
    import torch

    from steppo.models import TinyPolicy

    policy = TinyPolicy(hidden_size=32, num_layers=1, num_heads=2, seed=0)
    policy.build(lambda: ["You came from north. A door, a lamp and a chest are here. Find the coin. Look for the coin."])
    return policy.to(getattr(torch, dtype))


class Played:
    """Rounds of groups by ``num_producers`` actors, as the learner has them played.

    Args:
        env: What they play.
        plan: The groups of each iteration.
        pool: The file.
        num_producers: How many.
        dtype: Of the policy.
    """

    def __init__(self, env: Any, plan: Sequence[Sequence[Group]], pool: Path, num_producers: int, dtype: str) -> None:
        from steppo.rollouts import AsyncSettings, AsyncSource, RayFleet

        settings = AsyncSettings(0, num_producers, num_threads=1, pool=str(pool), fleet=RayFleet())
        self.source = AsyncSource(env_source(env), settings)
        self.policy = tiny_policy(dtype)
        self.source.bind(self.policy)
        self.plan = plan
        self.source.plan(lambda n: (plan[n], self.config(n)) if n < len(plan) else None, None)

    @staticmethod
    def config(iteration: int) -> RolloutConfig:
        return RolloutConfig(f"train/{iteration}", seed=0)

    def __call__(self, iteration: int) -> tuple[list[list[Episode]], float]:
        """The groups of an iteration, in order, and seconds."""
        import torch

        start = time.perf_counter()
        with torch.no_grad():
            self.source.publish(iteration, iteration, self.policy.inference_weights())
            groups = list(self.source.collect(self.plan[iteration], self.config(iteration)))
        return sorted(groups, key=lambda group: group[0].order), time.perf_counter() - start

    def close(self) -> None:
        self.source.close()


def stored(groups: Sequence[Sequence[Episode]]) -> list[Any]:
    from steppo.pool.records import encode

    return [encode(episode) for group in groups for episode in group]


def episodes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    env = asynchronous.WaitingEnv(wait_ms=args.wait_ms)
    plan = [groups_of(env.tasks("train")[:size], 2) for size in (4, args.groups)]
    alone, policy = env_source(env), tiny_policy("float64")
    with closing(alone), torch.no_grad():
        alone.bind(policy)
        alone.load_weights(policy.inference_weights(), 1)
        whole = list(alone.collect(plan[1], RolloutConfig("train/1", seed=0, version=1)))
    expected = stored(sorted(whole, key=lambda group: group[0].order))
    report: dict[str, Any] = {"groups": args.groups, "episodes": len(expected)}
    with joined(cpus=2) as nodes:
        for way in ("nothing", "the second node, which comes back"):
            pool = folder / f"{way[:3]}.sqlite"
            # Ray begins nodes in the main thread alone, and a pool belongs to its thread.
            with ThreadPoolExecutor(1) as thread:
                played = thread.submit(Played, env, plan, pool, 4, "float64").result()
                thread.submit(played, 0).result()
                rest = thread.submit(played, 1)
                if way != "nothing":
                    lose(nodes, pool, args.groups // 4)
                found, seconds = rest.result()
                counts = played.source.counts()
                thread.submit(played.close).result()
            same, replaced = stored(found) == expected, counts["restarted_producers"]
            report[way] = {"same_episodes": same, "seconds": seconds, "replaced_actors": replaced, "nodes": alive()}
            print(f"killed: {way}: {report[way]}", flush=True)
    return report


def alive() -> int:
    """Nodes of the cluster, once it has noticed which are gone."""
    import ray

    until = time.monotonic() + 60
    while (count := sum(node["Alive"] for node in ray.nodes())) > 2 and time.monotonic() < until:
        time.sleep(0.5)
    return count


def lose(nodes: TwoNodes, pool: Path, after: int) -> None:
    """Kills the second node once so many groups of the iteration are there, and brings it back."""
    while sum(name.startswith("train/1/") for name in asynchronous.there(pool)) < after:
        time.sleep(0.02)
    nodes.kill()
    nodes.begin()


# ---- speed ----


def speed(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    kinds = {"waits 50 ms": asynchronous.WaitingEnv(wait_ms=50), "computes 20 ms": BusyEnv(wait_ms=20)}
    with joined(cpus=4):
        for (name, env), count in itertools.product(kinds.items(), args.actors):
            tasks = env.tasks("train")
            plan = [groups_of(tasks[: count * size]) for size in (1, args.episodes_each)]
            with closing(Played(env, plan, folder / f"{name}-{count}.sqlite", count, "float32")) as played:
                played(0)
                before = psutil.cpu_times()
                groups, seconds = played(1)
                after = psutil.cpu_times()
            steps = sum(len(episode.steps) for group in groups for episode in group)
            busy = sum(getattr(after, kind) - getattr(before, kind) for kind in ("user", "nice", "system"))
            rows.append({"env": name, "actors": count, "steps_per_second": steps / seconds, "cores_in_use": busy / seconds})
            print(rows[-1], flush=True)
    return rows


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    from measuring import markdown

    lines = []
    for row in rows:
        one = next(other["steps_per_second"] for other in rows if other["env"] == row["env"])
        rate = row["steps_per_second"]
        lines.append([row["env"], str(row["actors"]), f"{rate:.1f}", f"{rate / one:.2f} x", f"{row['cores_in_use']:.1f}"])
    return markdown(["environment", "actors", "steps/s", "over one", "cores in use"], lines)


# ---- whole runs ----


def command(folder: Path, *args: str, staleness: int) -> list[str]:
    settings = {"max_staleness": staleness, "num_producers": 2, "num_threads": 1, "keep": 10**6, "fleet": "RayFleet"}
    ahead = [f"--data.asynchronous.{name}={value}" for name, value in settings.items()]
    return asynchronous.command(folder, *args, *ahead)


def fit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    size = ["--rollout.episodes_per_iteration=16", "--data.num_minibatches=2", "--trainer.max_epochs=3"]
    with closing(TwoNodes(cpus=1)) as nodes:
        start = time.perf_counter()
        environment = {**asynchronous.surroundings(), "RAY_ADDRESS": nodes.address}
        line = command(folder, *size, "--data.source.env.wait_ms=2", staleness=1)
        done = subprocess.run(line, cwd=asynchronous.ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    groups = asynchronous.there(folder / "run" / "version_0" / "pool.sqlite")
    return {"iterations": 3, "groups_learned": len(groups), "seconds": seconds}


def kills(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    rng = random.Random(args.seed)
    size = ["--rollout.episodes_per_iteration=16", "--data.num_minibatches=2", "--data.source.num_workers=1"]
    options = [*size, f"--trainer.max_epochs={args.kill_iterations}", "--data.source.env.wait_ms=20"]
    pool, log = folder / "run" / "version_0" / "pool.sqlite", folder / "log.txt"
    done: list[dict[str, Any]] = []
    lost: set[str] = set()
    with closing(TwoNodes(cpus=1)) as nodes, open(log, "a") as file:
        environment = {**asynchronous.surroundings(), "RAY_ADDRESS": nodes.address}
        line = command(folder, *options, staleness=args.staleness)
        learner = subprocess.Popen(line, cwd=asynchronous.ROOT, env=environment, stdout=file, stderr=file)
        while learner.poll() is None and len(done) < args.kills:
            before, since = asynchronous.there(pool), time.monotonic()
            while learner.poll() is None and asynchronous.there(pool) == before and time.monotonic() - since < 120:
                time.sleep(0.2)  # until it goes on: a run that never does is no test
            time.sleep(rng.uniform(0.0, 3.0))
            held, targets = asynchronous.there(pool), actors()
            if learner.poll() is not None or not targets:
                continue
            whom = rng.choice(("actor", "node"))
            if whom == "node":
                nodes.kill()
                nodes.begin()
            else:
                with suppress(psutil.Error):
                    rng.choice(targets).kill()
            done.append({"whom": whom, "groups": len(held)})
            print(f"kill {len(done)}: {whom}, {len(held)} groups in the pool", flush=True)
            now = asynchronous.there(pool)
            lost |= {name for name, known in held.items() if now.get(name) != known}
        if learner.wait():
            raise SystemExit(log.read_text()[-3000:])
    compared = asynchronous.checks(folder, [*options, f"--data.asynchronous.max_staleness={args.staleness}"], args)
    return {"kills": done, "lost_groups": len(lost), **compared}


# ---- weights ----


def tensors(dtype: str, vocabulary: int, hidden: int, layers: int, inner: int, keys: int) -> dict[str, Any]:
    """A transformer's, with embeddings that are its head, too."""
    import torch

    layer = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    layer |= {
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm_1": (hidden,),
        "norm_2": (hidden,),
    }
    shapes = {f"{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}
    shapes |= {"embeddings": (vocabulary, hidden), "norm": (hidden,)}
    kind = getattr(torch, dtype)
    return {name: torch.empty(shape, dtype=kind).uniform_(-1, 1) for name, shape in shapes.items()}


class Taker:
    """Copies weights as a policy does, but one over the other: four models of 3 GB have no room here."""

    def take(self, weights: Callable[[], Any]) -> tuple[int, int]:
        """How many it copied, and how many bytes this process has read, from files or others, meanwhile."""
        import torch

        before = psutil.Process().io_counters().read_chars
        found, place = weights().tensors, {}
        for tensor in found.values():
            held = place.setdefault(tensor.dtype, torch.empty(max(map(torch.numel, found.values())), dtype=tensor.dtype))
            held[: tensor.numel()].copy_(tensor.reshape(-1))
        return len(found), psutil.Process().io_counters().read_chars - before


def weights(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import ray

    from steppo.rollouts import RayFleet
    from steppo.rollouts.fleet import PublishedWeights

    rows = []
    for model, count, way in itertools.product(args.models, (1, 2, 4), ("object store", "folder")):
        given = tensors(*MODELS[model])
        payload = sum(tensor.nbytes for tensor in given.values())
        with joined(cpus=2, store=int(1.3 * payload) + 200 * 2**20):
            taker = ray.remote(Taker).options(num_cpus=1, scheduling_strategy="SPREAD")
            takers = [taker.remote() for _ in range(count)]
            fleet = RayFleet(weights_folder=str(folder) if way == "folder" else None)
            fleet._ray, fleet._folder = ray, PublishedWeights(folder / "weights")  # as it starts, but for actors
            tries = []
            for iteration in range(args.repeats + 1):  # the first meets empty memory
                wire, start = psutil.net_io_counters(pernic=True)["lo"].bytes_recv, time.perf_counter()
                written = psutil.Process().io_counters().write_chars
                fleet.publish(iteration, iteration, given.items())
                published = time.perf_counter() - start
                answers = ray.get([one.take.remote(fleet._weights) for one in takers])
                tries.append(
                    {
                        "seconds": time.perf_counter() - start,
                        "published": published,
                        "wire": psutil.net_io_counters(pernic=True)["lo"].bytes_recv - wire,
                        "written": psutil.Process().io_counters().write_chars - written,
                        "read": sum(read for _, read in answers),
                    }
                )
                assert all(copied == len(given) for copied, _ in answers)
            fleet._folder.clear()
        del given
        medians = {name: statistics.median(one[name] for one in tries[1:]) for name in tries[0]}
        rows.append({"model": model, "actors": count, "way": way, "payload": payload, **medians})
        print(rows[-1], flush=True)
    return rows


def weights_table(rows: Sequence[dict[str, Any]]) -> str:
    from measuring import markdown

    heads = ["weights", "GB", "by", "actors", "seconds", "of these to publish", "GB on the wire", "GB written", "GB read"]
    lines = []
    for row in rows:
        sizes = [f"{row[name] / 1e9:.2f}" for name in ("wire", "written", "read")]
        times = [f"{row[name]:.2f}" for name in ("seconds", "published")]
        lines.append([row["model"], f"{row['payload'] / 1e9:.2f}", row["way"], str(row["actors"]), *times, *sizes])
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", action="store_true")
    parser.add_argument("--groups", type=int, default=48, help="of the iteration whose episodes are compared")
    parser.add_argument("--wait-ms", type=float, default=20.0, help="of the environment of these")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--actors", type=int, nargs="+", default=list(ACTORS))
    parser.add_argument("--episodes-each", type=int, default=16, help="of an actor that is timed")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kill-iterations", type=int, default=120, help="of the run that is killed")
    parser.add_argument("--staleness", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="of each way to send weights")
    parser.add_argument("--results", type=Path, default=asynchronous.ROOT / "benchmarks" / "results" / "ray_fleet.json")
    args = parser.parse_args()

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: its nodes are on loopback
    import ray
    import torch
    from measuring import about

    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = asynchronous.surroundings()["PYTHONPATH"]  # of nodes, and so of actors
    report = json.loads(args.results.read_text()) if args.results.exists() else {}
    here = about()
    here["versions"]["ray"] = ray.__version__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.episodes:
            report["episodes"] = {**here, **episodes(args, folder)}
        if args.speed:
            report["speed"] = {**here, "rows": speed(args, folder)}
            print(speed_table(report["speed"]["rows"]))
        if args.fit:
            report["fit"] = {**here, **fit(args, folder / "fit")}
            print(report["fit"])
        if args.kills:
            report["kills"] = {**here, **kills(args, folder / "kills")}
            print(json.dumps({key: value for key, value in report["kills"].items() if key != "kills"}, indent=1))
        if args.weights:
            report["weights"] = {**here, "rows": weights(args, folder)}
            print(weights_table(report["weights"]["rows"]))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    import ray_fleet  # by whose name actors find its environment

    ray_fleet.main()
