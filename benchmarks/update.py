"""What an update costs: prefix trees against padded rows and steps one by one, on the same records, and the machine's limit.

    pip install -c constraints.txt -e "."
    python benchmarks/update.py                                          # tiny: about 30 minutes
    python benchmarks/update.py --models smollm2 --folder models/smollm2-135m --groups 1 --steps 8 16 32   # about an hour

Forward and backward of the library's updates (``StepBuffer``, ``Learner.update``), packing included and the optimizer left
out, in float32 and one thread. Prompts begin with 200 tokens, observations have 60, actions 8; ``append`` shows the whole
dialogue, ``window`` its last 3 turns, ``state`` the newest observation; siblings of a group begin alike. ``whole``: all
steps of the records in one update; ``steps``: four updates of random steps. Sides take turns, medians after a first pass,
which gives peak memory above what was in use before (weights, gradients). Gradients must agree first. A side is left out
where it would compute more than ``--most`` tokens.

``limit`` is (6 x trunk parameters x unique tokens + 6, or 8 where logits are computed twice, x head parameters x action
tokens + 12 x layers x width of the queries x pairs of unique tokens) FLOP over the matmul rate that this run measured on
the model's own matrices; ``share`` is how much of it the trees reach. ``--branches`` measures ``branch_tokens`` instead.
Writes into ``benchmarks/results/update.json``, where other rows stay, and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import about, in_turns, markdown, peak_memory, seconds
from records import CONTEXTS, VOCABULARY, Alternating, episodes, reads, smol, tiny, unique
from torch import nn

from steppo.batch import TokenBatch
from steppo.buffer import StepBuffer
from steppo.learner import Learner
from steppo.models import Policy
from steppo.models import policy as policy_module
from steppo.models.policy import trunk_states
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from steppo.types import Episode

ROOT = Path(__file__).parent.parent
SIDES: dict[str, tuple[Packer, int | None]] = {  # and the most tokens of a microbatch, if not the model's
    "tree": (PrefixTreePacker(), None),
    "padded": (PaddedPacker(), None),
    "single": (PaddedPacker(), 1),
}
MAX_TOKENS = {"tiny": 16384, "smollm2": 4096}
MOST = {"tiny": 200_000, "smollm2": 20_000}
KEYS = ("model", "context", "group", "steps", "minibatches")


def update(learner: Learner, buffer: StepBuffer) -> int:
    """All updates of a pass over the records; gives the tokens computed, padding included."""
    learner.policy.zero_grad(set_to_none=False)
    computed = 0
    for batch in buffer.updates(seed=0, iteration=0):
        computed += sum(microbatch.tokens.input_ids_BT.numel() for microbatch in batch)
        learner.update(batch, torch.Tensor.backward, dict)
    return computed


def gradient(policy: Policy) -> torch.Tensor:
    parts = [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
    return torch.cat(parts)


def compare(
    policy: Policy, model: str, context: str, group: int, steps: int, cut: str, most: int, repeats: int
) -> dict[str, Any]:
    """A row of the table, without its limit."""
    records = episodes(context, steps, group)
    learner = Learner(policy, Alternating(), packer=PrefixTreePacker(), max_tokens=MAX_TOKENS[model])
    with torch.no_grad():
        experience = learner.prepare(records)
    row: dict[str, Any] = dict(zip(KEYS, (model, context, group, steps, cut), strict=True))
    row |= {"segments": len(experience.steps), "repeats": repeats, "read_tokens": sum(map(len, reads(records)))}
    calls: dict[str, Callable[[], int]] = {}
    expected = None
    for name, (packer, tokens) in SIDES.items():
        if name != "tree" and row["read_tokens"] > most:
            continue
        buffer = StepBuffer(packer, tokens or MAX_TOKENS[model], num_minibatches=4 if cut == "steps" else 1)
        buffer.hold(experience)
        calls[name] = lambda buffer=buffer: update(learner, buffer)  # type: ignore[misc]
        computed = calls[name]()  # warm-up
        found = gradient(policy)
        expected = found if expected is None else expected
        difference = float((found - expected).norm() / expected.norm())
        assert difference < 1e-4, (name, difference)
        row[name] = {"tokens": computed, "peak_bytes": peak_memory(calls[name])}
    for name, times in in_turns(calls, repeats).items():
        row[name] |= times
    print(json.dumps(row), file=sys.stderr)
    return row


def flop(policy: Policy, records: Sequence[Episode]) -> dict[str, float]:
    """What an update of the records cannot do without, forward and backward."""
    config = policy.model.config
    tokens, pairs = unique(reads(records))
    actions = sum(len(step.action_ids) for episode in records for step in episode.steps)
    trunk = sum(layer.weight.numel() for layer in policy.trunk.modules() if isinstance(layer, nn.Linear))
    head = policy.model.get_output_embeddings().weight.numel()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    twice = actions * config.vocab_size > policy_module._LOGITS_PER_CHUNK
    attention = 12 * config.num_hidden_layers * width * pairs
    total = 6 * trunk * tokens + (8 if twice else 6) * head * actions + attention
    return {"unique_tokens": tokens, "pairs": pairs, "flop": total, "attention_flop": attention}


def matmul_rate(policy: Policy, tokens: int = 1024) -> float:
    """FLOP a second of process time: forward and both backward products of the trunk's linear layers."""
    shapes = Counter(tuple(layer.weight.shape) for layer in policy.trunk.modules() if isinstance(layer, nn.Linear))
    done = spent = 0.0
    for (out, width), count in shapes.items():
        x, weight, y = torch.randn(tokens, width), torch.randn(out, width), torch.randn(tokens, out)
        products = [lambda a=a, b=b: a @ b for a, b in ((x, weight.T), (y, weight), (y.T, x))]
        often = max(1, int(4e9 / (2 * tokens * out * width)))  # short products together
        for product in products:
            product()
            many = lambda product=product, often=often: [product() for _ in range(often)]  # noqa: E731
            spent += count * statistics.median(seconds(many)[1] for _ in range(3)) / often
            done += count * 2 * tokens * out * width
    return done / spent


