"""Whole runs through the command line, in process, on a toy environment."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import WarmStartCallback
from steppo.advantages import StepGAE
from steppo.batch import Credit, CreditBatch, Segment
from steppo.learner.sft import SFTLearner
from steppo.models import TinyPolicy
from tests.cli_helpers import checkpoint, evaluations, run, same, weights

RECORD = {
    "iteration",
    "updates",
    "environment_steps",
    "split",
    "panel_sha256",
    "episodes",
    "errors",
    "no_verdict",
    "success_rate",
    "success_ci95",
    "return_mean",
    "steps_mean",
    "invalid_action_rate",
    "seconds",
}
TAGS = {
    "rollout/success_rate",
    "rollout/return_mean",
    "rollout/steps_per_episode",
    "rollout/prompt_tokens_mean",
    "rollout/action_tokens_mean",
    "rollout/invalid_action_rate",
    "rollout/env_errors",
    "rollout/engine_errors",
    "rollout/env_timeouts",
    "rollout/replaced_workers",
    "rollout/recycled_workers",
    "rollout/stop_terminated",
    "rollout/stop_env_error",
    "rollout/degenerate_groups",
    "rollout/steps_per_second",
    "rollout/tokens_per_second",
    "train/policy_loss",
    "train/value_loss",
    "train/approx_kl",
    "train/clip_fraction",
    "train/ratio_min",
    "train/ratio_mean",
    "train/ratio_max",
    "train/first_ratio_spread",
    "train/entropy",
    "train/explained_variance",
    "train/grad_norm_policy",
    "train/grad_norm_critic",
    "train/learning_rate",
    "train/learning_rate_critic",
    "train/skipped_updates",
    "train/logprob_mismatch",
    "train/tokens_read",
    "train/tokens_unique",
    "train/padding_share",
    "train/branches",
    "train/updates",
    "train/environment_steps",
    "seconds/rollout",
    "seconds/score",
    "seconds/update",
    "val/success_rate",
}


class NaNAdvantage(StepGAE):
    """Credit that nothing can be learned from."""

    def __call__(self, batch: CreditBatch) -> Credit:
        credit = super().__call__(batch)
        assert credit.advantage_N is not None
        return Credit(advantage_N=credit.advantage_N * float("nan"), target_N=credit.target_N)


class KeepWeights(Callback):
    """Copies of the weights before training and after each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._copy(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._copy(pl_module)

    def _copy(self, module: Any) -> None:
        self.seen.append({name: weight.detach().clone() for name, weight in module.state_dict().items()})


KEEP = ["--trainer.callbacks+=tests.test_train.KeepWeights"]
NO_PANEL = "--trainer.limit_val_batches=0"


def kept(cli: Any) -> list[dict[str, torch.Tensor]]:
    return next(callback.seen for callback in cli.trainer.callbacks if isinstance(callback, KeepWeights))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_records_what_it_did(tmp_path: Path) -> None:
    cli = run(tmp_path, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2")
    records = evaluations(tmp_path)
    assert [record["iteration"] for record in records] == [0, 2, 3]  # before, every second, at the end
    assert [record["updates"] for record in records] == [0, 4, 6]
    assert set(records[0]) == RECORD
    assert {record["panel_sha256"] for record in records} == {cli.datamodule.panel_sha256("validate")}
    assert all(record["episodes"] == 8 and record["split"] == "valid" for record in records)
    assert cli.trainer.global_step == 6
    curves = scalars(tmp_path)
    assert set(curves) >= TAGS
    assert [step for step, _ in curves["val/success_rate"]] == [0, 4, 6]
    assert max(gap for _, gap in curves["train/logprob_mismatch"]) < 1e-4
    assert curves["train/environment_steps"][-1][1] == records[-1]["environment_steps"]


def test_append_context_samples_what_it_learns(tmp_path: Path) -> None:
    context = "--data.source.context.class_path=steppo.rendering.AppendContext"
    run(tmp_path, context, "--trainer.max_epochs=1", "--data.source.max_prompt_tokens=500")
    gaps = scalars(tmp_path)["train/logprob_mismatch"]
    assert 0 < max(gap for _, gap in gaps) < 1e-4


class TinyEager(TinyPolicy):
    """Attends under a mask of the whole row."""

    def build(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        super().build(tokenizer_texts)
        self.model.set_attn_implementation("eager")


def test_rounding_that_reaches_into_the_clip_range_is_told(tmp_path: Path) -> None:
    """Other relatives in a row when scored than when learned from: other masks, other rounding."""
    narrow = ["--model.loss.clip_low=1e-6", "--trainer.max_epochs=1", "--data.packer=PrefixTreePacker"]
    narrow += [
        "--model.policy=tests.test_train.TinyEager",
        "--model.policy.hidden_size=32",
        "--model.policy.vocab_size=320",
    ]
    with pytest.warns(UserWarning, match="by rounding alone.*clip range, 1e-06"):
        run(tmp_path / "rounded", *narrow)
    [(_, spread)] = scalars(tmp_path / "rounded")["train/first_ratio_spread"]
    assert 1e-7 < spread < 1e-5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*by rounding alone.*")
        run(tmp_path / "whole", *narrow, "--data.num_minibatches=1")
    assert scalars(tmp_path / "whole")["train/first_ratio_spread"] == [(1, 0.0)]


def test_whole_episodes_are_read_once(tmp_path: Path) -> None:
    """Shuffled steps find less of their episode in the same update, and padded rows nothing."""
    context = ["--data.source.context=AppendContext", "--data.source.max_prompt_tokens=500", "--warm_start.updates=10"]
    curves = {}
    for packer, minibatches in (
        ("PaddedPacker", "ShuffledSteps"),
        ("PrefixTreePacker", "ShuffledSteps"),
        ("PrefixTreePacker", "WholeEpisodes"),
    ):
        name = f"{packer}-{minibatches}"
        options = [f"--data.packer={packer}", f"--data.minibatches={minibatches}", "--trainer.max_epochs=1", NO_PANEL]
        cli = run(tmp_path / name, *context, *options)
        found = scalars(tmp_path / name)
        curves[name] = {tag: found[f"train/{tag}"][0][1] for tag in ("tokens_read", "tokens_unique", "padding_share")}
        steps = cli.datamodule.buffer.experience.steps.records
        assert curves[name]["tokens_read"] == sum(len(step.prompt_ids) + len(step.action_ids) - 1 for step in steps)
    padded, shuffled, whole = curves.values()
    assert padded["tokens_read"] == padded["tokens_unique"] == shuffled["tokens_read"] == whole["tokens_read"]
    assert padded["padding_share"] > 0
    assert padded["tokens_unique"] > 1.5 * shuffled["tokens_unique"] > 1.5 * 1.2 * whole["tokens_unique"]


def test_it_learns(tmp_path: Path) -> None:
    corridor = [f"--data.source.env.{name}=2" for name in ("length", "num_tasks")]
    run(
        tmp_path,
        *corridor,
        "--data.source.env.max_steps=4",
        "--data.source.on_invalid=end",
        "--data.eval_split=train",
        "--data.update_epochs=2",
        "--data.source.num_slots=32",
        "--model.policy.hidden_size=64",
        "--model.policy_optimizer.lr=1e-3",
        "--rollout.episodes_per_iteration=64",
        "--warm_start.updates=200",
        "--trainer.max_epochs=17",
        "--trainer.check_val_every_n_epoch=17",
        "--checkpoint.every_n_iterations=17",
    )
    assert evaluations(tmp_path)[-1]["success_rate"] == 1
    rollouts = [value for _, value in scalars(tmp_path)["rollout/success_rate"]]
    assert rollouts[0] <= 0.5
    assert rollouts[-1] >= 0.9


def test_same_seed_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, f"--seed_everything={seed}", f"--warm_start.cache_dir={tmp_path}/cache-{name}")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_validate_repeats_the_recorded_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "fit")
    path = f"--ckpt_path={checkpoint(tmp_path / 'fit')}"
    run(tmp_path / "again", path, command="validate")
    expected, found = evaluations(tmp_path / "fit")[-1], evaluations(tmp_path / "again")[-1]
    same_figures = RECORD - {"seconds"}
    assert {name: found[name] for name in same_figures} == {name: expected[name] for name in same_figures}
    capsys.readouterr()
    run(tmp_path / "test", path, "--data.test_split=train", command="test")
    assert evaluations(tmp_path / "test")[-1]["split"] == "train"
    assert "evaluation on train after 2 iterations: success " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--model.critic=steppo.models.SeparateCritic", "--model.objective.kl=loss", "--model.objective.kl_estimator=k2"],
        ["--model.critic.detach=true", "--model.objective.kl=reward", "--model.objective.aggregation=token-mean"],
        ["--model.advantage=steppo.advantages.TokenGAE", "--model.loss.ratio=token", "--model.objective.value_clip=0"],
        ["--model.advantage=steppo.advantages.TokenGAE", "--rollout.group_size=2", "--model.objective.kl=loss"],
        [
            "--model.advantage.bootstrap_truncated=true",
            "--data.source.max_steps=3",
            "--model.advantage.whiten_over=episodes",
        ],
        ["--data.max_tokens_per_microbatch=100", "--model.policy_optimizer.schedule=cosine", "--data.update_epochs=2"],
        ["--data.source.parser=steppo.rendering.CommandParser", "--data.sampler=steppo.samplers.SequentialSampler"],
    ],
)
def test_components_are_swapped_by_options(tmp_path: Path, options: list[str]) -> None:
    cli = run(tmp_path, "--trainer.max_epochs=1", "--warm_start.updates=5", NO_PANEL, *options, *KEEP)
    first, *_, last = kept(cli)
    assert not same(first, last)
    assert all(torch.isfinite(weight).all() for weight in last.values())


