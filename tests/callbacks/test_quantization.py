"""Real runs with a frozen base: LoRA, 4 bits, 8 bits; what is trained, kept, resumed and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steppo.models import TinyPolicy
from tests.cli_helpers import checkpoint, evaluations, run, same, weights
from tests.test_train import KEEP, NO_PANEL, kept, scalars


@pytest.fixture
def folder(tiny_policy: TinyPolicy, tmp_path: Path) -> str:
    """A pretrained model, as a hub would give it."""
    tiny_policy.model.save_pretrained(tmp_path / "model")
    tiny_policy.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def fit(where: Path, folder: str, *options: str, command: str = "fit") -> Any:
    return run(
        where,
        f"--config={{model: {{policy: {{class_path: HFPolicy, name_or_path: {folder}}}}}}}",
        "--model.critic=steppo.models.AdapterCritic",
        "--quantization.lora_rank=4",
        "--warm_start.updates=3",
        "--trainer.max_epochs=1",
        *options,
        command=command,
    )


# A 4-bit layer takes one row by another kernel than many on some CPUs, so sampler and learner differ by more.
BASES = {
    "lora": ([], 1e-4),
    "bfloat16": (["--quantization.base_dtype=bfloat16"], 0.1),
    "4-bit": (["--quantization.bits=4"], 1e-3),
    "8-bit": (["--quantization.bits=8"], 0.1),
}


@pytest.mark.parametrize(("options", "tolerance"), BASES.values(), ids=BASES)
def test_adapters_learn_on_a_frozen_base(options: list[str], tolerance: float, folder: str, tmp_path: Path) -> None:
    options = [*options, "--model.objective.kl=loss", "--quantization.gradient_checkpointing=true", NO_PANEL]
    first, *_, last = kept(fit(tmp_path / "run", folder, *options, *KEEP))
    # By bytes: 4-bit codes are stored as floats, some of which read as NaN.
    changed = {name for name in first if not torch.equal(first[name].view(torch.uint8), last[name].view(torch.uint8))}
    assert "critic.head.weight" in changed
    assert all(".policy." in name or ".critic." in name for name in changed if ".lora_" in name)
    assert not any(".lora_" not in name for name in changed if name.startswith("policy."))
    assert any(".lora_B.policy." in name for name in changed)
    assert any(".lora_B.critic." in name for name in changed)
    figures = scalars(tmp_path / "run")
    assert figures["train/logprob_mismatch"][0][1] < tolerance
    assert figures["memory/process_mib"][0][1] > 0
    saved = weights(tmp_path / "run")
    assert all(".lora_" in name or name.startswith("critic.head") for name in saved)
    assert {adapter for name in saved for adapter in ("policy", "critic", "reference") if f".{adapter}.w" in name} == {
        "policy",
        "critic",
        "reference",
    }


def test_a_checkpoint_of_adapters_evaluates_and_resumes_exactly(folder: str, tmp_path: Path) -> None:
    options = ["--quantization.bits=4", "--model.objective.kl=loss"]
    fit(tmp_path / "whole", folder, *options, "--trainer.max_epochs=2")
    fit(tmp_path / "part", folder, *options)
    last = f"--ckpt_path={checkpoint(tmp_path / 'part')}"
    fit(tmp_path / "again", folder, *options, last, command="validate")
    expected, found = evaluations(tmp_path / "part")[-1], evaluations(tmp_path / "again")[-1]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    fit(tmp_path / "rest", folder, *options, last, "--trainer.max_epochs=2")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "rest"))


def test_it_says_what_is_trained(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        cli = fit(tmp_path / "run", folder, "--quantization.bits=4", "--rollout.max_environment_steps=0", NO_PANEL)
    trained = sum(p.numel() for group in cli.trainer.optimizers[0].param_groups for p in group["params"])
    assert f"LoRA of rank 4 on a 4-bit base: {trained:,} of " in caplog.text


MODEL_PARALLEL = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
REFUSED = {
    "bits without lora": (["--quantization.lora_rank=0", "--quantization.bits=4"], "set quantization.lora_rank"),
    "alpha without lora": (["--quantization.lora_rank=0", "--quantization.lora_alpha=4"], "need lora_rank"),
    "critic of its own": (["--model.critic=steppo.models.SeparateCritic"], "use steppo.models.AdapterCritic"),
    "adapter critic, no adapter": (["--quantization.lora_rank=0"], "set quantization.lora_rank"),
    "nothing to quantise": (["--model.policy=steppo.models.TinyPolicy", "--quantization.bits=4"], "HFPolicy"),
    "float64": (["--quantization.bits=4", "--trainer.precision=64-true"], "32-true or bf16-mixed"),
    "spawn": (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "use ddp"),
    "unknown layers": (
        ["--quantization.lora_targets=[nowhere]"],
        "'nowhere': only linear layers can be adapted; the model has",
    ),
    "an embedding": (["--quantization.lora_targets=[embed_tokens,q_proj]"], "'embed_tokens': only linear layers can be"),
    "sharded files": ([MODEL_PARALLEL], "save_distributed_checkpoint"),
    "8 bits sharded": (
        [MODEL_PARALLEL, "--trainer.strategy.init_args.save_distributed_checkpoint=false", "--quantization.bits=8"],
        "quantization.bits to 4",
    ),
}


@pytest.mark.parametrize(("options", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_with_what_can(
    options: list[str], hint: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", folder, *options)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert hint in message
