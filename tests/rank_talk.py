"""What two processes of ``test_ranks.py`` say to each other; without Lightning they start quickly."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from steppo import distributed
from steppo.distributed import average_gradients, gather_columns


def own_columns(rank: int) -> dict[str, Tensor]:
    """Of unequal lengths, none on rank 1 among them, and with widths that do not divide each other's places."""
    chance = torch.Generator().manual_seed(rank)
    return {
        "none": torch.from_numpy(np.zeros(2 * rank, dtype=np.int64)[rank:]),  # as numpy has it, empty on rank 0
        "flag": torch.arange(3 * rank + 1) % 2 == 0,
        "order": torch.randint(-(2**62), 2**62, (2 * (1 - rank) + 1,), generator=chance),
        "value": torch.randn(5 - 5 * rank, generator=chance),
        "reward": torch.randn(4, generator=chance, dtype=torch.float64)[::2],
    }


def own_parameters(rank: int) -> list[nn.Parameter]:
    """Gradients of several dtypes, one not contiguous; the third is learned on rank 1 only, the fourth by nobody."""
    chance = torch.Generator().manual_seed(10 + rank)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((7, 3), torch.float64),
        ((50,), torch.float32),
        ((4,), torch.float64),
    ]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in [*shapes, ((3, 5), torch.float64)]]
    for place, parameter in enumerate(parameters[:3]):
        if place < 2 or rank == 1:
            turned = torch.randn(parameter.shape[::-1], generator=chance, dtype=parameter.dtype)
            parameter.grad = turned.permute(*reversed(range(turned.ndim)))
    return parameters


def one_by_one(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """What averaging each gradient on its own gives."""
    found = []
    for place, parameter in enumerate(parameters):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / dist.get_world_size()
        dist.all_reduce(gradient)
        found.append(gradient if place < 3 else None)
    return found


def talk(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {"columns": gather_columns(own_columns(rank))}
    for name, size in (("one bucket", 2**20), ("many", 100)):
        distributed._BUCKET_BYTES = size
        parameters = own_parameters(rank)
        found[f"{name}, expected"] = one_by_one(parameters)
        average_gradients(parameters)
        found[name] = [parameter.grad for parameter in parameters]
    average_gradients([])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
