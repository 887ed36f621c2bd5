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
from steppo.engines import HFEngine
from steppo.errors import ConfigError
from steppo.learner import Bypass, Correction, CorrectionInputs, ImportanceCorrection, NoCorrection, Weights
from steppo.learner.correction import weight_figures
from steppo.models import TinyPolicy
from steppo.types import Completion
from tests.cli_helpers import run, same, weights
from tests.numeric_helpers import FEW, close, normal, steps_of
from tests.test_train import scalars

ONE_UPDATE = ["--trainer.max_epochs=1", "--warm_start.updates=20", "--data.num_minibatches=1", "--data.eval_tasks=1"]


class DropLast(Correction):
    """Every third step is not learned from; the others count double. Each rank numbers its own steps."""

    def __call__(self, inputs: CorrectionInputs) -> Weights:
        return Weights(torch.full_like(inputs.old_logprobs_A, 2.0), inputs.step_of_A % 3 != 2)


class WatchUpdates(Callback):
    """Keeps the updates' microbatches and gradients."""

    def __init__(self) -> None:
        self.batches: list[Microbatch] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Microbatch], batch_idx: int) -> None:
        self.batches += batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def of_ratios(ratio_A: list[float], step_of_A: list[int], episode_of_N: list[int]) -> CorrectionInputs:
    """Tokens whose ``pi_old / behaviour`` these are."""
    old_A = torch.tensor(ratio_A, dtype=torch.float64).log()
    steps = torch.tensor(step_of_A)
    return CorrectionInputs(torch.zeros_like(old_A), old_A, steps, len(episode_of_N), torch.tensor(episode_of_N))


def test_by_hand() -> None:
    """Ratios 2 and 8 in one step, 1/4 in the other: geometric means 4 and 1/4, and over both steps the third root of 4."""
    inputs = of_ratios([2.0, 8.0, 0.25], [0, 0, 1], [0, 0])
    by_step = ImportanceCorrection("step", cap=3.0, keep_low=0.3)(inputs)
    close(by_step.weight_A, [3.0, 3.0, 0.25])
    assert by_step.keep_A.tolist() == [True, True, False]
    by_token = ImportanceCorrection("token", cap=3.0, keep_high=7.0)(inputs)
    close(by_token.weight_A, [2.0, 3.0, 0.25])
    assert by_token.keep_A.tolist() == [True, False, True]
    close(ImportanceCorrection("episode")(inputs).weight_A, [4 ** (1 / 3)] * 3)
    for none in (NoCorrection()(inputs), Bypass()(inputs)):
        assert none.weight_A.tolist() == [1.0, 1.0, 1.0]
        assert none.keep_A.all()


def test_masks_of_another_level_than_the_weights() -> None:
    """Of two episodes the second is far off as a whole, though one of its steps is not."""
    inputs = of_ratios([2.0, 0.5, 1.0, 9.0], [0, 1, 2, 3], [0, 0, 1, 1])
    by_episode = ImportanceCorrection("token", cap=5.0, keep_high=2.5, keep_level="episode")(inputs)
    close(by_episode.weight_A, [2.0, 0.5, 1.0, 5.0])
    assert by_episode.keep_A.tolist() == [True, True, False, False]
    only = ImportanceCorrection("none", keep_low=0.6, keep_high=4.0, keep_level="step")(inputs)
    assert only.weight_A.tolist() == [1.0] * 4
    assert only.keep_A.tolist() == [True, False, True, False]


def test_icepop_by_its_formula() -> None:
    """``M(k) = k`` for k in [0.5, 5], else 0, token by token."""
    ratios = [0.49, 0.51, 1.0, 4.9, 5.1]
    weight_A, keep_A = ImportanceCorrection("token", 5.0, 0.5, 5.0)(of_ratios(ratios, [0, 0, 0, 1, 1], [0, 1]))
    close(weight_A * keep_A, [0.0, 0.51, 1.0, 4.9, 0.0])


