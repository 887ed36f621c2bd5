"""LoRA adapters: several small trained models on one frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from steppo.errors import ConfigError


@dataclass(frozen=True)
class LoRASettings:
    """Rank of the two factors, scale ``alpha / rank`` of their product, and the linear layers that get them."""

    rank: int
    alpha: float
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Adapters:
    """Named adapters on a transformers model, one active at a time. The model's own weights are frozen.

    Args:
        model: The model; its linear layers are wrapped in place.
        settings: The same for each adapter.

    Raises:
        ConfigError: A target is no linear layer of the model.
    """

    def __init__(self, model: Any, settings: LoRASettings) -> None:
        if settings.targets != "all-linear":
            _check_targets(model, settings.targets)
        self._model = model
        self.settings = settings
        self.active = ""
        model.requires_grad_(False)

    def add(self, name: str, trained: bool = True) -> None:
        """Adds an adapter; what it adds to the base is 0 until it is trained. The active one stays active."""
        from peft import LoraConfig  # seconds to import, for runs that want it

        targets = self.settings.targets
        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,  # type: ignore[arg-type]
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        before = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        try:
            self._model.add_adapter(config, adapter_name=name)
        except ValueError as error:  # such as of a layer that a kind of model reads past its adapter
            raise ConfigError(f"quantization.lora_targets: {str(error).splitlines()[0]}") from error
        for parameter in self._model.parameters():  # peft freezes the adapters that were there
            parameter.requires_grad_(before.get(parameter, trained))
        for parameter in self.parameters(name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._activate(self.active or name)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The model under an adapter."""
        before = self.active
        if name != before:
            self._activate(name)
        try:
            yield
        finally:
            if name != before:
                self._activate(before)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """An adapter's parameters."""
        return [parameter for key, parameter in self._model.named_parameters() if self.owns(key) and f".{name}." in key]

    def owns(self, key: str) -> bool:
        """Whether a name in the model's ``state_dict`` is an adapter's."""
        return ".lora_" in key

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Gives one adapter the weights of another."""
        for new, old in zip(self.parameters(target), self.parameters(source), strict=True):
            new.copy_(old)

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For activation checkpoints: what is computed again in the backward pass needs the adapter of the forward pass."""
        return nullcontext(), self.using(self.active)

    def _activate(self, name: str) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        # peft's own set_adapter would also freeze the other adapters, which are still to be trained.
        for module in self._model.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = [name]
        self.active = name


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """peft would also take an embedding, by other names and in another place, and pass over a name that no layer has."""
    is_linear = {name: isinstance(module, nn.Linear | Conv1D) for name, module in model.named_modules()}
    wrong = []
    for target in targets:
        called = [linear for name, linear in is_linear.items() if f".{name}".endswith(f".{target}")]
        if not called or not all(called):
            wrong.append(repr(target))
    if wrong:
        layers = sorted({name.rpartition(".")[2] for name, linear in is_linear.items() if linear})
        raise ConfigError(
            f"quantization.lora_targets: {', '.join(wrong)}: only linear layers can be adapted; the model has "
            f"{', '.join(layers)}"
        )
