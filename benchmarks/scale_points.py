"""Measured points, each beside what ``benchmarks/scale_model.py`` makes of others: none is fitted to itself."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scale_simulation import Run, simulate

RESULTS = Path(__file__).parent / "results"
MISSING: set[str] = set()  # files and parts of them


def result(file: str, *path: str | int) -> Any:
    """A measured number or record, or nothing where that file is not there (yet)."""
    if not (RESULTS / file).exists():
        MISSING.add(file)
        return None
    found = json.loads((RESULTS / file).read_text())
    for key in path:
        if isinstance(found, dict) and key not in found:
            MISSING.add(f"{file}: {key}")
            return None
        found = found[key]
    return found


@dataclass(frozen=True)
class Point:
    """A measured number and what the model makes of others.

    Attributes:
        what: It is.
        unit: Of both.
        predicted: By the model.
        measured: By a script.
        basis: What the prediction is from.
        doubt: Why it may miss.
    """

    what: str
    unit: str
    predicted: float
    measured: float
    basis: str
    doubt: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def asynchronous() -> Iterator[Point]:
    """Playing ahead on two cores, from rollouts and updates of the synchronous runs."""
    rows = result("asynchronous.json", "speed", "rows") or []
    playing = min((row["ways"]["synchronous, 1 thread"]["rollout"] for row in rows), default=0.0)  # it waits for nothing
    for row, threads in itertools.product(rows, (1, 2)):
        name = f"{threads} thread{'s'[: threads - 1]}"
        waits = row["ways"]["synchronous, 1 thread"]["rollout"] - playing  # a producer has one
        learn = statistics.median(other["ways"][f"synchronous, {name}"]["update"] for other in rows)  # the same work in all
        run = Run(32, env_cpu=playing / 32, env_wait=waits / 32, learn=learn, threads=threads, ahead=1)
        yield Point(
            f"ahead by 1, rollout {row['rollout_over_update']:.2f} of the update, {name}",
            "s",
            simulate(run, 10)["seconds"],
            row["ways"][f"asynchronous, {name}"]["seconds"],
            "asynchronous.json: the synchronous runs' rollouts, median of their updates",
        )


def second_worker() -> Iterator[Point]:
    """A second worker, from one; by the clock also from what a second is worth to another environment."""
    for split, row in (result("multihop_qa.json", "splits") or {}).items():
        one, two = row["expert"]["steps_per_second"], row["steps_per_second_on_two"]
        yield Point(f"multi-hop QA, {split}: two workers", "steps/s", 2 * one, two, "multihop_qa.json: one")
    shop, papers = (result(f"{name}.json", "steps_per_s_in_workers") for name in ("webshop", "paper_search"))
    if shop is None or papers is None:
        return
    one, two = (shop[workers]["of_the_busiest"] for workers in ("1", "2"))
    yield Point("WebShop: two workers, a second that the busiest computes", "steps/s", 2 * one, two, "webshop.json: one")
    clocked = {
        "WebShop": [shop[workers]["by_the_clock"] for workers in ("1", "2")],
        "paper search": [papers[workers]["steps_per_s"] for workers in ("1", "2")],
    }
    for (name, (one, two)), (other, (others_one, others_two)) in itertools.permutations(clocked.items(), 2):
        yield Point(
            f"{name}: two workers by the clock",
            "steps/s",
            one * others_two / others_one,
            two,
            f"one, and a second's worth to {other}: a third process asks them, on the same two cores",
        )


def token_time(part: dict[str, Any]) -> Callable[[int, float], float]:
    """Seconds of a tick by rows and length: what is read of caches, and a line through the rest."""
    ticks = part["decode"]
    attention = [tick["seconds"] * tick["shares"]["attention"] / tick["batch"] / tick["length"] for tick in ticks]
    rest = [tick["seconds"] * (1 - tick["shares"]["attention"]) for tick in ticks]
    if len(ticks) == 1:
        return lambda rows, length: rest[0] + statistics.mean(attention) * rows * length
    slope = (rest[1] - rest[0]) / (ticks[1]["batch"] - ticks[0]["batch"])
    fixed = rest[0] - slope * ticks[0]["batch"]
    return lambda rows, length: fixed + slope * rows + statistics.mean(attention) * rows * length


def rollouts() -> Iterator[Point]:
    """Rollouts, from ticks at a length of 600 and the matmul rate."""
    for file, names in (("rollout.json", ("tiny", "smollm2")), ("rollout_gpu.json", ("smollm2",))):
        for name in names:
            part = result(file, name)
            if part is None:
                continue
            tick = token_time(part)
            per_token = 2 * sum(part["parameters"].values()) / part["rates"]["flops"]
            for row in part["rows"]:
                ticks = (200 + 68 * step + 60 + token for step in range(row["steps"]) for token in range(8))
                seconds = sum(tick(row["batch"], length) for length in ticks) + row["tokens_read"] * per_token
                yield Point(
                    f"{'H200: ' if 'gpu' in file else ''}rollout of {name}, {row['batch']} episodes of {row['steps']} steps",
                    "s",
                    seconds,
                    row["kept"]["seconds"],
                    f"{file}: ticks and matmul rate",
                    "ticks are measured before it: others may use the cores more meanwhile",
                )


def fitted(columns: Any, values: Any) -> Any:
    """Costs of columns by least squares of relative errors; none is negative."""
    scaled = np.asarray(columns, dtype=float) / np.asarray(values, dtype=float)[:, None]
    used = np.ones(scaled.shape[1], dtype=bool)
    while True:
        costs = np.zeros(scaled.shape[1])
        costs[used] = np.linalg.lstsq(scaled[:, used], np.ones(len(scaled)), rcond=None)[0]
        if (costs >= 0).all():
            return costs
        used &= costs >= 0


def updates() -> Iterator[Point]:
    """Updates of prompts written anew, from appended dialogues."""
    rows = [row for row in result("update.json", "rows") or [] if row["minibatches"] == "whole"]
    for model in dict.fromkeys(row["model"] for row in rows if row["context"] == "append"):
        of = [row for row in rows if row["model"] == model]
        # Seconds of its products and of its attention at the rate of the matmuls beside each row, and of an update at all.
        flop = np.array([[row["flop"] - row["attention_flop"], row["attention_flop"]] for row in of])
        rates = np.array([[row["matmul_flop_per_second"]] for row in of])
        columns = np.concatenate([flop / rates, np.ones_like(rates)], axis=1)
        seconds = np.array([row["tree"]["process_seconds"] for row in of])
        known = np.array([row["context"] == "append" for row in of])
        costs = fitted(columns[known], seconds[known])
        for row, predicted in zip(of, columns @ costs, strict=True):
            if row["context"] != "append":
                yield Point(
                    f"update of {model}, {row['context']} context, {row['group']} x {row['steps']} steps",
                    "s",
                    float(predicted),
                    row["tree"]["process_seconds"],
                    "update.json: FLOP, the matmul rate beside it, costs of appended dialogues",
                    "the rate is measured before and after it: others may use the cores more meanwhile",
                )


def quickstart() -> Iterator[Point]:
    """The quickstart's rollout by the clock, from CPU seconds of its engine and its worker, which take turns."""
    now = result("iteration.json")
    for name in ("now", "before") if now else ():
        part = now[name]
        worker = (part[f"  environments' {what}, beside"]["process"] for what in ("resets", "steps"))
        apart = [part["rollout"]["process"], *worker]
        yield Point(
            f"quickstart's rollout by the clock, {name}",
            "s",
            sum(apart),
            part["rollout"]["wall"],
            "iteration.json: CPU seconds of the run and of its worker",
        )


