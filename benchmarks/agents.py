"""Agents that know nothing of training learn on a CPU: success before and after, and the paired difference.

    pip install -c constraints.txt -e ".[gateway]" "smolagents[openai]"
    python benchmarks/agents.py --folder runs/agents

Trains each config of ``configs/agent``, then plays its panel with the untrained policy and with the trained one. Other
options go to ``train.py``. What is done stays in the folder and is not done again. Prints a table; writes
``benchmarks/results/agents.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import about, markdown

from steppo import results
from steppo.panel.compare import compare

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/agents.json"
AGENTS = {"quickstart": "openai", "smolagents": "smolagents"}  # config -> package of its agent


def train(command: list[str], folder: Path) -> dict[str, float]:
    """Runs train.py there, unless that is done; its seconds, by the clock and of all its processes."""
    clock = folder / "seconds.json"
    if not clock.exists():
        names = {"save_dir": folder.parent.parent, "name": folder.parent.name, "version": folder.name}
        where = [f"--trainer.logger.init_args.{name}={value}" for name, value in names.items()]
        start, before = time.perf_counter(), spent()
        subprocess.run([sys.executable, "train.py", *command, *where], cwd=ROOT, check=True)
        clock.write_text(json.dumps({"seconds": time.perf_counter() - start, "process_seconds": spent() - before}))
    return json.loads(clock.read_text())


def spent() -> float:
    """User and system seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def learned(name: str, folder: Path, samples: int, extra: list[str]) -> dict[str, Any]:
    """A config's figures."""
    config = f"--config=configs/agent/{name}.yaml"
    clock = train(["fit", config, *extra], folder / "fit")
    checkpoint = max((folder / "fit" / "checkpoints").glob("iteration-*.ckpt"))
    ends = {}
    for end, more in (("before", []), ("after", [f"--ckpt_path={checkpoint}"])):
        train(["validate", config, *more, f"--evaluation.samples={samples}", *extra], folder / end)
        ends[end] = results.read(folder / end / "validate.json")
    found = compare(ends["before"], ends["after"])
    assert found.success is not None
    curve = [json.loads(line) for line in (folder / "fit" / "evaluation.jsonl").read_text().splitlines()]
    return {
        "package": f"{AGENTS[name]} {version(AGENTS[name])}",
        "episodes": len(ends["after"]["episodes"]),
        "tasks": found.tasks,
        "before": found.success.a,
        "after": found.success.b,
        "difference": found.success.mean,
        "ci95": found.success.interval,
        "steps": curve[-1]["environment_steps"],
        "curve": [{key: record[key] for key in ("iteration", "success_rate", "success_ci95")} for record in curve],
        **clock,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "agents", help="of the runs")
    parser.add_argument("--samples", type=int, default=8, help="episodes of each task, before and after")
    options, extra = parser.parse_known_args()
    found = {name: learned(name, options.folder.resolve() / name, options.samples, extra) for name in AGENTS}
    rows = []
    for one in found.values():
        low, high = one["ci95"]
        difference = f"{one['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
        ends = [f"{one[end]:.2f}" for end in ("before", "after")]
        rows.append([one["package"], str(one["episodes"]), *ends, difference, f"{one['process_seconds']:.0f}"])
    print(markdown(["agent", "episodes", "before", "after", "paired difference", "CPU seconds"], rows))
    RESULT.write_text(json.dumps(about() | {"agents": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