@FEW
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 2**16),
    st.sampled_from(["step", "token", "episode", "none"]),
    st.sampled_from(["step", "token", "episode"]),
)
def test_equals_a_loop(lengths: list[list[int]], seed: int, level: Any, keep_level: Any) -> None:
    """Episodes of steps of tokens."""
    rng = np.random.default_rng(seed)
    flat = [count for episode in lengths for count in episode]
    behaviour_A, old_A = normal(rng, sum(flat)) - 3, normal(rng, sum(flat)) - 3
    episode_of_N = [number for number, episode in enumerate(lengths) for _ in episode]
    inputs = CorrectionInputs(behaviour_A, old_A, steps_of(flat), len(flat), torch.tensor(episode_of_N))
    found = ImportanceCorrection(level, 1.5, 0.4, 2.5, keep_level)(inputs)

    logs = iter((old_A - behaviour_A).tolist())
    expected, kept = [], []
    for episode in lengths:
        steps = [[next(logs) for _ in range(count)] for count in episode]
        whole = [log for step in steps for log in step]
        for step in steps:
            for log in step:
                scopes = {"token": [log], "step": step, "episode": whole, "none": [0.0]}
                means = {name: math.exp(min(sum(scope) / len(scope), 10.0)) for name, scope in scopes.items()}
                expected.append(min(means[level], 1.5))
                kept.append(0.4 <= means[keep_level] <= 2.5)
    close(found.weight_A, expected)
    assert found.keep_A.tolist() == kept


def test_figures_by_hand() -> None:
    """Steps of ratios (2, 2) and (1/2): products 4 and 1/2, means 2 and 1/2; the second is not kept, or all are."""
    inputs = of_ratios([2.0, 2.0, 0.5], [0, 0, 1], [0, 1])
    figures = weight_figures(ImportanceCorrection("step")(inputs), inputs)
    assert figures["correction_kept"] == 1.0
    assert figures["correction_ess"] == pytest.approx(2.5**2 / (2 * 4.25))
    assert figures["correction_ess_product"] == pytest.approx(4.5**2 / (2 * 16.25))
    figures = weight_figures(ImportanceCorrection("step", keep_low=0.6)(inputs), inputs)
    assert figures["correction_kept"] == pytest.approx(2 / 3)
    assert figures["correction_ess"] == pytest.approx(0.5)
    far = of_ratios([1e300, 1e300, 1e-300], [0, 0, 1], [0, 1])
    assert weight_figures(ImportanceCorrection("step")(far), far)["correction_ess_product"] == pytest.approx(0.5)
    nothing = weight_figures(ImportanceCorrection("step", keep_high=1.5, keep_low=0.9)(inputs), inputs)
    assert nothing["correction_kept"] == nothing["correction_ess"] == 0.0


def test_a_level_of_none_wants_a_level_to_keep_by() -> None:
    with pytest.raises(ConfigError, match="keep_level"):
        ImportanceCorrection("none", keep_high=2.0)


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


class Watered(HFEngine):
    """Says that it found everything less likely than it did, by a tenth of a nat a token."""

    def poll(self) -> list[Completion]:
        completions = super().poll()
        for completion in completions:
            completion.logprobs[:] = completion.logprobs - 0.1
        return completions


@pytest.mark.parametrize("critic", ["SeparateCritic", "SharedCritic"])
def test_bypass_takes_the_samplers_log_probabilities_for_the_old_ones(critic: str, tmp_path: Path) -> None:
    """The first ratio is then exp(0.1), where another correction weighs so and begins with ratio 1."""
    passes = count_passes(tmp_path / "bypass", critic, "Bypass")
    ratio = dict(scalars(tmp_path / "bypass")["train/ratio_mean"])
    assert list(ratio.values()) == pytest.approx([math.exp(0.1)], rel=1e-3)
    weighed = count_passes(tmp_path / "weighed", critic, "ImportanceCorrection")
    figures = scalars(tmp_path / "weighed")
    assert [value for _, value in figures["train/ratio_mean"]] == pytest.approx([1.0], rel=1e-3)
    assert [value for _, value in figures["train/weight_mean"]] == pytest.approx([math.exp(0.1)], rel=1e-3)
    assert [value for _, value in figures["train/correction_kept"]] == [1.0]
    assert "train/correction_kept" not in scalars(tmp_path / "bypass")
    # A critic of its own needs no pass of the policy before the update; a shared one reads it.
    assert passes < weighed if critic == "SeparateCritic" else passes == weighed


def count_passes(folder: Path, critic: str, correction: str) -> int:
    """Passes of the policy that scored the steps of a run, whose only update has all of them."""
    engine = "--data.source.engine=tests.learner.test_correction.Watered"
    critics = f"--model.critic=steppo.models.{critic}"
    options = [*ONE_UPDATE, engine, critics, f"--model.correction={correction}", "--data.eval_tasks=1"]
    calls = 0
    plain = TinyPolicy.forward

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += not torch.is_grad_enabled()
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyPolicy, "forward", counted)
        run(folder, *options)
    return calls


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
