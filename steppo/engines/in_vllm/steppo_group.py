"""A learner and the processes of a vLLM server as one group, in which weights go from memory to memory.

Both sides import this file, and it imports nothing but torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Without it NCCL ends the process where another one is gone, in place of an exception.
_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


def joined(rank: int, path: str, size: int, backend: str, timeout: float) -> Any:
    """The group as this process sees it.

    Args:
        rank: The learner has 0.
        path: Of a file that all see and nobody used before.
        size: Of the group.
        backend: ``nccl`` from GPU to GPU, ``gloo`` from CPU to CPU.
        timeout: Seconds in which all must have joined, and that a tensor may take.
    """
    kind: Any = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
    options = kind.Options() if backend == "nccl" else kind._Options()
    options._timeout = timedelta(seconds=timeout)
    if backend == "gloo":
        options._devices = [kind.create_device(hostname="127.0.0.1")]
    is_set = _BLOCKING in os.environ
    os.environ.setdefault(_BLOCKING, "1")
    try:
        return kind(dist.FileStore(path, size), rank, size, options)
    finally:
        if not is_set:
            del os.environ[_BLOCKING]


def broadcast(group: Any, tensors: Iterable[Tensor]) -> None:
    """Rank 0's values for all, tensor by tensor.

    Raises:
        RuntimeError: Another process is gone, or too slow.
    """
    for tensor in tensors:
        group.broadcast(tensor, 0).wait()
