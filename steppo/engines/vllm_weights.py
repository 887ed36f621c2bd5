"""The learner's weights of one version, as vLLM servers take them: out of a file, or broadcast."""

from __future__ import annotations

import copy
import itertools
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
    """Adapters are merged.

    Args:
        policy: Whose they are.
        weights: ``Policy.inference_weights``.
        version: Their name.
        dtype: That servers compute in.
        folder: In which a folder with them is made, once somebody asks for it.
        is_broadcast: They stay where the policy is until all servers have them.
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
        self.is_broadcast = is_broadcast
        self.backend = "nccl" if policy.device.type == "cuda" else "gloo"
        self._device = policy.device if self.backend == "nccl" else torch.device("cpu")
        self._tokenizer = policy.tokenizer
        self._folder = folder
        self._path: Path | None = None
        self._writing = threading.Lock()
        self._meetings = itertools.count()
        model = policy.merged()
        self._config, self._class = model.config, type(model).__name__
        if policy.adapters is not None:
            weights = model.named_parameters()
        device = self._device if is_broadcast else torch.device("cpu")
        self._tensors = {name: weight.detach().to(device, dtype).contiguous() for name, weight in weights}

    def model(self) -> Path:
        """A folder that transformers, and so vLLM, reads: whole when it has its name.

        Raises:
            RunError: It cannot be written.
        """
        with self._writing:  # servers that start at once want the same
            if self._path is None:
                self._path = self._written()
        return self._path

    def file(self) -> Path:
        """All weights, by the names of the model's own files."""
        return self.model() / _FILE

    def meeting(self) -> str:
        """A file by which a learner and a server find each other, once."""
        return str(self._folder / f"group-{self.version}.{next(self._meetings)}")

    def description(self) -> dict[str, list[Any]]:
        """What ``send`` sends, in its order."""
        tensors = self._tensors.values()
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        return {"names": list(self._tensors), "dtypes": dtypes, "shapes": [list(tensor.shape) for tensor in tensors]}

    def send(self, group: Any) -> None:
        """Broadcasts them to who has joined the group."""
        broadcast(group, (tensor.to(self._device) for tensor in self._tensors.values()))
        if self.backend == "nccl":
            torch.cuda.synchronize(self._device)

    def settle(self) -> None:
        """All servers have them: no more is kept than another start of one wants."""
        self._tensors = {} if self._path else {name: tensor.cpu() for name, tensor in self._tensors.items()}

    def remove(self) -> None:
        """Newer ones are there."""
        self._tensors = {}
        if self._path is not None:
            shutil.rmtree(self._path)

    def _written(self) -> Path:
        base, part = self._folder / "base", self._folder / f"part-{self.version}"
        try:
            if not base.exists():
                config = copy.deepcopy(self._config)
                config.architectures = [self._class]
                config.save_pretrained(base)
                self._tokenizer.save_pretrained(base)
            shutil.copytree(base, part)
            save_file({name: tensor.cpu() for name, tensor in self._tensors.items()}, part / _FILE, {"format": "pt"})
        except Exception as error:
            raise RunError(f"VLLMEngine: cannot write {part / _FILE}: {said(error)}; TMPDIR names another disk") from error
        return part.rename(self._folder / f"weights-{self.version}")
