"""More than one process: FSDP2 shards the weights, and each rank runs its share of passes.

In a run of one process nothing here does anything. ``torchrun`` starts several; whoever calls
``torch.distributed.init_process_group`` chooses gloo (CPU) or nccl (GPU).

The loss is a sum with weights that are fixed on the whole batch, so gradients are summed over
ranks, where FSDP would take their mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from research_agent.errors import ConfigError, RankError, ResearchAgentError

T = TypeVar("T")

_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out",
         "Broken pipe", "remote process exited", "Connection refused")  # fmt: skip
"""What torch's collectives say when another rank is gone."""


@contextmanager
def init_distributed(timeout_minutes: float = 15.0) -> Iterator[None]:
    """Meet the other processes that torchrun has started, if it has, and part at the end.

    Args:
        timeout_minutes: how long a rank waits in a collective before it fails.

    Raises:
        RankError: another rank stopped, or did not answer in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        yield
    except Exception as error:
        lost = next((text for text in _LOST if text in str(error)), "")
        if lost and not isinstance(error, ResearchAgentError):
            raise shared(
                RankError(
                    f"another rank stopped or did not answer for {timeout_minutes:g} minutes"
                    f" ({lost}); its own message says why. Start the same command again"
                )
            ) from error
        error.on_all_ranks = getattr(error, "on_all_ranks", False)  # type: ignore[attr-defined]
        raise
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The number of this rank, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard_batches(passes: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Deal passes to the ranks, the same number to each, as all of them take part in a pass.

    Args:
        passes: the same on every rank.

    Yields:
        The passes of this rank, and whether they count: a rank that has none left repeats the last.
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
    """The items of all ranks, those of the first one first."""
    size = rank_and_size()[1]
    if size == 1:
        return list(items)
    found: list[list[T]] = [[]] * size
    dist.all_gather_object(found, list(items))
    return [item for part in found for item in part]


@contextmanager
def together() -> Iterator[None]:
    """Run a block on all ranks; if it fails on one, the same error is raised on all.

    So the others do not wait in a collective until it times out, and the error can be shown once,
    by the first rank (see ``said_by_another``). The block must not contain a collective, except
    ones that fail on all ranks alike.

    Raises:
        ResearchAgentError: the first rank's error, or else that of the lowest rank with one.
        RuntimeError: that error is of Python's or a library's own.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if rank_and_size()[1] == 1:
            raise
        problem = error
    said = gather([None if problem is None else (type(problem), str(problem))])
    first = next((each for each in said if each is not None), None)
    if first is None:
        return
    kind, text = first
    if problem is not None and (type(problem), str(problem)) == first:
        raise shared(problem)
    error = kind(text) if issubclass(kind, ResearchAgentError) else RuntimeError(text)
    raise shared(error) from problem


@contextmanager
def alike() -> Iterator[None]:
    """Around what all ranks do alike: an error of this package in it is raised by all of them."""
    try:
        yield
    except ResearchAgentError as error:
        raise shared(error)  # noqa: B904 - the same error


def shared(error: Exception) -> Exception:
    """Mark an error that all ranks raise alike, so that only the first one shows it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def as_raised(cause: Exception, error: Exception) -> Exception:
    """Mark an error as raised on all ranks, if its cause is."""
    return shared(error) if getattr(cause, "on_all_ranks", False) else error


def said_by_another(error: BaseException) -> bool:
    """Whether the first rank shows this error, and this rank is another one."""
    if os.environ.get("RANK", "0") == "0":
        return False
    before_meeting = not (dist.is_available() and dist.is_initialized())
    return bool(getattr(error, "on_all_ranks", before_meeting))


def broadcast_object(value: T) -> T:
    """The value of the first rank; all ranks must call this."""
    if rank_and_size()[1] == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, element by element."""
    if rank_and_size()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def full_tensor(values: Tensor) -> Tensor:
    """A sharded tensor put together; all ranks must call this."""
    full = getattr(values, "full_tensor", None)
    return values if full is None else full()


def local_tensor(values: Tensor) -> Tensor:
    """What this rank holds of a tensor; all of it if it is not sharded."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import

    return values.to_local() if isinstance(values, DTensor) else values


def shard_on_cpu(local: Tensor, like: Tensor) -> Tensor:
    """View this rank's part of a tensor on the CPU as the shard that ``like`` has on its device.

    Args:
        local: of the shape of this rank's shard.
        like: a tensor, sharded or not.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - slow to import
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    if not isinstance(like, DTensor):
        return local
    mesh = like.device_mesh
    if mesh.device_type != "cpu":
        mesh = _cpu_meshes.setdefault(
            mesh, init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)
        )
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


_cpu_meshes: dict[Any, Any] = {}


def make_mesh(device: torch.device, shard_ranks: int | None = None) -> Any:
    """Arrange the ranks: those that share one copy of the weights, and how many copies there are.

    Args:
        device: where the weights live.
        shard_ranks: ranks that a copy is spread over; None takes those of a node.

    Returns:
        A ``DeviceMesh`` with the dimension "shard", and before it "replicate" if there is more
        than one copy (hybrid sharding, HSDP).

    Raises:
        ConfigError: the ranks cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - slow to import

    size = rank_and_size()[1]
    if shard_ranks is not None and size % shard_ranks:
        raise ConfigError(
            f"shard_ranks is {shard_ranks}, which does not divide the {size} ranks; give a divisor"
        )
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    ranks = shard_ranks or (size if size % per_node else per_node)
    if ranks == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (size // ranks, ranks), mesh_dim_names=names)


def shard(
    root: nn.Module,
    units: Sequence[nn.Module],
    mesh: Any,
    *,
    half: bool = False,
    exact: Sequence[nn.Module] = (),
) -> None:
    """Spread the weights of a module over the ranks; they are gathered unit by unit.

    Args:
        root: what is called; its parameters become ``DTensor``s.
        units: modules inside it that are gathered on their own.
        mesh: of ``make_mesh``.
        half: gather the weights in bfloat16; gradients are summed in float32 all the same.
        exact: further modules inside, whose weights are gathered as they are.
    """
    from torch.distributed.fsdp import (  # noqa: PLC0415 - slow to import
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )

    for module in exact:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    policy = MixedPrecisionPolicy()
    if half:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*units, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def any_rank(problem: bool, device: torch.device) -> bool:
    """Whether any rank has a problem; then all must stop, or the others would wait for it."""
    return bool(all_reduce_sum(torch.tensor(float(problem), device=device)) > 0)
