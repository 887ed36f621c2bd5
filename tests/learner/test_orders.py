"""Each episode has a place of its own, whatever the sizes of groups; a source that mixes them up is told so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steppo.advantages import GRPO
from steppo.datamodule import StepDataModule
from steppo.engines import HFEngine
from steppo.errors import RunError
from steppo.learner.credit import check_orders
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource, Player, ScriptedPlayer, random_action
from steppo.transcripts import episode_records
from steppo.types import Episode, Group, RolloutConfig, StopReason, groups_of
from tests.cli_helpers import run, source_options
from tests.learner.fakes import make_episode, scored
from tests.test_buffer import ListedTasks
from tests.toy_env import CorridorEnv


def unequal_groups(*sizes: int) -> list[Group]:
    firsts = itertools.accumulate(sizes, initial=0)
    tasks = CorridorEnv().tasks("train")
    return [
        Group(number, tasks[number], size, first=first)
        for number, (size, first) in enumerate(zip(sizes, firsts, strict=False))
    ]


@pytest.fixture
def source(tiny_policy: Any) -> Iterator[EnvSource]:
    context = StateContext()
    made = EnvSource(CorridorEnv(max_steps=3), context, HFEngine(), max_prompt_tokens=400, max_new_tokens=4, num_slots=4)
    made.bind(tiny_policy)
    yield made
    made.close()


@pytest.fixture
def player(source: EnvSource) -> Player:
    return ScriptedPlayer(random_action, source.write)


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 3), (2, 2, 2), (3, 1, 1, 4), (1, 1, 1), (5,)])
def test_places_of_episodes_do_not_collide(
    sizes: tuple[int, ...], source: EnvSource, player: Player, tiny_policy: Any
) -> None:
    """Of ranks neither; group by group, in the order of the groups; as ever where all have one size."""
    groups = unequal_groups(*sizes)
    config = RolloutConfig("train/0", 0)
    shares = [[e for group in source.collect(groups[rank::2], config, player) for e in group] for rank in range(2)]
    episodes = sorted((episode for share in shares for episode in share), key=lambda episode: episode.order)
    assert [episode.order for episode in episodes] == list(range(sum(sizes)))
    assert [episode.group_id for episode in episodes] == [number for number, size in enumerate(sizes) for _ in range(size)]
    if len(set(sizes)) == 1:
        assert groups == groups_of([group.task for group in groups], sizes[0])
    check_orders(episodes)
    batch = scored(episodes, "none").assign(GRPO()).batch
    assert batch.episode_N.tolist() == [number for number, episode in enumerate(episodes) for _ in episode.steps]
    assert batch.group_E.tolist() == [episode.group_id for episode in episodes]
    records = episode_records(episodes, tiny_policy.tokenizer)
    assert [record["id"] for record in records] == [episode.id for episode in episodes]


def test_ranks_deal_out_places(on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    shares = on_ranks(3, lambda rank: StepDataModule(ListedTasks()).next_groups(5, 4))
    places = [group.first + sample for share in shares for group in share for sample in range(group.size)]
    assert sorted(places) == list(range(20))


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ([0, 1, 1], []),
        ([0, 1], [2, 1]),
        ([7], [7]),
        ([], [3, 3]),
        ([-1, 0], [-1]),
    ],
)
@pytest.mark.parametrize("reason", [StopReason.TERMINATED, StopReason.ENV_ERROR])
def test_two_episodes_of_one_place_are_named(
    on_ranks: Callable[..., list[Any]], mine: list[int], others: list[int], reason: StopReason
) -> None:
    """By all ranks, also if one of the episodes failed."""
    numbered = iter(range(9))
    shares = [
        [replace(make_episode(0, [1], stop_reason=reason), order=order, id=f"episode {next(numbered)}") for order in orders]
        for orders in (mine, others)
    ]

    def work(rank: int) -> str:
        with pytest.raises(RunError, match=r"two episodes the order -?\d: episode \d and episode \d") as caught:
            check_orders(shares[rank])
        return str(caught.value)

    assert len(set(on_ranks(2, work))) == 1


class SharedPlaces(EnvSource):
    """Gives two episodes of each four one place."""

    def collect(self, groups: Any, config: RolloutConfig, *args: Any) -> Iterator[list[Episode]]:
        for group in super().collect(groups, config, *args):
            yield [replace(episode, order=episode.order - (episode.order % 4 == 1)) for episode in group]


@pytest.mark.parametrize("before", ["true", "false"])
def test_a_source_that_mixes_up_episodes_is_one_line(
    before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an evaluation and in an iteration."""
    options = [*source_options("tests.learner.test_orders.SharedPlaces"), f"--evaluation.before_training={before}"]
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *options, "--warm_start.updates=0")
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    plan = "validate" if before == "true" else "train/0"
    assert line.startswith(f"error: the source gave two episodes the order 0: {plan}/0/")
    assert f" and {plan}/1/" in line
