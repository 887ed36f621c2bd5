"""What an update costs: padded rows against prefix trees, on the same steps.

    pip install -c constraints.txt -e "."
    python benchmarks/update.py

Forward and backward of a small policy's loss, the optimizer left out, in float32 and one thread; packing is part of it.
Prompts begin with 200 tokens, observations have 60 tokens, actions 8. ``append``: one episode, whose prompts hold the whole
dialogue. ``state``: a group of 8 episodes; a prompt is the beginning and the newest observation. Both packers take turns;
medians after a first pass that does not count. Losses must agree first. Also measured: ``keys_per_token``, the packer's
setting, from causal and branched rows of several lengths. Writes ``benchmarks/results/update.json`` and prints a table.
Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from steppo.batch import Microbatch, Segment, TokenBatch
from steppo.learner.update import UpdateLoss
from steppo.losses import ClippedLoss, ObjectiveSettings
from steppo.models import TinyPolicy
from steppo.models.policy import trunk_states
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker

ROOT = Path(__file__).parent.parent
HEAD, OBSERVATION, ACTION, GROUP = 200, 60, 8, 8
VOCABULARY, MAX_TOKENS = 512, 16384
PACKERS: dict[str, Packer] = {"padded": PaddedPacker(), "tree": PrefixTreePacker()}


def append_steps(steps: int, rng: np.random.Generator) -> list[Segment]:
    dialogue, segments = tokens(rng, HEAD), []
    for _ in range(steps):
        dialogue = np.concatenate([dialogue, tokens(rng, OBSERVATION)])
        segments.append(Segment(dialogue, tokens(rng, ACTION)))
        dialogue = np.concatenate([dialogue, segments[-1].action_ids])
    return segments


def state_steps(steps: int, rng: np.random.Generator) -> list[Segment]:
    head = tokens(rng, HEAD)
    first = tokens(rng, OBSERVATION)
    segments = []
    for episode in range(GROUP):
        for step in range(steps):
            seen = tokens(rng, OBSERVATION) if step else first
            segments.append(Segment(np.concatenate([head, seen]), tokens(rng, ACTION), episode))
    return segments


def tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(2, VOCABULARY, length).astype(np.int32)


CONTEXTS: dict[str, Callable[[int, np.random.Generator], list[Segment]]] = {"append": append_steps, "state": state_steps}


def policy(max_positions: int) -> TinyPolicy:
    made = TinyPolicy(hidden_size=192, num_layers=4, vocab_size=VOCABULARY, max_positions=max_positions, seed=0)
    made.build(lambda: ["go north"])
    return made


def microbatches(segments: list[Segment], packer: Packer) -> list[Microbatch]:
    """Advantages of alternating sign; all else as on-policy."""
    found = []
    for steps, batch in packer.pack(segments, MAX_TOKENS):
        ones_A = torch.ones(len(batch.target_A))
        old_A = -6.0 * ones_A
        found.append(
            Microbatch(
                tokens=batch,
                temperature_A=ones_A,
                old_logprobs_A=old_A,
                behaviour_logprobs_A=old_A,
                ref_logprobs_A=None,
                advantage_A=1.0 - 2.0 * (torch.from_numpy(steps)[batch.step_of_A] % 2),
                weight_A=ones_A,
                index_N=torch.from_numpy(steps),
                old_value=None,
                target=None,
                update_steps=len(segments),
                update_tokens=len(segments) * ACTION,
            )
        )
    return found


def update(loss: UpdateLoss, segments: list[Segment], packer: Packer) -> tuple[float, int, int]:
    """Loss, tokens computed with padding, and batches."""
    loss.policy.zero_grad()
    total, computed = 0.0, 0
    batches = microbatches(segments, packer)
    for batch in batches:
        computed += batch.tokens.input_ids_BT.numel()
        for part in loss.parts(batch):
            part.loss.backward()
            total += float(part.loss.detach())
    return total, computed, len(batches)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the process."""
    gc.collect()
    wall, process = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - process