def branch_tokens(made: Policy, repeats: int) -> float:
    """What a branch costs beside its tokens, in tokens: 1,024 of them on a trunk of 32, in 64 branches and in 8."""
    costs = []
    none = torch.zeros(0, dtype=torch.int64)
    for count in (64, 8):
        lengths = torch.tensor([32, *[1024 // count] * count])
        ends = lengths.cumsum(0)
        until = ends.repeat_interleave(lengths)
        until[:32] = width = int(ends[-1])
        positions = torch.arange(width) - (ends - lengths - 32).clamp(min=0).repeat_interleave(lengths)
        batch = TokenBatch(torch.arange(width)[None] % VOCABULARY, positions[None], until[None], none, none, none, none)
        call = lambda batch=batch: trunk_states(made.trunk, batch).square().mean().backward()  # noqa: E731
        call()
        costs.append(statistics.median(seconds(call)[1] for _ in range(repeats)))
    return (costs[0] - costs[1]) / (64 - 8) / (costs[1] / width)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["model", "context", "group", "steps", "minibatches", "tokens read", "unique", "tree: tokens, CPU s, MiB"]
    heads += ["tree, ms a step", "limit, s", "share", "padded: CPU s, MiB", "tokens, CPU ratio", "one by one: CPU s, MiB"]
    lines = []
    for row in rows:
        tree = row["tree"]
        cells = [str(row[key]) for key in KEYS] + [f"{row['read_tokens']:,}", f"{row['unique_tokens']:,}"]
        cells += [f"{tree['tokens']:,}, {tree['process_seconds']:.3g}, {tree['peak_bytes'] / 2**20:,.0f}"]
        cells += [f"{1e3 * tree['process_seconds'] / row['segments']:.1f}", f"{row['limit_seconds']:.3g}"]
        cells += [f"{row['limit_seconds'] / tree['process_seconds']:.2f}"]
        for name in ("padded", "single"):
            side = row.get(name)
            cells.append(f"{side['process_seconds']:.3g}, {side['peak_bytes'] / 2**20:,.0f}" if side else "")
            if name == "padded":
                ratios = [f"{side[key] / tree[key]:.1f}" for key in ("tokens", "process_seconds")] if side else []
                cells.append(", ".join(ratios))
        lines.append(cells)
    return markdown(heads, lines)


def write(path: Path, model: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Into the results of earlier runs: rows of the same case give way."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    new = {tuple(row[key] for key in KEYS) for row in rows}
    old = [row for row in report.get("rows", []) if tuple(row.get(key) for key in KEYS) not in new]
    report["rows"] = sorted([*old, *rows], key=lambda row: [str(row[key]).zfill(9) for key in KEYS])
    report.setdefault("runs", {})[model] = facts
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"], choices=["tiny", "smollm2"])
    parser.add_argument("--folder", help="SmolLM2-135M; random weights of its shape without")
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=CONTEXTS)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="episodes that begin alike")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="of an episode")
    parser.add_argument("--minibatches", nargs="+", default=["whole", "steps"], choices=["whole", "steps"])
    parser.add_argument("--most", type=int, help="tokens read, beyond which only trees are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--branches", action="store_true", help="measure branch_tokens alone")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "update.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    done = []
    for model in args.models:
        policy = tiny() if model == "tiny" else smol(args.folder)
        policy.train()
        facts: dict[str, Any] = {**about(), "parameters": sum(weight.numel() for weight in policy.parameters())}
        if args.branches:
            facts["branch_tokens"] = branch_tokens(policy, args.repeats)
            write(args.results, f"{model}, branch_tokens", [], facts)
            print(f"{model}: branch_tokens {facts['branch_tokens']:.2f}")
            continue
        facts |= {"max_tokens": MAX_TOKENS[model], "weights": args.folder if model == "smollm2" else None}
        cases = itertools.product(args.contexts, args.groups, args.steps, args.minibatches)
        for context, group, steps, cut in cases:
            facts["matmul_flop_per_second"] = rate = matmul_rate(policy)  # beside each case: machines change their pace
            row = compare(policy, model, context, group, steps, cut, args.most or MOST[model], args.repeats)
            needed = flop(policy, episodes(context, steps, group))
            rate = (rate + matmul_rate(policy)) / 2
            done.append({**row, **needed, "matmul_flop_per_second": rate, "limit_seconds": needed["flop"] / rate})
            write(args.results, model, done, facts)
    if done:
        print(table(done))


if __name__ == "__main__":
    main()
