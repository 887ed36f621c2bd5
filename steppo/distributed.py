"""Collectives that also work in a single process, and sharded weights (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from steppo.errors import RunError, SteppoError

T = TypeVar("T")
_BUCKET_BYTES = 25 * 2**20  # of gradients at once, as DDP's


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


def gather_columns(columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Everyone's columns, in the order of ranks: an exchange of their lengths, and one of all bytes.

    Args:
        columns: By name, 1-D and on the CPU; of any length, but of the same names and dtypes on all ranks.
    """
    _, world = rank_and_world()
    if world == 1:
        return [dict(columns)]
    sizes = torch.tensor([len(column) * column.element_size() for column in columns.values()])
    sizes_R = _all_gather(sizes)
    # Not `contiguous`: an empty one from numpy keeps its stride of 0.
    dense = [column.clone(memory_format=torch.contiguous_format) for column in columns.values()]
    whole = torch.cat([column.view(torch.uint8) for column in dense])
    padding = max(int(other.sum()) for other in sizes_R) - len(whole)
    found = []
    for part, of_columns in zip(_all_gather(nn.functional.pad(whole, (0, padding))), sizes_R, strict=True):
        pieces = part[: int(of_columns.sum())].split(of_columns.tolist())
        pairs = zip(columns.items(), pieces, strict=True)
        found.append({name: piece.clone().view(column.dtype) for (name, column), piece in pairs})  # aligned anew
    return found


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Everyone's tensor of one shape, on the CPU."""
    sent = tensor.to("cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu")
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return [part.cpu() for part in parts]


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

    They go in flat buckets, one after the other, so that little memory is needed. Those of sharded weights were averaged in
    the backward pass.
    """
    _, world = rank_and_world()
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if world == 1 or not parameters:
        return
    mine = [parameter.grad is not None for parameter in parameters]
    anyone = torch.tensor(mine, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(anyone, dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_learned in zip(parameters, anyone.tolist(), strict=True):
        if is_learned:
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            gradients.append(parameter.grad)
    for bucket in _take_tensors(gradients, _BUCKET_BYTES):
        flat = _flatten_dense_tensors(bucket)
        flat /= world
        dist.all_reduce(flat)
        for gradient, averaged in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(averaged)


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
