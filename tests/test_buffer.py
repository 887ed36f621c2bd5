"""The step buffer: updates out of an experience, and microbatches out of updates, on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steppo.advantages import StepGAE
from steppo.batch import Credit, Microbatch
from steppo.buffer import StepBuffer
from steppo.datamodule import StepDataModule
from steppo.errors import RunError
from steppo.learner import OldLogprobs
from steppo.minibatches import ShuffledSteps, StepColumns, WholeEpisodes, WholeGroups
from steppo.packing import Packer, PaddedPacker
from steppo.rollouts import EpisodeSource
from steppo.samplers import SequentialSampler
from steppo.types import Episode, Group, RolloutConfig, Task
from tests.learner.fakes import (
    BOOTSTRAP,
    EPISODES,
    LEARNED,
    LEARNED_CODES,
    WIDE,
    ScrambledPacker,
    codes_A,
    codes_N,
    scored,
    shares_of,
)
from tests.numeric_helpers import close


def read_steps(microbatch: Microbatch) -> list[int]:
    """Codes of a microbatch's steps, as they stand in its prompts."""
    return microbatch.tokens.input_ids_BT.flatten()[microbatch.tokens.value_at_N].tolist()


@pytest.mark.parametrize("packer", [PaddedPacker(), ScrambledPacker()])
@pytest.mark.parametrize("max_tokens", [1, 15, WIDE])
@pytest.mark.parametrize("kind", ["step", "token", "none"])
def test_columns_stay_with_their_steps(packer: Packer, max_tokens: int, kind: str) -> None:
    episodes = scored(EPISODES, kind)
    codes = codes_N(episodes.steps)
    steps, tokens = torch.tensor(codes, dtype=torch.float64), codes_A(episodes.steps)
    credit = {
        "step": Credit(advantage_N=3 * steps, target_N=5 * steps),
        "token": Credit(advantage_A=3 * tokens, target_A=5 * tokens),
        "none": Credit(advantage_N=3 * steps),
    }[kind]
    buffer = StepBuffer(packer, max_tokens)
    buffer.hold(episodes.experience(credit))
    chosen = np.asarray([1, 2, 3, 7, 8, 11, 12, 17, 19])
    microbatches = buffer.microbatches(chosen, update_steps=40, update_tokens=90)
    assert len(microbatches) > 1 or max_tokens == WIDE
    assert sorted(code for part in microbatches for code in read_steps(part)) == [codes[row] for row in chosen]
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
    episodes = scored(EPISODES).replace(ref_logprobs_A=None)
    buffer = StepBuffer(PaddedPacker(), WIDE)
    buffer.hold(episodes.experience(episodes.assign(StepGAE(), 0.1)))
    assert buffer.microbatches(np.arange(3), 3, 6)[0].ref_logprobs_A is None


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


CUTS = {"S": ShuffledSteps(), "E": WholeEpisodes(), "G": WholeGroups()}


def make_data(episodes: Sequence[Episode], iteration: int = 0, **settings: Any) -> StepDataModule:
    """With credit assigned. By default a microbatch holds few steps."""
    settings = {"update_epochs": 2, "num_minibatches": 3, "max_tokens_per_microbatch": 12} | settings
    data = StepDataModule(ListedTasks(), **settings)
    data.trainer = SimpleNamespace(current_epoch=iteration)  # type: ignore[assignment]
    played = scored(episodes, "step", BOOTSTRAP)
    data.buffer.hold(played.experience(played.assign(StepGAE())))
    return data


def updates(data: StepDataModule) -> Iterator[list[Microbatch]]:
    return iter(data.train_dataloader().dataset)


def steps_in(update: Sequence[Microbatch]) -> Counter[int]:
    """Codes of an update's steps that count."""
    return Counter(code for part in update if part.scale for code in read_steps(part))


def test_an_epoch_covers_every_step_once_in_updates_of_equal_size() -> None:
    data = make_data(EPISODES)
    cut = list(updates(data))
    assert len(cut) == data.buffer.updates_per_iteration == len(data.train_dataloader()) == 6
    orders = []
    for epoch in (cut[:3], cut[3:]):
        assert sum((steps_in(update) for update in epoch), Counter()) == Counter(LEARNED_CODES)
        assert sorted(steps_in(update).total() for update in epoch) == [6, 7, 7]
        orders.append([sorted(steps_in(update)) for update in epoch])
    assert orders[0] != orders[1], "each epoch cuts anew"
    for update in cut:
        assert {part.scale for part in update} == {1.0}
        assert {part.update_steps for part in update} == {sum(part.tokens.num_steps for part in update)}
        assert {part.update_tokens for part in update} == {sum(len(part.tokens.target_A) for part in update)}


def test_the_same_seed_and_iteration_cut_the_same_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(iteration: int = 0) -> list[Counter[int]]:
        return [steps_in(update) for update in updates(make_data(EPISODES, iteration))]

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
@pytest.mark.parametrize(("max_tokens", "minibatches"), [(1, "S"), (12, "S"), (WIDE, "S"), (12, "E"), (12, "G")])
def test_updates_do_not_depend_on_the_number_of_ranks(
    on_ranks: Callable[..., list[Any]], shares: list[list[Episode]], max_tokens: int, minibatches: str
) -> None:
    settings = {"max_tokens_per_microbatch": max_tokens, "minibatches": CUTS[minibatches]}

    def work(episodes: Sequence[Episode]) -> list[list[Microbatch]]:
        return list(updates(make_data(episodes, **settings)))

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
    ranks = on_ranks(2, lambda rank: list(updates(make_data(shares[rank], update_epochs=1))))
    assert sorted(steps_in(update).total() for update in ranks[1]) == [0, 0, 1]
    for update, other in zip(*ranks, strict=True):
        assert len(update) == len(other) > 0


