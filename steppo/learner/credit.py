"""From the steps of all ranks to one credit batch, and back: credit covers the whole iteration, once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppo.advantages import Advantage
from steppo.advantages.base import time_order, tokens_in_order
from steppo.batch import Credit, CreditBatch
from steppo.distributed import gather, gather_columns, rank_and_world
from steppo.errors import ConfigError, RunError
from steppo.learner.scoring import Scores
from steppo.learner.steps import StepTable
from steppo.types import Episode, Step, StopReason


@dataclass(frozen=True, eq=False)
class AssignedCredit:
    """Credit of an iteration over all ranks, in logical order: the same on every rank, however many there are.

    Attributes:
        batch: What it was assigned from.
        credit: What was assigned, float64.
        mine: The credit of this rank's steps, in their order and in the dtype of their scores.
    """

    batch: CreditBatch
    credit: Credit
    mine: Credit

    def statistics(self) -> dict[str, float]:
        """What the critic was worth."""
        by_step = self.credit.target_N is not None
        target = self.credit.target_N if by_step else self.credit.target_A
        value = self.batch.value_N if by_step else self.batch.value_A
        if target is None or value is None or target.numel() < 2:
            return {}
        variance = float(target.var())
        # Of equal targets only rounding is left.
        explained = 1 - float((target - value).var()) / variance if variance > 1e-12 else 0.0
        return {"explained_variance": explained, "value_mean": float(value.mean()), "target_mean": float(target.mean())}


def assign_credit(steps: StepTable, scores: Scores, advantage: Advantage, kl_coef: float) -> AssignedCredit:
    """Assigns credit over all ranks, of which all must ask.

    Args:
        steps: This rank's.
        scores: Of these steps.
        advantage: The scheme.
        kl_coef: Of the KL penalty in the reward; 0 leaves rewards as they are.

    Raises:
        RunError: There is not one step on any rank.
        ConfigError: The scheme gave credit of the wrong kind or shape.
    """
    parts = gather_columns(_columns(steps, scores, kl_coef))
    joined = {name: _wide(torch.cat([part[name] for part in parts])) for name in parts[0]}
    parts_of_texts = gather([step.observation for step in steps.records]) if advantage.needs_observations else []
    texts = [text for part in parts_of_texts for text in part]
    if joined["order_N"].numel() == 0:
        raise RunError(f"the iteration gave no step to learn from: {why_nothing(steps.episodes)}")
    rank, _ = rank_and_world()
    rank_N = torch.cat([torch.full_like(part["order_N"], index) for index, part in enumerate(parts)])

    sort_N = time_order(joined["order_N"], joined["index_N"])  # whole episodes, whoever acts
    sort_A = tokens_in_order(joined["length_N"], sort_N)
    columns = {name: column[sort_N] for name, column in joined.items() if name.endswith("_N")}
    tokens = {name: column[sort_A] for name, column in joined.items() if name.endswith("_A")}
    _, episode_N, count_E = torch.unique_consecutive(columns["order_N"], return_inverse=True, return_counts=True)
    first_E = count_E.cumsum(0) - count_E
    agent_N = _numbered(columns["agent_N"])
    _, chain_N = torch.unique(episode_N * (agent_N.max() + 1) + agent_N, return_inverse=True)
    index_N, is_last_N = _places(chain_N)
    final_reward_E = columns["final_reward_N"][first_E]
    final_reward_N = torch.where(is_last_N, final_reward_E[episode_N], 0.0)
    reward_N, length_N = columns["reward_N"], columns["length_N"]
    reward_A = _on_last_tokens(reward_N, length_N)
    task_reward_N = reward_N + final_reward_N
    if "penalty_A" in tokens:
        reward_A -= tokens["penalty_A"]
        step_of_A = torch.repeat_interleave(torch.arange(len(length_N)), length_N)
        reward_N = torch.zeros_like(reward_N).index_add(0, step_of_A, reward_A)

    batch = CreditBatch(
        reward_N=reward_N + final_reward_N,
        reward_A=reward_A + _on_last_tokens(final_reward_N, length_N),
        task_reward_N=task_reward_N,
        task_reward_A=_on_last_tokens(task_reward_N, length_N),
        episode_N=episode_N,
        chain_N=chain_N,
        agent_N=agent_N,
        group_E=columns["group_N"][first_E],
        index_N=index_N,
        length_N=length_N,
        terminated_E=columns["terminated_N"][first_E],
        bootstrap_E=columns["bootstrap_N"][first_E],
        last_chain_E=chain_N[first_E + count_E - 1],
        final_reward_E=final_reward_E,
        value_N=columns.get("value_N"),
        value_A=tokens.get("value_A"),
        anchor_N=columns["anchor_N"],
        observation_N=[texts[row] for row in sort_N.tolist()] if advantage.needs_observations else None,
    )
    credit = advantage(batch)
    _check(credit, batch, advantage)

    # Stable sorts keep a rank's steps in the order of its table.
    is_mine_N = rank_N[sort_N] == rank
    mine_N = torch.nonzero(is_mine_N)[:, 0]
    mine_A = torch.nonzero(torch.repeat_interleave(is_mine_N, batch.length_N))[:, 0]
    dtype = scores.old_logprobs_A.dtype
    mine = Credit(
        advantage_N=_pick(credit.advantage_N, mine_N, dtype),
        advantage_A=_pick(credit.advantage_A, mine_A, dtype),
        target_N=_pick(credit.target_N, mine_N, dtype),
        target_A=_pick(credit.target_A, mine_A, dtype),
    )
    return AssignedCredit(batch, credit, mine)


def check_orders(episodes: Sequence[Episode]) -> None:
    """Episodes are told apart by their order, over all ranks: two of one order would be taken for one.

    Args:
        episodes: This rank's, of one iteration or panel; all ranks must ask.

    Raises:
        RunError: Two have the same order.
    """
    orders = torch.tensor([episode.order for episode in episodes], dtype=torch.int64)
    everyone = torch.cat([part["order"] for part in gather_columns({"order": orders})])
    if len(everyone.unique()) == len(everyone):
        return
    known: dict[int, str] = {}
    for order, name in (pair for part in gather([(e.order, e.id) for e in episodes]) for pair in part):
        if order in known:
            raise RunError(
                f"the source gave two episodes the order {order}: {known[order]} and {name}; it must tell them apart"
            )
        known[order] = name


def why_nothing(episodes: Sequence[Episode]) -> str:
    """How episodes ended that left nothing to learn from, and what may help."""
    if not episodes:
        return "no episode was played"
    ends = Counter(f"{e.stop_reason}: {e.error}" if e.error else str(e.stop_reason) for e in episodes)
    end, count = ends.most_common(1)[0]
    overflow = "; raise max_prompt_tokens" if end == StopReason.CONTEXT_OVERFLOW else ""
    return f"{count} of {len(episodes)} episodes ended as {end}{overflow}"


def _check(credit: Credit, batch: CreditBatch, advantage: Advantage) -> None:
    """The scheme may be a user's: what it gave is named if it cannot be right."""
    name, steps, tokens = type(advantage).__name__, len(batch.reward_N), len(batch.reward_A)
    if (credit.advantage_N is None) == (credit.advantage_A is None):
        raise ConfigError(f"{name} must give advantage_N or advantage_A, and only one of them")
    wanted = {"none": None, "step": "target_N", "token": "target_A"}[advantage.needs_values]
    if wanted is not None and getattr(credit, wanted) is None:
        raise ConfigError(f"{name} has needs_values = {advantage.needs_values!r}, so it must give {wanted}")
    for column, length in (("advantage_N", steps), ("target_N", steps), ("advantage_A", tokens), ("target_A", tokens)):
        found = getattr(credit, column)
        if found is not None and found.shape != (length,):
            raise ConfigError(f"{name} gave {column} of shape {tuple(found.shape)}, not {(length,)}")


