"""Linear layers whose weights lie in the order in which oneDNN reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEAST_WEIGHTS = 2**18  # of a layer; in smaller ones the call costs what the order saves


class PackedLinears:
    """Has a model's large linear layers read weights that are in order, while it samples in float32 on a CPU.

    Products of few rows take about half as long (``docs/performance.md``). A layer whose weights have changed is put in
    order again when it is used next. The copies are as large as the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            _PackedLinear(module)
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.numel() >= _LEAST_WEIGHTS and "forward" not in vars(module)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers read the copies."""
        layers = [layer for layer in self._layers if layer.is_ready()]
        for layer in layers:
            vars(layer.linear)["forward"] = layer
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer.linear)["forward"]


class _PackedLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._packed: Tensor | None = None
        self._seen = (0, 0)  # where the weights were, and how often they had been changed

    def is_ready(self) -> bool:
        """Whether it can take the layer's place, with its weights as they are now."""
        weight = self.linear.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            self._packed = None
            return False
        now = (weight.data_ptr(), weight._version)
        if self._packed is None or self._seen != now:
            self._packed, self._seen = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), now
        return True

    def __call__(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):  # a learner in another thread, or other rounding
            return F.linear(input, self.linear.weight, self.linear.bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.linear.bias, "none", [], "")
        return output
