"""What an update costs: prefix trees against padded rows and steps one by one, on the same records, and the machine's limit.

    pip install -c constraints.txt -e "."
    python benchmarks/update.py                                          # tiny: about 30 minutes
    python benchmarks/update.py --models smollm2 --folder models/smollm2-135m --groups 1 --steps 8 16 32   # about an hour

    python benchmarks/update.py --device cuda --models smollm2 1.5b --tasks 4 --results benchmarks/results/update_gpu.json

Forward and backward of the library's updates (``StepBuffer``, ``Learner.update``), packing included and the optimizer left
out, in float32 and one thread; on a GPU in bfloat16, by the clock. Prompts begin with 200 tokens, observations have 60,
actions 8; ``append`` shows the whole dialogue, ``window`` its last 3 turns, ``state`` the newest observation; siblings of a
group begin alike, tasks have the first 200 tokens in common. ``whole``: all steps of the records in one update; ``steps``:
four updates of random steps. Sides take turns, medians after two passes, of which the second gives peak memory above what
was in use before (weights, gradients); where a pass takes longer than a minute the first is all (``repeats`` 0). Gradients
must agree. A side is left out where it would compute more than ``--most`` tokens. ``--every 8``: sides but the trees make
each eighth of their passes, in the order of size, and count it as eight; their gradients must agree with those of trees of
the same steps. ``tree``: branches by ``sdpa`` (on GPUs by torch's kernel for rows of any lengths); ``flex``: by
``flex_attention``.

``limit`` is (6 x trunk parameters x unique tokens + 6, or 8 where logits are computed twice, x head parameters x action
tokens + 12 x layers x width of the queries x pairs of unique tokens) FLOP over the matmul rate that this run measured on
the model's own matrices; ``share`` is how much of it the trees reach. The ratio of FLOP is what a row for each step, without
padding, needs over that. ``--branches`` measures ``branch_tokens`` instead. Writes into ``benchmarks/results/update.json``,
where other rows stay, and prints a table.
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
from records import CONTEXTS, SHAPES, VOCABULARY, Alternating, episodes, made, reads, unique
from torch import nn

from steppo.batch import Microbatch, TokenBatch
from steppo.buffer import StepBuffer
from steppo.learner import Learner
from steppo.models import Policy
from steppo.models import policy as policy_module
from steppo.models.policy import trunk_states
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from steppo.types import Episode

ROOT = Path(__file__).parent.parent
SIDES: dict[str, tuple[Packer, int | None, str]] = {  # packer, most tokens of a microbatch if not the model's, attention
    "tree": (PrefixTreePacker(), None, "sdpa"),
    "flex": (PrefixTreePacker(), None, "flex_attention"),  # learns on GPUs only
    "padded": (PaddedPacker(), None, "sdpa"),
    "single": (PaddedPacker(), 1, "sdpa"),
}
MAX_TOKENS = {
    "cpu": {"tiny": 16384, "smollm2": 4096, "1.5b": 4096},
    "cuda": {"tiny": 65536, "smollm2": 32768, "1.5b": 8192},
}
LONG_S = 60.0  # measured once
MOST = {"tiny": 200_000, "smollm2": 20_000}
KEYS = ("model", "context", "group", "tasks", "steps", "minibatches")


def size(microbatch: Microbatch) -> int:
    """Tokens, padding included."""
    return microbatch.tokens.input_ids_BT.numel()


def update(learner: Learner, buffer: StepBuffer, every: int) -> tuple[list[Microbatch], list[Microbatch]]:
    """All updates of a pass over the records; gives the microbatches planned and those computed."""
    learner.policy.zero_grad(set_to_none=False)
    planned, computed = list[Microbatch](), list[Microbatch]()
    for batch in buffer.updates(seed=0, iteration=0):
        chosen = sorted(batch, key=size)[min(every // 2, len(batch) - 1) :: every]
        learner.update(chosen, torch.Tensor.backward, dict)
        planned += batch
        computed += chosen
    return planned, computed


def gradient(policy: Policy) -> torch.Tensor:
    parts = [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
    return torch.cat(parts)


def compare(
    policy: Policy, case: dict[str, Any], sides: Sequence[str], max_tokens: int, most: int, every: int, repeats: int
) -> dict[str, Any]:
    """A row of the table, without its limit."""
    device = policy.device.type
    records = episodes(case["context"], case["steps"], case["group"], case["tasks"])
    learner = Learner(policy, Alternating(), packer=PrefixTreePacker(), max_tokens=max_tokens)
    with torch.no_grad():
        experience = learner.prepare(records)
    row = {**case, "segments": len(experience.steps), "repeats": repeats, "read_tokens": sum(map(len, reads(records)))}
    closeness = 1e-4 if policy.dtype == torch.float32 else 0.05
    calls: dict[str, Callable[[], Any]] = {}
    for weight in policy.trained_parameters():
        weight.grad = torch.zeros_like(weight)  # no part of the first peak
    trees, of_all = StepBuffer(SIDES["tree"][0], max_tokens), None
    trees.hold(experience)
    for name in sides:
        packer, tokens, attention = SIDES[name]
        is_tree = packer is SIDES["tree"][0]
        if not is_tree and row["read_tokens"] > most:
            continue
        buffer = StepBuffer(packer, tokens or max_tokens, num_minibatches=4 if case["minibatches"] == "steps" else 1)
        buffer.hold(experience)

        def call(buffer: StepBuffer = buffer, attention: str = attention, every: int = 1 if is_tree else every) -> Any:
            policy.model.set_attn_implementation(attention)
            return update(learner, buffer, every)

        passes, first = list[tuple[list[Microbatch], list[Microbatch]]](), list[tuple[float, float]]()
        peak = peak_memory(lambda: first.append(seconds(lambda: passes.append(call()), device)), device)  # noqa: B023
        [(wall, process)], [(planned, computed)] = first, passes
        found = gradient(policy)
        expected = of_all = found if of_all is None else of_all
        if len(computed) < len(planned):
            steps = torch.cat([part.index_N for part in computed]).sort().values.numpy()
            policy.zero_grad(set_to_none=False)
            same = trees.microbatches(steps, computed[0].update_steps, computed[0].update_tokens)
            learner.update(same, torch.Tensor.backward, dict)
            expected = gradient(policy)
        difference = float((found - expected).norm() / expected.norm())
        assert difference < closeness, (name, difference)
        share = len(computed) / len(planned)
        row[name] = {"tokens": sum(map(size, planned)), "share_computed": share, "difference": difference}
        row[name] |= {"repeats": 0 if wall > LONG_S else repeats, "peak_bytes": peak}
        row[name] |= {"seconds": wall / share, "process_seconds": process / share}
        if row[name]["repeats"]:
            calls[name] = call
            row[name]["peak_bytes"] = peak_memory(call, device)
    for name, times in in_turns(calls, repeats, device).items():
        row[name] |= {key: value / row[name]["share_computed"] for key, value in times.items()}
    print(json.dumps(row), file=sys.stderr)
    return row


def flop(policy: Policy, records: Sequence[Episode]) -> dict[str, float]:
    """What an update of the records cannot do without, forward and backward; ``rows_flop``: with a row for each step."""
    config, rows = policy.model.config, reads(records)
    actions = sum(len(step.action_ids) for episode in records for step in episode.steps)
    trunk = sum(layer.weight.numel() for layer in policy.trunk.modules() if isinstance(layer, nn.Linear))
    head = policy.model.get_output_embeddings().weight.numel()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    of_head = (8 if actions * config.vocab_size > policy_module._LOGITS_PER_CHUNK else 6) * head * actions
    of_pair = 12 * config.num_hidden_layers * width

    def total(tokens: int, pairs: int) -> int:
        return 6 * trunk * tokens + of_head + of_pair * pairs

    tokens, pairs = unique(rows)
    alone = total(sum(map(len, rows)), sum(len(row) * (len(row) + 1) // 2 for row in rows))
    needed = {"flop": total(tokens, pairs), "attention_flop": of_pair * pairs, "rows_flop": alone}
    return {"unique_tokens": tokens, "pairs": pairs, **needed}


def matmul_rate(policy: Policy) -> float:
    """FLOP a second: forward and both backward products of the trunk's linear layers."""
    device, least, tokens = policy.device.type, *((4e9, 1024) if policy.device.type == "cpu" else (1e13, 16384))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=policy.dtype)

    shapes = Counter(tuple(layer.weight.shape) for layer in policy.trunk.modules() if isinstance(layer, nn.Linear))
    done = spent = 0.0
    for (out, width), count in shapes.items():
        x, weight, y = random(tokens, width), random(out, width), random(tokens, out)
        products = [lambda a=a, b=b: a @ b for a, b in ((x, weight.T), (y, weight), (y.T, x))]
        often = max(1, int(least / (2 * tokens * out * width)))  # short products together
        for product in products:
            product()
            many = lambda product=product, often=often: [product() for _ in range(often)]  # noqa: E731
            spent += count * statistics.median(seconds(many, device)[1] for _ in range(3)) / often
            done += count * 2 * tokens * out * width
    return done / spent


