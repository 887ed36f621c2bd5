"""An iteration's learning, beside TRL's: old log-probabilities and one update, forward and backward, on the same records.

In an environment of its own, which has TRL and what steppo's learner needs, from the repository's root:

    python -m venv trl && trl/bin/pip install -c constraints.txt trl==1.16.0 torch transformers peft psutil
    PYTHONPATH=. trl/bin/python benchmarks/trl_update.py --folder models/smollm2-135m    # about 15 minutes

``TRL``: its ``GRPOTrainer`` gets each episode as one row (``rollout_func`` returns the records, ``env_mask`` marks actions;
``num_iterations=2`` makes it compute old log-probabilities; no learning rate, so that each iteration begins alike), timed
from a step's begin to where the gradient is there. ``steppo``: ``Learner.prepare`` and the update of ``PrefixTreePacker``,
``GRPO`` without its divisor and token ratios; ``padded``: the same with ``PaddedPacker``. One group, token mean, no KL.
``TreeRow`` is the packing of TRL's experimental AsyncGRPO (its ``packing.py``): forward and backward alone, beside
``steppo, update``. Its attention kernel wants a GPU; here torch's attention reads the same segments and paths, and logits
are made where it takes loss terms. AsyncGRPO makes one sample of an appended dialogue; prompts that are written anew it gets
here as one sample per step.

Float32, one thread, medians of process seconds; TRL's passes come after the others. Gradient norms must agree: TRL cannot
learn from rewritten contexts in one row, so there it has none. Writes ``trl`` into ``benchmarks/results/update.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from measuring import about, in_turns, markdown
from records import CONTEXTS, episodes, made
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AttentionInterface, PreTrainedTokenizerFast, TrainerCallback
from transformers.masking_utils import AttentionMaskInterface
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo.packing import TreeRow

from steppo.advantages import GRPO
from steppo.buffer import StepBuffer
from steppo.learner import Learner
from steppo.losses import ClippedLoss, ObjectiveSettings
from steppo.models import Policy
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from steppo.types import Episode

ROOT = Path(__file__).parent.parent
Row = tuple[list[int], list[int]]  # token ids, and 1 where an action is


def norm(model: torch.nn.Module) -> float:
    return float(torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm())


def dialogue(episode: Episode) -> Row:
    """An appended episode as one row."""
    ids: list[int] = []
    mask: list[int] = []
    for step in episode.steps:
        new = step.prompt_ids[len(ids) :].tolist()
        ids += [*new, *step.action_ids.tolist()]
        mask += [0] * len(new) + [1] * len(step.action_ids)
    return ids, mask


def of_steppo(policy: Policy, records: list[Episode], packer: Packer, max_tokens: int) -> dict[str, Callable[[], float]]:
    """Scoring with an update, and the update alone; both give the gradient's norm."""
    loss, objective = ClippedLoss("token", dual_clip=0.0), ObjectiveSettings(aggregation="token-mean")
    learner = Learner(policy, GRPO(False), loss=loss, objective=objective, packer=packer, max_tokens=max_tokens)
    buffer = StepBuffer(packer, max_tokens)

    def update() -> float:
        policy.zero_grad()
        for batch in buffer.updates(seed=0, iteration=0):
            learner.update(batch, Tensor.backward, dict)
        return norm(policy)

    def iteration() -> float:
        with torch.no_grad():
            buffer.hold(learner.prepare(records))
        return update()

    return {"iteration": iteration, "update": update}


def tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, tree_kv_index: Tensor, tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What TRL's kernel computes: each segment's queries see their path, which ends with the segment."""
    found = []
    starts_q, starts_k = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    for at in range(len(starts_q) - 1):
        own = query[:, :, starts_q[at] : starts_q[at + 1]]
        path = tree_kv_index[starts_k[at] : starts_k[at + 1]]
        keys, values = key.index_select(2, path), value.index_select(2, path)
        length, seen = own.shape[2], len(path)
        lower = None if length == seen else torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
        out = torch.nn.functional.scaled_dot_product_attention(
            own, keys, values, attn_mask=lower, is_causal=lower is None, scale=scaling, enable_gqa=True
        )
        found.append(out.transpose(1, 2))
    return torch.cat(found, 1), None


def of_tree_row(policy: Policy, rows: list[Row], advantages: list[float], budget: int) -> Callable[[], float]:
    """Forward and backward of TRL's packed rows; gives the gradient's norm."""
    AttentionInterface.register("tree_torch", tree_attention)
    AttentionMaskInterface.register("tree_torch", lambda **_: None)
    tokens = sum(sum(mask) for _, mask in rows)

    def packed() -> list[dict[str, Tensor]]:
        trees = [TreeRow()]
        for (ids, mask), advantage in zip(rows, advantages, strict=True):
            sample = {"input_ids": torch.tensor(ids), "completion_mask": torch.tensor(mask)}
            sample |= {"old_log_probs": torch.zeros(len(ids)), "advantage": advantage, "group_id": 0}  # type: ignore[dict-item]
            if trees[-1].samples and not trees[-1].fits(sample, budget):
                trees.append(TreeRow())
            trees[-1].add(sample)
        return [tree.pack() for tree in trees]

    def call() -> float:
        policy.zero_grad()
        attention = policy.model.config._attn_implementation
        policy.model.set_attn_implementation("tree_torch")
        for row in packed():
            kwargs = {key: row[key] for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
            hidden = policy.trunk(
                input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False, **kwargs
            ).last_hidden_state[0]
            target = row["shift_labels"][row["token_index"]]
            logprobs = policy.logits(hidden[row["token_index"]]).log_softmax(-1).gather(1, target[:, None])[:, 0]
            ratio = (logprobs - logprobs.detach()).exp()
            (-(ratio * row["advantages"]).sum() / tokens).backward()
        policy.model.set_attn_implementation(attention)
        return norm(policy)

    return call


class Clock(TrainerCallback):
    """Process seconds from a step's begin until the gradient is there, and the gradient's norm."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.norms: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.times.append(time.process_time() - self.start)
        self.norms.append(norm(model))


