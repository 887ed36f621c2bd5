"""What benchmarks of the learner learn from: scripted episodes, and models without files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steppo.advantages import Advantage
from steppo.batch import Credit, CreditBatch
from steppo.models import HFPolicy, Policy, TinyPolicy
from steppo.types import Episode, Step, StopReason

HEAD, OBSERVATION, ACTION, WINDOW = 200, 60, 8, 3
VOCABULARY = 512
CONTEXTS = ("append", "window", "state")


def episodes(context: str, steps: int, group: int, groups: int = 1, seed: int = 0) -> list[Episode]:
    """Random tokens: all prompts begin with the same instructions, the first ones of a group are the same.

    ``append``: a prompt holds the whole dialogue; ``window``: its last turns; ``state``: the newest observation alone.
    """
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(2, VOCABULARY, length).astype(np.int32)

    head, found = tokens(HEAD), []
    for number in range(groups):
        first = tokens(OBSERVATION)
        for _ in range(group):
            turns, records = [first], []
            for index in range(steps):
                shown = {"append": turns, "window": turns[-2 * WINDOW - 1 :], "state": turns[-1:]}[context]
                action, last = tokens(ACTION), index == steps - 1
                records.append(
                    Step(
                        prompt_ids=np.concatenate([head, *shown]),
                        action_ids=action,
                        behaviour_logprobs=np.zeros(ACTION, dtype=np.float32),
                        reward=float(len(found) % 2) if last else 0.0,
                        index=index,
                        finish_reason="stop",
                        terminated=last,
                        truncated=False,
                        action_valid=True,
                        observation="",
                        action="",
                        temperature=1.0,
                        policy_version=0,
                    )
                )
                turns = [*turns, action, tokens(OBSERVATION)]
            order = len(found)
            found.append(Episode(str(order), order, number, "", tuple(records), StopReason.TERMINATED))
    return found


class Alternating(Advantage):
    """1 and -1 in turns."""

    def __call__(self, batch: CreditBatch) -> Credit:
        return Credit(advantage_N=1.0 - 2.0 * (batch.index_N % 2).to(batch.reward_N.dtype))


class Shaped(Policy):
    """A Llama of the given shape with random weights."""

    def __init__(self, **shape: int) -> None:
        super().__init__()
        self.shape = shape

    def build(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**self.shape, max_position_embeddings=8192, tie_word_embeddings=True))


SHAPES = {
    "smollm2": {  # SmolLM2-135M's
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3},
    },
    "1.5b": {
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 152064},
        **{"num_attention_heads": 12, "num_key_value_heads": 2},
    },
}


def made(model: str, folder: str | None = None) -> Policy:
    """``tiny`` (1.9 M parameters), or one of ``SHAPES``: from a folder, or with random weights."""
    policy: Policy
    if model == "tiny":
        policy = TinyPolicy(hidden_size=192, num_layers=4, vocab_size=VOCABULARY, max_positions=8192, seed=0)
    else:
        policy = HFPolicy(folder) if folder else Shaped(**SHAPES[model])
    policy.build(lambda: ["go north"])
    return policy


def reads(found: Sequence[Episode]) -> list[list[int]]:
    """Tokens that a model reads of each step."""
    return [[*step.prompt_ids.tolist(), *step.action_ids[:-1].tolist()] for one in found for step in one.steps]


def unique(rows: Iterable[list[int]]) -> tuple[int, int]:
    """Tokens of rows, those that several begin with counted once, and the pairs of one with those that it sees."""
    tokens = pairs = 0
    for before, row in pairwise([[], *sorted(rows)]):
        same = next((at for at, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), min(len(before), len(row)))
        tokens += len(row) - same
        pairs += sum(range(same + 1, len(row) + 1))
    return tokens, pairs