def compare(loss: UpdateLoss, context: str, steps: int, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    segments = CONTEXTS[context](steps, np.random.default_rng(0))
    first = {name: update(loss, segments, packer) for name, packer in PACKERS.items()}  # warm-up
    losses = [found[0] for found in first.values()]
    assert abs(losses[0] - losses[1]) <= 1e-4 * max(abs(losses[0]), 1e-2), losses
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PACKERS}
    for _ in range(repeats):
        for name, packer in PACKERS.items():
            times[name].append(timed(lambda packer=packer: update(loss, segments, packer)))
    row: dict[str, Any] = {"context": context, "steps": steps, "segments": len(segments), "repeats": repeats}
    row["read_tokens"] = sum(len(segment.prompt_ids) + ACTION - 1 for segment in segments)
    for name, (_, computed, batches) in first.items():
        wall, process = (statistics.median(column) for column in zip(*times[name], strict=True))
        row[name] = {"tokens": computed, "batches": batches, "seconds": wall, "process_seconds": process}
    for key in ("tokens", "seconds", "process_seconds"):
        row[f"{key}_ratio"] = row["padded"][key] / row["tree"][key]
    print(json.dumps(row), file=sys.stderr)
    return row


def keys_per_token(made: TinyPolicy, attention: str, repeats: int) -> float:
    """Process time of branched rows by their length: cost of a token over that of a key."""
    made.model.set_attn_implementation(attention)
    lengths, costs = [256, 512, 1024, 2048], []
    none = torch.zeros(0, dtype=torch.int64)
    for length in lengths:
        rows = lengths[-1] // length
        ids = torch.arange(rows * length).reshape(rows, length) % VOCABULARY
        positions = torch.arange(length).expand(rows, length)
        batch = TokenBatch(ids, positions, torch.full_like(ids, length), none, none, none, none)  # all see all before
        call = lambda batch=batch: trunk_states(made.trunk, batch).square().mean().backward()  # noqa: E731
        call()
        costs.append(statistics.median(timed(call)[1] for _ in range(repeats)) / ids.numel())
    slope, intercept = np.polyfit(lengths, costs, 1)
    made.model.set_attn_implementation("sdpa")
    return float(intercept / slope)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["context", "steps", "tokens read", "padded: tokens, CPU s", "tree: tokens, CPU s", "tree, ms a step"]
    heads += ["token ratio", "CPU ratio", "wall ratio"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        padded, tree = row["padded"], row["tree"]
        cells = [row["context"], str(row["steps"]), f"{row['read_tokens']:,}"]
        cells += [f"{one['tokens']:,}, {one['process_seconds']:.3g}" for one in (padded, tree)]
        cells += [f"{1e3 * tree['process_seconds'] / row['segments']:.1f}"]
        cells += [f"{row[f'{key}_ratio']:.1f}" for key in ("tokens", "process_seconds", "seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=list(CONTEXTS))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="of an episode; state: up to 16")
    parser.add_argument("--repeats", type=int, default=5, help="most; fewer of long episodes")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "update.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    made = policy(HEAD + max(args.steps) * (OBSERVATION + ACTION) + 2048)
    loss = UpdateLoss(made, None, "none", ClippedLoss(), ObjectiveSettings())
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/update.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": 1,
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
        "max_tokens": MAX_TOKENS,
        "keys_per_token": {name: keys_per_token(made, name, args.repeats) for name in ("sdpa", "eager")},
        "rows": [],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for context in args.contexts:
        for steps in sorted(set(args.steps)):
            if context == "append" or steps <= 16:
                report["rows"].append(compare(loss, context, steps, max(2, min(args.repeats, 80 // steps))))
                args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    print("keys_per_token:", ", ".join(f"{name} {value:.0f}" for name, value in report["keys_per_token"].items()))


if __name__ == "__main__":
    main()
