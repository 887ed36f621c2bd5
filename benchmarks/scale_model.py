"""What runs of any size would do: a simulation, first compared with what was measured, then asked about clusters.

    python benchmarks/scale_model.py             # a minute, no GPU
    python benchmarks/scale_model.py --measure   # also times the pool with longer episodes

Numbers come from ``benchmarks/results/``, each by its name; what was not measured is in ``ASSUMED``. First the model
predicts measured points from others (``scale_points.py``), none from itself. Then it simulates iterations of several layouts
(``scale_simulation.py``): episodes in slots of actors, engines that slow down with what they hold, environments that wait or
compute on a machine's cores, groups through the learner's pool, updates, exchanges, weights on their way back.

Prints both tables, and writes ``benchmarks/results/scale_model.json``. A result file that is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scale_points import MISSING, POINTS, RESULTS, Point, episode_bytes, pool_line, result
from scale_simulation import Run, simulate

# What no script here has measured: value, unit, where it is from.
ASSUMED: dict[str, tuple[float, str, str]] = {
    "memory_bandwidth": (3.35e12, "bytes/s", "NVIDIA's data sheet, H100 SXM"),
    "memory_share": (
        0.7,
        "of it in decoding",
        "assumed; 0.77 on an A100, batch 1: johnmusgrave.com/p/vllm-throughput-latency-sweep-on",
    ),
    "tick_overhead": (0.003, "s of a server's tick beside its bytes", "assumed"),
    "prefill_share": (0.5, "of the matmul rate in reading prompts", "assumed"),
    "nvlink": (450e9, "bytes/s each way of a GPU", "NVIDIA's data sheet, H100 SXM"),
    "node_link": (50e9, "bytes/s each way of a node", "400 Gbit/s, one link a node: assumed"),
    "link_share": (0.8, "of a link that collectives reach", "assumed"),
    "hop": (10e-6, "s of a collective for each rank of its ring", "assumed"),
    "object_store": (2e9, "bytes/s of Ray's, put or sent, one stream", "assumed where ray_fleet.json says nothing"),
    "copy": (4e9, "bytes/s of weights from memory to a GPU, or out of it", "assumed: memory that is not pinned"),
    "file_write": (1.5e9, "bytes/s of weights that one process writes", "assumed: local NVMe or tmpfs"),
    "file_read": (3e9, "bytes/s of weights that one process reads", "assumed"),
    "deal": (1e9, "bytes/s of pickled episodes from rank 0 to all ranks", "assumed"),
    "node_cores": (96, "cores of a machine with 8 GPUs", "assumed"),
}


def assumed(name: str) -> float:
    return ASSUMED[name][0]


# ---- layouts ----


@dataclass(frozen=True)
class Model:
    """What of a language model costs."""

    name: str
    parameters: float
    layers: int
    width: int  # of all query heads
    cached: int  # bytes of a token's keys and values

    def flop(self, context: float) -> float:
        """Of a token, forward and backward."""
        return 6 * self.parameters + 12 * self.layers * self.width * context / 2


QWEN_1B = Model("Qwen2.5-1.5B", 1.544e9, 28, 1536, 28 * 2 * 256 * 2)
QWEN_4B = Model("Qwen3-4B", 4.02e9, 36, 4096, 36 * 2 * 1024 * 2)

# Episodes on paper: appended dialogues in groups of 8.
GROUP, STEPS, FIRST, OBSERVATION, ACTION = 8, 12, 800, 200, 150
EPISODE_TOKENS = FIRST + STEPS * (OBSERVATION + ACTION)
CONTEXT = FIRST + STEPS * (OBSERVATION + ACTION) / 2
EPISODE_BYTES = episode_bytes(STEPS, CONTEXT, ACTION, OBSERVATION)
MODELS_LEARNED = 2  # policy and critic of its size
MINIBATCHES, MICROBATCH = 16, 16384


def server_tick(model: Model) -> Callable[[int], float]:
    """Seconds of a token of each of so many requests of a vLLM server on an H100: bytes read, and prompts between."""
    bandwidth = assumed("memory_bandwidth") * assumed("memory_share")
    matmul = result("update_gpu.json", "runs", "1.5b", "matmul_flop_per_second")
    reading = OBSERVATION * 2 * model.parameters / matmul / assumed("prefill_share") / ACTION
    weights, cached = 2 * model.parameters / bandwidth, CONTEXT * model.cached / bandwidth
    return lambda held: assumed("tick_overhead") + weights + held * (cached + reading)


@dataclass(frozen=True)
class Layout:
    """A run, what its learner consists of, and what flows."""

    name: str
    run: Run
    iteration: dict[str, float]
    learner: dict[str, float]
    flows: dict[str, float]

    def row(self) -> dict[str, Any]:
        found, run, seconds = self.iteration, self.run, self.iteration["seconds"]
        steps = run.groups * run.group_size * run.steps
        cores = run.env_cpu * steps / (run.machines * run.cores)
        waits = max(cores, (run.env_cpu + run.env_wait) * steps / run.actors / run.slots)
        playing = {"engines": found["engines_busy"] * seconds, "environments": waits, "weights in": run.fetch}
        playing["pool"] = run.put * run.groups * run.group_size
        side = playing if found["learner_waits"] > 0.1 * seconds else self.learner
        return {
            "layout": self.name,
            "seconds": seconds,
            "iterations_per_hour": 3600 / seconds,
            "steps_per_second": found["steps"] / seconds,
            "learner_waits": found["learner_waits"] / seconds,
            "actors_wait": found["actors_wait"],
            "bound_by": max(side, key=lambda name: side[name]),
            "learner_seconds": self.learner,
            "playing_seconds": playing,
            "bytes_per_second": {name: size / seconds for name, size in self.flows.items()},
        }


def pool_seconds() -> list[float]:
    """To write and to read an episode: its CPU seconds, and by the clock as much more as with short ones."""
    found, alone = [], result("pool.json", "alone")
    for what in ("written", "read"):
        each, per_byte = pool_line(what)
        slower = alone[f"{what}_per_process_second"] / alone[f"{what}_per_second"]
        found.append(slower * (each + per_byte * EPISODE_BYTES))
    return found


def store_rate() -> float:
    """Bytes a second into Ray's object store, the larger model's."""
    rows = [row for row in result("ray_fleet.json", "weights", "rows") or [] if row["way"] == "object store"]
    largest = max((row["payload"] for row in rows), default=0)
    rates = [largest / row["published"] for row in rows if row["payload"] == largest]
    return statistics.median(rates) if rates else assumed("object_store")


def updating(model: Model, tokens: float, ranks: int, nodes: int) -> dict[str, float]:
    """A rank's seconds in an iteration: a pass for scores, one of updates; sharded weights come and go meanwhile."""
    row = result("update_gpu.json", "rows", 0)
    rate = row["flop"] / row["tree"]["seconds"]  # of 1.5 B on an H200, attention and all
    passes = MINIBATCHES * math.ceil(tokens / MINIBATCHES / MICROBATCH)
    computing = tokens * model.flop(CONTEXT) / rate
    exchanging = 0.0
    if ranks > 1:
        link = assumed("link_share") * (assumed("nvlink") if nodes == 1 else assumed("node_link"))
        weights = 4 * model.parameters  # float32: gathered twice, and their gradients scattered, in each microbatch
        exchanging = passes * (3 * weights / link + 3 * model.layers * ranks * assumed("hop"))
    score = computing / 3
    seen = max(0.0, exchanging - computing)  # what is gathered while it computes costs nothing
    return {"updates": MODELS_LEARNED * (computing + score), "exchanges": MODELS_LEARNED * seen}


