"""From episodes to updates: buffer, credit over all ranks, microbatches. Every column must stay with its step.

Episodes are fakes whose token ids say where they are from: token k of step t of episode e is ``1000 e + 50 t + k``, and a
step's prompt ends with the step's own code, ``1000 e + 50 t``. All scores are functions of these codes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steppo.advantages import GRPO, RLOO, Advantage, GiGPO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE, whiten
from steppo.buffer import Scores, StepBuffer
from steppo.datamodule import StepDataModule
from steppo.errors import RunError
from steppo.learner.credit import GlobalSteps, assign_credit
from steppo.packing import Packer, PaddedPacker
from steppo.rollout import EpisodeSource
from steppo.samplers import SequentialSampler
from steppo.types import (
    Credit,
    CreditBatch,
    Episode,
    Group,
    Microbatch,
    RolloutConfig,
    Segment,
    Step,
    StopReason,
    Task,
    TokenBatch,
)
from tests.numeric_helpers import close, steps_of

WIDE = 10**6  # tokens: all steps in one microbatch


class ScrambledPacker(Packer):
    """Packs in an order that has nothing to do with the steps' lengths."""

    def pack(self, segments: Sequence[Segment], max_tokens: int) -> list[tuple[np.ndarray, TokenBatch]]:
        order = np.random.default_rng(len(segments)).permutation(len(segments))
        packed = PaddedPacker().pack([segments[row] for row in order], max_tokens)
        return [(order[rows], batch) for rows, batch in reversed(packed)]


class EqualShares(Advantage):
    """Needs no critic: each step's reward is its advantage."""

    def __call__(self, batch: CreditBatch) -> Credit:
        return Credit(advantage_N=batch.reward_N)


class ReadsTexts(EqualShares):
    """Wants the observations' texts."""

    needs_observations = True


def make_episode(
    order: int,
    lengths: Sequence[int],
    rewards: Sequence[float] | None = None,
    stop_reason: StopReason = StopReason.TERMINATED,
    group_size: int = 1,
    final: bool = False,
) -> Episode:
    """Steps with so many action tokens; rewards depend on the place unless given."""
    steps = []
    for index, tokens in enumerate(lengths):
        code = 1000 * order + 50 * index
        steps.append(
            Step(
                prompt_ids=np.asarray([7] * (1 + code % 3) + [code], dtype=np.int32),
                action_ids=np.arange(code, code + tokens, dtype=np.int32),
                behaviour_logprobs=-np.arange(code, code + tokens, dtype=np.float32) / 1024,
                reward=float(np.sin(code + 1)) if rewards is None else rewards[index],
                index=index,
                finish_reason="stop",
                terminated=index == len(lengths) - 1 and stop_reason == StopReason.TERMINATED,
                truncated=index == len(lengths) - 1 and stop_reason != StopReason.TERMINATED,
                action_valid=True,
                observation=f"room {code % 4}",
                action="",
                temperature=1 + code / 1024,
                policy_version=0,
            )
        )
    return Episode(
        id=str(order),
        order=order,
        group_id=order // group_size,
        task_id="",
        steps=tuple(steps),
        stop_reason=stop_reason,
        final_prompt_ids=np.asarray([7, 7, 900_000 + order], dtype=np.int32) if final else None,
        error="broken" if stop_reason.failed else "",
    )


def codes_N(buffer: StepBuffer) -> list[int]:
    return [int(step.prompt_ids[-1]) for step in buffer.steps]


def codes_A(buffer: StepBuffer) -> Tensor:
    """Codes of all action tokens in the order of the buffer."""
    ids = [torch.from_numpy(step.action_ids) for step in buffer.steps]
    return torch.cat(ids).double() if ids else torch.zeros(0, dtype=torch.float64)


