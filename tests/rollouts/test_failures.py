"""Nothing lost: what fails costs the episode it was in, is counted and reported, and changes no other episode."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import RolloutCallback
from steppo.engines import PlainEngine
from steppo.errors import ConfigError
from steppo.learner import Experience, ReplayStatistics
from steppo.listeners import Listener
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, ParsedAction
from steppo.types import Action, Completion, Episode, Request, Sampling, StopReason, Turn
from tests.cli_helpers import evaluations, run
from tests.test_ddp import fit
from tests.toy_env import UnreliableEnv


class AnyTextParser(ActionParser):
    """Reads a command into any text, and refuses about one in eight: random weights play, too."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        number, commands = sum(text.encode()), turn.commands
        assert commands
        return ParsedAction(None, "Not now.") if number % 8 == 0 else ParsedAction(Action(commands[number % len(commands)]))


class KeepEpisodes(Listener):
    """The episodes of all iterations."""

    def __init__(self) -> None:
        self.seen: list[Episode] = []

    def on_experience(self, trainer: Any, pl_module: Any, experience: Experience, replay: ReplayStatistics) -> None:
        self.seen += experience.episodes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, sharp: what a run without faults reads must not decide what words there are."""
    policy = TinyPolicy(hidden_size=32, num_layers=1, num_heads=2, max_positions=512)
    torch.manual_seed(0)
    policy.build(lambda: ["You are in room 0123456789. Take the coin in room. Commands: left, right, take"] * 4)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(8)
    folder = tmp_path_factory.mktemp("model")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def play(folder: Path, model: Path, *args: str) -> tuple[list[Episode], dict[str, list[float]]]:
    """Episodes and logged figures of a run in float64 that never changes its weights."""
    cli = run(
        folder,
        "--model.policy=steppo.models.HFPolicy",
        f"--model.policy.name_or_path={model}",
        "--model.policy.dtype=float64",
        "--trainer.precision=64-true",
        "--model.policy_optimizer.lr=1e-30",
        "--warm_start.updates=0",
        "--data.eval_tasks=1",
        "--data.source.env=tests.toy_env.UnreliableEnv",
        "--data.source.env.num_tasks=48",
        "--rollout.episodes_per_iteration=48",
        "--data.source.parser=tests.rollouts.test_failures.AnyTextParser",
        "--trainer.callbacks+=tests.rollouts.test_failures.KeepEpisodes",
        *args,
    )
    events = EventAccumulator(str(folder)).Reload()
    figures = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return next(callback.seen for callback in cli.trainer.callbacks if isinstance(callback, KeepEpisodes)), figures


def expected_fault(env: UnreliableEnv, episode: Episode) -> str:
    """What would have stopped this episode of a run without faults; refused actions do not reach the environment."""
    actions: list[str] = []
    for step in episode.steps:
        if step.action_valid:
            actions.append(step.action)
            if fault := env.fault(episode.task_id, actions):
                return fault
    return ""


def assert_same_steps(episode: Episode, other: Episode) -> None:
    assert (episode.stop_reason, episode.success, len(episode.steps)) == (other.stop_reason, other.success, len(other.steps))
    for step, like in zip(episode.steps, other.steps, strict=True):
        np.testing.assert_array_equal(step.prompt_ids, like.prompt_ids)
        np.testing.assert_array_equal(step.action_ids, like.action_ids)
        np.testing.assert_allclose(step.behaviour_logprobs, like.behaviour_logprobs, atol=1e-6, rtol=0)
        assert step.reward == like.reward


def test_a_run_of_faults_loses_the_episodes_they_hit_and_no_other(model_folder: Path, tmp_path: Path) -> None:
    """One step in 20 raises, one in 100 hangs."""
    healthy, _ = play(tmp_path / "healthy", model_folder)
    rates = 0.05, 0.01
    faulty, figures = play(
        tmp_path / "faulty",
        model_folder,
        f"--data.source.env.fail_rate={rates[0]}",
        f"--data.source.env.hang_rate={rates[1]}",
        "--data.source.env_timeout=0.2",
        "--rollout.min_valid_fraction=0.3",
    )
    assert [episode.id for episode in faulty] == [episode.id for episode in healthy]
    assert len(faulty) == 96
    env = UnreliableEnv(*rates)
    faults = [expected_fault(env, episode) for episode in healthy]
    assert faults.count("fail") >= 10
    assert faults.count("hang") >= 2
    for episode, other, fault in zip(faulty, healthy, faults, strict=True):
        if not episode.stop_reason.failed:
            assert not fault
            assert_same_steps(episode, other)
        else:
            assert episode.stop_reason == StopReason.ENV_ERROR
            assert (fault == "fail") or "broken by chance" not in episode.error
    # On a busy machine a step without a fault may be late, too.
    failed = [episode for episode in faulty if episode.stop_reason.failed]
    late = [episode for episode in failed if "broken by chance" not in episode.error]
    assert len(late) >= faults.count("hang")
    assert sum(figures["rollout/env_errors"]) == len(failed)
    assert sum(figures["rollout/env_timeouts"]) == sum(figures["rollout/replaced_workers"]) >= len(late)
    assert figures["rollout/engine_errors"] == [0, 0]
    assert figures["rollout/recycled_workers"] == [0, 0]


def test_engine_errors_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = "--data.source.engine=tests.rollouts.test_failures.FailingEngine"
    options = [engine, "--warm_start.updates=0", "--trainer.max_epochs=1"]
    run(tmp_path / "some", *options, "--data.source.engine.fails=[0]", "--rollout.min_valid_fraction=0")
    events = EventAccumulator(str(tmp_path / "some")).Reload()
    assert 0 < events.Scalars("rollout/engine_errors")[0].value < 8
    with pytest.raises(SystemExit):
        run(tmp_path / "all", *options, "--rollout.min_valid_fraction=0")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "only 0 of 8 episodes of the iteration are healthy (0.0%; rollout.min_valid_fraction is 0)" in error
    assert "the most common error: ValueError: the engine is broken" in error


class FailingEngine(PlainEngine):
    """Raises in some polls (counted from 0) of the training's episodes, or in all of them."""

    def __init__(self, fails: list[int] | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.polls = 0

    def poll(self) -> list[Completion]:
        if self._queue and self._queue[0].session_id.startswith("train"):
            self.polls += 1
            if self.fails is None or self.polls - 1 in self.fails:
                raise ValueError("the engine is broken")
        return super().poll()


@pytest.mark.parametrize(("min_valid_fraction", "goes_on"), [(0.75, True), (0.76, False)])
def test_a_run_needs_its_share_of_healthy_episodes(
    min_valid_fraction: float, goes_on: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--data.source.env=tests.toy_env.FaultyEnv",
        "--data.source.env.fail_tasks=[corridor/train/1,corridor/train/4]",
        "--trainer.max_epochs=1",
        f"--rollout.min_valid_fraction={min_valid_fraction}",
    ]
    if goes_on:
        run(tmp_path, *options)
        assert [record["iteration"] for record in evaluations(tmp_path)] == [0, 1]
        return
    with pytest.raises(SystemExit):
        run(tmp_path, *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "only 6 of 8 episodes of the iteration are healthy (75.0%; rollout.min_valid_fraction is 0.76)" in error
    assert "broken on purpose" in error


def test_all_processes_decide_alike(tmp_path: Path) -> None:
    """Each counts the episodes of both; a rank that went on alone would wait for the other for ever."""
    status, errors = fit(
        tmp_path,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.source.env=tests.toy_env.FaultyEnv",
        "--data.source.env.fail_tasks=[corridor/train/1,corridor/train/3,corridor/train/4]",
        "--data.source.parser=tests.rollouts.test_failures.AnyTextParser",
        "--warm_start.updates=0",
        "--evaluation.before_training=false",
        "--rollout.min_valid_fraction=0.7",
    )
    # Every five seconds Lightning looks whether rank 1 is gone; if so it kills a rank 0 that is not yet.
    assert status in (2, -signal.SIGKILL), errors
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert said
    assert all("only 5 of 8 episodes of the iteration are healthy" in line for line in said)


@pytest.mark.parametrize("min_valid_fraction", [-0.1, 1.1])
def test_a_share_is_a_share(min_valid_fraction: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        RolloutCallback(min_valid_fraction=min_valid_fraction)


class TerminatingParser(AnyTextParser):
    """Sends this process what a scheduler sends, with the first action that it reads."""

    read: ClassVar[list[str]] = []

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        self.read.append(text)
        if len(self.read) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().parse(text, turn)


@pytest.mark.parametrize("phase", ["evaluation", "rollout"])
def test_a_round_ends_when_the_run_is_told_to(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TerminatingParser, "read", [])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(
            tmp_path,
            "--data.source.parser=tests.rollouts.test_failures.TerminatingParser",
            "--data.source.num_slots=2",
            "--warm_start.updates=0",
            f"--evaluation.before_training={phase == 'evaluation'}",
        )
    assert signal.getsignal(signal.SIGTERM) == before
    assert 0 < len(TerminatingParser.read) <= 3 * 8, "eight steps at most in each of two slots, and a third that began"


def test_running_out_of_memory_costs_one_batch(tiny_policy: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PlainEngine(max_batch_size=2)
    engine.bind(tiny_policy)
    prompt = np.arange(2, 6, dtype=np.int32)

    def ask() -> dict[int, Completion]:
        for number in range(5):
            engine.submit(Request(number, str(number), prompt, Sampling(1.0, 3), number))
        return {completion.request_id: completion for _ in range(3) for completion in engine.poll()}

    expected = ask()
    generate, batches = engine._generate, []

    def second_is_too_much(requests: list[Request]) -> list[Completion]:
        batches.append(len(requests))
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(requests)

    monkeypatch.setattr(engine, "_generate", second_is_too_much)
    answers = ask()
    assert batches == [2, 2, 1]
    assert engine.poll() == []
    for number in (0, 1, 4):
        np.testing.assert_array_equal(answers[number].action_ids, expected[number].action_ids)
        assert answers[number].error == ""
    for number in (2, 3):
        assert answers[number].error == "OutOfMemoryError: CUDA out of memory"
        assert len(answers[number].action_ids) == 0


def test_released_requests_are_not_answered(tiny_policy: TinyPolicy) -> None:
    engine = PlainEngine()
    engine.bind(tiny_policy)
    prompt = np.arange(2, 6, dtype=np.int32)
    for number in range(3):
        engine.submit(Request(number, f"episode {number}", prompt, Sampling(1.0, 3), number))
    engine.release("episode 1")
    assert [completion.request_id for completion in engine.poll()] == [0, 2]
