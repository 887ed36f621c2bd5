"""Importance corrections: by hand, against a loop, and what they do and leave alone in a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from steppo.batch import Microbatch
from steppo.errors import ConfigError
from steppo.learner import Correction, ImportanceCorrection, NoCorrection
from steppo.learner.correction import Weights
from tests.cli_helpers import run, same, weights
from tests.numeric_helpers import FEW, close, normal, steps_of

ONE_UPDATE = ["--trainer.max_epochs=1", "--warm_start.updates=20", "--data.num_minibatches=1", "--data.eval_tasks=1"]


class DropLast(Correction):
    """Every third step is not learned from; the others count double. Each rank numbers its own steps."""

    def __call__(self, behaviour_logprobs_A: Tensor, old_logprobs_A: Tensor, step_of_A: Tensor, num_steps: int) -> Weights:
        return Weights(torch.full_like(old_logprobs_A, 2.0), step_of_A % 3 != 2)


class WatchUpdates(Callback):
    """Keeps the updates' microbatches and gradients."""

    def __init__(self) -> None:
        self.batches: list[Microbatch] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Microbatch], batch_idx: int) -> None:
        self.batches += batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def test_by_hand() -> None:
    """Ratios 2 and 8 in one step, 1/4 in the other: geometric means 4 and 1/4."""
    old_A = torch.tensor([2.0, 8.0, 0.25], dtype=torch.float64).log()
    arguments = (torch.zeros(3, dtype=torch.float64), old_A, torch.tensor([0, 0, 1]), 2)
    by_step = ImportanceCorrection("step", cap=3.0, keep_low=0.3)(*arguments)
    close(by_step.weight_A, [3.0, 3.0, 0.25])
    assert by_step.keep_A.tolist() == [True, True, False]
    by_token = ImportanceCorrection("token", cap=3.0, keep_high=7.0)(*arguments)
    close(by_token.weight_A, [2.0, 3.0, 0.25])
    assert by_token.keep_A.tolist() == [True, False, True]
    none = NoCorrection()(*arguments)
    assert none.weight_A.tolist() == [1.0, 1.0, 1.0]
    assert none.keep_A.all()


@FEW
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 2**16), st.sampled_from(["step", "token"]))
def test_equals_a_loop(lengths: list[int], seed: int, level: Any) -> None:
    rng = np.random.default_rng(seed)
    behaviour_A, old_A = normal(rng, sum(lengths)) - 3, normal(rng, sum(lengths)) - 3
    found = ImportanceCorrection(level, 1.5, 0.4, 2.5)(behaviour_A, old_A, steps_of(lengths), len(lengths))
    expected, kept = [], []
    for logs in (old_A - behaviour_A).split(lengths):
        mean = math.exp(min(sum(logs.tolist()) / len(logs), 10.0))
        for log in logs.tolist():
            ratio = mean if level == "step" else math.exp(min(log, 10.0))
            expected.append(min(ratio, 1.5))
            kept.append(0.4 <= ratio <= 2.5)
    close(found.weight_A, expected)
    assert found.keep_A.tolist() == kept


@pytest.mark.parametrize(
    "settings",
    [
        {"cap": 0.0},
        {"cap": math.inf},
        {"cap": math.nan},
        {"keep_low": -0.1},
        {"keep_low": 1.1},
        {"keep_low": math.nan},
        {"keep_high": 0.9},
        {"keep_high": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="ImportanceCorrection"):
        ImportanceCorrection(**settings)


def test_where_the_policies_are_one_nothing_changes(tmp_path: Path) -> None:
    """The engine samples with the learner's own weights: its weights are 1 but for rounding. None is exactly none."""
    run(tmp_path / "default", *ONE_UPDATE)
    run(tmp_path / "none", *ONE_UPDATE, "--model.correction=steppo.learner.NoCorrection")
    assert same(weights(tmp_path / "default"), weights(tmp_path / "none"))
    watch = ["--trainer.callbacks+=tests.learner.test_correction.WatchUpdates"]
    cli = run(tmp_path / "weighed", *ONE_UPDATE, *watch, "--model.correction=steppo.learner.ImportanceCorrection")
    [seen] = [callback for callback in cli.trainer.callbacks if isinstance(callback, WatchUpdates)]
    weight_A = torch.cat([batch.weight_A for batch in seen.batches])
    torch.testing.assert_close(weight_A, torch.ones_like(weight_A), atol=1e-4, rtol=0)


def test_what_is_not_kept_teaches_nothing_and_stays_in_the_divisor(tmp_path: Path) -> None:
    """Every third step is gone, the others count double; credit is as without. The rest is in test_objective."""
    options = [*ONE_UPDATE, "--trainer.precision=64-true", "--trainer.callbacks+=tests.learner.test_correction.WatchUpdates"]
    options += ["--model.policy_optimizer.max_grad_norm=0", "--model.critic_optimizer.max_grad_norm=0"]
    options += ["--model.critic=steppo.models.SeparateCritic", "--model.objective.value_clip=0"]
    cli = run(tmp_path, *options, "--model.correction=tests.learner.test_correction.DropLast")
    [seen] = [callback for callback in cli.trainer.callbacks if isinstance(callback, WatchUpdates)]
    credits = torch.cat([batch.advantage_A for batch in seen.batches])
    weight_A = torch.cat([batch.weight_A for batch in seen.batches])
    assert set(weight_A.tolist()) == {0.0, 2.0}
    assert (credits[weight_A == 0] != 0).any()  # credit was assigned to all
    plain = run(tmp_path / "plain", *options)
    [every] = [callback for callback in plain.trainer.callbacks if isinstance(callback, WatchUpdates)]
    assert torch.equal(credits, torch.cat([batch.advantage_A for batch in every.batches]))  # and is what it would be
    # The gradient at the critic's bias: 2 (v - R) of each step that is kept, over the number of all.
    batch = seen.batches[0]
    assert len(seen.batches) == 1
    assert batch.target is not None
    assert batch.old_value is not None
    keep_N = torch.zeros(batch.tokens.num_steps).index_add(0, batch.tokens.step_of_A, batch.weight_A.float()) > 0
    expected = 2 * (batch.old_value - batch.target)[keep_N].sum() / batch.update_steps
    close(seen.gradients["critic.head.bias"], [float(expected)], 1e-8)
