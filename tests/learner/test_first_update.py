"""An iteration's first update learns with the policy that scored it: what it finds by itself is not computed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steppo.engines import HFEngine
from steppo.learner import Experience, Learner, ReplayStatistics
from steppo.listeners import Listener
from steppo.types import Completion
from tests.cli_helpers import run, weights
from tests.test_train import scalars

FAST = ["--trainer.limit_val_batches=0", "--transcripts.enabled=false", "--trainer.max_epochs=2"]
GRPO = ["--model.advantage=GRPO", "--model.critic=null", "--rollout.group_size=4"]
LATE = {
    "no critic": GRPO,
    "a critic of its own": ["--model.critic=SeparateCritic"],
    "KL as a loss": [*GRPO, "--model.objective.kl=loss"],
}
BEFORE = {
    "a shared critic": [],
    "KL in the reward": [*GRPO, "--model.objective.kl=reward"],
    "weights": [*GRPO, "--model.correction=ImportanceCorrection"],
    "a critic that warms up": ["--model.critic=SeparateCritic", "--model.critic_warmup_updates=100"],
}


class Known(Listener):
    """Keeps which share of old log-probabilities was known when updates began."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_experience(self, trainer: Any, pl_module: Any, experience: Experience, replay: ReplayStatistics) -> None:
        self.shares.append(float((~experience.scores.old_logprobs_A.isnan()).float().mean()))


KNOWN = "--trainer.callbacks+=tests.learner.test_first_update.Known"


def known(cli: Any) -> list[float]:
    return next(callback.shares for callback in cli.trainer.callbacks if isinstance(callback, Known))


@pytest.mark.parametrize("options", LATE.values(), ids=LATE)
def test_weights_are_as_if_all_had_been_scored(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = ["--data.num_minibatches=2", "--data.update_epochs=2"]
    cli = run(tmp_path / "late", *FAST, *options, *passes, KNOWN)
    assert known(cli) == pytest.approx([0.5, 0.5], abs=0.15)
    monkeypatch.setattr(Learner, "_needs_old_logprobs", True)
    scored = run(tmp_path / "scored", *FAST, *options, *passes, KNOWN)
    assert known(scored) == [1.0, 1.0]
    late, expected = weights(tmp_path / "late"), weights(tmp_path / "scored")
    for name in expected:
        torch.testing.assert_close(late[name], expected[name], rtol=1e-4, atol=1e-5)
    ours, theirs = scalars(tmp_path / "late"), scalars(tmp_path / "scored")
    assert theirs.keys() - ours.keys() == {"train/first_ratio_spread"}  # compared with itself it would be 0
    assert ours.keys() - theirs.keys() <= {"warm_start/loss"}  # it may be in the cache by now
    for name in ("train/ratio_max", "train/approx_kl", "train/logprob_mismatch", "train/policy_loss"):
        assert [value for _, value in ours[name]] == pytest.approx([value for _, value in theirs[name]], rel=1e-4, abs=1e-5)
    assert max(value for _, value in ours["train/ratio_max"]) > 1.01, "later passes compare with what was before"


@pytest.mark.parametrize("options", BEFORE.values(), ids=BEFORE)
def test_what_needs_them_before_gets_them(options: list[str], tmp_path: Path) -> None:
    assert known(run(tmp_path, *FAST, *options, KNOWN)) == [1.0, 1.0]


class Boaster(HFEngine):
    """Takes all that it says for likelier than it is."""

    def poll(self) -> list[Completion]:
        completions = super().poll()
        for completion in completions:
            completion.logprobs[:] = completion.logprobs / 2
        return completions


def test_a_sampler_that_is_off_is_found_by_the_update(tmp_path: Path) -> None:
    """Nothing was scored before it."""
    off = ["--data.source.engine=tests.learner.test_first_update.Boaster", "--data.num_minibatches=1"]
    with pytest.warns(UserWarning, match="the sampler's log-probabilities are up to"):
        cli = run(tmp_path, *FAST, *GRPO, *off, KNOWN)
    assert known(cli) == [0.0, 0.0]
    assert scalars(tmp_path)["train/logprob_mismatch"][0][1] > 0.1
