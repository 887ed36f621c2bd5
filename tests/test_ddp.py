"""Two processes learn what one learns: the same tasks give the same gradients and weights, however steps fall to ranks."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from callbacks import RolloutCallback, quantization
from steppo.advantages import StepGAE
from steppo.batch import Credit, CreditBatch
from steppo.cli import build_parts
from steppo.distributed import rank_and_world, require_equal
from steppo.errors import ConfigError, RunError
from steppo.models import TinyPolicy
from tests.cli_helpers import TOY, evaluations, places, run, weights
from tests.started import Started, started_by_torchrun

WITH_GRADIENTS = [
    "--trainer.callbacks+=tests.test_ddp.SaveFirstGradient",
    "--trainer.callbacks+=tests.test_ddp.SaveInferenceWeights",
]


class SaveFirstGradient(Callback):
    """Writes the first update's gradients, as the optimizer sees them."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step > 0:
            return
        gradients = {name: whole(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None}
        if trainer.is_global_zero:
            torch.save(gradients, Path(trainer.logger.save_dir) / "gradients.pt")


class SaveInferenceWeights(Callback):
    """Writes what an engine elsewhere would get at the end of training."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sent = {name: weight.clone() for name, weight in pl_module.policy.inference_weights()}
        if trainer.is_global_zero:
            torch.save(sent, Path(trainer.logger.save_dir) / "inference.pt")


class UnequalMemory(Callback):
    """Each process seems to need other memory, the second one more."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        used = SimpleNamespace(rss=(trainer.global_rank + 1) * 2**20)
        process = SimpleNamespace(memory_info=lambda: used)
        quantization.psutil = SimpleNamespace(Process=lambda: process)  # type: ignore[assignment]


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def fit(folder: Path, *args: str) -> tuple[int | None, str]:
    """Exit status and standard error of the real command, whose second process is started as Lightning does it."""
    variables = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    run = Started("fit", "--config", str(TOY), *places(folder), *args, variables=variables | {"MASTER_ADDR": "127.0.0.1"})
    errors = run.errors()
    return run.status, errors


def fit_by_torchrun(folder: Path, *args: str) -> tuple[int | None, str]:
    """As ``fit``; both processes, which must end alike, begin with what another has imported."""
    ranks = started_by_torchrun("fit", "--config", str(TOY), *places(folder), *args)
    errors = "".join(rank.errors() for rank in ranks)
    (status,) = {rank.status for rank in ranks}
    return status, errors


DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP = [
    "--trainer.devices=2",
    "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.save_distributed_checkpoint=false",
]
# 5 tasks: ranks of unequal numbers of rows and microbatches.
UNEQUAL = ["--rollout.episodes_per_iteration=5", "--data.num_minibatches=3", "--trainer.max_epochs=2"]
EXACT = ["--trainer.precision=64-true"]
NO_PANEL = ["--trainer.limit_val_batches=0"]
RUNS = {
    "unequal": ([*UNEQUAL, *EXACT, "--warm_start.updates=10"], fit, DDP, 1e-9),
    "sharded": ([*UNEQUAL, "--warm_start.updates=0"], fit_by_torchrun, FSDP, 1e-4),
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def one_and_two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """The same run in one process and in two, and how near they must be. Sharding knows no float64."""
    shape, start, processes, tolerance = request.param
    options = [
        *shape,
        "--data.max_tokens_per_microbatch=100",
        "--model.critic=steppo.models.SeparateCritic",
        "--model.objective.kl=loss",
        "--transcripts.num_shown=1",
        "--data.source.env=tests.info_env.InfoEnv",
        *WITH_GRADIENTS,
    ]
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    status, errors = start(two, *options, *processes, "--trainer.callbacks+=tests.test_ddp.UnequalMemory")
    assert status == 0, errors
    run(one, *options, "--trainer.devices=1")
    return one, two, tolerance


def test_two_ranks_give_the_gradient_of_one(one_and_two: tuple[Path, Path, float]) -> None:
    *folders, tolerance = one_and_two
    one, two = (torch.load(folder / "gradients.pt", weights_only=True) for folder in folders)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.norm())), name
    assert any(float(gradient.norm()) > 0 for gradient in one.values())


