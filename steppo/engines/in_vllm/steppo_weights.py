"""New weights for a vLLM server, out of a file or from a learner's memory: its processes import this folder, and nothing
else of steppo.

``PYTHONPATH=<this folder>``, ``--worker-extension-cls steppo_weights.Extension`` and
``--weight-transfer-config '{"backend": "steppo"}'`` make a server take them; docs/vllm.md has the whole command.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from steppo_group import broadcast, joined
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """The group that the learner broadcasts to, as ``steppo_group.joined`` takes it."""

    path: str
    size: int
    backend: str
    timeout: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """All weights, by the names of the model's own files: ``path`` of a safetensors file, or what is broadcast, in order."""

    path: str | None = None
    dtype: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)


class Engine(WeightTransferEngine[GroupInfo, UpdateInfo]):
    """Loads weights as vLLM loads a checkpoint."""

    init_info_cls = GroupInfo
    update_info_cls = UpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Joins the learner, which is rank 0."""
        mine = self.parallel_config
        rank = 1 + mine.data_parallel_index * mine.world_size + mine.rank
        self._group = joined(rank, **asdict(init_info))
        self._receives_on = self.device if init_info.backend == "nccl" else torch.device("cpu")

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is not None:
            self.model.load_weights(_read(Path(update_info.path)))
            return
        for name, shape in update_info.shapes.items():
            weight = torch.empty(shape, dtype=getattr(torch, update_info.dtype), device=self._receives_on)
            broadcast(self._group, [weight])
            self.model.load_weights([(name, weight)])  # as many calls as broadcasts, whatever a model skips

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # On a CPU a head keeps a copy of its weights in another layout. Tied to the embedding, it has none of its own
            # in the file, and would keep the old copy.
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self._group = None


class Extension:
    """What a worker is given beside its own methods: nothing. That it is named loads this file."""


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - it is no dict
            yield name, file.get_tensor(name)


WeightTransferEngineFactory.register_engine("steppo", Engine)
