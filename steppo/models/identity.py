"""What a checkpoint belongs to: all that makes the policy and is not among its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steppo.errors import in_short

if TYPE_CHECKING:
    from steppo.models.policy import Policy

_SAMPLES = 64
# Of a transformers config: what is bookkeeping, a starting value, or a limit. The rest is how the model computes.
_NO_ARCHITECTURE = {
    "architectures",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "pad_token_id",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_PROBE = "Take the coin, \u00c4ffchen!  x = {'a': [1, 23, 4567]}\n\t<b>don't</b> \u4e16\u754c \U0001f9ed"


def identity(policy: Policy) -> dict[str, Any]:
    """What a policy is besides its trained weights: plain data, by content, whatever the folder is called."""
    lora = asdict(policy.adapters.settings) if policy.adapters is not None else {}
    tokenizer = policy.tokenizer
    return {
        "architecture": dict(_architecture(policy.model.config.to_dict())),
        "lora_rank": lora.get("rank", 0),
        "lora_alpha": float(lora.get("alpha", 0)),
        "bits": policy.bits,
        "base_dtype": str(policy.base_dtype).removeprefix("torch.") if policy.base_dtype is not None else None,
        "stop_ids": sorted(policy.stop_ids),
        # One that was trained is in the checkpoint itself.
        "tokenizer": "" if policy.tokenizer_state() else _hash(_reading(tokenizer)),
        "chat_template": _hash(tokenizer.chat_template) if tokenizer.chat_template else "",
        "base": fingerprint(policy.model, policy.adapters.owns) if policy.adapters is not None else "",
    }


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between a checkpoint's identity and a model's, for people; empty if nothing does."""
    there, here = ({**part.get("architecture", {}), **part, "architecture": None} for part in (there, here))
    # What a later version added is not in an earlier one's checkpoint.
    unlike = [name for name, mine in here.items() if there.get(name, mine) != mine]
    said = {
        "tokenizer": "the tokenizer is another one",
        "chat_template": "the chat template is another one",
        "base": "the base model's weights are others",
    }
    for name in unlike:
        said.setdefault(name, f"{name} is {in_short(str(there[name]), 60)} there and {in_short(str(here[name]), 60)} here")
    return "; ".join(said[name] for name in unlike[:4])


def fingerprint(module: torch.nn.Module, left_out: Any = lambda name: False) -> str:
    """A hash of weights: the sum of all their bits, and some of them by place. The same on all devices.

    Of quantised layers the scales count, which are maxima: codes may be rounded otherwise on another device.

    Args:
        module: The weights, not sharded.
        left_out: Whether a name is not to be counted.
    """
    state = module.state_dict()
    digest = hashlib.sha256()
    for name, weight in state.items():
        codes = f"{name}.absmax" in state or f"{name.rpartition('.')[0]}.SCB" in state
        if isinstance(weight, Tensor) and not left_out(name) and not (codes and name.endswith("weight")):
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
            bits = _bits(weight)
            sample = bits[:: max(1, len(bits) // _SAMPLES)][:_SAMPLES]
            digest.update(str([int(bits.sum(dtype=torch.int64)), *sample.tolist()]).encode())
    return digest.hexdigest()[:32]


def _bits(weight: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().reshape(-1).view(whole)


def _architecture(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        private = name.startswith("_") or name in _NO_ARCHITECTURE or "dropout" in name or "pdrop" in name
        if not private and not name.startswith(("output_", "return_", "problem_")):
            yield name, json.loads(json.dumps(value, default=str))  # tuples become lists, as in a checkpoint


def _reading(tokenizer: Any) -> list[Any]:
    """How a tokenizer reads: its vocabulary, and a text."""
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [sorted(tokenizer.get_vocab().items()), special, tokenizer.encode(_PROBE, add_special_tokens=True)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
