"""More than one process: FSDP2 shards the weights, and each process runs its share of passes.

FSDP2 is torch's. In a run of one process nothing here does anything. ``torchrun`` starts several;
who calls ``torch.distributed.init_process_group`` chooses gloo (CPU) or nccl (GPU).

The loss is a sum with weights that are fixed on the whole batch, so gradients are added up over
processes, where FSDP would take their mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from research_agent.errors import StoppedError

T = TypeVar("T")

TIMEOUT = timedelta(days=1)  # the others wait while the first process evaluates


@contextmanager
def init_distributed() -> Iterator[None]:
    """Meet the other processes that torchrun has started, if it has, and part at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard_batches(passes: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Deal passes to the processes, as many to each, for a pass is an appointment of all of them.

    Args:
        passes: the same in every process.

    Yields:
        Those of this process, and whether they count: one that has none left repeats the last.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from ((each, True) for each in passes)
        return
    every = list(passes)
    for first in range(0, len(every), size):
        mine = first + rank
        yield (every[mine], True) if mine < len(every) else (every[-1], False)


def gather(items: Sequence[T]) -> list[T]:
    """The items of all processes, those of the first one first."""
    size = rank_and_size()[1]
    if size == 1:
        return list(items)
    found: list[list[T]] = [[]] * size
    dist.all_gather_object(found, list(items))
    return [item for part in found for item in part]


def broadcast_object(value: T) -> T:
    """What the first process says; all must ask."""
    if rank_and_size()[1] == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def run_together(work: Callable[[], T]) -> list[T]:
    """Do something on all ranks; what each rank returned.

    Raises:
        Exception: what the first rank that failed raised, on rank 0.
        StoppedError: a rank failed, on the other ranks.
    """
    result: tuple[T | None, Exception | None]
    try:
        result = work(), None
    except Exception as error:
        if rank_and_size()[1] == 1:
            raise
        result = None, error
    results = gather([result])
    if error := next((error for _, error in results if error), None):
        raise_together(error)
    return [value for value, _ in results]  # type: ignore[misc]


def raise_together(error: Exception) -> NoReturn:
    """Raise an error that all ranks know of: on rank 0, which says what it was, and so once.

    Raises:
        Exception: the error, on rank 0.
        StoppedError: on the other ranks.
    """
    if rank_and_size()[0]:
        raise StoppedError(f"stopped, as all ranks: {error}")
    raise error


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, element by element."""
    if rank_and_size()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def full_tensor(values: Tensor) -> Tensor:
    """A tensor whose parts lie in several processes, put together; all of them must ask."""
    full = getattr(values, "full_tensor", None)
    return values if full is None else full()


def shard_like(values: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, cut as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415

    if not isinstance(sharded, DTensor) or values.shape != sharded.shape:
        return values
    return distribute_tensor(values, sharded.device_mesh, sharded.placements)


def shard(root: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Spread the weights of a module over the processes; they are gathered layer by layer.

    Args:
        root: what is called; its parameters become ``DTensor``s.
        layers: modules inside it that are gathered on their own.
    """
    if rank_and_size()[1] == 1:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415

    for module in (*layers, root):
        fully_shard(module)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def any_rank(problem: bool, device: torch.device) -> bool:
    """Whether any process has a problem; then all must stop, or the others would wait for ever."""
    return bool(all_reduce_sum(torch.tensor(float(problem), device=device)) > 0)
