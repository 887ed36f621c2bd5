"""On a GPU: trees give what padded rows give, kept caches what reading anew gives, and runs learn and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from steppo.models import TinyPolicy, branches
from steppo.models import policy as policy_module
from steppo.packing import Packer, PaddedPacker, PrefixTreePacker
from tests.callbacks.test_quantization import fit, folder  # noqa: F401
from tests.cli_helpers import checkpoint, run, weights
from tests.engines.test_caches import check_by_reading_all, engine_for, episodes, llama, play, policy_of
from tests.numeric_helpers import near
from tests.packing.scenes import SCENES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = "configs/trainer/gpu.yaml"


def readings(policy: TinyPolicy, scene: str, packer: Packer) -> list[torch.Tensor]:
    """Log-probabilities by step, and the gradient of their weighted sum."""
    segments = SCENES[scene]
    by_step = [torch.empty(0)] * len(segments)
    total = torch.zeros((), device=policy.device, dtype=torch.float64)
    policy.zero_grad()
    for steps, tokens in packer.pack(segments, 10**6):
        batch = tokens.to(policy.device)
        ones_A = torch.ones(len(batch.target_A), device=policy.device)
        logprobs_A = policy(batch, ones_A).logprobs_A
        for place, step in enumerate(steps):
            by_step[step] = logprobs_A[batch.step_of_A == place]
            if by_step[step].numel():
                total = total + (1 + step % 3) * by_step[step].mean()
    total.backward()
    gradients = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]
    return [torch.cat(by_step).detach(), torch.cat(gradients)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scene", ["append group", "state group"])
def test_trees_give_what_padded_rows_give(scene: str, dtype: torch.dtype) -> None:
    """Both are compared with the truth: trees may be off by as much as rounding is for rows (norms are never in float64)."""
    torch.manual_seed(0)
    policy = TinyPolicy(hidden_size=64, num_layers=2, num_heads=4, seed=0)
    policy.build(lambda: ["go north take coin"])
    policy.cuda().double()
    truth = readings(policy, scene, PaddedPacker())
    policy.to(dtype)
    padded = readings(policy, scene, PaddedPacker())
    trees = readings(policy, scene, PrefixTreePacker(branch_tokens=0))
    least = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for tree, row, true in zip(trees, padded, truth, strict=True):
        near(tree, true, least + 2 * float((row.double() - true).norm() / true.norm()))


def test_mixed_precision_attends_to_all_branches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, calls = branches._at_once, list[torch.dtype]()

    def counted(query: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(query.dtype)
        return at_once(query, *others)

    monkeypatch.setattr(branches, "_at_once", counted)
    policy = TinyPolicy(hidden_size=64, num_layers=2, num_heads=4, seed=0)
    policy.build(lambda: ["go north"])
    policy.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        readings(policy, "append group", PrefixTreePacker(branch_tokens=0))
    assert set(calls) == {torch.bfloat16}


def test_kept_caches_give_what_reading_anew_gives() -> None:
    torch.manual_seed(0)
    policy = policy_of(llama(2)).cuda()
    assert check_by_reading_all(policy, play(engine_for(policy, max_batch_size=9), episodes(40))) > 100


def test_logits_in_chunks_give_what_all_give(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy = TinyPolicy(hidden_size=64, seed=0)
    policy.build(lambda: ["go north"])
    policy.cuda().double()
    expected = readings(policy, "append", PaddedPacker())
    monkeypatch.setattr(policy_module, "_LOGITS_PER_CHUNK", 1)
    monkeypatch.setattr(policy_module, "_ROWS_PER_CHUNK", 3)
    for one, other in zip(readings(policy, "append", PaddedPacker()), expected, strict=True):
        near(one, other, 1e-9)


def test_a_run_learns_evaluates_and_resumes(tmp_path: Path) -> None:
    options = ["--config", GPU, "--data.packer=PrefixTreePacker"]
    cli = run(tmp_path, *options)
    assert isinstance(cli.trainer.accelerator, CUDAAccelerator)  # which has moved the weights back to the CPU
    before = weights(tmp_path)
    run(
        tmp_path,
        "--config",
        GPU,
        "--data.packer=PrefixTreePacker",
        "--trainer.max_epochs=3",
        f"--ckpt_path={checkpoint(tmp_path)}",
    )
    after = weights(tmp_path)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_adapters_learn_on_a_base_in_4_bits(folder: str, tmp_path: Path) -> None:  # noqa: F811
    options = ["--config", GPU, "--quantization.bits=4", "--quantization.gradient_checkpointing=true"]
    cli = fit(tmp_path, folder, *options, "--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed")
    assert isinstance(cli.trainer.accelerator, CUDAAccelerator)
    assert all(value.isfinite().all() for name, value in weights(tmp_path).items() if ".lora_" in name)
