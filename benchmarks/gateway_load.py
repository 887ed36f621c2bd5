"""What a call costs over its engine, with many sessions at once, and whether memory stays flat.

    python benchmarks/gateway_load.py --sessions 200 --total 5000

The engine answers at once, so the time of a call is the gateway's: HTTP, the prompt, chains, the record. Clients are in a
process of their own. Each session makes its calls one after the other, as many alone as at once, since a call costs more the
longer its dialogue is. Of many, each pauses between its calls. One at a time does not, so that the gateway never rests, or
does, for so long that calls come as often. Prints a table; writes benchmarks/results/gateway_load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import psutil
from gateway_fuzz import Rig
from measuring import about, markdown

from steppo.engines import Engine
from steppo.models import TinyPolicy
from steppo.types import Completion, Request

RESULT = Path(__file__).parent / "results/gateway_load.json"


class InstantEngine(Engine):
    """Says the same eight tokens to all."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = np.asarray(ids, np.int32)
        self._asked: list[Request] = []

    def submit(self, request: Request) -> None:
        self._asked.append(request)

    def poll(self) -> list[Completion]:
        asked, self._asked = self._asked, []
        return [Completion(request.id, self._ids, np.zeros(len(self._ids), np.float32), "stop") for request in asked]


def wave(rig: Rig, clients: Popen, count: int, calls: int, pause_s: float, first: int) -> tuple[list[float], float]:
    """Seconds of all calls of so many sessions at once, and the gateway's CPU seconds."""
    sessions = [rig.open(f"load/{first + number}") for number in range(count)]
    before = time.process_time()
    work = rig.place, [(session.id, session.key) for session in sessions], calls, pause_s
    assert clients.stdin is not None
    assert clients.stdout is not None
    print(json.dumps(work), file=clients.stdin, flush=True)
    found = json.loads(clients.stdout.readline())
    spent = time.process_time() - before
    assert all(len(session.taken) == calls for session in sessions)
    for session in sessions:
        rig.end(session)
    return found, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200, help="at once")
    parser.add_argument("--total", type=int, default=5000, help="sessions in all")
    parser.add_argument("--calls", type=int, default=10, help="of each session")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between the calls of a session")
    options = parser.parse_args()
    policy = TinyPolicy()
    policy.build(lambda: ["Where am I now, after steps?"])
    engine = InstantEngine([*policy.tokenizer.encode("Here.....")[:7], policy.tokenizer.eos_token_id])
    rig = Rig(policy, engine, 10_000, 100_000, 8, max_calls_per_s=1e6)
    clients = Popen([sys.executable, Path(__file__).with_name("gateway_clients.py")], stdin=PIPE, stdout=PIPE, text=True)
    results: dict[str, Any] = {}
    try:
        with rig.asking():
            for name, pause in (("one at a time", 0.0), ("one at a time, with pauses", options.pause / options.sessions)):
                waves = [wave(rig, clients, 1, options.calls, pause, number) for number in range(21)][1:]  # warm
                alone = [seconds for found, _ in waves for seconds in found]
                results[name] = figures(alone, sum(spent for _, spent in waves))
            many, spent = wave(rig, clients, options.sessions, options.calls, options.pause, 100)
            results[f"{options.sessions} at once"] = figures(many, spent)
            resident = []
            for first in range(0, options.total, options.sessions):
                wave(rig, clients, options.sessions, 2, 0.05, 1000 + first)
                resident.append(psutil.Process().memory_info().rss / 2**20)
    finally:
        rig.gateway.close()
        clients.kill()
    memory = {"sessions": options.total, "MiB after a fifth": resident[len(resident) // 5], "MiB at the end": resident[-1]}
    rows = [[name, *(f"{row[key] * 1e3:.1f}" for key in ("median_s", "p95_s", "cpu_s"))] for name, row in results.items()]
    print(markdown(["sessions", "ms a call, median", "p95", "CPU ms a call"], rows))
    print(", ".join(f"{name} {value:.0f}" for name, value in memory.items()))
    load = os.getloadavg()[2]  # of all that the machine does: much more than 1 tells of others
    print(f"load average of the last 15 minutes: {load:.1f}")
    RESULT.write_text(
        json.dumps(
            about() | {"load": load, "calls_per_s": options.sessions / options.pause, "calls": results, "memory": memory},
            indent=1,
        )
        + "\n"
    )


def figures(seconds: list[float], spent: float) -> dict[str, float]:
    """Of all calls of a wave."""
    cut = statistics.quantiles(seconds, n=20)
    return {"median_s": statistics.median(seconds), "p95_s": cut[-1], "cpu_s": spent / len(seconds), "count": len(seconds)}


if __name__ == "__main__":
    main()
