"""More than one process: FSDP2 shards the weights, and each rank runs its share of the passes.

``torchrun`` starts the processes, called ranks. A collective is a call that all ranks make
together; in a run of one process it returns its argument. A rank that does not make the call lets
the others wait, so errors are raised on all ranks (``together``, ``alike``).

The loss is a sum with weights that are fixed on the whole batch, so gradients are summed over
ranks, where FSDP would take their mean.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from research_agent.errors import ConfigError, RankError, ResearchAgentError, StoppedError
from research_agent.system.rendezvous import open_store
from research_agent.system.torchrun import torchrun

T = TypeVar("T")

_LOST_RANK_MESSAGES = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused"),
    *("Timed out", "timed out", "Broken pipe", "remote process exited"),
)
"""Parts of what torch's collectives say when another rank is gone."""
_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says on a CPU, and what CUDA's libraries say."""
_RANK_0_TIMEOUT = timedelta(seconds=10)  # for rank 0 to fail as this rank did
_cpu_meshes: dict[Any, Any] = {}  # by the mesh of a GPU: the same ranks on the CPU


@contextmanager
def init_distributed(timeout_minutes: float = 15.0) -> Iterator[None]:
    """Make the process group of the ranks that torchrun has started, and destroy it at the end.

    Without torchrun there is one process, and nothing to make. The backend is gloo on CPUs, and
    nccl on GPUs.

    Args:
        timeout_minutes: how long a rank waits in a collective before it fails.

    Raises:
        RankError: another rank stopped, or did not answer in time.
    """
    if torchrun("WORLD_SIZE", 1) == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(torchrun("LOCAL_RANK", 0))
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store, rank, size = open_store(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    except Exception as error:
        # The process group is not destroyed: the other ranks might not take part in that.
        if lost := _lost_rank(error):
            message = (
                f"another rank stopped or did not answer for {timeout_minutes:g} minutes ({lost});"
                " its own message says why. Start the same command again"
            )
            raise RankError(message) from error  # on every rank: it may be rank 0 that is gone
        raise
    dist.destroy_process_group()


def lost_or_out_of_memory(error: Exception) -> bool:
    """Whether an error means a lost rank or too little memory, which is no fault of a file."""
    if isinstance(error, StoppedError | RankError | MemoryError | torch.OutOfMemoryError):
        return True
    out_of_memory = any(text in str(error) for text in _OUT_OF_MEMORY_MESSAGES)
    return isinstance(error, RuntimeError) and (out_of_memory or bool(_lost_rank(error)))


def _lost_rank(error: Exception) -> str:
    """The words in which a collective's error says that a rank is gone; empty for other errors."""
    if isinstance(error, ResearchAgentError) or not isinstance(error, RuntimeError):
        return ""
    return next((text for text in _LOST_RANK_MESSAGES if text in str(error)), "")


def rank_and_size() -> tuple[int, int]:
    """The number of this rank, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard_batches(passes: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Give each rank the same number of passes, because all ranks take part in each pass.

    Args:
        passes: the same on every rank.

    Yields:
        The passes of this rank, and whether they count: a rank without one repeats the last pass.
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
    """Collect the items of all ranks, in the order of the ranks; a collective."""
    size = rank_and_size()[1]
    if size == 1:
        return list(items)
    found: list[list[T]] = [[]] * size
    dist.all_gather_object(found, list(items))
    return [item for part in found for item in part]


def broadcast_object(value: T) -> T:
    """Return the value of the first rank, on all ranks; a collective."""
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def together() -> Iterator[None]:
    """Run a block on all ranks; if it fails on any, all stop, and rank 0 says why.

    No rank then waits in a collective for one that has failed. The block itself must not contain a
    collective, except one that fails on all ranks alike.

    Raises:
        Exception: what the first rank that failed raised, on rank 0.
        StoppedError: a rank failed, on the other ranks.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if rank_and_size()[1] == 1 or _lost_rank(error):  # nobody would answer
            raise
        problem = error
    problems = gather([problem and portable(problem)])
    if first := next(filter(None, problems), None):
        # Rank 0 raises its own error, which has a traceback, if it is the first that failed.
        raise_together(problem if problem and problems[0] else first)


def run_together(work: Callable[[], T]) -> list[T]:
    """Call a function on all ranks, under ``together``; returns the results in rank order."""
    with together():
        result = work()
    return gather([result])


@contextmanager
def consumed_together(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Let a block go through items whose making is a collective, such as gathered weights.

    A rank whose block fails goes through the rest of the items, so that no rank waits for it.

    Raises:
        Exception: as ``together``.
    """
    left = iter(items)
    with together():
        try:
            yield left
        except Exception:
            for _ in left:
                pass
            raise


@contextmanager
def alike() -> Iterator[None]:
    """Mark a block that fails on all ranks alike: rank 0 raises its error for all.

    Only errors of this package are converted; others are raised unchanged. If rank 0 does not
    fail within ten seconds, this rank raises its own error.

    Raises:
        StoppedError: the block failed, on other ranks than 0.
    """
    try:
        yield
    except ResearchAgentError as error:
        if isinstance(error, StoppedError) or not _rank_0_fails():
            raise
        raise_together(error)


def _rank_0_fails() -> bool:
    """Whether rank 0 fails too: it says so in the store that all ranks share."""
    rank, size = rank_and_size()
    if size == 1:
        return True
    store: Any = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("failed", "alike")
        return True
    try:
        store.wait(["failed"], _RANK_0_TIMEOUT)
    except RuntimeError:  # rank 0 does not fail, or is gone
        return False
    return True


def raise_together(error: Exception) -> NoReturn:
    """Raise an error that all ranks know; only rank 0 shows it, so users read it once.

    Raises:
        Exception: the error, on rank 0.
        StoppedError: on the other ranks.
    """
    if rank_and_size()[0]:
        raise StoppedError(f"stopped, as all ranks: {error}") from error
    raise error


def portable(error: Exception) -> Exception:
    """Return the error, or one with the same words if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class may raise anything here
        return ResearchAgentError(f"{type(error).__name__}: {error}")
    return error


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, element by element; a collective."""
    if rank_and_size()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


@dataclass(frozen=True)
class Repeatable(Generic[T]):
    """An iterable that starts a new generator each time it is iterated over."""

    start: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.start()


def full_tensor(values: Tensor) -> Tensor:
    """Gather a sharded tensor; a collective. Any other tensor is returned as it is."""
    full = getattr(values, "full_tensor", None)
    return values if full is None else full()


def gathered_numel(values: Tensor) -> int:
    """Count the elements that ``full_tensor`` allocates: it pads the shards to equal sizes."""
    mesh = getattr(values, "device_mesh", None)
    if mesh is None or not values.numel():
        return values.numel()
    ranks: int = mesh.size(mesh.ndim - 1)
    return -(-len(values) // ranks) * ranks * (values.numel() // len(values))


def local_tensor(values: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; all of it if it is not sharded."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import

    return values.to_local() if isinstance(values, DTensor) else values


def shard_on_cpu(local: Tensor, like: Tensor) -> Tensor:
    """View this rank's part of a tensor on the CPU as the shard that ``like`` has on its device.

    Args:
        local: this rank's part, in the shape of its shard.
        like: a tensor, sharded or not.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - slow to import
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    if not isinstance(like, DTensor):
        return local
    mesh = like.device_mesh
    if mesh.device_type != "cpu":
        if mesh not in _cpu_meshes:
            names = mesh.mesh_dim_names
            _cpu_meshes[mesh] = init_device_mesh("cpu", mesh.shape, mesh_dim_names=names)
        mesh = _cpu_meshes[mesh]
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def make_mesh(device: torch.device, shard_ranks: int | None = None) -> Any:
    """Arrange the ranks in a mesh, by the copies of the weights that they share.

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
    per_node = torchrun("LOCAL_WORLD_SIZE", size)
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
    """Shard the weights of a module over the ranks (FSDP2); they are gathered unit by unit.

    Args:
        root: the module that is called; its parameters become ``DTensor``s.
        units: modules inside it that are gathered on their own.
        mesh: what ``make_mesh`` returned.
        half: gather the weights in bfloat16; gradients are summed in float32 all the same.
        exact: further modules inside, whose weights are gathered in their own number format.
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
    """Whether any rank has a problem; a collective, after which all ranks can stop together."""
    return bool(all_reduce_sum(torch.tensor(float(problem), device=device)) > 0)