def _columns(steps: StepTable, scores: Scores, kl_coef: float) -> dict[str, Tensor]:
    """What credit needs of this rank's steps, and of their tokens only what cannot be told from the steps."""
    episode_of = {episode.order: episode for episode in steps.episodes}
    episodes = [episode_of[order] for order in steps.order_N.tolist()]
    agents = {name: _text_key(name) for name in {step.agent_id for step in steps.records}}
    columns = {
        "order_N": torch.from_numpy(steps.order_N),
        "group_N": torch.from_numpy(steps.group_N),
        "index_N": torch.tensor([step.index for step in steps.records], dtype=torch.int64),
        "length_N": torch.from_numpy(steps.lengths_N),
        "reward_N": torch.tensor([step.reward for step in steps.records], dtype=torch.float64),
        "agent_N": torch.tensor([agents[step.agent_id] for step in steps.records], dtype=torch.int64),
        "final_reward_N": torch.tensor([episode.final_reward for episode in episodes], dtype=torch.float64),
        "terminated_N": torch.tensor([e.stop_reason == StopReason.TERMINATED for e in episodes], dtype=torch.bool),
        "bootstrap_N": scores.bootstrap_N,
        "anchor_N": torch.tensor([_text_key(_state(s), agents[s.agent_id]) for s in steps.records], dtype=torch.int64),
    }
    if kl_coef and scores.ref_logprobs_A is not None:
        columns["penalty_A"] = kl_coef * (scores.old_logprobs_A.double() - scores.ref_logprobs_A.double())
    values = {"value_N": scores.value_N, "value_A": scores.value_A}
    return columns | {name: value for name, value in values.items() if value is not None}


def _wide(column: Tensor) -> Tensor:
    """Floats as float64: in float32 a perfect critic's advantages would be rounding noise, whitened to unit size."""
    return column.double() if column.is_floating_point() else column


def _state(step: Step) -> str:
    return step.observation if step.state_key is None else step.state_key


def _on_last_tokens(reward_N: Tensor, length_N: Tensor) -> Tensor:
    reward_A = reward_N.new_zeros(int(length_N.sum()))
    reward_A[length_N.cumsum(0) - 1] = reward_N
    return reward_A


def _pick(column: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if column is None else column[rows].to(dtype)


def _text_key(text: str, salt: int = 0) -> int:
    """A number for a text, the same on all ranks; another one for the same text with other salt."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little", signed=True)


def _numbered(keys: Tensor) -> Tensor:
    """Numbers from 0 in place of keys, in the order in which they come first: what the keys are does not matter."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys.tolist()], dtype=torch.int64)


def _places(chain_N: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each step in its chain, and whether it is the last one; steps of a chain are in their order."""
    order_N = torch.argsort(chain_N, stable=True)
    length_C = torch.bincount(chain_N)
    place = torch.arange(len(chain_N)) - torch.repeat_interleave(length_C.cumsum(0) - length_C, length_C)
    index_N = torch.empty_like(chain_N)
    index_N[order_N] = place
    return index_N, index_N == length_C[chain_N] - 1
