"""Copies of large linear layers' weights in oneDNN's own layout, for sampling on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEAST_WEIGHTS = 2**18  # of a layer; in smaller ones a call costs much of what is saved


class PackedLinears:
    """Has a model's large linear layers read such copies in float32 on a CPU: products of few rows take about half as long.

    The copies are as large as the weights. They follow changes that torch counts: those in place, but for fused optimizers
    and ``.data``. After others there must be a new object.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = (module for module in model.modules() if type(module) is nn.Linear)
        self._layers = [_PackedLinear(linear) for linear in linears if linear.weight.numel() >= _LEAST_WEIGHTS]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers read the copies."""
        try:
            for layer in self._layers:
                if layer.is_ready():
                    vars(layer.linear)["forward"] = layer
            yield
        finally:
            for layer in self._layers:
                if isinstance(vars(layer.linear).get("forward"), _PackedLinear):
                    del vars(layer.linear)["forward"]


class _PackedLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._packed: Tensor | None = None
        self._copied = linear.weight.detach()  # held, so that no other weight gets its address
        self._version = -1

    def is_ready(self) -> bool:
        """Whether it can take the layer's place, with its weights as they are now."""
        weight, mkldnn = self.linear.weight, torch.backends.mkldnn
        is_usual = isinstance(vars(self.linear).get("forward", self), _PackedLinear)  # nobody else has one for it
        is_float32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not is_usual or not is_float32 or weight.device.type != "cpu" or not mkldnn.is_available() or not mkldnn.enabled:
            self._packed = None
        elif not self._is_current():
            self._copied, self._version = weight.detach(), weight._version
            try:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self._copied, None)
            except (RuntimeError, MemoryError):  # no room for it
                self._packed = None
        return self._packed is not None

    def __call__(self, input: Tensor) -> Tensor:
        # Gradients and other precisions are for learners in other threads.
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not self._is_current():
            return F.linear(input, self.linear.weight, self.linear.bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.linear.bias, "none", [], "")
        return output

    def _is_current(self) -> bool:
        weight, copied = self.linear.weight, self._copied
        return self._packed is not None and (weight.data_ptr(), weight._version) == (copied.data_ptr(), self._version)
