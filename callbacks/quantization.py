"""Decides what of the policy is trained and how the rest is stored: LoRA, 4-bit and 8-bit bases, one process or many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from steppo.checkpoints import read
from steppo.distributed import gather
from steppo.errors import ConfigError
from steppo.models import AdapterCritic, SeparateCritic
from steppo.models.adapters import LoRASettings
from steppo.module import AgentModule
from steppo.run_folder import RunTrainer


@dataclass(eq=False)
class QuantizationCallback(pl.Callback):
    """Sets up base precision and adapters before the model is built; says what will be trained and logs memory.

    With ``lora_rank`` the model is frozen and an adapter is trained; ``AdapterCritic`` and the reference policy are further
    adapters on the same base. Works on CPU and CUDA, in one process, under DDP and under FSDP2 (``ModelParallelStrategy``).

    Args:
        bits: Store the base in 4 bits (nf4) or 8 bits (bitsandbytes); it can then only be trained through LoRA.
        lora_rank: Rank of the adapters on all targets; 0 trains all weights.
        lora_alpha: Scale of the adapters; twice the rank unless given.
        lora_targets: Names of the linear layers to adapt; all but the head unless given.
        base_dtype: Of a frozen base's weights (those that are not quantised): bfloat16 on CUDA and float32 on a CPU unless
            given, or what a checkpoint was trained on. Weights that are trained are always as the policy says.
        gradient_checkpointing: Keep no activations within a layer, compute them again in the backward pass.
    """

    bits: Literal[4, 8] | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None
    base_dtype: Literal["float32", "bfloat16"] | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_alpha is not None and self.lora_alpha <= 0):
            raise ConfigError("quantization: lora_rank must be at least 0 and lora_alpha above 0")
        if self.lora_rank == 0 and (self.lora_alpha, self.lora_targets, self.base_dtype) != (None, None, None):
            raise ConfigError("quantization: lora_alpha, lora_targets and base_dtype need lora_rank")
        if self.lora_rank == 0 and self.bits is not None:
            raise ConfigError(
                f"quantization: weights of {self.bits} bits cannot be trained; set quantization.lora_rank, such as 16"
            )

    def setup(self, trainer: pl.Trainer, pl_module: AgentModule, stage: str) -> None:
        self._check(trainer, pl_module)
        path = cast(RunTrainer, trainer).begins_from
        checkpoint = read(path, mmap=True) if self.lora_rank and path is not None else None
        self.apply(pl_module, trainer.strategy.root_device, checkpoint)

    def apply(self, module: AgentModule, device: torch.device, checkpoint: dict[str, Any] | None = None) -> None:
        """Tells a module what to build, where, and for which checkpoint; for commands without a trainer too."""
        module.gradient_checkpointing = self.gradient_checkpointing
        if self.lora_rank == 0:
            return
        kept = checkpoint["steppo"].get("belongs_to", {}).get("base_dtype") if checkpoint else None
        own = "bfloat16" if device.type == "cuda" else "float32"
        module.policy.bits, module.policy.load_device = self.bits, device
        module.policy.base_dtype = getattr(torch, self.base_dtype or kept or own)
        alpha = self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank
        module.lora = LoRASettings(self.lora_rank, alpha, tuple(self.lora_targets) if self.lora_targets else "all-linear")

    def _check(self, trainer: pl.Trainer, module: AgentModule) -> None:
        """Refuses what cannot work, with what can."""
        strategy, policy, critic = trainer.strategy, type(module.policy).__name__, module.critic
        name = type(strategy).__name__
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise ConfigError(
                f"trainer.strategy {name} is not supported; use auto, ddp, or configs/trainer/fsdp.yaml (FSDP2)"
            )
        if isinstance(strategy, ModelParallelStrategy) and self.bits == 8:
            raise ConfigError("8-bit weights cannot be sharded: set quantization.bits to 4, or trainer.strategy to ddp")
        if self.lora_rank and module.policy.base_model() is None:
            raise ConfigError(f"{policy} is made from scratch, there is no base to freeze; use steppo.models.HFPolicy")
        if self.bits is not None and trainer.precision == "64-true":
            raise ConfigError("quantised weights compute in 32 or 16 bits: set trainer.precision to 32-true or bf16-mixed")
        if self.lora_rank and isinstance(critic, SeparateCritic):
            raise ConfigError("SeparateCritic would copy a frozen base: with LoRA use steppo.models.AdapterCritic instead")
        if self.lora_rank == 0 and isinstance(critic, AdapterCritic):
            raise ConfigError("AdapterCritic shares a frozen base: set quantization.lora_rank, or use SeparateCritic")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        trained = sum(parameter.numel() for group in trainer.optimizers[0].param_groups for parameter in group["params"])
        total = sum(_numel(parameter) for parameter in pl_module.parameters())
        base = "all weights"
        if self.lora_rank:
            stored = f"{self.bits}-bit" if self.bits else str(pl_module.policy.dtype).removeprefix("torch.")
            base = f"LoRA of rank {self.lora_rank} on a {stored} base"
        rank_zero_info(f"training {base}: {trained:,} of {total:,} parameters ({trained / total:.1%})")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: AgentModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            memory = {"memory/process_mib": psutil.Process().memory_info().rss / 2**20}
            if pl_module.device.type == "cuda":
                memory["memory/cuda_peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
            everyone = gather(memory)  # a mean would hide the process that is about to run out
            pl_module.report({name: max(of_rank[name] for of_rank in everyone) for name in memory})


def _numel(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; two 4-bit ones share a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
