"""Peak memory and time of log-probabilities, entropies and their gradients: the library's chunks against ``log_softmax``.

    pip install -c constraints.txt -e "."
    python benchmarks/memory.py                  # about 15 minutes; the plain side needs 8 GiB at 152,000 tokens

Hidden states of the given size are read by ``Policy.action_logprobs``, and in one piece by ``logits.log_softmax`` (the
entropy from the same log-probabilities), forward and backward to the states and, if it learns, to the head. ``loss`` says
what goes backward: log-probabilities alone (as with ``ent_coef`` 0; the entropy is computed), or entropies too. Float32 in
one thread on a CPU. Each case has a process of its own: one pass of each side for its peak above what was in use before
(weights and states), then both in turns for median seconds. Gradients must agree first. The head's own gradient, which both
have, is told apart. Writes ``benchmarks/results/memory.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import about, in_turns, markdown, peak_memory
from torch import Tensor

from steppo.batch import TokenBatch
from steppo.models import TinyPolicy

ROOT = Path(__file__).parent.parent
LOSSES = ["log-probabilities", "entropy too"]


def case(vocabulary: int, hidden: int, positions: int, head: str, loss: str, repeats: int, device: str) -> dict[str, Any]:
    """A row of the table."""
    policy = TinyPolicy(hidden_size=hidden, num_layers=1, vocab_size=vocabulary, seed=0)
    policy.build(lambda: ["go north"])
    policy.to(device)
    weight = policy.model.get_output_embeddings().weight
    weight.requires_grad_(head == "trained")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator).to(device).requires_grad_()
    target_A = torch.randint(vocabulary, (positions,), generator=generator)
    share_A = torch.randn(positions, generator=generator).to(device)
    row = torch.arange(positions)
    batch = TokenBatch(row[None], row[None], None, row, target_A, row, row).to(torch.device(device))
    ones_A = torch.ones(positions, device=device)

    def plain(first: int) -> tuple[Tensor, Tensor]:
        logprobs = (policy.logits(states[batch.predict_at_A[:first]]) / ones_A[:first, None]).log_softmax(-1)
        return logprobs.gather(1, batch.target_A[:first, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def chunks(first: int) -> tuple[Tensor, Tensor]:
        part = replace(batch, predict_at_A=batch.predict_at_A[:first], target_A=batch.target_A[:first])
        return policy.action_logprobs(states, part, ones_A[:first])

    def learn(read: Callable[[int], tuple[Tensor, Tensor]], first: int = positions) -> list[Tensor]:
        states.grad = weight.grad = None
        logprobs_A, entropy_A = read(first)
        total = (logprobs_A * share_A[:first]).sum()
        if loss == "entropy too":
            total = total - 0.01 * (entropy_A * share_A[:first]).sum()
        total.backward()
        return [gradient for gradient in (states.grad, weight.grad) if gradient is not None]

    calls: dict[str, Callable[[], Any]] = {"plain": lambda: learn(plain), "chunks": lambda: learn(chunks)}
    for read in (plain, chunks):
        learn(read, 8)  # what libraries make once
    states.grad = weight.grad = None
    gradients: dict[str, list[Tensor]] = {}
    found: dict[str, Any] = {}
    for name, call in calls.items():
        peak = peak_memory(lambda name=name, call=call: gradients.update({name: call()}), device)
        found[name] = {"peak_bytes": peak}
        states.grad = weight.grad = None
    for ours, expected in zip(gradients["chunks"], gradients["plain"], strict=True):
        difference = float((ours - expected).norm() / expected.norm())
        assert difference < 1e-4, difference
    gradients.clear()
    for name, times in in_turns(calls, repeats, device).items():
        found[name] |= times
    own = weight.numel() * weight.element_size() if head == "trained" else 0
    return {
        **{"vocabulary": vocabulary, "hidden": hidden, "positions": positions, "head": head, "loss": loss},
        **{"head_gradient_bytes": own, **found},
        "peak_ratio": (found["chunks"]["peak_bytes"] - own) / (found["plain"]["peak_bytes"] - own),
        "time_ratio": found["chunks"]["process_seconds"] / found["plain"]["process_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; peaks without the head's gradient."""
    heads = ["vocabulary", "hidden", "positions", "head", "loss", "plain: peak MiB, CPU s", "chunks: peak MiB, CPU s"]
    lines = []
    for row in rows:
        cells = [f"{row[key]:,}" for key in ("vocabulary", "hidden", "positions")] + [row["head"], row["loss"]]
        for side in (row["plain"], row["chunks"]):
            peak = (side["peak_bytes"] - row["head_gradient_bytes"]) / 2**20
            cells.append(f"{peak:,.0f}, {side['process_seconds']:.2f}")
        lines.append([*cells, f"{row['peak_ratio']:.2f}", f"{row['time_ratio']:.2f}"])
    return markdown([*heads, "peak ratio", "time ratio"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2000, 49152, 152000])
    parser.add_argument("--hidden", type=int, nargs="+", default=[896], help="width of the states")
    parser.add_argument("--positions", type=int, default=2048, help="action tokens")
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        vocabulary, hidden, positions, head, loss = args.case
        sizes = int(vocabulary), int(hidden), int(positions)
        print(json.dumps(case(*sizes, head, loss, args.repeats, args.device)))
        return
    report: dict[str, Any] = {**about(), "rows": []}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for vocabulary, hidden, head, loss in itertools.product(args.vocabularies, args.hidden, args.heads, args.losses):
        command = [sys.executable, __file__, f"--repeats={args.repeats}", f"--device={args.device}"]
        command += ["--case", *map(str, (vocabulary, hidden, args.positions, head, loss))]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report["rows"].append(json.loads(found.stdout.splitlines()[-1]))
        print(found.stdout.splitlines()[-1], file=sys.stderr)
        args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
