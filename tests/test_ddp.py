"""Two processes learn what one learns: the same tasks give the same gradients and weights, however steps fall to ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.cli_helpers import TOY, evaluations

ROOT = Path(__file__).parent.parent
WITH_GRADIENTS = ["--trainer.callbacks+=tests.test_ddp.SaveFirstGradient"]


class SaveFirstGradient(Callback):
    """Writes the first update's gradients, as the optimizer sees them."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            torch.save(gradients, Path(trainer.logger.save_dir) / "gradients.pt")


def fit(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """A run of the real command in processes of its own."""
    command = [sys.executable, "train.py", "fit", "--config", str(TOY)]
    where = [f"--trainer.logger.init_args.save_dir={folder}", f"--warm_start.cache_dir={folder}/cache"]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    environment.pop("MASTER_PORT", None)
    return subprocess.run(
        [*command, *where, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run in one process and in two: 5 tasks, so that the ranks have unequal numbers of rows."""
    options = [
        "--rollout.tasks_per_iteration=5",
        "--trainer.precision=64-true",
        "--data.num_minibatches=3",
        "--data.max_tokens_per_microbatch=100",
        "--model.loss.kl=loss",
        *WITH_GRADIENTS,
    ]
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder, processes in ((one, ["--trainer.devices=1"]), (two, ["--trainer.devices=2", "--trainer.strategy=ddp"])):
        done = fit(folder, *options, *processes)
        assert done.returncode == 0, done.stderr[-2000:]
    return one, two


def test_two_ranks_give_the_gradient_of_one(one_and_two: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / "gradients.pt", weights_only=True) for folder in one_and_two)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.norm())), name
    assert any(float(gradient.norm()) > 0 for gradient in one.values())


def test_two_ranks_end_with_the_weights_of_one(one_and_two: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in one_and_two)
    assert max(float((two[name] - weight).abs().max()) for name, weight in one.items()) < 1e-9


def test_the_panel_is_split_and_counted_once(one_and_two: tuple[Path, Path]) -> None:
    one, two = (evaluations(folder) for folder in one_and_two)
    assert [record["iteration"] for record in two] == [0, 1, 2]
    for left, right in zip(one, two, strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


def test_transcripts_hold_the_episodes_of_all_ranks_once(one_and_two: tuple[Path, Path]) -> None:
    one, two = (
        [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()] for folder in one_and_two
    )
    assert [record["kind"] for record in two] == ["valid"] * 8 + (["train"] * 5 + ["valid"] * 8) * 2
    assert any(step["advantage"] is not None for record in two if record["kind"] == "valid" for step in record["steps"])
    for left, right in zip(one, two, strict=True):
        for mine, other in zip(left.pop("steps"), right.pop("steps"), strict=True):
            for name in ("value", "advantage", "ratio"):
                assert mine.pop(name) == pytest.approx(other.pop(name), abs=1e-6)
            assert mine == other
        assert left == right


def test_more_processes_than_tasks_is_refused(tmp_path: Path) -> None:
    done = fit(tmp_path, "--rollout.tasks_per_iteration=1", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode != 0
    assert "rollout.tasks_per_iteration must be at least the number of processes, 2" in done.stderr
    assert "Traceback" not in done.stderr
