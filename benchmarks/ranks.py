"""What ranks send each other for an iteration and an update: bytes and seconds, before and now.

    python benchmarks/ranks.py

*Before* is how it was, kept here: columns of steps and tokens as one pickle for every rank, a list of booleans as a
pickle, one all-reduce for each gradient. *Now* is ``steppo.distributed``. Gloo processes on the loopback device, one thread
each; both ways take turns. Bytes are those of the tensors that a rank gets from others (of an all-reduce: twice its tensor,
as a ring sends it), counted at torch's collectives; seconds are by the clock and of the process, user and system of all
threads: of the slowest rank, medians. Prints tables and writes ``benchmarks/results/ranks.json``. About two minutes and
3 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from steppo.distributed import average_gradients, gather, gather_columns

ROOT = Path(__file__).parent.parent
TOKENS = 32  # of an action
WORLDS = 1, 2, 4
# Name, width, layers, vocabulary: gradients as a decoder's of that shape has them.
MODELS = {"1.9 M": (128, 4, 8192), "20 M": (320, 12, 16384), "135 M": (576, 30, 49152)}


class Received:
    """Counts what this rank gets, at torch's own collectives: how often, and how many bytes."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self._wrap("all_gather", lambda parts, tensor, **_: sum(part.nbytes for part in parts) - tensor.nbytes)
        self._wrap(
            "all_reduce", lambda tensor, *_, **__: 2 * tensor.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        )

    def _wrap(self, name: str, size: Callable[..., int]) -> None:
        real = getattr(c10d, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += size(*args, **{key: value for key, value in kwargs.items() if key != "group"})
            return real(*args, **kwargs)

        setattr(c10d, name, counted)  # where object collectives look it up
        setattr(dist, name, counted)

    def during(self, call: Callable[[], Any]) -> dict[str, int]:
        self.calls = self.bytes = 0
        call()
        return {"calls": self.calls, "bytes": self.bytes}


# ---- columns ----


def columns(steps: int, wide: bool) -> dict[str, Tensor]:
    """Of a rank's steps, as ``assign_credit`` has them: float32 models and step values, no KL in the reward.

    Args:
        steps: How many.
        wide: As before: all in float64, with rewards of tokens, and of steps twice.
    """
    chance = torch.Generator().manual_seed(steps + dist.get_rank())
    found = {name: torch.arange(steps) for name in ("order_N", "group_N", "index_N", "agent_N", "anchor_N")}
    found["length_N"] = torch.full((steps,), TOKENS)
    found |= {name: torch.randn(steps, generator=chance, dtype=torch.float64) for name in ("reward_N", "final_reward_N")}
    found["terminated_N"] = torch.arange(steps) % 2 == 0
    values = {name: torch.randn(steps, generator=chance) for name in ("bootstrap_N", "value_N")}
    if not wide:
        return found | values
    tokens = torch.zeros(steps * TOKENS, dtype=torch.float64)
    found |= {"task_reward_N": found["reward_N"], "reward_A": tokens}
    return found | {name: value.double() for name, value in values.items()}


def exchange_before(wide: dict[str, Tensor]) -> None:
    gather([(order, f"train/0/{order}/0") for order in range(0, len(wide["order_N"]), 10)])
    gather(tuple(wide[name].numpy() for name in ("order_N", "group_N", "length_N")))
    gather({**wide, "texts": []})


def exchange_now(narrow: dict[str, Tensor]) -> None:
    gather_columns({"order": narrow["order_N"][::10]})
    gather_columns({name: narrow[name] for name in ("order_N", "group_N", "length_N")})
    gather_columns(narrow)


# ---- gradients ----


def parameters(width: int, layers: int, vocabulary: int) -> list[nn.Parameter]:
    hidden = 8 * width // 3
    layer = [(width,)] * 2 + [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    shapes = [(vocabulary, width), *(layer * layers), (width,)]
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    chance = torch.Generator().manual_seed(dist.get_rank())
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=chance)
    return made


def average_before(parameters: list[nn.Parameter]) -> None:
    world = dist.get_world_size()
    has_gradient = gather([parameter.grad is not None for parameter in parameters])
    work = []
    for parameter, *anyone in zip(parameters, *has_gradient, strict=True):
        if any(anyone) and parameter.grad is not None:
            parameter.grad /= world
            work.append(dist.all_reduce(parameter.grad, async_op=True))
    for handle in work:
        handle.wait()


def difference(left: list[nn.Parameter], right: list[nn.Parameter]) -> float:
    pairs = [(a.grad, b.grad) for a, b in zip(left, right, strict=True) if a.grad is not None and b.grad is not None]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# ---- both ways ----


def compare(before: Callable[[], None], now: Callable[[], None], received: Received, repeats: int) -> dict[str, Any]:
    """Bytes of each, and seconds of the slowest rank."""
    calls = {"before": before, "now": now}
    found: dict[str, Any] = {
        name: received.during(call) if dist.get_world_size() > 1 else {"calls": 0, "bytes": 0}
        for name, call in calls.items()
    }
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            dist.barrier()
            wall, process = measuring.seconds(call)
            slowest = torch.tensor([wall, process], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times[name].append(slowest.tolist())
    for name, rows in times.items():
        wall, process = np.median(rows, axis=0).tolist()
        found[name] |= {"seconds": wall, "process_seconds": process}
    return found


def measure(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    received, found = Received(), []
    for steps in options.steps:
        wide, narrow = columns(steps // world, wide=True), columns(steps // world, wide=False)
        of = compare(lambda w=wide: exchange_before(w), lambda n=narrow: exchange_now(n), received, options.repeats)
        found.append({"what": "columns", "ranks": world, "steps": steps, **of})
    for name in options.models:
        left, right = parameters(*MODELS[name]), parameters(*MODELS[name])
        if world > 1:
            average_before(left)
            average_gradients(right)
        off = difference(left, right)
        of = compare(lambda p=left: average_before(p), lambda p=right: average_gradients(p), received, options.repeats)
        tensors, size = len(left), sum(parameter.numel() for parameter in left)
        found.append(
            {"what": "gradients", "ranks": world, "model": name, "tensors": tensors, "parameters": size, "off": off, **of}
        )
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="Steps of an iteration, over all ranks."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Shapes of gradients.")
    parser.add_argument("--repeats", type=int, default=5, help="Calls of each way.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ranks.json", help="Where the results go.")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            mp.spawn(measure, (world, folder, options), world)
            found += json.loads(Path(folder, f"{world}.json").read_text())
    options.out.write_text(json.dumps({**measuring.about(), "threads": 1, "rows": found}, indent=1) + "\n")

    def cells(row: dict[str, Any]) -> list[str]:
        ways = row["before"], row["now"]
        times = [f"{way['process_seconds'] * 1e3:,.1f} / {way['seconds'] * 1e3:,.1f}" for way in ways]
        return [*(f"{way['calls']}, {way['bytes'] / 1e6:,.3f} MB" for way in ways), *times]

    heads = ["before: calls, received", "now", "before: process / clock, ms", "now"]
    rows = [[f"{row['steps']:,}", str(row["ranks"]), *cells(row)] for row in found if row["what"] == "columns"]
    print(measuring.markdown(["steps", "ranks", *heads], sorted(rows, key=lambda row: (len(row[0]), row[0]))))
    rows = [
        [row["model"], str(row["tensors"]), str(row["ranks"]), *cells(row), f"{row['off']:.1g}"]
        for row in found
        if row["what"] == "gradients"
    ]
    print(measuring.markdown(["gradients", "tensors", "ranks", *heads, "relative difference"], rows))


if __name__ == "__main__":
    main()