def make_buffer(
    episodes: Sequence[Episode],
    values: str = "step",
    bootstrap: dict[int, float] | None = None,
    packer: Packer | None = None,
    max_tokens: int = WIDE,
) -> StepBuffer:
    """A scored buffer; ``bootstrap`` gives the value after the last step of some episodes, by their order."""
    buffer = StepBuffer(packer or PaddedPacker(), max_tokens)
    buffer.fill(episodes)
    after = bootstrap or {}
    tokens = codes_A(buffer)
    steps = torch.tensor(codes_N(buffer), dtype=torch.float64)
    buffer.scores = Scores(
        old_logprobs_A=-tokens / 1024,
        ref_logprobs_A=-tokens / 1024 + torch.cos(tokens),
        value_N=torch.cos(steps) if values == "step" else None,
        value_A=torch.cos(tokens) if values == "token" else None,
        bootstrap_N=torch.tensor([after.get(order, 0.0) for order in buffer.order_N.tolist()], dtype=torch.float64),
        weight_A=1 + tokens / 4096,
    )
    return buffer


# Lengths and endings of many kinds, broken episodes among them, and one that has no step.
EPISODES = [
    make_episode(0, [3, 1, 2]),
    make_episode(1, [2]),
    make_episode(2, [1, 4, 1, 1], stop_reason=StopReason.STEP_LIMIT, final=True),
    make_episode(3, [2, 2], stop_reason=StopReason.ENV_ERROR),
    make_episode(4, [5, 1]),
    make_episode(5, [], stop_reason=StopReason.CONTEXT_OVERFLOW),
    make_episode(6, [1, 1, 1], stop_reason=StopReason.CONTEXT_OVERFLOW),
    make_episode(7, [4], stop_reason=StopReason.ENGINE_ERROR),
    make_episode(8, [2, 6], stop_reason=StopReason.STEP_LIMIT, final=True),
    make_episode(9, [1, 1, 1, 1, 1]),
    make_episode(10, [2, 1], stop_reason=StopReason.ABORTED),
]
LEARNED = [0, 1, 2, 4, 6, 8, 9]
LEARNED_CODES = [1000 * order + 50 * index for order in LEARNED for index in range(len(EPISODES[order].steps))]
BOOTSTRAP = {2: 0.75, 8: -1.5}


# --- the buffer ---


