"""Reads the checkpoints of runs outside of a run."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from steppo.errors import ConfigError
from steppo.models import Policy
from steppo.models.adapters import LoRASettings


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that steppo wrote, on the CPU; nothing in it is run. Raises ``ConfigError`` for other files."""
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a checkpoint that can be read safely") from error
    if not isinstance(checkpoint, dict) or "steppo" not in checkpoint:
        raise ConfigError(f"the checkpoint {path} was not written by steppo")
    return checkpoint


def restore_policy(policy: Policy, lora: LoRASettings | None, checkpoint: dict[str, Any]) -> None:
    """Builds a policy as it is in a checkpoint: weights and tokenizer. Raises ``ConfigError`` if they do not fit."""
    policy.build(list)
    if lora is not None:
        policy.add_lora(lora)
    if checkpoint["steppo"]["tokenizer"]:
        policy.load_tokenizer_state(checkpoint["steppo"]["tokenizer"])
    weights = {k.removeprefix("policy."): w for k, w in checkpoint["state_dict"].items() if k.startswith("policy.")}
    own = policy.state_dict()
    # The critic's and the reference's adapters sit on the same base; its own weights are not in the checkpoint.
    weights = {k: w for k, w in weights.items() if k in own or policy.adapters is None or not policy.adapters.owns(k)}
    weights = {k: w for k, w in own.items() if policy.is_base_weight(k)} | weights
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the checkpoint does not fit the config's model: {reason}") from error
