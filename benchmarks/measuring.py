"""What benchmarks say of their machine, and how they measure time and memory."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers


def about() -> dict[str, Any]:
    """Command, date, machine, threads, versions."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}{gpu}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def seconds(call: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """By the clock, and of the process: user and system of all its threads. On a GPU by the clock both times."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    wall, process = time.perf_counter(), time.process_time()
    call()
    if device == "cpu":
        return time.perf_counter() - wall, time.process_time() - process
    torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return wall, wall


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Median seconds of each; they take turns, so that a busy machine is busy for all."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in times.items()}
    return {name: {"seconds": wall, "process_seconds": process} for name, (wall, process) in medians.items()}


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes above what was in use before, at most: on a GPU of the allocator, else of this process as Linux counts."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used again without being seen
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024 - before


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])