ALGORITHMS = Path(__file__).parent.parent / "configs" / "algorithm"
LINES = {
    "reinforce_pp": "ReinforcePP, no critic, token ratio clipped at -0.2 / +0.2, KL in the reward (0.001), groups of 1",
    "rloo": "RLOO, no critic, token ratio clipped at -0.2 / +0.2, KL in the reward (0.001), groups of 8",
    "gspo": "GRPO, no critic, step ratio clipped at -0.1 / +0.1, no KL, groups of 8",
    "gigpo": "GiGPO, no critic, token ratio clipped at -0.2 / +0.2, no KL, groups of 8",
    "steppo": "StepGAE, SharedCritic read per step, step ratio clipped at -0.1 / +0.1, no KL, groups of 1",
}


@pytest.mark.parametrize("name", LINES)
def test_an_overlay_is_a_method(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """It learns, says which parts are at work, and has no critic that nobody asks."""
    similar = ["--model.advantage.similarity=0.9"] if name == "gigpo" else []
    overlay = ["--config", str(ALGORITHMS / f"{name}.yaml"), "--model.critic=steppo.models.SharedCritic", *similar, NO_PANEL]
    cli = run(
        tmp_path, *overlay, "--trainer.max_epochs=1", "--warm_start.updates=5", "--rollout.episodes_per_iteration=64", *KEEP
    )
    assert f"credit by {LINES[name]}" in caplog.messages
    first, *_, last = kept(cli)
    assert not same(first, last)
    assert any(weight.startswith("critic.") for weight in last) == (name == "steppo")
    assert ("train/kl" in cli.trainer.callback_metrics) == ("no KL" not in LINES[name])
    episodes = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    returns: dict[int, set[float]] = {}
    for episode in (episode for episode in episodes if episode["kind"] == "train"):
        returns.setdefault(episode["group"], set()).add(episode["return"])
    same_returns = [len(found) == 1 for found in returns.values()]
    share = sum(same_returns) / len(same_returns) if "groups of 8" in LINES[name] else 0.0
    assert cli.model.latest["rollout/degenerate_groups"] == pytest.approx(share)


def test_a_budget_of_environment_steps_ends_the_run(tmp_path: Path) -> None:
    run(tmp_path / "long", "--trainer.max_epochs=4", "--evaluation.before_training=false")
    steps = [record["environment_steps"] for record in evaluations(tmp_path / "long")]
    budget = [f"--rollout.max_environment_steps={steps[1]}", "--trainer.max_epochs=9", "--trainer.check_val_every_n_epoch=9"]
    run(tmp_path / "short", *budget)
    assert [record["iteration"] for record in evaluations(tmp_path / "short")] == [0, 2]
    assert evaluations(tmp_path / "short")[-1]["environment_steps"] == steps[1]
    done = weights(tmp_path / "short")
    run(tmp_path / "short", *budget, f"--ckpt_path={checkpoint(tmp_path / 'short')}")  # nothing is left to do
    assert same(weights(tmp_path / "short"), done)


def test_react_is_evaluated_and_not_trained(tmp_path: Path) -> None:
    cli = run(tmp_path, "--config", str(ALGORITHMS / "react.yaml"))
    [record] = evaluations(tmp_path)
    assert (record["iteration"], record["updates"], record["episodes"]) == (0, 0, 8)
    assert not (tmp_path / "checkpoints").exists()
    assert cli.trainer.global_step == 0
    assert cli.model.critic is None
    assert cli.model.reference is None


def test_demonstrations_are_said_as_the_parser_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments: list[Segment] = []

    def clone(callback: WarmStartCallback, trainer: pl.Trainer, learner: SFTLearner, held_out: list[Segment]) -> None:
        segments.extend(learner.segments)

    monkeypatch.setattr(WarmStartCallback, "_train", clone)
    parser = ["--data.source.parser=ToolCallParser", "--data.source.max_new_tokens=80"]
    cache = f"--warm_start.cache_dir={tmp_path}/cache"
    cli = run(tmp_path, *parser, "--trainer.max_epochs=1", "--warm_start.updates=1", cache)
    said = [cli.datamodule.source.renderer.decode_action(segment.action_ids) for segment in segments]
    assert said
    assert all(text.startswith('<tool_call>\n{"name": "act", "arguments": {"command": "') for text in said)


def test_microbatch_size_does_not_matter(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs=1", "--warm_start.updates=5", "--trainer.precision=64-true", NO_PANEL]
    for size in (100, 100_000):
        run(tmp_path / str(size), f"--data.max_tokens_per_microbatch={size}", *options)
    small, large = weights(tmp_path / "100"), weights(tmp_path / "100000")
    assert all(torch.allclose(small[name], large[name], rtol=0, atol=1e-6) for name in small)


def test_critic_warms_up_alone(tmp_path: Path) -> None:
    first, *after = kept(run(tmp_path, "--model.critic_warmup_updates=2", "--trainer.max_epochs=1", NO_PANEL, *KEEP))
    policy = [name for name in first if name.startswith("policy.")]
    for state in after[:2]:
        assert all(torch.equal(state[name], first[name]) for name in policy)
        assert not torch.equal(state["critic.head.weight"], first["critic.head.weight"])


def test_runs_of_any_seed_can_begin_alike(tmp_path: Path) -> None:
    alike = ["--model.policy.seed=5", "--warm_start.seed=5", "--trainer.max_epochs=1", "--warm_start.updates=5", NO_PANEL]
    (first, *_, trained), (other, *_, differently) = (
        kept(run(tmp_path / str(seed), f"--seed_everything={seed}", *alike, *KEEP)) for seed in (1, 2)
    )
    assert same(first, other)
    assert not same(trained, differently)


def test_warm_start_is_cached_by_what_it_depends_on(tmp_path: Path) -> None:
    found = []
    short = [f"--warm_start.cache_dir={tmp_path}/cache", "--trainer.max_epochs=1", NO_PANEL]
    for number, options in enumerate(([], [], ["--warm_start.updates=31"], ["--warm_start.actions=expert"])):
        folder = tmp_path / str(number)
        start = kept(run(folder, *short, "--warm_start.updates=30", *options, *KEEP))[0]
        found.append((start, len(list((tmp_path / "cache").iterdir()))))
    assert [count for _, count in found] == [1, 1, 2, 3]
    assert same(found[0][0], found[1][0])
    assert not same(found[0][0], found[3][0])


def test_updates_that_are_not_finite_are_skipped_then_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.advantage=tests.test_train.NaNAdvantage", "--warm_start.updates=0", NO_PANEL]
    first, *after = kept(run(tmp_path / "skip", *options, "--trainer.max_epochs=2", "--model.max_skipped_updates=9", *KEEP))
    assert all(same(first, state) for state in after)
    assert scalars(tmp_path / "skip")["train/skipped_updates"][-1][1] == 4
    with pytest.raises(SystemExit):
        run(tmp_path / "stop", *options, "--model.max_skipped_updates=3")
    assert "3 updates in a row had non-finite gradients" in capsys.readouterr().err


def test_broken_episodes_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = ["--data.source.env=tests.toy_env.FaultyEnv", "--trainer.max_epochs=1"]
    broken = [f"corridor/train/{number}" for number in (1, 4)]
    run(tmp_path, *faulty, f"--data.source.env.fail_tasks={broken}")
    assert scalars(tmp_path)["rollout/env_errors"][0][1] == 2
    everything = [f"corridor/train/{number}" for number in range(8)]
    with pytest.raises(SystemExit):
        run(tmp_path / "none", *faulty, f"--data.source.env.fail_tasks={everything}")
    assert "broken on purpose" in capsys.readouterr().err


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("context", ["StateContext", "AppendContext", "WindowContext"])
def test_a_pretrained_model_of_a_folder_trains(context: str, tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_policy.model.save_pretrained(folder)
    tiny_policy.tokenizer.chat_template = CHAT
    tiny_policy.tokenizer.save_pretrained(folder)
    tiny_policy.tokenizer.chat_template = None
    cli = run(
        tmp_path / "run",
        "--model.policy=steppo.models.HFPolicy",
        f"--model.policy.name_or_path={folder}",
        "--model.critic=steppo.models.SeparateCritic",
        f"--data.source.context=steppo.rendering.{context}",
        "--data.source.max_prompt_tokens=900",
        "--data.source.env.max_steps=4",
        "--warm_start.updates=10",
        "--trainer.max_epochs=1",
    )
    assert cli.model.policy.tokenizer.chat_template == CHAT
    assert scalars(tmp_path / "run")["train/logprob_mismatch"][0][1] < 1e-4
    assert [record["iteration"] for record in evaluations(tmp_path / "run")] == [0, 1]
