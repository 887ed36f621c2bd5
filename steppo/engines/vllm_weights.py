"""The learner's weights of one version, as vLLM servers take them: out of a file, or broadcast."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steppo.engines.in_vllm.steppo_group import broadcast
from steppo.errors import RunError, said

if TYPE_CHECKING:
    from steppo.models.policy import Policy

_FILE = "model.safetensors"


class Weights:
    """They wait in the machine's memory, adapters merged.

    Args:
        policy: Whose they are.
        weights: ``Policy.inference_weights``.
        version: Their name.
        dtype: That servers compute in.
        folder: In which a folder with them is made, once somebody asks for it.
        is_broadcast: Servers that run receive them; only one that starts reads a file.
    """

    def __init__(
        self,
        policy: Policy,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        dtype: torch.dtype,
        folder: Path,
        is_broadcast: bool,
    ) -> None:
        self.version = version
        self.folder = folder
        self.is_broadcast = is_broadcast
        self.backend = "nccl" if policy.device.type == "cuda" else "gloo"
        self._device = policy.device if self.backend == "nccl" else torch.device("cpu")
        self._dtype = dtype
        self._tokenizer = policy.tokenizer
        self._path: Path | None = None
        self._writing = threading.Lock()
        model = policy.merged()
        self._config, self._class = model.config, type(model).__name__
        if policy.adapters is not None:
            weights = model.named_parameters()
        self._tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights}

    def model(self) -> Path:
        """A folder that transformers, and so vLLM, reads: whole when it has its name.

        Raises:
            RunError: It cannot be written.
        """
        with self._writing:  # servers that start at once want the same
            if self._path is None:
                self._path = self._written()
        return self._path

    def update_info(self) -> dict[str, Any]:
        """What a server that runs is told: where all are, or what ``send`` sends, in its order."""
        if not self.is_broadcast:
            return {"path": str(self.model() / _FILE)}
        shapes = {name: list(tensor.shape) for name, tensor in self._tensors.items()}
        return {"dtype": str(self._dtype).removeprefix("torch."), "shapes": shapes}

    def send(self, group: Any) -> None:
        """Broadcasts them to who has joined the group."""
        broadcast(group, (tensor.to(self._device) for tensor in self._tensors.values()))

    def settle(self) -> None:
        """All servers have them; who starts again reads the file, if there is one."""
        if self._path is not None:
            self._tensors = {}

    def remove(self) -> None:
        """Newer ones are there."""
        with self._writing:
            if self._path is not None:
                shutil.rmtree(self._path)

    def _written(self) -> Path:
        base, part = self.folder / "base", self.folder / f"part-{self.version}"
        try:
            if not base.exists():
                config = copy.deepcopy(self._config)
                config.architectures = [self._class]
                config.save_pretrained(base)
                self._tokenizer.save_pretrained(base)
            shutil.copytree(base, part)
            save_file(self._tensors, part / _FILE, metadata={"format": "pt"})
        except Exception as error:
            raise RunError(f"VLLMEngine: cannot write {part / _FILE}: {said(error)}; TMPDIR names another disk") from error
        return part.rename(self.folder / f"weights-{self.version}")
