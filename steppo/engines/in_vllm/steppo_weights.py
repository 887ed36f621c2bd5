"""New weights out of a file, for a vLLM server: its processes import this file, and nothing else of steppo.

``PYTHONPATH=<this folder>``, ``--worker-extension-cls steppo_weights.Extension`` and
``--weight-transfer-config '{"backend": "steppo_file"}'`` make a server take them; docs/vllm.md has the whole command.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
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
class NoInfo(WeightTransferInitInfo):
    """A file needs no handshake."""


@dataclass
class FileInfo(WeightTransferUpdateInfo):
    """``path`` of a safetensors file with all weights, by the names of the model's own files."""

    path: str


class FileEngine(WeightTransferEngine[NoInfo, FileInfo]):
    """Loads a file as vLLM loads a checkpoint."""

    init_info_cls = NoInfo
    update_info_cls = FileInfo

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileInfo) -> None:
        self.model.load_weights(_read(Path(update_info.path)))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # On a CPU a head keeps a copy of its weights in another layout. Tied to the embedding, it has none of its own
            # in the file, and would keep the old copy.
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


class Extension:
    """What a worker is given beside its own methods: nothing. That it is named loads this file."""


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - it is no dict
            yield name, file.get_tensor(name)


WeightTransferEngineFactory.register_engine("steppo_file", FileEngine)
