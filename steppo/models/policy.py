"""A language-model policy: a transformers trunk and head, read only where actions are."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AutoModelForCausalLM

from steppo.batch import TokenBatch
from steppo.errors import ConfigError
from steppo.models.adapters import Adapters, LoRASettings
from steppo.models.branches import attend
from steppo.models.reading import read_chunks

# Most logits held at once, in numbers: 64 MiB in float32; but so many rows that a product is not mostly the weights' way
# through memory.
_LOGITS_PER_CHUNK = 2**24
_ROWS_PER_CHUNK = 256

AttentionInterface.register("sdpa", attend)  # for every model of the process the same as before, and rows that branch


class PolicyOutput(NamedTuple):
    """``hidden`` [B * T, H]; ``logprobs_A`` and ``entropy_A`` [A], or [0] where no temperature was given.

    A tuple, so that FSDP's hooks find the tensors.
    """

    hidden: Tensor
    logprobs_A: Tensor
    entropy_A: Tensor


class Policy(nn.Module, ABC):
    """A causal language model with its tokenizer.

    The constructor only stores settings; ``build`` makes the model.

    Attributes:
        model: The transformers model, once built.
        tokenizer: Its tokenizer, once built.
        stop_ids: Token ids that end an action.
        adapters: LoRA adapters on a frozen base; ``None`` when all weights are trained.
        bits: 4 or 8 where ``build`` loads a quantised base.
        base_dtype: Of the other weights of a quantised or frozen base; ``None``: as the policy's own settings say.
        load_device: Where ``build`` puts a quantised base.
    """

    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]

    def __init__(self) -> None:
        super().__init__()
        self.model = None
        self.adapters: Adapters | None = None
        self.bits: int | None = None
        self.base_dtype: torch.dtype | None = None
        self.load_device = torch.device("cpu")

    @abstractmethod
    def build(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        """Makes model and tokenizer.

        Args:
            tokenizer_texts: Gives texts of the training environment, for policies that make their own tokenizer.
        """

    def unbuilt(self) -> Policy:
        """One of the same settings, to be built in another process."""
        other = copy.copy(self)
        vars(other).update(_modules={}, model=None, adapters=None)
        vars(other).pop("tokenizer", None)
        return other

    def tokenizer_state(self) -> str:
        """The tokenizer, for the checkpoint; empty when it comes with the model."""
        return ""

    def load_tokenizer_state(self, state: str) -> None:
        """Takes the tokenizer of a checkpoint."""

    def base_model(self) -> str | None:
        """Hub id or folder of the model that it began as; ``None`` for a model from scratch."""
        return None

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` with which transformers (and peft) computes what this policy does.

        ``quantization_config`` is given as the arguments of a ``BitsAndBytesConfig``.
        """
        return {}

    def export(self, folder: Path, merge: bool) -> None:
        """Writes model and tokenizer as transformers loads them.

        Args:
            folder: Exists, empty.
            merge: Write one whole model where the policy is an adapter on another; a whole model has nothing to merge.
        """
        (self.merged() if merge else self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def merged(self) -> Any:
        """The model as one without adapters: the weights that the base computes with (a quantised layer's as they are read
        back), plus the adapter's products, in float32 or better, so that these are not rounded away."""
        if self.adapters is None:
            return self.model
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if isinstance(self.model.get_output_embeddings(), BaseTunerLayer):  # its product must not reach the input
            config.tie_word_embeddings = False
        dtype = torch.promote_types(self.dtype, torch.float32)
        merged = AutoModelForCausalLM.from_config(config, dtype=dtype)
        own = dict(self.model.named_modules())
        for name, module in merged.named_modules():
            adapted = isinstance(own[name], BaseTunerLayer)
            base: Any = own[name].get_base_layer() if adapted else own[name]
            for key, weight in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                value = getattr(base, key)
                if get_bnb_param_type(value):
                    value = dequantize_bnb_weight(value, state=getattr(base, "state", None))
                weight.copy_(value)
                if adapted and key == "weight":
                    weight += own[name].get_delta_weight("policy").to(dtype)
        merged.generation_config = self.model.generation_config
        return merged

    @property
    def trunk(self) -> Any:
        """The transformer without its head."""
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def blocks(self) -> list[str]:
        """Class names of the model's layers, as sharding takes them one at a time."""
        return list(self.model._no_split_modules)

    @property
    def text_config(self) -> Any:
        """What the model's config says of text: a part of it where the model reads images too."""
        return self.model.config.get_text_config()

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens; ``sys.maxsize`` where nothing limits it, as with ALiBi."""
        return int(getattr(self.text_config, "max_position_embeddings", sys.maxsize))

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows, from 0."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def inference_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What an engine that lives elsewhere needs of the policy as it is now.

        Whole tensors, also where weights are sharded (all ranks must go through them), by the names that the model's own
        files have. Of an adapter its own weights only, by peft's names: the base is what such an engine began with.
        """
        for name, parameter in self.model.named_parameters():
            if self.adapters is not None:
                if not self.adapters.owns(name) or ".policy." not in name:
                    continue
                name = "base_model.model." + name.replace(".policy.", ".")
            weight = parameter.detach()
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight

    # ---- what is trained ----

    def add_lora(self, settings: LoRASettings) -> None:
        """Freezes the model and trains an adapter named ``policy``, in float32 or better."""
        self.adapters = Adapters(self.model, settings)
        self.adapters.add("policy")

    def trained_parameters(self) -> list[nn.Parameter]:
        """The policy's own: all, or its adapter's."""
        if self.adapters is not None:
            return self.adapters.parameters("policy")
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def is_base_weight(self, name: str) -> bool:
        """Whether a name in ``state_dict`` is of a frozen base, which is loaded anew instead of kept in checkpoints."""
        return self.adapters is not None and not self.adapters.owns(name)

    def frozen_copy(self) -> Policy | AdapterView:
        """The policy as it is now, never trained: another adapter on the same base, or a second model."""
        if self.adapters is None:
            return copy.deepcopy(self).requires_grad_(False)
        view = AdapterView(self, self.adapters, "reference", trained=False)
        view.copy_weights_from(self)
        return view

    def copy_weights_from(self, policy: Policy) -> None:
        """Takes the weights of a policy of the same kind."""
        self.load_state_dict(policy.state_dict())

    def train(self, mode: bool = True) -> Policy:
        """Always in training mode: dropout is 0 anyway, and in evaluation mode 4-bit layers repack their weights on some
        CPUs, after which their backward pass is wrong."""
        return super().train(True)

    def checkpoint_layers(self) -> None:
        """Recomputes each layer in the backward pass, under the adapter that was active in the forward pass."""
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if self.adapters is not None:
            kwargs["context_fn"] = self.adapters.recompute_contexts
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    @contextmanager
    def keeping_activations(self) -> Iterator[None]:
        """Without ``checkpoint_layers``, which forbids the cache of keys and values that sampling needs."""
        layers: list[Any] = [module for module in self.modules() if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = True

    # ---- reading ----

    def forward(self, batch: TokenBatch, temperature_A: Tensor | None = None) -> PolicyOutput:
        """Hidden states; with ``temperature_A`` also what ``action_logprobs`` gives."""
        hidden = self.hidden(batch)
        if temperature_A is None:
            return PolicyOutput(hidden, hidden.new_zeros(0), hidden.new_zeros(0))
        return PolicyOutput(hidden, *self.action_logprobs(hidden, batch, temperature_A))

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states, [B * T, H]."""
        return trunk_states(self.trunk, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states [..., H], in float32 or better: [..., V]."""
        logits = self.model.get_output_embeddings()(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def action_logprobs(self, hidden: Tensor, batch: TokenBatch, temperature_A: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the action tokens, and the entropy where each was drawn.

        Logits exist at action positions only, one chunk at a time, in the backward pass too.

        Args:
            hidden: [B * T, H], from ``hidden``.
            batch: The same batch.
            temperature_A: Temperature of each action token; 0 (greedy) counts as 1.

        Returns:
            Two tensors [A], in float32 or better.
        """
        states_A = hidden[batch.predict_at_A]
        divisor_A = torch.where(temperature_A == 0, torch.ones_like(temperature_A), temperature_A)
        vocabulary = int(self.text_config.vocab_size)
        if states_A.shape[0] * vocabulary <= _LOGITS_PER_CHUNK:
            return self._read(states_A, batch.target_A, divisor_A)
        weights = [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]
        rows = max(_LOGITS_PER_CHUNK // vocabulary, _ROWS_PER_CHUNK)
        return read_chunks(self.logits, weights, states_A, batch.target_A, divisor_A, rows)

    def _read(self, states_A: Tensor, target_A: Tensor, divisor_A: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(states_A)
        logits = logits / divisor_A[:, None].to(logits.dtype)
        log_normaliser = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(1, target_A[:, None])[:, 0] - log_normaliser
        entropy = log_normaliser - ((logits - log_normaliser[:, None]).exp() * logits).sum(-1)
        return logprobs, entropy


class AdapterView:
    """A policy's base under another adapter than the policy's own: a model for the price of an adapter.

    Args:
        policy: With adapters.
        adapters: Those.
        name: Of the new adapter, which starts as 0: the base itself.
        trained: Whether it gets gradients.
    """

    def __init__(self, policy: Policy, adapters: Adapters, name: str, trained: bool) -> None:
        self._policy = policy
        self._adapters = adapters
        self._name = name
        adapters.add(name, trained)

    def __call__(self, batch: TokenBatch, temperature_A: Tensor | None = None) -> PolicyOutput:
        with self._adapters.using(self._name):
            return self._policy(batch, temperature_A)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's."""
        return self._adapters.parameters(self._name)

    def copy_weights_from(self, policy: Policy) -> None:
        """Takes the weights of the policy's own adapter, on the same base."""
        self._adapters.copy("policy", self._name)


def trunk_states(trunk: Any, batch: TokenBatch) -> Tensor:
    """Last hidden states of a trunk, [B * T, H].

    Raises:
        ConfigError: Rows branch, and the model does not attend to all that a mask lets it see.
    """
    mask: Tensor | BlockMask | None = None
    if batch.until_BT is not None:
        attention = trunk.config._attn_implementation
        odd = beyond_full_attention(trunk) - {"flex_attention"}
        if odd:
            raise ConfigError(
                "rows of PrefixTreePacker branch, which wants full attention by sdpa, eager or flex_attention; "
                f"{trunk.config.model_type} has {', '.join(sorted(odd))}: set data.packer to PaddedPacker"
            )
        if attention == "flex_attention":
            mask = batch.block_mask()
        elif attention == "sdpa" and trunk._supports_attention_backend:
            mask = batch.until_BT[:, None, None]  # for `attend`
        else:
            mask = batch.attention_mask(trunk.get_input_embeddings().weight.dtype)
    output = trunk(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def beyond_full_attention(trunk: Any) -> set[str]:
    """Layers and positions that go by a token's column, or attention that takes no float mask."""
    config = trunk.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if getattr(config, "sliding_window", None) is not None:
        odd.add("sliding_attention")
    if config._attn_implementation not in ("sdpa", "eager"):
        odd.add(config._attn_implementation)
    if getattr(config, "alibi", False) or "position_ids" not in signature(trunk.forward).parameters:
        odd.add("positions of its own")
    return odd