def waiting() -> Iterator[Point]:
    """Environments that wait 1 to 200 ms in 16 slots, from those that do not."""
    rows = result("scheduling.json", "rows") or []
    answers = 2 * 13  # of an environment in a slot
    for row in rows:
        is_usual = row["engine"] == ("kept" if row["scheduler"] == "ticks" else "plain")
        if row["environment"] != "slow" or row["env_ticks"] > 1 or not is_usual:
            continue
        fast = next(
            other
            for other in rows
            if other["environment"] == "fast"
            and all(other[key] == row[key] for key in ("answers", "scheduler", "engine", "env_ticks"))
        )
        waited_for = 16 if row["scheduler"] == "ticks" else 8
        slowest = (1 + 199 * waited_for / (waited_for + 1)) / 1000
        hidden = 1.0 if row["scheduler"] == "ticks" else 0.5  # one half samples while the other waits
        yield Point(
            f"slow environments, {row['scheduler']}, {row['answers']}",
            "s",
            answers * slowest + hidden * fast["seconds"],
            row["seconds"],
            "scheduling.json: the fast ones; the slowest of 16 or 8 waits, 26 times",
            "answers differ in length, so that some are waited for more often",
        )


def gateway() -> Iterator[Point]:
    """A gateway's call among 200 sessions, from sessions one at a time."""
    rate = result("gateway_load.json", "calls_per_s")
    names = "one at a time", "one at a time, with pauses", "200 at once"
    found = [result("gateway_load.json", "calls", name) for name in names]
    if rate and all(found):
        busy, rested, many = (part["cpu_s"] for part in found)
        # Calls come at random, so they find it at work for the share of time that it works: rate * a call.
        yield Point(
            "gateway: CPU of a call, 200 sessions at once",
            "ms",
            1e3 * rested / (1 + rate * (rested - busy)),
            1e3 * many,
            "gateway_load.json: one at a time, when it rests between calls and when it does not",
        )


