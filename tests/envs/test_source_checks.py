"""What an episode source of any kind hands over: a wrong reward, index or agent costs its episode, and is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steppo.envs.checks import MOST_REWARD, checked_episode
from steppo.rollouts import EnvSource
from steppo.transcripts import episode_records
from steppo.types import Episode, RolloutConfig, StopReason
from tests.cli_helpers import evaluations, run, source_options
from tests.learner.fakes import make_episode

NAN, INF = float("nan"), float("inf")
EPISODE = make_episode(3, [1, 2, 1])


def with_step(place: int, **fields: Any) -> Episode:
    steps = list(EPISODE.steps)
    steps[place] = dataclasses.replace(steps[place], **fields)
    return dataclasses.replace(EPISODE, steps=tuple(steps))


class Unreadable(float):
    """Raises where it is compared."""

    def __float__(self) -> float:
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (NAN, "must be finite and at most 1e+12 in size, not nan"),
        (INF, "not inf"),
        (-INF, "not -inf"),
        (1.0001e12, "not 1000100000000.0"),
        (np.float32(-3e38), "not -"),
        (10**400, "not inf"),
        ("1.0", "must be a number, not '1.0'"),
        (None, "must be a number, not None"),
        (1j, "must be a number, not a complex"),
        (np.ones(1), "must be a number, not a ndarray"),
        ([1.0], "must be a number, not a list"),
        (Unreadable(1.0), "cannot be read: RuntimeError: not now"),
    ],
)
def test_wrong_rewards(value: Any, words: str, tiny_policy: Any) -> None:
    """Of the episode, and of a step."""
    found = checked_episode(dataclasses.replace(EPISODE, final_reward=value))
    assert (found.stop_reason, found.steps, found.final_reward) == (StopReason.ENV_ERROR, EPISODE.steps, 0.0)
    assert words in found.error
    assert found.error.startswith("the episode's final_reward ")
    step = checked_episode(with_step(1, reward=value if value != 1.0001e12 else 2.0001e12))
    assert (step.stop_reason, step.steps) == (StopReason.ENV_ERROR, EPISODE.steps[:1])
    assert step.error.startswith("the reward of the episode's step 1 ")
    for episode in (found, step):
        assert (episode.id, episode.order, episode.group_id) == (EPISODE.id, EPISODE.order, EPISODE.group_id)
        json.dumps(episode_records([episode], tiny_policy.tokenizer), allow_nan=False)


@pytest.mark.parametrize(
    "value",
    [0, 1, -0.5, True, np.float32(0.25), np.int64(3), np.bool_(True), Fraction(1, 4), MOST_REWARD, -MOST_REWARD, 5e-324],
)
def test_right_rewards(value: Any) -> None:
    found = checked_episode(dataclasses.replace(with_step(2, reward=value), final_reward=value))
    assert not found.stop_reason.failed
    for number in (found.final_reward, found.steps[2].reward):
        assert type(number) is float
        assert number == value
    assert found.steps[:2] == EPISODE.steps[:2]  # the very same


def test_a_step_may_have_lost_a_penalty_too() -> None:
    assert not checked_episode(with_step(0, reward=-2 * MOST_REWARD)).stop_reason.failed


@pytest.mark.parametrize(
    "indices", [[0, 1, 0], [1, 2, 3], [0, 0, 1], [2, 1, 0], [0, 2, 1], [0, 1, None], [0, 1.0, 2], [False, 1, 2]]
)
def test_wrong_places(indices: list[Any]) -> None:
    """Places of steps are of the episode: numbered by agent they would mix up whose credit is whose."""
    steps = tuple(dataclasses.replace(step, index=index) for step, index in zip(EPISODE.steps, indices, strict=True))
    found = checked_episode(dataclasses.replace(EPISODE, steps=steps))
    wrong = next(place for place, index in enumerate(indices) if type(index) is not int or index != place)
    assert found.stop_reason == StopReason.ENV_ERROR
    assert found.steps == steps[:wrong]
    assert f"the index of the episode's step {wrong} must be its place, {wrong}, whoever acts" in found.error


@pytest.mark.parametrize("agent", [None, 1, b"agent", ["agent"], "\ud800"])
def test_wrong_agents(agent: Any) -> None:
    found = checked_episode(with_step(1, agent_id=agent))
    assert found.stop_reason == StopReason.ENV_ERROR
    assert found.error.startswith("the agent_id of the episode's step 1 must be")


@pytest.mark.parametrize("agent", ["", "é", np.str_("worker"), "x" * 10_000, "a\nb\0"])
def test_right_agents(agent: Any) -> None:
    found = checked_episode(with_step(1, agent_id=agent)).steps[1].agent_id
    assert type(found) is str
    assert found == agent


def test_what_failed_before_keeps_its_reason() -> None:
    broken = make_episode(0, [1, 1], [0.0, NAN], StopReason.ENGINE_ERROR)
    found = checked_episode(dataclasses.replace(broken, final_reward=INF))
    assert (found.stop_reason, found.error, found.steps) == (StopReason.ENGINE_ERROR, "broken", broken.steps[:1])
    assert found.episode_return == broken.steps[0].reward


class OddJudge(EnvSource):
    """Its reward for the whole episode is not a number for one of eight."""

    def collect(self, groups: Any, config: RolloutConfig, *args: Any) -> Iterator[list[Episode]]:
        for group in super().collect(groups, config, *args):
            yield [dataclasses.replace(episode, final_reward=NAN if episode.order == 5 else 0.5) for episode in group]


class ByAgent(EnvSource):
    """Numbers the steps of each agent from 0."""

    def collect(self, groups: Any, config: RolloutConfig, *args: Any) -> Iterator[list[Episode]]:
        for group in super().collect(groups, config, *args):
            for episode in group:
                steps = [
                    dataclasses.replace(step, index=step.index // 2, agent_id="ab"[step.index % 2]) for step in episode.steps
                ]
                yield [dataclasses.replace(episode, steps=tuple(steps))]


def test_a_judge_that_fails_now_and_then_costs_its_episodes(tmp_path: Path) -> None:
    cli = run(tmp_path, *source_options("tests.envs.test_source_checks.OddJudge"), "--warm_start.updates=0")
    for record in evaluations(tmp_path):
        assert (record["episodes"], record["errors"]) == (7, 1)
        assert record["most_common_error"].startswith("the episode's final_reward must be finite")
        assert math.isfinite(record["return_mean"])
    failed = [episode for episode in cli.datamodule.buffer.experience.episodes if episode.stop_reason.failed]
    assert [episode.order for episode in failed] == [5]


def test_a_source_that_numbers_steps_by_agent_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--evaluation.before_training=false", "--warm_start.updates=0"]
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *source_options("tests.envs.test_source_checks.ByAgent"), *options)
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the index of the episode's step 1 must be its place, 1, whoever acts, not 0" in line
