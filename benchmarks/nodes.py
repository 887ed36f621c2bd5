"""Two nodes as two torchrun agents on the loopback device: what they learn beside one process, and after one was killed.

    pip install -c constraints.txt -e ".[test]"
    python benchmarks/nodes.py

The toy experiment of the tests with ``configs/trainer/multi-node.yaml``, on CPUs, under DDP (float64) and FSDP2 (float32:
sharded weights know no float64). For each: a run in one process, one of two nodes, and one of two nodes of which the second
is killed in mid-run (agent and process, as a machine that goes down) and started again by the same command. torchrun starts
the other one anew, and ``--ckpt_path last`` goes on. Compares the first update's gradients and the last weights. Prints a
table and writes ``benchmarks/results/nodes.json``. About five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import psutil
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # tests/ is not installed

from steppo.checkpoints import iteration_path, read  # noqa: E402
from tests.cli_helpers import TOY, checkpoint, evaluations, places  # noqa: E402

EPOCHS, KILL_AFTER = 4, 1
COMMON = ["--data.num_minibatches=3", f"--trainer.max_epochs={EPOCHS}", "--model.critic=steppo.models.SeparateCritic"]
COMMON += ["--model.objective.kl=loss", "--trainer.callbacks+=tests.test_ddp.SaveFirstGradient", "--num_threads=1"]
COMMON += [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--warm_start.updates=0",
    "--rollout.episodes_per_iteration=5",
]
SHARDED = ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.save_distributed_checkpoint=false"]
WAYS = {"DDP": ["--trainer.precision=64-true"], "FSDP2": [*SHARDED, "--trainer.precision=32-true"]}


def train(folder: Path, options: list[str]) -> list[str]:
    overlay = ["--config", str(ROOT / "configs/trainer/multi-node.yaml")]
    return ["train.py", "fit", "--config", str(TOY), *overlay, *places(folder), *COMMON, *options]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else no agent that is started later can join
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    for process, log in zip(processes, logs, strict=True):
        if process.wait(timeout=1800):
            raise SystemExit(f"status {process.returncode}:\n{log.read_text()[-4000:]}")


class Nodes:
    """Two agents; the first keeps torchrun's store."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        here = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "toy"]
        same = train(folder, [*options, "--ckpt_path=last"])
        # On one machine both take themselves for the host of the store.
        hosts = [["--rdzv-conf", f"is_host={number == 0}"] for number in range(2)]
        self.commands = [["-m", "torch.distributed.run", *here, *meet, *host, *same] for host in hosts]
        self.logs = [folder.with_name(f"{folder.name}-node{number}.log") for number in range(2)]
        self.agents = [start(command, log) for command, log in zip(self.commands, self.logs, strict=True)]

    def kill_second(self) -> None:
        """As a machine that goes down: agent and processes at once."""
        agent = self.agents[1]
        for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
            process.send_signal(signal.SIGKILL)
        agent.wait()

    def start_second(self) -> None:
        self.agents[1] = start(self.commands[1], self.logs[1])

    def finish(self) -> None:
        finish(self.agents, self.logs)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return read(checkpoint(folder / "run"))["state_dict"]


def off(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest number of the tensor."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max() / right[name].abs().max().clamp(min=1e-12)) for name in left)


def played(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in evaluations(folder / "run")]


def compare(name: str, root: Path) -> dict[str, Any]:
    one, two, cut = (root / name / kind for kind in ("one", "two", "cut"))
    for folder in (one, two, cut):
        folder.mkdir(parents=True)
    options, runs = WAYS[name], {"seconds": {}}
    alone = ["--trainer.num_nodes=1", "--trainer.strategy=auto", options[-1]]
    begun = time.monotonic()
    finish([start(train(one / "run", alone), root / name / "one.log")], [root / name / "one.log"])
    runs["seconds"]["one"] = time.monotonic() - begun
    begun = time.monotonic()
    Nodes(two / "run", options).finish()
    runs["seconds"]["two"] = time.monotonic() - begun
    begun = time.monotonic()
    nodes = Nodes(cut / "run", options)
    while not iteration_path(cut / "run" / "checkpoints", KILL_AFTER).exists():
        if any(agent.poll() is not None for agent in nodes.agents):
            nodes.finish()
        time.sleep(0.05)
    nodes.kill_second()
    killed = time.monotonic()
    nodes.start_second()
    while not iteration_path(cut / "run" / "checkpoints", KILL_AFTER + 1).exists():
        if any(agent.poll() is not None for agent in nodes.agents):
            nodes.finish()
        time.sleep(0.05)
    runs["seconds"]["from the kill to the next checkpoint"] = time.monotonic() - killed
    nodes.finish()
    runs["seconds"]["cut"] = time.monotonic() - begun
    gradients = [torch.load(folder / "run" / "gradients.pt", weights_only=True) for folder in (one, two)]
    again = nodes.logs[0].read_text()
    return {
        "way": name,
        "gradients_off": off(gradients[1], gradients[0]),
        "weights_off": off(state(two), state(one)),
        "same_after_kill": all(torch.equal(weight, state(two)[key]) for key, weight in state(cut).items()),
        "same_evaluations_after_kill": played(cut) == played(two),
        "went_on_from": [
            line.partition("Continuing ")[2].split()[-1] for line in again.splitlines() if "Continuing " in line
        ],
        **runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="DDP, FSDP2 or both.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nodes.json", help="Where the results go.")
    options = parser.parse_args()
    rows = []
    for name in options.ways:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(name, Path(folder)))
        options.out.write_text(json.dumps({**measuring.about(), "threads": 1, "rows": rows}, indent=1) + "\n")
    heads = ["", "gradients off by", "weights off by", "weights after a kill", "kill to next checkpoint, s"]
    cells = [
        [
            row["way"],
            f"{row['gradients_off']:.1g}",
            f"{row['weights_off']:.1g}",
            "equal" if row["same_after_kill"] and row["same_evaluations_after_kill"] else "DIFFER",
            f"{row['seconds']['from the kill to the next checkpoint']:.0f}",
        ]
        for row in rows
    ]
    print(measuring.markdown(heads, cells))


if __name__ == "__main__":
    main()
