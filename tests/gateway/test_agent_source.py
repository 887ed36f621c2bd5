"""AgentSource: agents in processes of their own, and what becomes of what they ask."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.errors import ConfigError, RunError
from steppo.gateway.source import AgentSource
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, AppendContext, ParsedAction
from steppo.rollouts import EnvSource
from steppo.types import Action, Episode, RolloutConfig, StopReason, Turn, groups_of
from tests.cli_helpers import evaluations, run
from tests.gateway.agents import command_of
from tests.toy_env import CorridorEnv

PLAN = RolloutConfig("train/0", seed=3, version=7)
ROOT = Path(__file__).parents[2]
QUICKSTART, EXAMPLES = ROOT / "configs/agent/quickstart.yaml", ROOT / "examples/agents"
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


def test_it_can_be_sent_to_a_producer(tmp_path: Path) -> None:
    """As asynchronous training does, before it is bound."""
    there = pickle.loads(pickle.dumps(AgentSource({"train": str(tmp_path)}, HFEngine(), command="sh agent.sh", max_steps=7)))
    assert there.protocol()["agent"] == "sh agent.sh"
    assert there.longest_episode == 7


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


def only(source: AgentSource) -> Episode:
    [episode] = play(source, 1)
    return episode


def test_what_an_agent_returns_is_its_reward(make: Maker) -> None:
    source = make("one_call")
    first, second = play(source)
    assert [(e.stop_reason, e.final_reward, e.success, len(e.steps)) for e in (first, second)] == [
        (StopReason.TERMINATED, 0.5, True, 1)
    ] * 2
    assert [episode.steps[0].reward for episode in (first, second)] == [0.0, 0.0]
    again = play(source)
    assert [e.steps[0].action_ids.tolist() for e in again] == [e.steps[0].action_ids.tolist() for e in (first, second)]
    assert source.counts()["aborted_sessions"] == 0


def test_a_command_is_an_agent(make: Maker) -> None:
    episode = only(make(None, command=f"{sys.executable} -m tests.gateway.agents"))
    assert (episode.stop_reason, episode.error, episode.final_reward, len(episode.steps)) == ("terminated", "", 1.0, 1)


def test_a_judge_gives_the_reward_and_the_agent_has_no_key_for_it(make: Maker) -> None:
    episode = only(make("greedy", judge="tests.gateway.agents.judge"))
    assert (episode.final_reward, episode.error) == (0.25, "")


@pytest.mark.parametrize(
    ("agent", "settings", "reason", "steps", "error"),
    [
        ("silent", {}, "aborted", 0, "the agent made no call that was answered; it must ask OPENAI_BASE_URL"),
        ("warm", {}, "aborted", 0, "the last was refused: temperature: not while a policy is trained"),
        ("too_wordy", {}, "aborted", 0, "the last was refused: the prompt has"),
        ("thankless", {}, "terminated", 1, ""),
        ("wordy", {}, "context_overflow", 1, ""),
        ("restless", {"max_steps": 3}, "step_limit", 3, ""),
        ("hanging", {"agent_timeout": 3.0}, "aborted", 1, "no answer within 3 s"),
        ("dying", {}, "aborted", 1, "process died"),
    ],
)
def test_how_episodes_end(agent: str, settings: dict[str, Any], reason: str, steps: int, error: str, make: Maker) -> None:
    source = make(agent, **settings)
    episode = only(source)
    assert (episode.stop_reason, len(episode.steps)) == (reason, steps)
    assert error in episode.error
    assert source.counts()["aborted_sessions"] == (reason == "aborted")
    assert source.counts()["unrewarded_sessions"] == (agent == "thankless")


def test_rounds_may_be_left_early(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine rests after each."""
    rests: list[None] = []
    source = make("one_call")
    monkeypatch.setattr(source.engine, "rest", lambda: rests.append(None))
    groups = groups_of(source.tasks("train"))
    first = next(iter(rounds := source.collect(groups, PLAN)))
    rounds.close()
    assert len(first) == len(rests) == 1
    assert len(play(source)) == len(rests) == 2


def test_what_agents_ask_makes_a_tokenizer(make: Maker) -> None:
    source = make("one_call")
    texts = source.tokenizer_texts(source.tasks("train")[:2])
    assert all(f"corridor/train/{number}" in text for number, text in enumerate(sorted(texts)))
    with pytest.raises(RunError, match="no agent asked for a completion"):
        make("silent").tokenizer_texts(source.tasks("train")[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent": None}, "give an agent"),
        ({"agent": "a.b", "command": "true"}, "and not both"),
        ({"agent": "play"}, "an agent or judge is a dotted path"),
        ({"agent": "a.b", "num_parallel": 0}, "num_parallel must be at least 1"),
        ({"agent": "a.b", "agent_timeout": 0.0}, "agent_timeout must be at least 1"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AgentSource({}, HFEngine(), **settings)


@pytest.mark.parametrize("line", ["{", "[]", '{"door": 1}', '{"id": 3}'])
def test_a_line_that_is_no_task_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(f'{{"id": "a"}}\n\n{line}\n')
    source = AgentSource({"train": str(path), "valid": str(tmp_path / "none")}, HFEngine(), "a.b")
    with pytest.raises(ConfigError, match="line 3: a task is a JSON object"):
        source.tasks("train")
    with pytest.raises(ConfigError, match="cannot be read"):
        source.tasks("valid")
    with pytest.raises(ConfigError, match="no tasks of the split 'test'"):
        source.tasks("test")


@pytest.mark.parametrize("example", ["smolagents", "shell"])
def test_the_examples_play(example: str, sharp_policy: TinyPolicy) -> None:
    """``openai_agent`` is the quickstart's."""
    agent, command = None, None
    if example == "shell":
        command = f"sh {EXAMPLES}/shell_agent.sh"
        if not shutil.which("curl"):
            pytest.skip("needs curl")
    else:
        pytest.importorskip("smolagents")
        agent = "examples.agents.smolagents_agent.play"
    tasks = {"train": f"{EXAMPLES}/train.jsonl"}
    source = AgentSource(tasks, HFEngine(), agent, command, max_prompt_tokens=600, max_new_tokens=2, num_parallel=2)
    source.bind(sharp_policy)
    try:
        episodes = play(source, 2)
    finally:
        source.close()
    assert [(episode.stop_reason, episode.error) for episode in episodes] == [("terminated", "")] * 2
    assert [episode.final_reward for episode in episodes] == [float(episode.success is True) for episode in episodes]
    assert all(1 <= len(episode.steps) <= 6 for episode in episodes)
    assert source.counts()["gateway_refused"] == 0


def test_the_quickstart_trains(tmp_path: Path) -> None:
    few = [
        "--trainer.max_epochs=1",
        "--rollout.episodes_per_iteration=4",
        "--data.num_minibatches=1",
        "--evaluation.samples=2",
    ]
    run(tmp_path, *few, "--trainer.logger.version=few", "--data.source.num_parallel=2", config=QUICKSTART)
    records = evaluations(tmp_path / "agent" / "few")
    assert [record["iteration"] for record in records] == [0, 1]
    assert {record["errors"] for record in records} == {0}