def test_a_rank_without_any_step_keeps_in_step(on_ranks: Callable[..., list[Any]]) -> None:
    ranks = on_ranks(2, lambda rank: list(updates(make_data([EPISODES[3]] if rank else EPISODES))))
    for update, other in zip(*ranks, strict=True):
        assert len(update) == len(other) > 0
        assert all(part.scale == 0.0 for part in other)


@pytest.mark.parametrize("num_minibatches", [20, 21])
def test_too_few_steps_for_the_updates(num_minibatches: int) -> None:
    found = updates(make_data(EPISODES, num_minibatches=num_minibatches))
    if num_minibatches == 20:
        assert [steps_in(update).total() for update in found] == [1] * 40
    else:
        with pytest.raises(RunError, match="gave 20 steps, too few for 21 minibatches"):
            next(found)


def test_too_few_episodes_left_to_stay_whole() -> None:
    """Others failed: that does not cost the run."""
    data = make_data(EPISODES[:4], num_minibatches=4, update_epochs=1, minibatches=WholeEpisodes())
    left = len({code // 1000 for code in codes_N(scored(EPISODES[:4]).steps)})
    assert left < 4
    with pytest.warns(UserWarning, match=f"episodes are {left}, too few for 4 .* shuffled one by one"):
        cut = list(updates(data))
    assert sum((steps_in(update) for update in cut), Counter()) == Counter(codes_N(scored(EPISODES[:4]).steps))


def test_the_first_update_is_the_one_that_was_promised() -> None:
    """Also if the cut draws from elsewhere. What it finds must be handed back before it is needed again."""

    class Restless(ShuffledSteps):
        calls = 0

        def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
            self.calls += 1
            return super().cut(steps, num_minibatches, np.random.default_rng(self.calls))

    played = scored(EPISODES)
    experience = played.experience(played.assign(StepGAE()))
    buffer = StepBuffer(PaddedPacker(), WIDE, update_epochs=2, num_minibatches=3, minibatches=Restless())
    promised = buffer.first_update(experience.columns, 0, 0)
    tokens = experience.steps.tokens_of(promised)
    left_out = played.scores.left_out_A.clone()
    left_out[tokens] = True
    experience = dataclasses.replace(experience, scores=dataclasses.replace(played.scores, left_out_A=left_out))
    buffer.hold(experience)
    cut = buffer.updates(0, 0)
    [first] = next(cut)
    assert sorted(first.index_N.tolist()) == sorted(promised.tolist())
    assert first.old_logprobs_A is None
    with pytest.raises(RunError, match=r"StepBuffer.take was not given"):  # in the second pass
        list(cut)
    cut = buffer.updates(0, 0)
    [first] = next(cut)
    found = played.scores.old_logprobs_A[experience.steps.tokens_of(first.index_N.numpy())]
    buffer.take([OldLogprobs(first.index_N, found)])
    for [part] in cut:
        close(part.old_logprobs_A, played.scores.old_logprobs_A[experience.steps.tokens_of(part.index_N.numpy())])


def test_what_is_no_number_was_not_left_out() -> None:
    """Weights that overflow give NaN; what is not finite is the update's to skip and to count."""
    played = scored(EPISODES)
    none = torch.full_like(played.scores.old_logprobs_A, torch.nan)
    experience = played.experience(played.assign(StepGAE()))
    buffer = StepBuffer(PaddedPacker(), WIDE, num_minibatches=3)
    buffer.hold(dataclasses.replace(experience, scores=dataclasses.replace(played.scores, old_logprobs_A=none)))
    for [part] in buffer.updates(0, 0):
        assert part.old_logprobs_A is not None
        assert part.old_logprobs_A.isnan().all()


def test_what_rows_cost_is_told_of_all_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    """What steps read and what is unique among it does not depend on where; padding does."""

    def work(episodes: Sequence[Episode]) -> dict[str, float]:
        data = make_data(episodes, minibatches=WholeEpisodes())
        for _ in range(2):  # it is that of the latest pass
            list(updates(data))
        return data.buffer.packing_figures()

    alone = work(EPISODES)
    learned = [step for order in LEARNED for step in EPISODES[order].steps]
    assert alone["tokens_read"] == 2 * sum(len(step.prompt_ids) + len(step.action_ids) - 1 for step in learned)
    first, second = on_ranks(2, lambda rank: work(shares_of(2)[rank]))
    assert first == second
    assert {name: first[name] for name in ("tokens_read", "tokens_unique", "branches")} == {
        name: alone[name] for name in ("tokens_read", "tokens_unique", "branches")
    }


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


def test_an_empty_buffer_says_who_fills_it() -> None:
    data = StepDataModule(ListedTasks())
    data.trainer = SimpleNamespace(current_epoch=0)  # type: ignore[assignment]
    with pytest.raises(RunError, match="no callback has played episodes"):
        next(updates(data))


def test_what_has_no_credit_is_not_learned_from() -> None:
    buffer = StepBuffer(PaddedPacker(), WIDE)
    buffer.hold(scored(EPISODES).experience(Credit()))
    with pytest.raises(ValueError, match="no credit was assigned"):
        buffer.microbatches(np.arange(3), 3, 6)
