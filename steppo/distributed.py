"""Collectives that also work in a single process, and sharded weights (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from steppo.errors import RunError, SteppoError

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


def gather_to_first(item: T) -> list[T]:
    """Everyone's item, in the order of ranks, on rank 0; nothing on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [item]
    items: list[T] | None = [item] * world if rank == 0 else None
    dist.gather_object(item, items)
    return items or []


def made_once(make: Callable[[], T]) -> T:
    """What rank 0 makes, for everyone; its mistake is everyone's. All ranks must ask."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except SteppoError as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def dealt_once(make: Callable[[], Sequence[T]]) -> T:
    """This rank's of the parts that rank 0 makes, one for each; its mistake is everyone's. All ranks must ask."""
    rank, world = rank_and_world()
    if world == 1:
        return make()[0]
    parts: list[Any] = []
    if rank == 0:
        try:
            parts = list(make())
        except SteppoError as error:
            parts = [error] * world
    box: list[Any] = [None]
    dist.scatter_object_list(box, parts or None, 0)
    if isinstance(box[0], SteppoError):
        raise box[0]
    return box[0]


def require_equal(parts: Mapping[str, Any]) -> None:
    """Compares what must be equal on all ranks. All must ask.

    Args:
        parts: Plain data, by what it is called.

    Raises:
        RunError: On every rank, if one differs from rank 0; it names what and who.
    """
    first, *others = gather(dict(parts))
    for rank, other in enumerate(others, 1):
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            raise RunError(
                f"process {rank} has other {' and '.join(names)} than process 0: what runs in several processes must give "
                "all of them the same, from files and seeds that are the same on every machine"
            )


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages gradients over ranks, once per update. Each rank may have made any number of backward passes, also none.

    Those of sharded weights were averaged in the backward pass.
    """
    _, world = rank_and_world()
    if world == 1:
        return
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    has_gradient = gather([parameter.grad is not None for parameter in parameters])
    work = []
    for parameter, *anyone in zip(parameters, *has_gradient, strict=True):
        if any(anyone):
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            parameter.grad /= world
            work.append(dist.all_reduce(parameter.grad, async_op=True))
    for handle in work:
        handle.wait()


def shard(module: nn.Module, blocks: Sequence[str], device_type: str) -> None:
    """Shards a module's weights over all ranks, block by block.

    Args:
        module: The root; called by its ``forward`` only.
        blocks: Class names of the modules that are gathered one at a time: a transformer's layers.
        device_type: ``cpu`` or ``cuda``.
    """
    mesh = init_device_mesh(device_type, (rank_and_world()[1],))
    for part in list(module.modules()):
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


@contextmanager
def unsharded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Holds sharded modules whole on every rank, so that ranks need not make the same number of passes."""
    for root in modules:
        if isinstance(root, FSDPModule):  # the engine calls parts of it, maybe before its own first call
            root._get_fsdp_state()._lazy_init()
    parts = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights that are trained, whole and on the CPU. All ranks must ask."""
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for name, p in trained.items()}


@torch.no_grad()
def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives all ranks what rank 0 has."""
    rank, world = rank_and_world()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        device, dtype = parameter.device, parameter.dtype
        whole = state[name].to(device, dtype) if rank == 0 else torch.empty(parameter.shape, dtype=dtype, device=device)
        if world > 1:
            dist.broadcast(whole, 0)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)