def test_two_ranks_end_with_the_weights_of_one(one_and_two: tuple[Path, Path, float]) -> None:
    *folders, tolerance = one_and_two
    one, two = (weights(folder) for folder in folders)
    assert one.keys() == two.keys()
    assert max(float((two[name] - weight).abs().max()) for name, weight in one.items()) < tolerance


def test_engines_get_whole_weights_by_their_own_names(one_and_two: tuple[Path, Path, float]) -> None:
    """The names of transformers' own files; also of sharded weights, which nobody else holds whole."""
    for folder in one_and_two[:2]:
        sent, kept = torch.load(folder / "inference.pt", weights_only=True), weights(folder)
        assert "model.layers.0.self_attn.q_proj.weight" in sent
        assert all(torch.equal(weight, kept[f"policy.model.{name}"]) for name, weight in sent.items())


def test_what_environments_say_is_told_of_all_ranks(one_and_two: tuple[Path, Path, float]) -> None:
    """Tasks go to ranks in turn, and only every other one has names of its own."""
    one, two, _ = one_and_two
    for alone, shared in zip(evaluations(one), evaluations(two), strict=True):
        assert {"distance", "odd one/s"} <= alone["info"].keys()
        assert {"type", "kind é"} <= alone["by_label"].keys()
        assert (alone["info"], alone["by_label"]) == (shared["info"], shared["by_label"])
    tags = [EventAccumulator(str(folder)).Reload().Tags()["scalars"] for folder in (one, two)]
    assert {"rollout/info/odd one/s", "val/info/odd one/s"} <= set(tags[0])
    assert set(tags[0]) == set(tags[1])


def test_memory_is_that_of_the_process_that_has_most(one_and_two: tuple[Path, Path, float]) -> None:
    assert {point.value for point in EventAccumulator(str(one_and_two[1])).Reload().Scalars("memory/process_mib")} == {2}


def test_the_panel_is_split_and_counted_once(one_and_two: tuple[Path, Path, float]) -> None:
    one, two = (evaluations(folder) for folder in one_and_two[:2])
    assert [record["iteration"] for record in two] == [record["iteration"] for record in one]
    for left, right in zip(one, two, strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0, "return_mean": pytest.approx(right["return_mean"])}


class SaveTokenizer(Callback):
    """Writes each process's tokenizer."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        path = Path(trainer.logger.save_dir) / f"tokenizer-{trainer.global_rank}.json"
        path.write_text(pl_module.policy.tokenizer_state())


def test_what_one_process_alone_sees_makes_no_other_tokenizer(tmp_path: Path) -> None:
    """Nor other demonstrations: it gets as far as the start of training."""
    options = ["--data.source.env=tests.worker_envs.DifferingEnv", "--data.source.env.what=fails", *NO_PANEL]
    saving = ["--trainer.callbacks+=tests.test_ddp.SaveTokenizer", "--warm_start.updates=1", "--warm_start.episodes=8"]
    status, errors = fit_by_torchrun(tmp_path, *options, *saving, "--rollout.max_environment_steps=0", *DDP)
    assert status == 0, errors
    first, second = ((tmp_path / f"tokenizer-{rank}.json").read_text() for rank in range(2))
    assert first == second


def test_processes_that_list_other_tasks_are_refused(tmp_path: Path) -> None:
    other = ["--data.source.env=tests.worker_envs.DifferingEnv", "--data.source.env.what=tasks"]
    status, errors = fit_by_torchrun(tmp_path, *other, *DDP)
    assert status == 2
    assert "process 1 has other tasks than process 0" in errors
    assert "Traceback" not in errors


PARTS: dict[str, tuple[Any, Any]] = {
    "tasks": (["a", "b"], ["b", "a"]),
    "seed": (1, 2),
    "tokenizer": ("x", "y"),
    "initial weights": ("12", "13"),
    "config": ({"lr": 1.0}, {"lr": 2.0}),
    "checkpoint": ({"updates": 4}, {}),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_differs_between_processes_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = PARTS[name]
    for others, wrong in (([mine, mine], None), ([theirs, mine], 1), ([mine, theirs], 2)):
        everyone = [{"same": 0, name: value} for value in (mine, *others)]
        monkeypatch.setattr("steppo.distributed.gather", lambda item, everyone=everyone: everyone)
        if wrong is None:
            require_equal(everyone[0])
            continue
        with pytest.raises(RunError, match=f"process {wrong} has other {name} than process 0"):
            require_equal(everyone[0])


class FailingOnOneRank(StepGAE):
    """Credit that one rank cannot compute: not a config mistake, but a bug."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def __call__(self, batch: CreditBatch) -> Credit:
        if rank_and_world()[0] == self.rank:
            raise ZeroDivisionError(f"rank {self.rank} is broken on purpose")
        return super().__call__(batch)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_on_one_rank_ends_both(rank: int, tmp_path: Path) -> None:
    """Its message is shown; nobody waits for the collectives' time-out of half an hour."""
    failing = ["--model.advantage=tests.test_ddp.FailingOnOneRank", f"--model.advantage.rank={rank}"]
    status, errors = fit(tmp_path, *failing, "--warm_start.updates=0", *NO_PANEL, *DDP)
    assert status != 0
    assert f"rank {rank} is broken on purpose" in errors