def test_failed_episodes_are_kept_but_not_learned_from() -> None:
    buffer = make_buffer(EPISODES)
    assert [episode.order for episode in buffer.episodes] == list(range(11))
    assert codes_N(buffer) == LEARNED_CODES
    assert buffer.num_tokens == len(codes_A(buffer)) == sum(len(step.action_ids) for step in buffer.steps) == 37
    assert sum(batch.num_steps for _, _, batch in buffer.batches()) == len(LEARNED_CODES) == 20


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_filling_does_not_matter(seed: int) -> None:
    shuffled = [EPISODES[row] for row in np.random.default_rng(seed).permutation(len(EPISODES))]
    assert shuffled != EPISODES
    buffer, expected = make_buffer(shuffled), make_buffer(EPISODES)
    assert codes_N(buffer) == codes_N(expected)
    assert buffer.order_N.tolist() == [code // 1000 for code in LEARNED_CODES]
    for name in ("order_N", "group_N", "lengths_N"):
        np.testing.assert_array_equal(getattr(buffer, name), getattr(expected, name))


def test_filling_forgets_the_iteration_before() -> None:
    buffer = make_buffer(EPISODES)
    assign_credit(buffer, StepGAE(), 0.0)
    buffer.fill(EPISODES[:2])
    assert codes_N(buffer) == [0, 50, 100, 1000]
    assert (buffer.scores, buffer.credit, buffer.num_tokens) == (None, None, 8)


def test_columns_by_token_follow_the_steps() -> None:
    buffer = make_buffer(EPISODES)
    close(buffer.behaviour_logprobs().double(), -codes_A(buffer) / 1024)
    close(buffer.temperatures().double(), 1 + (codes_A(buffer) // 50 * 50) / 1024, 1e-6)


@pytest.mark.parametrize("packer", [PaddedPacker(), ScrambledPacker()])
@pytest.mark.parametrize("max_tokens", [1, 20, WIDE])
def test_batches_name_their_steps_and_tokens(packer: Packer, max_tokens: int) -> None:
    buffer = make_buffer(EPISODES, packer=packer, max_tokens=max_tokens)
    step_codes, token_codes = torch.tensor(codes_N(buffer)), codes_A(buffer)
    found = []
    for steps, actions, batch in buffer.batches():
        assert batch.input_ids_BT.flatten()[batch.value_at_N].tolist() == step_codes[steps].tolist()
        assert batch.target_A.tolist() == token_codes[actions].tolist()
        assert (batch.target_A // 50 * 50).tolist() == step_codes[steps][batch.step_of_A].tolist()
        found += steps.tolist()
    assert sorted(found) == list(range(len(step_codes)))


@pytest.mark.parametrize("max_tokens", [1, WIDE])
def test_final_prompts_belong_to_truncated_episodes(max_tokens: int) -> None:
    buffer = make_buffer(EPISODES, packer=ScrambledPacker(), max_tokens=max_tokens)
    found: dict[int, int] = {}
    for episodes, batch in buffer.final_batches():
        assert batch.target_A.numel() == 0
        ends = batch.input_ids_BT.flatten()[batch.value_at_N].tolist()
        found |= {episode.order: end for episode, end in zip(episodes, ends, strict=True)}
    assert found == {2: 900_002, 8: 900_008}


# --- microbatches ---


def read_steps(microbatch: Microbatch) -> list[int]:
    """Codes of a microbatch's steps, as they stand in its prompts."""
    return microbatch.tokens.input_ids_BT.flatten()[microbatch.tokens.value_at_N].tolist()


@pytest.mark.parametrize("packer", [PaddedPacker(), ScrambledPacker()])
@pytest.mark.parametrize("max_tokens", [1, 15, WIDE])
@pytest.mark.parametrize("kind", ["step", "token", "none"])
def test_columns_stay_with_their_steps(packer: Packer, max_tokens: int, kind: str) -> None:
    buffer = make_buffer(EPISODES, kind, packer=packer, max_tokens=max_tokens)
    steps, tokens = torch.tensor(codes_N(buffer), dtype=torch.float64), codes_A(buffer)
    buffer.credit = {
        "step": Credit(advantage_N=3 * steps, target_N=5 * steps),
        "token": Credit(advantage_A=3 * tokens, target_A=5 * tokens),
        "none": Credit(advantage_N=3 * steps),
    }[kind]
    chosen = np.asarray([1, 2, 3, 7, 8, 11, 12, 17, 19])
    microbatches = buffer.microbatches(chosen, update_steps=40, update_tokens=90)
    assert len(microbatches) > 1 or max_tokens == WIDE
    assert sorted(code for part in microbatches for code in read_steps(part)) == [codes_N(buffer)[row] for row in chosen]
    for part in microbatches:
        step_code = torch.tensor(read_steps(part), dtype=torch.float64)
        token_code = part.tokens.target_A.double()
        own_step = step_code[part.tokens.step_of_A]
        close(own_step, token_code // 50 * 50)
        close(part.old_logprobs_A, -token_code / 1024)
        assert part.ref_logprobs_A is not None
        close(part.ref_logprobs_A, -token_code / 1024 + torch.cos(token_code))
        close(part.temperature_A.double(), 1 + own_step / 1024, 1e-6)
        close(part.weight_A, 1 + token_code / 4096)
        close(part.advantage_A, 3 * (token_code if kind == "token" else own_step))
        if kind == "none":
            assert part.old_value is part.target is None
        else:
            assert part.old_value is not None
            assert part.target is not None
            code = token_code if kind == "token" else step_code
            close(part.old_value, torch.cos(code))
            close(part.target, 5 * code)
        assert (part.update_steps, part.update_tokens, part.scale) == (40, 90, 1.0)


def test_without_reference_there_is_no_column_of_it() -> None:
    buffer = make_buffer(EPISODES)
    assert buffer.scores is not None
    buffer.scores.ref_logprobs_A = None
    assign_credit(buffer, StepGAE(), 0.1)
    assert buffer.microbatches(np.arange(3), 3, 6)[0].ref_logprobs_A is None


# --- credit ---


def test_the_batch_tells_episodes_apart() -> None:
    episodes = [make_episode(order, [1, 2], stop_reason=reason, group_size=2) for order, reason in enumerate(StopReason)]
    batch = assign_credit(make_buffer(episodes), StepGAE(), 0.0).batch
    # TERMINATED, STEP_LIMIT, CONTEXT_OVERFLOW; the others broke
    assert batch.episode_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.index_N.tolist() == [0, 1] * 3
    assert batch.terminated_E.tolist() == [True, False, False]
    assert batch.group_E.tolist() == [0, 0, 1]
    assert batch.length_N.tolist() == [1, 2] * 3


def test_rewards_sit_on_the_last_token_of_their_step() -> None:
    buffer = make_buffer([make_episode(0, [3, 1], rewards=[1.0, 2.0]), make_episode(1, [2], rewards=[-1.0])])
    batch = assign_credit(buffer, StepGAE(), 0.0).batch
    close(batch.reward_N, [1.0, 2.0, -1.0])
    close(batch.reward_A, [0.0, 0.0, 1.0, 2.0, 0.0, -1.0])


def test_equal_observations_have_equal_anchors() -> None:
    buffer = make_buffer(EPISODES)
    anchors = assign_credit(buffer, StepGAE(), 0.0).batch.anchor_N
    assert anchors is not None
    texts = [step.observation for step in buffer.steps]
    assert len(set(texts)) == len(set(anchors.tolist())) == len(set(zip(texts, anchors.tolist(), strict=True))) == 2


@pytest.mark.parametrize(
    ("kl_coef", "by_token", "by_step"),
    [(0.1, [-0.05, 1.1, 1.95], [1.05, 1.95]), (0.0, [0.0, 1.0, 2.0], [1.0, 2.0])],
)
def test_kl_in_the_reward(kl_coef: float, by_token: list[float], by_step: list[float]) -> None:
    """r - kl_coef (old - ref) on each token: old - ref is 0.5, -1, 0.5."""
    for advantage, values in ((StepGAE(), "step"), (TokenGAE(), "token")):
        buffer = make_buffer([make_episode(0, [2, 1], rewards=[1.0, 2.0])], values)
        assert buffer.scores is not None
        buffer.scores.old_logprobs_A = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
        buffer.scores.ref_logprobs_A = torch.tensor([-1.5, -1.0, -3.5], dtype=torch.float64)
        steps = assign_credit(buffer, advantage, kl_coef)
        close(steps.batch.reward_A, by_token)
        close(steps.batch.reward_N, by_step)
        assert buffer.credit is not None
        if values == "step":
            assert buffer.credit.target_N is not None
            close(buffer.credit.target_N, [sum(by_step), by_step[1]])
        else:
            assert buffer.credit.target_A is not None
            close(buffer.credit.target_A, [sum(by_token), sum(by_token[1:]), by_token[2]])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_kl_in_the_reward_reaches_returns(kl_coef: float) -> None:
    """Penalties 0.1 * (old - ref): 0.05, -0.1, 0.2 and 0.1. Returns of 3 stay equal: 0.15 and 0.1 less are undivided."""
    episodes = [make_episode(0, [2, 1], rewards=[1.0, 2.0], group_size=2), make_episode(1, [1], rewards=[3.0], group_size=2)]
    if kl_coef:
        penalties, by_token = [-0.15, -0.15, -0.1], [-0.15, -0.1, -0.2, -0.1]
    else:
        penalties, by_token = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    centred = torch.tensor(penalties, dtype=torch.float64) - (penalties[0] + penalties[2]) / 2
    task, penalty = torch.tensor([[3.0, 3.0, 2.0, 3.0], by_token], dtype=torch.float64)  # of tokens: a deviation of 1/2
    for advantage, expected in (
        (GRPO(scale_by_std=False), centred),
        (RLOO(), 2 * centred),
        (GRPO(), centred),
        (GiGPO(step_weight=0.0), centred),
        (ReinforcePPBaseline(), centred),
        (ReinforcePP(), whiten(task) + (penalty - penalty.mean()) / (0.5 + 1e-8)),
    ):
        buffer = make_buffer(episodes, "none")
        assert buffer.scores is not None
        buffer.scores.old_logprobs_A = torch.tensor([-1.0, -2.0, -1.0, -2.0], dtype=torch.float64)
        buffer.scores.ref_logprobs_A = torch.tensor([-1.5, -1.0, -3.0, -3.0], dtype=torch.float64)
        assign_credit(buffer, advantage, kl_coef)
        assert buffer.credit is not None
        found = buffer.credit.advantage_A if buffer.credit.advantage_N is None else buffer.credit.advantage_N
        assert found is not None
        close(found, expected)


def test_failed_episodes_are_not_in_group_statistics() -> None:
    """Groups of three: one of the first failed, two of the second. Of the third all did."""
    broken = StopReason.ENV_ERROR
    episodes = [
        make_episode(0, [1, 2], [0.0, 1.0], group_size=3),
        make_episode(1, [1], [100.0], broken, group_size=3),
        make_episode(2, [1, 1], [2.0, 1.0], group_size=3),
        make_episode(3, [2], [50.0], StopReason.ENGINE_ERROR, group_size=3),
        make_episode(4, [1], [7.0], group_size=3),
        make_episode(5, [1], [60.0], StopReason.ABORTED, group_size=3),
        *(make_episode(order, [1], [70.0], broken, group_size=3) for order in (6, 7, 8)),
    ]
    # gamma 1/2: the first steps' returns are 1/2 and 5/2, the second ones' 1 and 1, of one observation each.
    for advantage, expected in (
        (GRPO(scale_by_std=False), [-1.0, -1.0, 1.0, 1.0, 0.0]),
        (RLOO(), [-2.0, -2.0, 2.0, 2.0, 0.0]),
        (GiGPO(0.5, scale_by_std=False), [-2.0, -1.0, 2.0, 1.0, 0.0]),
        (GiGPO(0.5, scale_by_std=False, similarity=0.99), [-2.0, -1.0, 2.0, 1.0, 0.0]),
    ):
        buffer = make_buffer(episodes, "none")
        steps = assign_credit(buffer, advantage, 0.0)
        assert steps.batch.group_E.tolist() == [0, 0, 1]
        assert buffer.credit is not None
        assert buffer.credit.advantage_N is not None
        close(buffer.credit.advantage_N, expected)
    buffer = make_buffer(episodes, "none")
    assign_credit(buffer, ReinforcePPBaseline(), 0.0)
    assert buffer.credit is not None
    assert buffer.credit.advantage_N is not None
    compared = whiten(torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    close(buffer.credit.advantage_N, [*compared[[0, 1, 3, 4]].tolist(), 0.0])


@pytest.mark.parametrize("bootstraps", [True, False])
def test_only_truncated_episodes_are_bootstrapped(bootstraps: bool) -> None:
    endings = [StopReason.TERMINATED, StopReason.STEP_LIMIT, StopReason.CONTEXT_OVERFLOW]
    episodes = [make_episode(order, [1, 1], [1.0, 2.0], reason) for order, reason in enumerate(endings)]
    buffer = make_buffer(episodes, bootstrap={0: 99.0, 1: 8.0})  # a stray value after the terminated one
    steps = assign_credit(buffer, StepGAE(gamma=0.5, bootstrap_truncated=bootstraps), 0.0)
    close(steps.batch.bootstrap_E[1:], [8.0, 0.0])
    after = 8.0 if bootstraps else 0.0
    assert buffer.credit is not None
    assert buffer.credit.target_N is not None
    close(buffer.credit.target_N, [2.0, 2.0, 1.0 + 0.5 * (2.0 + 0.5 * after), 2.0 + 0.5 * after, 2.0, 2.0])


def test_targets_are_of_the_kind_that_the_critic_reads() -> None:
    for advantage, values in ((StepGAE(), "step"), (TokenGAE(), "token"), (EqualShares(), "none")):
        buffer = make_buffer(EPISODES, values)
        assign_credit(buffer, advantage, 0.0)
        [part] = buffer.microbatches(np.arange(20), 20, 37)
        shapes = [None if column is None else len(column) for column in (part.advantage_A, part.old_value, part.target)]
        assert shapes == {"step": [37, 20, 20], "token": [37, 37, 37], "none": [37, None, None]}[values]


def test_credit_is_stored_in_the_precision_of_the_scores() -> None:
    buffer = make_buffer(EPISODES)
    assert buffer.scores is not None
    buffer.scores.old_logprobs_A = buffer.scores.old_logprobs_A.float()
    steps = assign_credit(buffer, StepGAE(), 0.0)
    assert buffer.credit is not None
    assert buffer.credit.advantage_N is not None
    assert (buffer.credit.advantage_N.dtype, steps.batch.reward_N.dtype) == (torch.float32, torch.float64)


def test_the_gap_is_the_largest_difference_to_the_sampler() -> None:
    buffer = make_buffer(EPISODES)
    assert assign_credit(buffer, StepGAE(), 0.0).logprob_mismatch == pytest.approx(0.0, abs=1e-6)
    assert buffer.scores is not None
    buffer.scores.old_logprobs_A[17] -= 0.25
    buffer.scores.old_logprobs_A[30] += 0.125
    assert assign_credit(buffer, StepGAE(), 0.0).logprob_mismatch == pytest.approx(0.25, abs=1e-6)


def test_nothing_to_learn_from() -> None:
    broken = [episode for episode in EPISODES if episode.stop_reason.failed]
    with pytest.raises(RunError, match="no step to learn from"):
        assign_credit(make_buffer([*broken, EPISODES[5]]), StepGAE(), 0.0)


# --- several ranks ---


def shares_of(world: int) -> list[list[Episode]]:
    """Unequal shares: whole groups in turn, as tasks are dealt out."""
    return [EPISODES[rank::world] for rank in range(world)]


SHARES = {
    "2 ranks": shares_of(2),
    "3 ranks": shares_of(3),
    "in one piece": [EPISODES[4:], EPISODES[:4]],
    "one rank without a step": [EPISODES[:3], [EPISODES[3], EPISODES[5]], EPISODES[6:], EPISODES[4:5]],
}


def assert_equal(left: Any, right: Any) -> None:
    """The same fields with exactly the same numbers."""
    for name, column in vars(right).items():
        if column is None or isinstance(column, list):
            assert getattr(left, name) == column
        else:
            assert getattr(left, name).dtype == column.dtype
            assert getattr(left, name).tolist() == column.tolist()


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("kind", ["step", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_ranks_together_equal_a_single_process(
    on_ranks: Callable[..., list[Any]], shares: list[list[Episode]], kind: str, kl_coef: float
) -> None:
    scheme = StepGAE if kind == "step" else TokenGAE
    advantage = scheme(gamma=0.9, gae_lambda=0.8, bootstrap_truncated=True)

    def work(episodes: Sequence[Episode]) -> tuple[StepBuffer, GlobalSteps]:
        buffer = make_buffer(episodes, kind, BOOTSTRAP)
        assert buffer.scores is not None
        buffer.scores.old_logprobs_A += torch.sin(codes_A(buffer)) / 8  # the sampler is off, on each rank by another gap
        return buffer, assign_credit(buffer, advantage, kl_coef)

    whole, expected = work(EPISODES)
    assert expected.mine_N.tolist() == list(range(20))
    found = on_ranks(len(shares), lambda rank: work(shares[rank]))
    for buffer, steps in found:
        assert_equal(steps.batch, expected.batch)
        assert_equal(steps.credit, expected.credit)
        assert steps.logprob_mismatch == expected.logprob_mismatch
        assert codes_N(buffer) == [LEARNED_CODES[row] for row in steps.mine_N]
        mine_A = torch.isin(steps_of(expected.batch.length_N.tolist()), torch.from_numpy(steps.mine_N))
        assert codes_A(buffer).tolist() == codes_A(whole)[mine_A].tolist()
        for name in ("advantage_N", "target_N", "advantage_A", "target_A"):
            column, of_all = getattr(buffer.credit, name), getattr(whole.credit, name)
            assert (column is not None) == (of_all is not None) == name.endswith("N" if kind == "step" else "A")
            if column is not None:
                assert column.tolist() == of_all[mine_A if name.endswith("A") else steps.mine_N].tolist()
    assert sorted(row for _, steps in found for row in steps.mine_N) == list(range(20))


# The same episodes; observations say which episode they are from, and some come again.
TELLING = [
    dataclasses.replace(
        episode,
        steps=tuple(dataclasses.replace(step, observation=f"{episode.order}: {step.index // 2}") for step in episode.steps),
    )
    for episode in EPISODES
]


@pytest.mark.parametrize("shares", [[EPISODES[::-1]], *SHARES.values()], ids=["1 rank", *SHARES])
def test_observations_come_with_their_steps(on_ranks: Callable[..., list[Any]], shares: list[list[Episode]]) -> None:
    def work(rank: int) -> tuple[CreditBatch, CreditBatch]:
        episodes = [TELLING[episode.order] for episode in shares[rank]]
        wanted, unwanted = (assign_credit(make_buffer(episodes, "none"), s, 0.0) for s in (ReadsTexts(), EqualShares()))
        return wanted.batch, unwanted.batch

    expected = [f"{code // 1000}: {code % 1000 // 50 // 2}" for code in LEARNED_CODES]
    for batch, without in on_ranks(len(shares), work):
        assert batch.observation_N == expected
        assert without.observation_N is None
        assert batch.anchor_N is not None
        anchors = batch.anchor_N.tolist()
        assert len(set(zip(anchors, expected, strict=True))) == len(set(anchors)) == len(set(expected)) < len(expected)


@pytest.mark.parametrize("advantage", [GiGPO(), GiGPO(similarity=0.8), ReinforcePPBaseline()])
def test_groups_that_ranks_share_equal_a_single_process(on_ranks: Callable[..., list[Any]], advantage: Advantage) -> None:
    episodes = [dataclasses.replace(episode, group_id=episode.order % 3) for episode in EPISODES]
    whole = assign_credit(make_buffer(episodes, "none"), advantage, 0.0)
    for steps in on_ranks(2, lambda rank: assign_credit(make_buffer(episodes[rank::2], "none"), advantage, 0.0)):
        assert_equal(steps.credit, whole.credit)
    found = whole.credit.advantage_A if whole.credit.advantage_N is None else whole.credit.advantage_N
    assert found is not None
    assert len(set(found.tolist())) > 3


def test_nothing_to_learn_from_on_any_rank(on_ranks: Callable[..., list[Any]]) -> None:
    def work(rank: int) -> str:
        with pytest.raises(RunError, match="no step to learn from") as caught:
            assign_credit(make_buffer([EPISODES[3 if rank else 7]]), StepGAE(), 0.0)
        return str(caught.value)

    assert len(on_ranks(2, work)) == 2


# --- updates ---


class ListedTasks(EpisodeSource):
    """Has tasks, and plays none of them."""

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{number}") for number in range(7)]

    def bind(self, policy: Any) -> None:
        raise NotImplementedError

    def collect(self, groups: Sequence[Group], config: RolloutConfig) -> Iterator[list[Episode]]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")


def make_data(episodes: Sequence[Episode], iteration: int = 0, **settings: Any) -> StepDataModule:
    """With credit assigned. By default a microbatch holds few steps."""
    settings = {"update_epochs": 2, "num_minibatches": 3, "max_tokens_per_microbatch": 12} | settings
    data = StepDataModule(ListedTasks(), **settings)
    data.trainer = SimpleNamespace(current_epoch=iteration)  # type: ignore[assignment]
    data.buffer = make_buffer(episodes, "step", BOOTSTRAP, max_tokens=settings["max_tokens_per_microbatch"])
    data.global_steps = assign_credit(data.buffer, StepGAE(), 0.0)
    return data


def steps_in(update: Sequence[Microbatch]) -> Counter[int]:
    """Codes of an update's steps that count."""
    return Counter(code for part in update if part.scale for code in read_steps(part))


def test_an_epoch_covers_every_step_once_in_updates_of_equal_size() -> None:
    data = make_data(EPISODES)
    updates = list(data.updates())
    assert len(updates) == data.updates_per_iteration == len(data.train_dataloader()) == 6
    orders = []
    for epoch in (updates[:3], updates[3:]):
        assert sum((steps_in(update) for update in epoch), Counter()) == Counter(LEARNED_CODES)
        assert sorted(steps_in(update).total() for update in epoch) == [6, 7, 7]
        orders.append([sorted(steps_in(update)) for update in epoch])
    assert orders[0] != orders[1], "each epoch cuts anew"
    for update in updates:
        assert {part.scale for part in update} == {1.0}
        assert {part.update_steps for part in update} == {sum(part.tokens.num_steps for part in update)}
        assert {part.update_tokens for part in update} == {sum(len(part.tokens.target_A) for part in update)}


def test_the_same_seed_and_iteration_cut_the_same_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(iteration: int = 0) -> list[Counter[int]]:
        return [steps_in(update) for update in make_data(EPISODES, iteration).updates()]

    first = cut()
    assert cut() == first
    assert cut(iteration=1) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert cut() != first


def advantages_of(update: Sequence[Microbatch]) -> dict[int, float]:
    """Advantage of each action token that counts."""
    return {
        code: advantage
        for part in update
        if part.scale
        for code, advantage in zip(part.tokens.target_A.tolist(), part.advantage_A.tolist(), strict=True)
    }


@pytest.mark.parametrize("shares", [shares_of(2), shares_of(3), [EPISODES[:9], EPISODES[9:]]], ids=["2", "3", "2 uneven"])
@pytest.mark.parametrize("max_tokens", [1, 12, WIDE])
def test_updates_do_not_depend_on_the_number_of_ranks(
    on_ranks: Callable[..., list[Any]], shares: list[list[Episode]], max_tokens: int
) -> None:
    def work(episodes: Sequence[Episode]) -> list[list[Microbatch]]:
        return list(make_data(episodes, max_tokens_per_microbatch=max_tokens).updates())

    expected = work(EPISODES)
    ranks = on_ranks(len(shares), lambda rank: work(shares[rank]))
    assert len({sum(len(episode.steps) for episode in share) for share in shares}) > 1
    for number, update in enumerate(expected):
        parts = [rank[number] for rank in ranks]
        assert sum((steps_in(part) for part in parts), Counter()) == steps_in(update)
        assert {code: a for part in parts for code, a in advantages_of(part).items()} == advantages_of(update)
        assert len({len(part) for part in parts}) == 1, "all ranks make as many passes"
        sizes = {(part.update_steps, part.update_tokens) for part in update}
        assert {(part.update_steps, part.update_tokens) for rank in parts for part in rank} == sizes
    fillers = [part for rank in ranks for update in rank for part in update if part.scale != 1.0]
    assert {part.scale for part in fillers} <= {0.0}
    assert len(fillers) > 0 or max_tokens == WIDE


def test_a_rank_may_have_no_part_in_an_update(on_ranks: Callable[..., list[Any]]) -> None:
    """It makes as many passes as the others, all of weight 0."""
    shares = [EPISODES[:1] + EPISODES[2:], EPISODES[1:2]]
    ranks = on_ranks(2, lambda rank: list(make_data(shares[rank], update_epochs=1).updates()))
    assert sorted(steps_in(update).total() for update in ranks[1]) == [0, 0, 1]
    for update, other in zip(*ranks, strict=True):
        assert len(update) == len(other) > 0


def test_a_rank_without_any_step_keeps_in_step(on_ranks: Callable[..., list[Any]]) -> None:
    ranks = on_ranks(2, lambda rank: list(make_data([EPISODES[3]] if rank else EPISODES).updates()))
    for update, other in zip(*ranks, strict=True):
        assert len(update) == len(other) > 0
        assert all(part.scale == 0.0 for part in other)


@pytest.mark.parametrize("num_minibatches", [20, 21])
def test_too_few_steps_for_the_updates(num_minibatches: int) -> None:
    updates = make_data(EPISODES, num_minibatches=num_minibatches).updates()
    if num_minibatches == 20:
        assert [steps_in(update).total() for update in updates] == [1] * 40
    else:
        with pytest.raises(RunError, match="gave 20 steps, too few for 21 minibatches"):
            next(updates)


def test_groups_are_dealt_out_to_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    def work(rank: int) -> tuple[list[Group], int]:
        data = StepDataModule(ListedTasks(), sampler=SequentialSampler())
        data.next_groups(3, 2)
        return data.next_groups(5, 2), data.sampler.cursor

    [(expected, cursor)] = on_ranks(1, work)
    assert [group.id for group in expected] == list(range(5))
    assert [group.task.id for group in expected] == [f"train/{number}" for number in (3, 4, 5, 6, 0)]
    ranks = on_ranks(3, work)
    assert sorted((group for groups, _ in ranks for group in groups), key=lambda group: group.id) == expected
    assert sorted(len(groups) for groups, _ in ranks) == [1, 2, 2]
    assert {found for _, found in ranks} == {cursor} == {8}