def branch_tokens(policy: Policy, repeats: int) -> float:
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
        batch = batch.to(policy.device)
        call = lambda batch=batch: trunk_states(policy.trunk, batch).square().mean().backward()  # noqa: E731
        call()
        costs.append(statistics.median(seconds(call, policy.device.type)[1] for _ in range(repeats)))
    return (costs[0] - costs[1]) / (64 - 8) / (costs[1] / width)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    others = {"flex": "flex", "padded": "padded", "single": "one by one"}
    others = {name: words for name, words in others.items() if any(name in row for row in rows)}
    heads = [*KEYS, "tokens read", "unique", "tree: tokens, s, MiB", "tree, ms a step", "limit, s", "share"]
    for name, words in others.items():
        heads += [f"{words}: s, MiB", *(["ratio of tokens, FLOP, s"] if name == "padded" else [])]
    lines = []
    for row in rows:
        tree = row["tree"]
        cells = [str(row[key]) for key in KEYS] + [f"{row['read_tokens']:,}", f"{row['unique_tokens']:,}"]
        cells += [f"{tree['tokens']:,}, {tree['process_seconds']:.3g}, {tree['peak_bytes'] / 2**20:,.0f}"]
        cells += [f"{1e3 * tree['process_seconds'] / row['segments']:.1f}", f"{row['limit_seconds']:.3g}"]
        cells += [f"{row['limit_seconds'] / tree['process_seconds']:.2f}"]
        for name in others:
            side = row.get(name)
            cells.append(f"{side['process_seconds']:.3g}, {side['peak_bytes'] / 2**20:,.0f}" if side else "")
            if name == "padded":
                ratios = [(side["tokens"], tree["tokens"]), (row["rows_flop"], row["flop"])] if side else []
                ratios += [(side["process_seconds"], tree["process_seconds"])] if side else []
                cells.append(", ".join(f"{this / that:.1f}" for this, that in ratios))
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
    parser.add_argument("--models", nargs="+", default=["tiny"], choices=["tiny", *SHAPES])
    parser.add_argument("--folder", help="SmolLM2-135M; random weights of its shape without")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=CONTEXTS)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="episodes that begin alike")
    parser.add_argument("--tasks", type=int, default=1, help="groups of one update")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="of an episode")
    parser.add_argument("--minibatches", nargs="+", default=["whole", "steps"], choices=["whole", "steps"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="all that can learn there unless given; the tree first")
    parser.add_argument("--most", type=int, help="tokens read, beyond which only trees are measured")
    parser.add_argument("--every", type=int, default=1, help="sides but trees: each N-th pass by size, counted N times")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--branches", action="store_true", help="measure branch_tokens alone")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "update.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    done = []
    for model in args.models:
        policy = made(model, args.folder if model == "smollm2" else None).train()
        policy.to(args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
        facts: dict[str, Any] = {**about(), "parameters": sum(weight.numel() for weight in policy.parameters())}
        if args.branches:
            facts["branch_tokens"] = branch_tokens(policy, args.repeats)
            write(args.results, f"{model}, branch_tokens", [], facts)
            print(f"{model}: branch_tokens {facts['branch_tokens']:.2f}")
            continue
        max_tokens = MAX_TOKENS[args.device][model]
        facts |= {"max_tokens": max_tokens, "weights": args.folder if model == "smollm2" else None}
        sides = args.sides or [name for name in SIDES if name != "flex" or args.device == "cuda"]
        for values in itertools.product([model], args.contexts, args.groups, [args.tasks], args.steps, args.minibatches):
            case = dict(zip(KEYS, values, strict=True))
            facts["matmul_flop_per_second"] = rate = matmul_rate(policy)  # beside each case: machines change their pace
            most = args.most or MOST.get(model, 10**6)
            row = compare(policy, case, sides, max_tokens, most, args.every, args.repeats)
            needed = flop(policy, episodes(case["context"], case["steps"], case["group"], case["tasks"]))
            rate = (rate + matmul_rate(policy)) / 2
            done.append({**row, **needed, "matmul_flop_per_second": rate, "limit_seconds": needed["flop"] / rate})
            write(args.results, model, done, facts)
    if done:
        print(table(done))


if __name__ == "__main__":
    main()
