"""AgentSource: agents in processes of their own, and what becomes of what they ask."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.envs import Env
from steppo.errors import ConfigError, RunError
from steppo.gateway.session import GatewaySettings
from steppo.gateway.source import AgentSource
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, AppendContext, ParsedAction
from steppo.rollouts import EnvSource
from steppo.types import Action, Episode, RolloutConfig, StopReason, Task, Turn, groups_of
from tests.gateway.agents import command_of
from tests.toy_env import CorridorEnv

pytest.importorskip("openai", reason="agents on the openai package")

PLAN = RolloutConfig("train/0", seed=3, version=7)
Maker = Callable[..., AgentSource]


class AnyText(ActionParser):
    def parse(self, text: str, turn: Turn) -> ParsedAction:
        return ParsedAction(Action(command_of(text, turn.commands or ())))


@pytest.fixture
def sharp_policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    """In float64 and far from uniform: fresh weights hardly look at their prompt."""
    with torch.no_grad():
        tiny_policy.model.get_input_embeddings().weight.mul_(8)
    return tiny_policy.double()


@pytest.fixture
def make(sharp_policy: TinyPolicy, tmp_path: Path) -> Iterator[Maker]:
    made: list[AgentSource] = []
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"id": task.id, **task.data}) + "\n" for task in CorridorEnv().tasks("train")))

    def new(agent: str | None, engine: Engine | None = None, **settings: Any) -> AgentSource:
        settings = {"max_new_tokens": 3, "max_prompt_tokens": 600, "num_parallel": 2} | settings
        agent = agent and f"tests.gateway.agents.{agent}"
        made.append(AgentSource({"train": str(tasks)}, engine or HFEngine(), agent, **settings))
        made[-1].bind(sharp_policy)
        return made[-1]

    yield new
    for source in made:
        source.close()


def play(source: AgentSource | EnvSource, count: int = 2, size: int = 1) -> list[Episode]:
    groups = groups_of(source.tasks("train")[:count], size)
    episodes = [episode for group in source.collect(groups, PLAN) for episode in group]
    return sorted(episodes, key=lambda episode: episode.order)


def test_an_agent_leaves_the_records_of_its_environment(make: Maker, sharp_policy: TinyPolicy) -> None:
    by_env = EnvSource(
        CorridorEnv(max_steps=5), AppendContext(""), PlainEngine(), AnyText(), max_prompt_tokens=600, max_new_tokens=3
    )
    by_env.bind(sharp_policy)
    try:
        wanted = play(by_env, 4, 2)
    finally:
        by_env.close()
    source = make("walk")
    episodes = play(source, 4, 2)
    assert len({episode.steps[0].action_ids.tobytes() for episode in wanted}) > 4
    assert source.counts()["gateway_calls"] == sum(len(episode.steps) for episode in wanted)
    for episode, other in zip(episodes, wanted, strict=True):
        for name in ("id", "order", "group_id", "task_id", "stop_reason", "error", "episode_return"):
            assert getattr(episode, name) == getattr(other, name), name
        for step, like in zip(episode.steps, other.steps, strict=True):
            assert step.prompt_ids.tolist() == like.prompt_ids.tolist()
            assert step.action_ids.tolist() == like.action_ids.tolist()
            np.testing.assert_allclose(step.behaviour_logprobs, like.behaviour_logprobs, atol=1e-6, rtol=0)
            for name in ("reward", "index", "finish_reason", "terminated", "truncated", "temperature", "policy_version",
                         "agent_id"):  # fmt: skip
                assert getattr(step, name) == getattr(like, name), name
