"""Any causal language model of the Hugging Face hub, or of a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steppo.errors import ConfigError, said
from steppo.models.policy import Policy


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
        name_or_path = os.path.expanduser(name_or_path)
        if not name_or_path or (name_or_path[0] in "./~" and not Path(name_or_path).is_dir()):
            raise ConfigError(
                f"HFPolicy: there is no folder {name_or_path!r}; give a folder with a model, or the id of one of "
                "the Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        self.name_or_path = name_or_path
        self.load_dtype = dtype
        self.attn_implementation = attn_implementation
        self.revision = revision

    def build(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        dtype = self.base_dtype or self.load_dtype
        quantized: dict[str, Any] = {}
        if self.bits is not None:
            settings = BitsAndBytesConfig(**_quantization(self.bits, dtype))
            quantized = {"quantization_config": settings, "device_map": {"": self.load_device}}
        try:
            config = AutoConfig.from_pretrained(self.name_or_path, revision=self.revision)
            text = config.get_text_config()
            for name, value in text.to_dict().items():
                if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                    setattr(text, name, 0.0)
            self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, revision=self.revision)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.name_or_path,
                config=config,
                revision=self.revision,
                dtype=dtype,
                attn_implementation=self.attn_implementation,
                ignore_mismatched_sizes=True,  # to say below which
                output_loading_info=True,
                **quantized,
            )
        except Exception as error:  # of a damaged file those who read it for transformers may say anything
            is_plain = isinstance(error, (OSError, ValueError, ImportError))
            reason = str(error).strip().partition("\n")[0] if is_plain else said(error)
            raise ConfigError(f"HFPolicy: cannot load {self.name_or_path!r}: {reason}") from error
        self.model, found = loaded
        # In their place transformers has random ones.
        wrong = sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]})
        if wrong:
            raise ConfigError(
                f"HFPolicy: {self.name_or_path!r} has weights that its config.json does not fit: {len(wrong)} are missing "
                f"or have other shapes, such as {wrong[0]}"
            )
        self.stop_ids = _stop_ids(self.tokenizer, self.model)
        self._check_tokens()
        self.train()  # transformers loads in evaluation mode
        self._check_head()

    def base_model(self) -> str | None:
        return self.name_or_path

    def load_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.adapters is not None:
            arguments["dtype"] = self.dtype
        if self.attn_implementation != "sdpa":  # transformers' choice where a model has it
            arguments["attn_implementation"] = self.attn_implementation
        if self.bits is not None:
            arguments["quantization_config"] = _quantization(self.bits, self.dtype)
        return arguments

    def export(self, folder: Path, merge: bool) -> None:
        model = self.merged() if merge else self.model
        if self.adapters is not None and not merge:
            model.set_adapter("policy")  # what is active is saved
            base = Path(self.name_or_path)
            settings = model.peft_config["policy"]
            settings.base_model_name_or_path = str(base.resolve()) if base.is_dir() else self.name_or_path
            settings.revision = None if self.revision == "main" else self.revision
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _check_tokens(self) -> None:
        """Every token that a prompt or an action can hold needs a row in the model's embedding."""
        rows = min(self.model.get_input_embeddings().weight.shape[0], self.text_config.vocab_size)
        beyond = [(text, token) for text, token in self.tokenizer.get_vocab().items() if token >= rows]
        used = {text: token for text, token in beyond if self._can_occur(text, token)}
        used |= {f"stop id {token}": token for token in self.stop_ids if token >= rows and token not in used.values()}
        if used:
            first = min(used, key=lambda text: used[text])
            raise ConfigError(
                f"HFPolicy: {len(used)} tokens of {self.name_or_path!r} have no row in the model's embedding of {rows}: "
                f"{first!r} is {used[first]}. Resize the model once (model.resize_token_embeddings(len(tokenizer)), then "
                "save_pretrained), or use the tokenizer and generation config that belong to it"
            )

    def _can_occur(self, text: str, token: int) -> bool:
        """Special tokens are taken out of what environments say: only templates and the tokenizer itself write them."""
        tokenizer = self.tokenizer
        added = tokenizer.added_tokens_decoder.get(token)
        if added is None or not added.special or text in str(tokenizer.chat_template or ""):
            return True
        if token in (tokenizer.eos_token_id, *tokenizer.encode("?")):
            return True
        if not tokenizer.chat_template:
            return False
        turn = [{"role": "user", "content": "?"}]
        return text in tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

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


def _quantization(bits: int, dtype: Any) -> dict[str, Any]:
    """Arguments of the ``BitsAndBytesConfig`` of a base."""
    if bits == 8:
        return {"load_in_8bit": True}
    # Stored as the other weights are: FSDP wants one dtype.
    computing = {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": dtype}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **computing}


def _stop_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    named = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    ids = {token for entry in named if entry is not None for token in (entry if isinstance(entry, list) else [entry])}
    if tokenizer.eos_token_id is None:
        raise ConfigError("HFPolicy: the tokenizer has no end-of-sequence token, so actions could not end")
    return frozenset(ids)
