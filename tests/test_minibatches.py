"""How an iteration is cut into updates: what stays together, and what each step counts for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from steppo.advantages import StepGAE
from steppo.buffer import StepBuffer
from steppo.errors import ConfigError, RunError
from steppo.learner.update import UpdateLoss, run_update
from steppo.losses import ClippedLoss, ObjectiveSettings
from steppo.minibatches import Minibatches, ShuffledSteps, StepColumns, WholeEpisodes, WholeGroups, checked_cut
from steppo.models.policy import PolicyOutput
from steppo.packing import PaddedPacker
from steppo.types import Episode
from tests.learner.fakes import BOOTSTRAP, EPISODES, scored
from tests.numeric_helpers import FEW, close

WHOLE: dict[str, Minibatches] = {"episode_N": WholeEpisodes(), "group_N": WholeGroups()}
GROUPED = [dataclasses.replace(episode, group_id=episode.order // 2) for episode in EPISODES]  # five groups learn
CODES = 11_000


def columns(lengths: Sequence[int], group_size: int = 1) -> StepColumns:
    """Episodes of so many steps, each of one token more than the step before."""
    episode_N = np.repeat(np.arange(len(lengths)), lengths)
    return StepColumns(episode_N, episode_N // group_size, 1 + np.arange(len(episode_N)) % 5)


def cut(minibatches: Minibatches, steps: StepColumns, count: int, seed: int = 0) -> list[np.ndarray]:
    return checked_cut(minibatches, steps, count, np.random.default_rng(seed))


@FEW
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_relatives_stay_together(lengths: list[int], group_size: int, count: int, seed: int) -> None:
    steps = columns(lengths, group_size)
    for column, minibatches in WHOLE.items():
        family_N = getattr(steps, column)
        sizes = np.bincount(family_N)
        if len(sizes) < count:
            with pytest.raises(RunError, match=f"are {len(sizes)}, too few for {count} minibatches|iteration gave"):
                cut(minibatches, steps, count, seed)
            continue
        parts = cut(minibatches, steps, count, seed)
        for one, other in itertools.combinations(parts, 2):
            assert not set(family_N[one]) & set(family_N[other])
        spread = max(map(len, parts)) - min(map(len, parts))
        assert spread <= sizes.max()
        same = cut(minibatches, steps, count, seed)
        assert all(np.array_equal(one, other) for one, other in zip(parts, same, strict=True))


def test_groups_of_one_are_episodes() -> None:
    steps = columns([3, 1, 4, 1, 5, 2], group_size=1)
    for seed in range(5):
        pairs = zip(cut(WholeGroups(), steps, 3, seed), cut(WholeEpisodes(), steps, 3, seed), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


def test_numbers_of_episodes_do_not_matter() -> None:
    steps = columns([3, 1, 4, 1, 5, 2])
    other = steps._replace(episode_N=100 + 7 * steps.episode_N)
    assert [part.tolist() for part in cut(WholeEpisodes(), steps, 3)] == [
        part.tolist() for part in cut(WholeEpisodes(), other, 3)
    ]


@pytest.mark.parametrize("lengths", [[9, 1, 2, 3, 1, 1, 4, 3], [3] * 8], ids=["uneven", "even"])
@pytest.mark.parametrize("minibatches", [ShuffledSteps(), *WHOLE.values()], ids=lambda part: type(part).__name__)
def test_a_step_is_in_any_update_as_often(minibatches: Minibatches, lengths: list[int]) -> None:
    """Those of the longest episode, too, come neither first nor last; nor is it the first update that gets most."""
    steps, draws = columns(lengths, group_size=2), 2000
    counts = np.zeros((24, 3))
    for seed in range(draws):
        for update, part in enumerate(cut(minibatches, steps, 3, seed)):
            counts[part, update] += 1
    assert np.abs(counts / draws - 1 / 3).max() < 5 * (2 / 9 / draws) ** 0.5  # five standard deviations


def test_any_two_episodes_meet() -> None:
    steps, met = columns([3, 1, 2, 3, 1, 1, 4, 3]), np.zeros((8, 8), dtype=int)
    for seed in range(300):
        for part in cut(WholeEpisodes(), steps, 3, seed):
            together = np.unique(steps.episode_N[part])
            met[np.ix_(together, together)] += 1
    assert met.min() > 10


def test_shuffled_steps_are_those_of_a_permutation() -> None:
    parts = cut(ShuffledSteps(), columns([9, 2, 2]), 4, seed=3)
    expected = np.array_split(np.random.default_rng(3).permutation(13), 4)
    assert all(np.array_equal(one, other) for one, other in zip(parts, expected, strict=True))
    assert [len(part) for part in parts] == [4, 3, 3, 3]


def test_one_episode_is_one_update() -> None:
    [part] = cut(WholeEpisodes(), columns([5]), 1)
    assert part.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RunError, match=r"episodes are 1, too few for 2 .* lower data.num_minibatches, or raise rollout"):
        cut(WholeEpisodes(), columns([5]), 2)
    with pytest.raises(RunError, match="groups are 2, too few for 3 minibatches of whole groups"):
        cut(WholeGroups(), columns([5, 1, 2, 2], group_size=2), 3)
    with pytest.raises(RunError, match="gave 5 steps, too few for 6 minibatches"):
        cut(ShuffledSteps(), columns([5]), 6)


class Given(Minibatches):
    """Gives what it was told to."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Any:
        return self.parts


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([[0, 1, 2, 3, 4]], "cut the steps into 1 parts, not into num_minibatches = 2"),
        ([[0, 1, 2, 3, 4], []], "no array of indices of steps, with one at least"),
        ([[0.0, 1.0, 2.0], [3.0, 4.0]], "no array of indices"),
        ([[True, False], [True, True, True]], "no array of indices"),
        ([[[0, 1, 2]], [[3, 4]]], "no array of indices"),
        ([[0, 1, 2], [3]], "must put each of the 5 steps into exactly one update"),
        ([[0, 1, 2], [2, 3]], "exactly one update"),
        ([[0, 1, 2], [2, 3, 4]], "exactly one update"),
        ([[0, 1, 2], [3, 5]], "exactly one update"),
        ([[0, 1, 2], [3, -1]], "exactly one update"),
        ([[[0, 1], [2]], [3, 4]], "no list of index arrays"),
        (None, "gave a NoneType that is no list"),
    ],
)
def test_what_is_no_cut_is_refused(parts: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"Given .*{said}"):
        cut(Given(parts), columns([5]), 2)


