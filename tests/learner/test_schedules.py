"""Learning rates by the budgets of a run, and what the figures of its updates are means over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from steppo.advantages import Advantage, StepGAE
from steppo.batch import Credit, CreditBatch
from steppo.errors import ConfigError
from steppo.learner.optim import OptimizerSettings, learning_rate_schedule
from tests.cli_helpers import checkpoint, run
from tests.test_train import scalars


def factors(settings: OptimizerSettings, planned: float, alone: int = 0) -> list[float]:
    """Of each update of a run, and of the one that would come after."""
    factor = learning_rate_schedule(settings, planned, alone)
    return [factor(done) for done in range(int(planned) + 1)]


LINEAR, COSINE = OptimizerSettings(schedule="linear"), OptimizerSettings(schedule="cosine")


def test_a_budget_of_epochs() -> None:
    assert factors(LINEAR, 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(COSINE, 4) == pytest.approx([0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(5)])
    warm = OptimizerSettings(schedule="linear", warmup_updates=2)
    assert factors(warm, 6) == [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0]
    endless = learning_rate_schedule(OptimizerSettings(warmup_updates=1), math.inf)
    assert [endless(done) for done in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [0, 3, 10])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_updates_of_the_critic_alone_use_up_nothing(warmup: int, kind: Any) -> None:
    """Ten of 20 updates are: the policy's own ten are as in a run of ten."""
    settings = OptimizerSettings(schedule=kind, warmup_updates=warmup)
    found = factors(settings, 20, alone=10)
    assert found[10:] == pytest.approx(factors(settings, 10))
    if warmup == 10:
        assert found[10] == pytest.approx(1 / 11)


def test_a_schedule_needs_an_end() -> None:
    for settings in (LINEAR, COSINE):
        with pytest.raises(ConfigError, match=r"schedule needs trainer.max_epochs"):
            learning_rate_schedule(settings, math.inf)


# --- real runs ---


class NaNNow(Advantage):
    """StepGAE, but not a number in the second iteration."""

    needs_values = "step"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: CreditBatch) -> Credit:
        credit = StepGAE()(batch)
        self.calls += 1
        if self.calls == 2:
            assert credit.advantage_N is not None
            credit.advantage_N[len(credit.advantage_N) // 2] = torch.nan
        return credit


FAST = ["--warm_start.updates=0", "--evaluation.before_training=false", "--transcripts.enabled=false"]
OF_POLICY = [
    "policy_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "first_ratio_spread",
    "grad_norm_policy",
]


class Rates(pl.Callback):
    """Keeps the learning rates with which updates are made."""

    def __init__(self) -> None:
        self.policy: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.policy.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("critic", ["SharedCritic", "SeparateCritic"])
def test_a_critic_that_warms_up_alone(critic: str, tmp_path: Path) -> None:
    """Three of two updates an iteration: the first iteration has no figure of the policy, the second those of one update."""
    options = [f"--model.critic=steppo.models.{critic}", "--model.critic_warmup_updates=3", "--trainer.max_epochs=3"]
    rates = ["--model.policy_optimizer.warmup_updates=4", "--trainer.callbacks+=tests.learner.test_schedules.Rates"]
    cli = run(tmp_path, *FAST, *options, *rates, "--data.num_minibatches=2")
    [kept] = [callback.policy for callback in cli.trainer.callbacks if isinstance(callback, Rates)]
    assert kept == pytest.approx([2e-3 * factor for factor in (0.2, 0.2, 0.2, 0.2, 0.4, 0.6)])
    curves = scalars(tmp_path)
    for name in OF_POLICY:
        own = name == "first_ratio_spread" and critic == "SeparateCritic"  # its later iterations score nothing before
        assert [step for step, _ in curves[f"train/{name}"]] == ([4] if own else [4, 6]), name
    assert curves["train/ratio_mean"][0][1] == pytest.approx(1.0)  # before its first update
    assert 0.5 < curves["train/entropy"][0][1] / curves["train/entropy"][1][1] < 2
    assert [step for step, _ in curves["train/value_loss"]] == [2, 4, 6]
    assert [value for _, value in curves["train/learning_rate"]] == pytest.approx([4e-4, 8e-4, 1.6e-3])
    assert [value for _, value in curves["train/learning_rate_critic"]] == pytest.approx([3e-3] * 3)


def test_figures_are_of_the_updates_that_were_made(tmp_path: Path) -> None:
    """One of the second iteration's two updates is skipped: no figure is halved, and none is lost."""
    run(tmp_path, *FAST, "--model.advantage=tests.learner.test_schedules.NaNNow", "--trainer.max_epochs=2")
    curves = scalars(tmp_path)
    assert curves["train/skipped_updates"][-1][1] == 1
    for name in (*OF_POLICY, "value_loss", "grad_norm_critic"):
        assert [step for step, _ in curves[f"train/{name}"]] == [2, 4], name
    assert curves["train/ratio_mean"][1][1] == pytest.approx(1.0, abs=0.1)


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    """To 0 at the end, and a run that was cut ends with the same weights."""
    options = [*FAST, "--trainer.max_epochs=3", "--model.policy_optimizer.schedule=linear", "--checkpoint.keep=9"]
    run(tmp_path / "whole", *options)
    rates = [value for _, value in scalars(tmp_path / "whole")["train/learning_rate"]]
    assert rates == pytest.approx([2e-3 * 2 / 3, 2e-3 / 3, 0.0], abs=1e-9)
    middle = tmp_path / "whole" / "checkpoints" / "iteration-000001.ckpt"
    run(tmp_path / "rest", *options, f"--ckpt_path={middle}")
    whole, rest = (torch.load(checkpoint(tmp_path / name), weights_only=True) for name in ("whole", "rest"))
    assert all(torch.equal(whole["state_dict"][name], weight) for name, weight in rest["state_dict"].items())
    assert whole["lr_schedulers"] == rest["lr_schedulers"]
    assert whole["steppo"]["counters"] == rest["steppo"]["counters"]
