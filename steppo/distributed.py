"""Collectives that also work in a single process."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(item: T) -> list[T]:
    """Everyone's item, in the order of ranks."""
    _, world = rank_and_world()
    if world == 1:
        return [item]
    items: list[T] = [item] * world
    dist.all_gather_object(items, item)
    return items