def fleet() -> Iterator[Point]:
    """4 and 8 Ray actors on two cores, from 1 and 2."""
    rows = result("ray_fleet.json", "speed", "rows") or []
    cores = 2.0
    for env in dict.fromkeys(row["env"] for row in rows):
        by = {row["actors"]: row for row in rows if row["env"] == env}
        if not {1, 2} <= by.keys():
            continue
        rates = np.array([by[count]["steps_per_second"] for count in (1, 2)])
        busy = np.array([by[count]["cores_in_use"] for count in (1, 2)])
        computes = max(1e-4, float((busy[1] - busy[0]) / (rates[1] - rates[0])))  # cores in use grow with steps
        others = max(0.0, float(busy[0] - computes * rates[0]))  # that use cores whoever plays
        waits = max(0.0, 1 / rates[0] - computes)
        for count in sorted(by.keys() - {1, 2}):
            episodes = 16 * count
            run = Run(episodes, steps=8, env_cpu=computes, env_wait=waits, actors=count, cores=max(0.5, cores - others))
            found = simulate(replace(run, apart=1 / rates[0]), 1)
            yield Point(
                f"{count} actors, an environment that {env}",
                "steps/s",
                8 * episodes / found["seconds"],
                by[count]["steps_per_second"],
                "ray_fleet.json: steps/s and cores in use of 1 and 2 actors",
            )


def broadcasts() -> Iterator[Point]:
    """The larger model's weights to Ray actors, from the smaller's and from other numbers of actors."""
    rows = result("ray_fleet.json", "weights", "rows") or []
    cores = 2

    def parts(row: dict[str, Any]) -> list[float]:
        """Bytes to another node, once, and those that an actor copies, with as many actors at a time as there are cores."""
        to_another_node = round(row["wire"] / row["payload"])
        return [row["payload"] * to_another_node, row["payload"] * max(1.0, row["actors"] / cores)]

    largest = max((row["payload"] for row in rows), default=0)
    for row in rows:
        if row["payload"] == largest:
            others = [other for other in rows if other["way"] == row["way"] and other is not row]
            published = statistics.mean(other["published"] / other["payload"] for other in others) * row["payload"]
            fetching = fitted(
                [parts(other) for other in others], [other["seconds"] - other["published"] for other in others]
            )
            yield Point(
                f"{row['model']} by {row['way']} to {row['actors']}",
                "s",
                published + float(np.dot(fetching, parts(row))),
                row["seconds"],
                "ray_fleet.json: what all others by that way take to publish a byte and to fetch it",
                "both nodes and all actors share two cores, a memory and a disk",
            )


def exchanges() -> Iterator[Point]:
    """CPU seconds of exchanges among 4 ranks, from those of 1 and 2."""
    found = result("ranks.json", "rows") or []
    rows = {(row["ranks"], row["what"], row.get("steps") or row["parameters"]): row for row in found}

    def parts(row: dict[str, Any]) -> list[float]:
        """What a call costs for each rank, and what bytes cost."""
        return [row["ranks"] * row["now"]["calls"], row["now"]["bytes"]]

    of = [(what, size) for ranks, what, size in rows if ranks == 4]
    alone = np.array([rows[1, *each]["now"]["process_seconds"] for each in of])  # a rank's own work
    both = np.array([rows[2, *each]["now"]["process_seconds"] for each in of])
    costs = fitted([parts(rows[2, *each]) for each in of], both - alone)
    for (what, size), own in zip(of, alone, strict=True):
        row = rows[4, what, size]
        yield Point(
            f"4 ranks exchange {what} of {size:,} {'steps' if what == 'columns' else 'parameters'}",
            "ms",
            1e3 * (own + float(np.dot(costs, parts(row)))),
            1e3 * row["now"]["process_seconds"],
            "ranks.json: 1 and 2 ranks, columns and gradients alike",
        )


def episode_bytes(steps: int, prompt: float, action: int, seen: int) -> float:
    """As the pool stores it: ids and log-probabilities, JSON of 400 bytes, and what was seen."""
    return steps * (4 * (prompt + 2 * action) + 400 + 4 * seen)


def pool_line(what: str) -> tuple[float, float]:
    """CPU seconds of an episode and of each of its bytes, written or read, from the shortest and longest ones."""
    sizes = result("scale_model.json", "pool", "rows")
    short, *_, long = [(row["bytes"], 1 / row[f"{what}_per_process_second"]) for row in sizes]
    per_byte = (long[1] - short[1]) / (long[0] - short[0])
    return short[1] - per_byte * short[0], per_byte


def pool_by_size() -> Iterator[Point]:
    """Episodes through the pool, from shorter and longer ones."""
    for what in ("written", "read") if result("scale_model.json", "pool") else ():
        each, per_byte = pool_line(what)
        row = result("scale_model.json", "pool", "rows")[1]
        yield Point(
            f"pool: episodes of {row['bytes'] / 1e3:.0f} kB {what}, a CPU second",
            "1/s",
            1 / (each + per_byte * row["bytes"]),
            row[f"{what}_per_process_second"],
            "shorter and longer ones",
        )


POINTS = (
    *(asynchronous, fleet, broadcasts, exchanges),
    *(second_worker, rollouts, updates, quickstart, waiting, gateway, pool_by_size),
)