def test_two_processes_train_adapters_on_a_4_bit_base(tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    tiny_policy.model.save_pretrained(tmp_path / "model")
    tiny_policy.tokenizer.save_pretrained(tmp_path / "model")
    options = [
        "--model.policy=steppo.models.HFPolicy",
        f"--model.policy.name_or_path={tmp_path}/model",
        "--model.critic=steppo.models.AdapterCritic",
        "--model.objective.kl=loss",
        "--quantization.bits=4",
        "--quantization.lora_rank=4",
        "--warm_start.updates=0",
        "--trainer.max_epochs=1",
        "--rollout.episodes_per_iteration=4",
        *NO_PANEL,
        *WITH_GRADIENTS,
    ]
    run(tmp_path / "one", *options, "--trainer.devices=1")
    for name, machine in (("ddp", DDP), ("sharded", FSDP)):
        status, errors = fit_by_torchrun(tmp_path / name, *options, *machine)
        assert status == 0, errors
    one = torch.load(tmp_path / "one" / "gradients.pt", weights_only=True)
    for name in ("ddp", "sharded"):
        assert weights(tmp_path / name).keys() == weights(tmp_path / "one").keys()
        two = torch.load(tmp_path / name / "gradients.pt", weights_only=True)
        assert one.keys() == two.keys()
        assert all(float((two[key] - gradient).norm()) <= 1e-3 * float(gradient.norm()) for key, gradient in one.items())


def test_transcripts_hold_the_episodes_of_all_ranks_once(one_and_two: tuple[Path, Path, float]) -> None:
    one, two = (
        [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()] for folder in one_and_two[:2]
    )
    iterations = len(evaluations(one_and_two[0])) - 1
    tasks = sum(record["kind"] == "train" for record in one) // iterations
    assert [record["kind"] for record in two] == ["valid"] * 8 + (["train"] * tasks + ["valid"] * 8) * iterations
    assert any(step["advantage"] is not None for record in two if record["kind"] == "valid" for step in record["steps"])
    for left, right in zip(one, two, strict=True):
        for mine, other in zip(left.pop("steps"), right.pop("steps"), strict=True):
            for name in ("value", "advantage", "ratio"):
                figures = mine.pop(name), other.pop(name)
                if one_and_two[2] <= 1e-9:  # in float32 whitening makes rounding large
                    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
            assert mine == other
        assert left == right


def test_more_processes_than_tasks_is_refused() -> None:
    module = build_parts(Namespace(config=[str(TOY)], ckpt_path=None), []).model
    trainer = cast(Any, SimpleNamespace(world_size=2))
    message = r"1 tasks per iteration \(episodes_per_iteration / group_size\) are fewer than the 2 processes"
    for episodes, group in ((1, 1), (4, 4)):
        with pytest.raises(ConfigError, match=message):
            RolloutCallback(episodes, group).setup(trainer, module, "fit")