def of_trl(policy: Policy, rows: list[Row], rewards: list[float], repeats: int) -> tuple[float, float, float]:
    """Median process seconds of an old pass with an update and of an update alone, and the gradient's norm."""
    firsts = [mask.index(1) for _, mask in rows]
    output = {
        "prompt_ids": [ids[:first] for (ids, _), first in zip(rows, firsts, strict=True)],
        "completion_ids": [ids[first:] for (ids, _), first in zip(rows, firsts, strict=True)],
        "env_mask": [mask[first:] for (_, mask), first in zip(rows, firsts, strict=True)],
        "logprobs": [[0.0] * (len(ids) - first) for (ids, _), first in zip(rows, firsts, strict=True)],
    }
    words = {f"t{number}": number for number in range(int(policy.model.config.vocab_size))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0", eos_token="t1"
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            num_generations=len(rows),
            num_iterations=2,
            max_steps=2 * (repeats + 1),
            max_completion_length=max(len(ids) for ids in output["completion_ids"]),
            learning_rate=0.0,
            max_grad_norm=0.0,
            beta=0.0,
            loss_type="bnpo",
            scale_rewards="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=policy.model,
            reward_funcs=lambda completions, **_: rewards,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["t2"] * len(rows)}),
            processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: dict(output),
            callbacks=[clock],
        ).train()
    with_old, alone = clock.times[2::2], clock.times[3::2]  # each second step reuses the old pass; the first pair warms up
    return float(np.median(with_old)), float(np.median(alone)), clock.norms[-1]


def compare(policy: Policy, context: str, count: int, steps: int, shared: bool, args: argparse.Namespace) -> dict[str, Any]:
    """All sides on one group of episodes; ``shared``: their first prompts are the same."""
    records = episodes(context, steps, *((count, 1) if shared else (1, count)))
    records = [Episode(one.id, one.order, 0, "", one.steps, one.stop_reason) for one in records]
    rewards = [one.episode_return for one in records]
    middle = sum(rewards) / len(rewards)
    rows = [dialogue(one) for one in records]
    advantages = [reward - middle for reward in rewards]
    if context != "append":
        each = [(one, advantage) for one, advantage in zip(records, advantages, strict=True) for _ in one.steps]
        advantages = [advantage for _, advantage in each]
        rows = [
            ([*step.prompt_ids.tolist(), *step.action_ids.tolist()], [0] * len(step.prompt_ids) + [1] * len(step.action_ids))
            for one in records
            for step in one.steps
        ]
    ours = of_steppo(policy, records, PrefixTreePacker(), args.max_tokens)
    calls = {"steppo": ours["iteration"], "steppo, update": ours["update"]}
    calls["TreeRow, update"] = of_tree_row(policy, rows, advantages, args.max_tokens)
    if args.padded:
        calls["padded"] = of_steppo(policy, records, PaddedPacker(), args.max_tokens)["iteration"]
    norms = {name: call() for name, call in calls.items()}  # warm-up
    found = {name: times["process_seconds"] for name, times in in_turns(calls, args.repeats).items()}
    if context == "append":
        found["TRL"], found["TRL, update"], norms["TRL"] = of_trl(policy, rows, rewards, args.repeats)
    for other in norms.values():
        assert abs(other - norms["steppo"]) <= 1e-3 * norms["steppo"], norms
    row = {"model": args.model, "context": context, "episodes": count, "steps": steps, "shared": shared}
    return {**row, "process_seconds": found, "gradient_norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=["tiny", "smollm2"])
    parser.add_argument("--folder", help="SmolLM2-135M; random weights of its shape without")
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=CONTEXTS)
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--starts", nargs="+", default=["own", "shared"], choices=["own", "shared"], help="first prompts")
    parser.add_argument("--padded", action="store_true", help="padded rows too")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "update.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = made(args.model, args.folder)
    policy.train()
    rows = []
    for context in args.contexts:
        for start in args.starts:
            rows.append(compare(policy, context, args.episodes, args.steps, start == "shared", args))
            print(json.dumps(rows[-1]), flush=True)
    report = json.loads(args.results.read_text()) if args.results.is_file() else {}
    facts = about()
    facts["versions"]["trl"] = trl.__version__
    report.setdefault("trl", {})[args.model] = {**facts, "max_tokens": args.max_tokens, "rows": rows}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    names = ["TRL", "steppo", "padded", "TRL, update", "TreeRow, update", "steppo, update"]
    lines = []
    for row in rows:
        cells = [row["context"], str(row["episodes"]), str(row["steps"]), "shared" if row["shared"] else "own"]
        lines.append(cells + [f"{row['process_seconds'].get(name, float('nan')):.3g}" for name in names])
    print(markdown(["context", "episodes", "steps", "first prompts", *(f"{name}, CPU s" for name in names)], lines))


if __name__ == "__main__":
    main()