def test_any_order_and_kind_of_list_will_do() -> None:
    found = cut(Given(iter([(4, 0, 2), np.array([1, 3], dtype=np.int32)])), columns([5]), 2)
    assert [part.tolist() for part in found] == [[4, 0, 2], [1, 3]]


# --- what a step counts for ---


class Table(nn.Module):
    """A policy whose every action token has a weight of its own, so that a gradient shows what each counted for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_C = nn.Parameter(torch.linspace(-1.0, 1.0, CODES, dtype=torch.float64))

    def forward(self, batch: Any, temperature_A: Tensor | None = None) -> PolicyOutput:
        logprobs_A = nn.functional.logsigmoid(self.weight_C[batch.target_A])
        return PolicyOutput(logprobs_A.new_zeros(0), logprobs_A, -logprobs_A)


class ValueTable(nn.Module):
    """A critic likewise, by the code at each prompt's end."""

    needs_policy_hidden = False

    def __init__(self) -> None:
        super().__init__()
        self.weight_C = nn.Parameter(torch.linspace(1.0, -1.0, CODES, dtype=torch.float64))

    def forward(self, batch: Any, positions: Tensor, hidden: Tensor | None) -> Tensor:
        return self.weight_C[batch.input_ids_BT.flatten()[positions]]


def gradients(
    minibatches: Minibatches, count: int, aggregation: Any, episodes: Sequence[Episode] = GROUPED
) -> list[tuple[Tensor, Tensor]]:
    """Of policy and critic, for each update of one pass at fixed weights; this rank's part of them."""
    buffer = StepBuffer(PaddedPacker(), 12, num_minibatches=count, minibatches=minibatches)
    played = scored(episodes, "step", BOOTSTRAP)
    buffer.hold(played.experience(played.assign(StepGAE())))
    policy, critic = Table(), ValueTable()
    settings = ObjectiveSettings(ent_coef=0.1, aggregation=aggregation, value_clip=0)
    loss = UpdateLoss(policy, critic, "step", ClippedLoss(ratio="token"), settings)  # type: ignore[arg-type]
    found = []
    for batch in buffer.updates(seed=5, iteration=2):
        policy.zero_grad()
        critic.zero_grad()
        run_update(loss, batch, lambda part: part.backward(), dict)
        zero = torch.zeros_like(policy.weight_C)
        found.append(tuple(zero if w.grad is None else w.grad.clone() for w in (policy.weight_C, critic.weight_C)))
    return found  # type: ignore[return-value]


def summed(updates: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([torch.stack(update) for update in updates]).sum(0)


@pytest.mark.parametrize("aggregation", ["step-mean", "token-mean"])
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("minibatches", WHOLE.values(), ids=lambda part: type(part).__name__)
def test_a_pass_adds_up_to_the_gradient_of_all(minibatches: Minibatches, count: int, aggregation: str) -> None:
    """Times the number of updates: whichever update a step falls into, it counts as in one update of all steps."""
    parts = gradients(minibatches, count, aggregation)
    whole = count * summed(gradients(minibatches, 1, aggregation))
    assert whole[0].count_nonzero() == 37
    assert whole[1].count_nonzero() == 20
    close(summed(parts), whole)
    touched = [(update[1] != 0).sum() for update in parts]
    assert len(set(map(int, touched))) > 1, "updates of unequal size: divided by its own, the sums would differ"


def test_a_pass_adds_up_to_that_of_shuffled_steps() -> None:
    """20 steps in 4 updates: there each update has the mean size."""
    shuffled = summed(gradients(ShuffledSteps(), 4, "step-mean"))
    for minibatches in WHOLE.values():
        close(summed(gradients(minibatches, 4, "step-mean")), shuffled)


def test_shuffled_steps_are_divided_by_their_own_number() -> None:
    """20 steps in 3 updates, of 7, 7 and 6: as it always was."""
    updates = gradients(ShuffledSteps(), 3, "step-mean")
    alone = gradients(ShuffledSteps(), 20, "step-mean")  # one step each
    each = summed(alone)[1]
    for _, found in updates:
        mine = found != 0
        close(found[mine], each[mine] / mine.sum())


@pytest.mark.parametrize("aggregation", ["step-mean", "token-mean"])
def test_two_ranks_make_the_updates_of_one(on_ranks: Callable[..., list[Any]], aggregation: str) -> None:
    for minibatches in WHOLE.values():
        one = gradients(minibatches, 3, aggregation)
        ranks = on_ranks(2, lambda rank, m=minibatches: gradients(m, 3, aggregation, GROUPED[rank::2]))
        for update, *parts in zip(one, *ranks, strict=True):
            close(summed(parts), 2 * torch.stack(update))  # gradients are averaged over ranks
