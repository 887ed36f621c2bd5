"""Any causal language model of the Hugging Face hub, or of a local folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steppo.errors import ConfigError
from steppo.models.policy import Policy

_DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "activation_dropout",
)


class HFPolicy(Policy):
    """A pretrained model, trained whole, or frozen (in 4 or 8 bits, if wanted) under LoRA: see ``QuantizationCallback``.

    Every dropout is set to 0: sampling and learning must see the same policy.

    Args:
        name_or_path: Hub id or local folder.
        dtype: Of the weights; ``auto`` takes the checkpoint's. Small updates vanish in 16-bit weights: for speed keep
            float32 here and set ``trainer.precision: bf16-mixed``.
        attn_implementation: As transformers names it.
        revision: Commit, tag or branch of a hub model.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32",
        attn_implementation: str = "sdpa",
        revision: str = "main",
    ) -> None:
        super().__init__()
        if not name_or_path or (name_or_path[0] in "./~" and not Path(name_or_path).is_dir()):
            raise ConfigError(
                f"HFPolicy: there is no folder {name_or_path!r}; give a folder with a model, or the id of one of "
                "the Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        self.name_or_path = name_or_path
        self.load_dtype = dtype
        self.attn_implementation = attn_implementation
        self.revision = revision

    def build(self, corpus: Callable[[], list[str]]) -> None:
        dtype = self.base_dtype or self.load_dtype
        quantized: dict[str, Any] = {}
        if self.bits is not None:
            quantized = {"quantization_config": _quantization(self.bits, dtype), "device_map": {"": self.load_device}}
        try:
            config = AutoConfig.from_pretrained(self.name_or_path, revision=self.revision)
            for name in _DROPOUTS:
                if hasattr(config, name):
                    setattr(config, name, 0.0)
            self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, revision=self.revision)
            self.model = AutoModelForCausalLM.from_pretrained(
                self.name_or_path,
                config=config,
                revision=self.revision,
                dtype=dtype,
                attn_implementation=self.attn_implementation,
                **quantized,
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"HFPolicy: cannot load {self.name_or_path!r}: {reason}") from error
        self.stop_ids = _stop_ids(self.tokenizer, self.model)
        self.train()  # transformers loads in evaluation mode
        self._check_head()

    def base_model(self) -> str | None:
        return self.name_or_path

    def export(self, folder: Path, merge: bool) -> None:
        if self.adapters is None:
            return super().export(folder, merge)
        self.tokenizer.save_pretrained(folder)
        self.model.set_adapter("policy")  # what is active is saved
        if not merge:
            self.model.save_pretrained(folder)
            return None
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as adapter:
            self.model.save_pretrained(adapter)
            base = AutoModelForCausalLM.from_pretrained(
                self.name_or_path, revision=self.revision, dtype=self.base_dtype or self.load_dtype
            )
            merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        merged.generation_config = self.model.generation_config
        merged.save_pretrained(folder)
        return None

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some models scale or cap their logits behind the output embedding; read there, they would be another policy."""
        ids = torch.arange(4, device=self.device)[None] + 10
        whole = self.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        # In one product of the same shape: in 16 bits another one rounds otherwise.
        ours = self.logits(self.trunk(input_ids=ids, use_cache=False).last_hidden_state)[0, -1].float()
        if not torch.allclose(whole, ours, atol=1e-3, rtol=1e-3):
            raise ConfigError(
                f"HFPolicy: {self.model.config.model_type} changes its logits behind the output embedding (scaling or "
                "soft-capping), which is not supported"
            )


def _quantization(bits: int, dtype: Any) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # Stored as the other weights are: FSDP wants one dtype.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype
    )


def _stop_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    named = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    ids = {token for entry in named if entry is not None for token in (entry if isinstance(entry, list) else [entry])}
    if tokenizer.eos_token_id is None:
        raise ConfigError("HFPolicy: the tokenizer has no end-of-sequence token, so actions could not end")
    return frozenset(ids)
