"""Demonstrations that end early: what is kept of them, and what is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from callbacks import WarmStartCallback
from steppo.batch import Segment
from tests.cli.test_errors import refused
from tests.cli_helpers import TOY, places, run
from tests.expert_env import ExpertEnv

# The warm start, and nothing after it: 8 tasks, twice.
SHORT = [
    "--warm_start.updates=1",
    "--warm_start.episodes=16",
    "--rollout.max_environment_steps=0",
    "--trainer.limit_val_batches=0",
    "--data.source.env=tests.expert_env.ExpertEnv",
]
EXPERT = "--warm_start.actions=expert"


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[list[Segment]]:
    """The steps that each warm start learned from."""
    found: list[list[Segment]] = []
    demonstrations = WarmStartCallback._demonstrations

    def counted(self: WarmStartCallback, *given: Any) -> list[Segment]:
        segments = demonstrations(self, *given)
        found.append(segments)
        return segments

    monkeypatch.setattr(WarmStartCallback, "_demonstrations", counted)
    return found


def expert_steps(knows: Any) -> tuple[int, int]:
    """Steps that the expert takes in the 8 training tasks, and tasks that it leaves early: played here."""
    env = ExpertEnv(knows)
    steps = early = 0
    for task in env.tasks("train"):
        turn = env.reset(task)
        while not turn.terminated:
            if (command := env.expert_action()) is None:
                early += 1
                break
            turn = env.command(command)
            steps += 1
    return steps, early


@pytest.mark.parametrize("knows", ["always", "first", "near", "some"])
def test_steps_before_the_expert_had_no_action_are_learned_from(
    knows: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, learned: list[list[Segment]]
) -> None:
    run(tmp_path, *SHORT, EXPERT, f"--data.source.env.knows={knows}")
    steps, early = expert_steps(knows)
    assert [len(segments) for segments in learned] == [2 * steps]
    said = [message for message in caplog.messages if message.startswith("warm_start: ")]
    line = f"warm_start: {2 * early} of 16 demonstrations ended early: the expert of ExpertEnv had no action"
    assert said == ([line] if early else [])


def test_random_actions_that_have_nothing_to_choose_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, learned: list[list[Segment]]
) -> None:
    run(tmp_path, *SHORT, "--data.source.env.knows=first")
    assert "warm_start: 16 of 16 demonstrations ended early: ExpertEnv showed no commands" in caplog.messages
    assert [len(segments) for segments in learned] == [16]


NONE = {
    "never": "16 of 16 demonstrations ended early: the expert of ExpertEnv had no action",
    "raises": "16 of 16 demonstrations failed and are left out: ",
}


@pytest.mark.parametrize("knows", NONE)
def test_no_demonstration_is_one_line(knows: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An environment that raises has failed: nothing of the episode is learned from."""
    said = refused(["fit", f"--config={TOY}", *places(tmp_path), *SHORT, EXPERT, f"--data.source.env.knows={knows}"], capfd)
    if knows == "never":
        assert said == f"error: warm_start: there is no demonstration: {NONE[knows]}"
    else:
        assert f"there is no demonstration: {NONE[knows]}" in said
        assert "RuntimeError: lost" in said


def test_no_random_demonstration_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(["fit", f"--config={TOY}", *places(tmp_path), *SHORT, "--data.source.env.knows=never"], capfd)
    assert "16 of 16 demonstrations ended early: ExpertEnv showed no commands" in said


def test_where_detours_lead_the_expert_is_asked_too(tmp_path: Path, learned: list[list[Segment]]) -> None:
    cli = run(tmp_path, *SHORT, EXPERT, "--warm_start.detours=0.9")
    source, [segments] = cli.datamodule.source, learned
    asked = wandered = 0
    for segment in segments:
        prompt = cli.model.policy.tokenizer.decode(segment.prompt_ids)
        wandered += "Done: take" in prompt
        if (seen := re.search(r"coin in room (\d).*in room (\d)", prompt, re.DOTALL)) is not None:
            goal, room = map(int, seen.groups())
            asked += 1
            wanted = "take" if room == goal else "left" if room > goal else "right"
            assert source.renderer.decode_action(segment.action_ids) == wanted
    assert asked > 2 * expert_steps("always")[0]
    assert wandered, "which the expert never does first"
