"""What sampling costs: with caches kept between steps, without, by transformers' ``generate``; and how near the limit is.

    pip install -c constraints.txt -e "."
    python benchmarks/rollout.py tiny
    python benchmarks/rollout.py smollm2 --model models/smollm2-135m
    python benchmarks/rollout.py 1.5b --device cuda --batches 8 32 128 --results benchmarks/results/rollout_gpu.json

Dialogues are appended to: prompts begin with 200 tokens, observations have 60 tokens, actions 8. They are scripted, there is
no environment. A batch of episodes goes step by step, each with its own. ``kept``: ``HFEngine``, ``plain``: ``PlainEngine``,
``generate``: transformers' on each step's prompts. One thread, float32; on a GPU bfloat16, by the clock. They take turns,
medians after a first step that does not count. ``tiny``: the policy of ``benchmarks/update.py``. ``smollm2``: SmolLM2-135M,
or random weights of its shape; ``1.5b``: random weights.

The limit of a forward pass is the larger of its arithmetic over the matmul rate and its bytes (weights once, the keys and
values of each row) over the memory's bandwidth, both measured in the same run. Also reported: the decode limit at batches
of 8 and 32, with a profile and beside ticks with weights in torch's own layout, and what a pass costs beside its tokens.
Adds to ``benchmarks/results/rollout.json`` and prints tables. All of ``tiny`` takes about half an hour, all of ``smollm2``
twenty minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import about, seconds
from records import SHAPES, made
from torch.profiler import ProfilerActivity, profile

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.models.policy import Policy
from steppo.types import Request, Sampling

ROOT = Path(__file__).parent.parent
HEAD, OBSERVATION, ACTION = 200, 60, 8
KINDS = ("kept", "plain", "generate")
Times = tuple[float, float]  # by the clock, and of the process


# ---- the machine ----


def timed(policy: Policy, call: Callable[[], Any]) -> Times:
    return seconds(call, policy.device.type)


def median(times: list[Times]) -> Times:
    wall, process = zip(*times, strict=True)
    return statistics.median(wall), statistics.median(process)


def machine(policy: Policy) -> dict[str, float]:
    """FLOP/s of a matrix product, and bytes/s of reading what no cache holds."""
    kind = {"device": policy.device, "dtype": policy.dtype}
    width = 1024 if policy.device.type == "cpu" else 8192
    one, other, many = torch.randn(width, width, **kind), torch.randn(width, width, **kind), torch.ones(2**27, **kind)
    products = sorted(timed(policy, lambda: one @ other)[1] for _ in range(9))
    sums = sorted(timed(policy, many.sum)[1] for _ in range(7))
    return {"flops": 2 * width**3 / products[2], "bytes_per_s": many.nbytes / sums[2]}


class Limit:
    """The least time of forward passes, by the measured rates."""

    def __init__(self, policy: Policy, rates: dict[str, float]) -> None:
        config = policy.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        embedding = policy.model.get_input_embeddings().weight.numel()
        self.trunk = sum(weight.numel() for weight in policy.trunk.parameters()) - embedding
        self.head = policy.model.get_output_embeddings().weight.numel()
        self.per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * width  # scores and their use
        self.bytes = policy.dtype.itemsize
        self.per_key = (
            2 * self.bytes * config.num_hidden_layers * config.num_key_value_heads * width
        )  # bytes of a key and a value
        self.rates = rates

    def seconds(self, rows: int, new: int, length: int) -> float:
        """Of a pass that reads ``new`` tokens in each row, the last of them at ``length``, and draws one."""
        pairs = new * length - new * (new - 1) / 2
        flop = rows * (2 * self.trunk * new + 2 * self.head + self.per_pair * pairs)
        read = self.bytes * (self.trunk + self.head) + rows * length * self.per_key
        return max(flop / self.rates["flops"], read / self.rates["bytes_per_s"])

    def rollout(self, rows: int, steps: int) -> float:
        total, length = 0.0, HEAD
        for step in range(steps):
            new = OBSERVATION + (1 if step else HEAD)  # the last token of an action is read with what follows
            length += OBSERVATION
            total += self.seconds(rows, new, length)
            for _ in range(ACTION - 1):
                length += 1
                total += self.seconds(rows, 1, length)
            length += 1
        return total


# ---- rollouts ----


def words(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(2, 512, length).astype(np.int32)


Answer = Callable[[int, list[np.ndarray]], list[np.ndarray]]  # step and prompts -> actions


def rollout(rows: int, steps: int, answer: Answer) -> None:
    rngs = [np.random.default_rng(row) for row in range(rows)]
    dialogues = [words(rng, HEAD) for rng in rngs]
    for step in range(steps):
        dialogues = [np.concatenate([past, words(rng, OBSERVATION)]) for past, rng in zip(dialogues, rngs, strict=True)]
        actions = answer(step, dialogues)
        assert all(len(action) == ACTION for action in actions)
        dialogues = [np.concatenate(pair) for pair in zip(dialogues, actions, strict=True)]


def by_engine(engine: Engine) -> Answer:
    def answer(step: int, prompts: list[np.ndarray]) -> list[np.ndarray]:
        for row, prompt in enumerate(prompts):
            seed = 10**6 * step + row
            engine.submit(Request(row, str(row), prompt, Sampling(1.0, ACTION), seed))
        actions: dict[int, np.ndarray] = {}
        while len(actions) < len(prompts):
            for done in engine.poll():
                assert not done.error, done.error
                actions[done.request_id] = done.action_ids
        return [actions[row] for row in range(len(prompts))]

    return answer


def by_generate(policy: Policy) -> Answer:
    settings = {"max_new_tokens": ACTION, "min_new_tokens": ACTION, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def answer(step: int, prompts: list[np.ndarray]) -> list[np.ndarray]:
        ids = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(policy.device)
        found = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return list(found[:, ids.shape[1] :].int().cpu().numpy())

    return answer


def compare(policy: Policy, limit: Limit, rows: int, steps: int, repeats: int, kinds: list[str]) -> dict[str, Any]:
    """A row of the table."""
    kept, plain = HFEngine(rows, cache_tokens=rows * (HEAD + steps * (OBSERVATION + ACTION))), PlainEngine(rows)
    kept.bind(policy)
    plain.bind(policy)
    answers = {"kept": by_engine(kept), "plain": by_engine(plain), "generate": by_generate(policy)}
    times: dict[str, list[Times]] = {kind: [] for kind in kinds}
    for kind in kinds:
        rollout(rows, 1, answers[kind])
    before = kept.tokens_read
    for _ in range(repeats):
        for kind in kinds:
            kept.load_weights([], 0)
            times[kind].append(timed(policy, lambda kind=kind: rollout(rows, steps, answers[kind])))
    found: dict[str, Any] = {"batch": rows, "steps": steps, "repeats": repeats, "limit_seconds": limit.rollout(rows, steps)}
    for kind in kinds:
        wall, process = median(times[kind])
        found[kind] = {"seconds": wall, "process_seconds": process, "steps_per_s": rows * steps / process}
        found[kind]["tokens_per_s"] = ACTION * found[kind]["steps_per_s"]
    found["tokens_read"] = (kept.tokens_read - before) // repeats  # by the one that keeps caches
    for kind in kinds[1:]:
        found[f"over_{kind}"] = found[kind]["process_seconds"] / found[kinds[0]]["process_seconds"]
    print(json.dumps(found), file=sys.stderr)
    return found


def decode(policy: Policy, limit: Limit, rows: int, length: int, ticks: int) -> dict[str, Any]:
    """Ticks of one token in each row, which is about ``length`` tokens long, with weights in torch's own layout, too; and
    where their time goes."""
    engine = HFEngine(rows, cache_tokens=rows * (length + 4 * ticks))
    engine.bind(policy)
    prompt = words(np.random.default_rng(0), length - ticks // 2)
    for row in range(rows):  # siblings: their prompt is read once
        engine.submit(Request(row, str(row), prompt, Sampling(1.0, 3 * ticks + 4), row))
    for _ in range(2):
        engine.poll()
    with torch.backends.mkldnn.flags(enabled=False):
        usual = median([timed(policy, engine.poll) for _ in range(ticks)])[1]
    wall, process = median([timed(policy, engine.poll) for _ in range(ticks)])
    on_gpu = policy.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        total = timed(policy, lambda: [engine.poll() for _ in range(ticks)])[0] / ticks
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    by_name: Counter[str] = Counter()
    for event in profiled.key_averages():
        if "::" in event.key:
            by_name[event.key.split("::")[1]] += getattr(event, own) / 1e6 / ticks
    groups = {
        "products": ("addmm", "mm", "bmm", "_linear_pointwise"),
        "drawing": ("exp", "cumsum", "logsumexp", "searchsorted", "argmax", "amax"),
    }
    groups["attention"] = ("_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward")
    groups["attention"] += ("_efficient_attention_forward",)
    shares = {name: sum(by_name[key] for key in keys) / total for name, keys in groups.items()}
    shares["other operators"] = sum(by_name.values()) / total - sum(shares.values())
    shares["idle" if on_gpu else "Python"] = 1 - sum(shares.values())
    least = limit.seconds(rows, 1, length)
    found = {"batch": rows, "length": length, "seconds": wall, "process_seconds": process, "limit_seconds": least}
    found |= {"tokens_per_s": rows / process, "over_limit": process / least, "shares": shares}
    found["process_seconds_in_torch_layout"] = usual
    print(json.dumps(found), file=sys.stderr)
    return found


def pass_tokens(policy: Policy) -> float:
    """Time of a forward pass over one token, over what a token more costs."""

    few, many = (256, 512) if policy.device.type == "cpu" else (8192, 16384)

    def least(tokens: int) -> float:
        ids = torch.arange(tokens, device=policy.device)[None].reshape(-1, min(tokens, 64)) % 500
        return min(timed(policy, lambda: policy.trunk(input_ids=ids, use_cache=False))[1] for _ in range(7))

    return least(1) / ((least(many) - least(few)) / (many - few))


# ---- the report ----


def tables(part: dict[str, Any]) -> str:
    """Markdown."""
    kinds = [kind for kind in KINDS if part["rows"] and kind in part["rows"][0]]
    heads = ["batch", "steps", *(f"{kind}: steps/s, tokens/s" for kind in kinds)]
    heads += [*(f"over {kind}" for kind in kinds[1:]), "over the limit"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in part["rows"]:
        cells = [str(row["batch"]), str(row["steps"])]
        cells += [f"{row[kind]['steps_per_s']:.3g}, {row[kind]['tokens_per_s']:.3g}" for kind in kinds]
        cells += [f"{row[f'over_{kind}']:.1f} x" for kind in kinds[1:]]
        cells += [f"{row[kinds[0]]['process_seconds'] / row['limit_seconds']:.1f} x"]
        lines.append("| " + " | ".join(cells) + " |")
    for row in part["decode"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        lines.append(
            f"a tick of {row['batch']} rows of {row['length']} tokens: {1e3 * row['process_seconds']:.1f} ms, limit "
            f"{1e3 * row['limit_seconds']:.1f} ms ({row['over_limit']:.1f} x); {shares}; with weights in torch's layout "
            f"{1e3 * row['process_seconds_in_torch_layout']:.1f} ms"
        )
    lines.append(f"a pass costs as much as {part['pass_tokens']:.0f} tokens beside its own")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tiny", *SHAPES])
    parser.add_argument("--model", help="folder of SmolLM2-135M; random weights of its shape unless given")
    parser.add_argument("--steps", type=int, nargs="*", help="of an episode: 2 4 8 16 32, larger models: 8")
    parser.add_argument("--batches", type=int, nargs="*", help="episodes at a time: 8 32, larger models: 4 8")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--decode", type=int, nargs="*", default=[8, 32], help="batches of the decode limit")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "rollout.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    tiny = args.part == "tiny"
    torch.manual_seed(0)
    policy = made(args.part, args.model)
    policy.stop_ids = frozenset()  # all actions have their full length
    policy.to(args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    with torch.no_grad():
        rates = machine(policy)
        limit = Limit(policy, rates)
        part: dict[str, Any] = {
            **about(),
            "parameters": {"trunk": limit.trunk, "head": limit.head},
            "rates": rates,
            "pass_tokens": pass_tokens(policy),
            "decode": [decode(policy, limit, rows, length=600, ticks=12) for rows in args.decode],
            "rows": [],
        }
        for rows in args.batches if args.batches is not None else [8, 32] if tiny else [4, 8]:
            for steps in args.steps if args.steps is not None else [2, 4, 8, 16, 32] if tiny else [8]:
                part["rows"].append(compare(policy, limit, rows, steps, args.repeats, args.kinds))
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results | {args.part: part}, indent=1) + "\n")
    print(tables(part))


if __name__ == "__main__":
    main()
