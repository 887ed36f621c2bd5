"""A learner and the processes of a vLLM server as one group, in which weights go from memory to memory.

Both sides import this file, and it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


def joined(rank: int, path: str, size: int, backend: str, timeout: float) -> Any:
    """The group, as soon as all have joined.

    Args:
        rank: The learner has 0.
        path: Of a file that all see and nobody used before.
        size: Of the group.
        backend: ``nccl`` from GPU to GPU, ``gloo`` from CPU to CPU.
        timeout: Seconds that may pass until all have joined; also for a tensor.
    """
    kind: Any = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
    options = kind.Options() if backend == "nccl" else kind._Options()
    options._timeout = timedelta(seconds=timeout)
    if backend == "gloo":
        options._devices = [kind.create_device(hostname="127.0.0.1")]
    return kind(dist.FileStore(path, size), rank, size, options)


def broadcast(group: Any, tensors: Iterable[Tensor]) -> None:
    """Rank 0's values for all, tensor by tensor."""
    for tensor in tensors:
        group.broadcast(tensor, 0).wait()