def cluster(
    name: str,
    nodes: tuple[int, int],
    gpus: tuple[int, int],
    groups: int,
    env_wait: float = 0.05,
    env_cpu: float = 0.005,
    slots: int = 64,
) -> Layout:
    """Learning and playing nodes (the same one if the second is 0), and GPUs that learn and play, each with a server."""
    model = QWEN_4B
    ranks, actors = gpus
    playing_nodes = nodes[1] or 1
    episodes = groups * GROUP
    whole, half = 4 * model.parameters, 2 * model.parameters
    put, get = pool_seconds()
    learner = updating(model, episodes * EPISODE_TOKENS / ranks, ranks, nodes[0])
    learner["pool"] = episodes * (get + (EPISODE_BYTES / assumed("deal") if ranks > 1 else 0.0))
    learner["weights out"] = whole / assumed("copy") + whole / store_rate()
    hops = math.ceil(math.log2(nodes[1] + 1))  # whoever has them gives them on
    to_server = half / assumed("file_write") + half / assumed("file_read")
    fetch = hops * whole / store_rate() + whole / assumed("copy") + to_server
    run = Run(
        groups=groups,
        group_size=GROUP,
        steps=STEPS,
        tokens=ACTION,
        tick=server_tick(model),
        env_cpu=env_cpu,
        env_wait=env_wait,
        actors=actors,
        slots=slots,
        machines=playing_nodes,
        cores=assumed("node_cores"),
        learn=learner["updates"] + learner["exchanges"],
        ahead=1,
        put=put,
        get=learner["pool"] / episodes,
        publish=learner["weights out"],
        fetch=fetch,
        varied=True,
    )
    flows = {
        "prompts and answers, a server": episodes * STEPS / actors * 6 * (CONTEXT + ACTION),  # ids as JSON
        "episodes to rank 0": episodes * EPISODE_BYTES,
        "weights into a node that plays": whole,
        "weights to files, a node": half * actors / playing_nodes,
        "weights and gradients, a rank": MODELS_LEARNED * 3 * whole * MINIBATCHES if ranks > 1 else 0.0,
    }
    # A part of a large cluster stands for it: the pool, which all share, is as much slower.
    part = max(1, actors // 32)
    sample = replace(run, groups=groups // part, actors=actors // part, machines=max(1, playing_nodes // part))
    found = simulate(replace(sample, put=put * part, get=run.get * part), 4)
    found["steps"] *= part
    return Layout(name, run, found, learner, flows)


def laptop(ahead: int) -> Layout:
    """The quickstart: engine and worker take turns, by what they compute; the learner has a core, too."""
    now = result("iteration.json", "now")
    worker = (now[f"  environments' {what}, beside"]["process"] for what in ("resets", "steps"))
    playing = now["rollout"]["process"] + sum(worker)
    learn = {"updates": sum(now[name]["wall"] for name in ("score", "update")), "rest": now["rest"]["wall"]}
    put, get = (1 / result("pool.json", "alone", f"{what}_per_second") for what in ("written", "read"))
    if not ahead:
        put = get = 0.0
    run = Run(64, env_cpu=playing / 64, learn=sum(learn.values()), threads=1, ahead=ahead, put=put, get=get)
    found = simulate(run, 8)
    found["steps"] = now["  environments' steps, beside"]["calls"]
    flows = {"episodes to rank 0": 64 * episode_bytes(10, 180, 8, 0), "weights to files, a node": 4 * 0.3e6} if ahead else {}
    name = "laptop, the quickstart" + (", ahead by 1" if ahead else "")
    return Layout(name, run, found, learn, flows)


def one_gpu(with_server: bool) -> Layout:
    """1.5 B on one GPU, which engine and learner use in turns."""
    model, groups = QWEN_1B, 8
    half = 2 * model.parameters
    learner = updating(model, groups * GROUP * EPISODE_TOKENS, 1, 1)
    reload = half / assumed("copy") + half / assumed("file_write") + half / assumed("file_read")
    run = Run(
        groups,
        GROUP,
        STEPS,
        ACTION,
        server_tick(model),
        env_cpu=0.005,
        env_wait=0.05,
        slots=64,
        cores=16,
        learn=sum(learner.values()),
        fetch=reload if with_server else 0.0,
        varied=True,
    )
    if not with_server:  # kernels are launched one by one, whatever the batch
        tick = result("rollout_gpu.json", "smollm2", "decode", 0, "seconds") * model.layers / 30
        run = replace(run, tick=lambda held: tick)
    flows = {"weights to files, a node": half} if with_server else {}
    if with_server:
        flows["prompts and answers, a server"] = groups * GROUP * STEPS * 6 * (CONTEXT + ACTION)
    name = f"one GPU, 1.5 B, {'vLLM' if with_server else '`HFEngine`'}"
    return Layout(name, run, simulate(run, 4), learner, flows)


def layouts() -> list[Layout]:
    if result("update_gpu.json") is None or result("pool.json") is None or result("iteration.json") is None:
        return []
    found = [laptop(0), laptop(1), one_gpu(False), one_gpu(True)]
    for play in (2, 3, 4):
        found += [cluster(f"one node, 4 B: {8 - play} GPUs learn, {play} play", (1, 0), (8 - play, play), 32)]
    for nodes in (8, 64):
        learn, play = nodes * 5 // 8, nodes * 3 // 8
        found += [
            cluster(f"{nodes} nodes, 4 B: {learn} learn, {play} play", (learn, play), (8 * learn, 8 * play), 32 * nodes)
        ]
    for what, wait, computing in (("wait 2 s", 2.0, 0.01), ("compute 2 s", 0.0, 2.0)):
        name = f"1,000 environments that {what}, 4 B: 1 node learns, 2 play"
        found += [cluster(name, (1, 2), (8, 16), 125, wait, computing, slots=63)]
    return found


# ---- the report ----


def amount(size: float) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B" if size else ""


def rounded(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def tables(families: dict[str, list[Point]], rows: Sequence[dict[str, Any]]) -> str:
    from measuring import markdown

    points = [point for family in families.values() for point in family]
    lines = [
        [point.what, f"{point.predicted:.4g}", f"{point.measured:.4g}", point.unit, f"{point.error:+.0%}", point.basis]
        for point in points
    ]
    heads = ["point", "predicted", "measured", "", "off by", "from"]
    missed = [f"- {point.what}, {point.error:+.0%}: {point.doubt or '?'}" for point in points if abs(point.error) > 0.2]
    text = [markdown(heads, lines), ""]
    lines = []
    for name, family in families.items():
        errors = sorted(point.error for point in family)
        lines += [
            [
                name,
                str(len(family)),
                str(sum(abs(error) <= 0.2 for error in errors)),
                f"{errors[0]:+.0%} to {errors[-1]:+.0%}",
            ]
        ]
    text += [markdown(["what, from what", "points", "within 20 %", "off by"], lines), ""]
    text += [f"{len(points) - len(missed)} of {len(points)} within 20 %. The others:", *missed, ""]
    heads = ["size", "iterations/h", "steps/s", "seconds of the learner", "seconds of the players", "bound by", "who waits"]
    lines = []
    for row in rows:
        parts = [
            ", ".join(f"{name} {rounded(seconds)}" for name, seconds in row[f"{who}_seconds"].items() if seconds >= 0.05)
            for who in ("learner", "playing")
        ]
        rates = [f"{row[name]:,.0f}" for name in ("iterations_per_hour", "steps_per_second")]
        waits = f"learner {row['learner_waits']:.0%}, players {row['actors_wait']:.0%}".replace("%", " %")
        lines.append([row["layout"], *rates, *parts, row["bound_by"], waits])
    text += [markdown(heads, lines), ""]
    names = list(dict.fromkeys(name for row in rows for name in row["bytes_per_second"]))
    lines = [[row["layout"], *(amount(row["bytes_per_second"].get(name, 0.0)) for name in names)] for row in rows]
    text += [markdown(["bytes a second", *names], lines)]
    return "\n".join([*text, f"Not there yet: {', '.join(sorted(MISSING))}"] if MISSING else text)


def measure_pool() -> dict[str, Any]:
    """Episodes of several sizes, by one process that writes and reads."""
    import pool
    from measuring import about

    from steppo.pool.records import encode

    rows = []
    for prompt in (pool.PROMPT, int(CONTEXT) // 2, int(CONTEXT)):
        pool.PROMPT = prompt
        size = statistics.mean(sum(map(len, encode(episode))) for number in range(20) for episode in pool.group(str(number)))
        tries = []
        for _ in range(5):
            with tempfile.TemporaryDirectory() as folder:
                tries += [pool.alone(Path(folder), 50)]
        best = {name: max(one[name] for one in tries) for name in tries[0] if "process" in name}  # others disturb less
        rows += [{"prompt": prompt, "bytes": size, **best}]
    return {**about(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="the pool with longer episodes, which later runs use")
    args = parser.parse_args()

    from measuring import about

    out = RESULTS / "scale_model.json"
    report = json.loads(out.read_text()) if out.exists() else {}
    if args.measure or "pool" not in report:
        report = {"pool": measure_pool()}
        out.write_text(json.dumps(report))
    families = {str(each.__doc__).rstrip("."): found for each in POINTS if (found := list(each()))}
    rows = [layout.row() for layout in layouts()]
    print(tables(families, rows))
    report = {
        **about(),
        "command": "python benchmarks/scale_model.py",
        "not_there": sorted(MISSING),
        "assumed": {name: dict(zip(("value", "unit", "source"), row, strict=True)) for name, row in ASSUMED.items()},
        "pool": report["pool"],
        "points": [
            {"family": name, **asdict(point), "error": point.error} for name, family in families.items() for point in family
        ],
        "layouts": rows,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
