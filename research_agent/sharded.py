"""Weights and moments of many ranks, to and from files: each rank reads and writes its shard.

torch.distributed.checkpoint (DCP) reads weights and moments, and writes moments, in safetensors.
Weights are written by this module as a folder that transformers opens, one file per bucket. A rank
holds its shard and at most one bucket.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from research_agent.distributed import raise_together, rank_and_size, together
from research_agent.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copies of a file's content that exist while DCP writes it: on the host, as bytes, in the file.
_COPIES = 4
_SOURCE = "_research_agent_weights"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Read = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors in place, by their names in the files of a checkpoint."""


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Make new modules with their parameters on the meta device; buffers are real tensors."""

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied weight stays one object
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    register: Any = nn.modules.module.register_module_parameter_registration_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Replace meta parameters by zeros that take no memory while adapters are added.

    peft would move an adapter beside a meta parameter to the meta device too.
    """
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for module, name, parameter in held:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(zeros, parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in held:
            stand_in = module._parameters[name]
            parameter.requires_grad_(stand_in is not None and stand_in.requires_grad)
            module._parameters[name] = parameter


def defer(model: nn.Module, folder: Path) -> None:
    """Note the folder from which ``fill`` will read a meta model's weights."""
    setattr(model, _SOURCE, folder)


def deferred_folder(model: nn.Module) -> Path | None:
    """The folder from which a model's weights have still to be read; None if they are there."""
    folder: Path | None = getattr(model, _SOURCE, None)
    return folder


def fill(root: nn.Module, model: nn.Module, folder: Path, device: torch.device) -> None:
    """Allocate this rank's shards of a model that was made on the meta device, and read them.

    Args:
        root: the module that was sharded; it contains the model.
        model: a deferred model. Parameters that are not on the meta device (new adapters) stay.
        folder: the folder of its weights.
        device: where the shards live.

    Raises:
        OSError, ValueError, SafetensorError: the files cannot be read.
    """
    allocate(root, device)
    read_weights(model, folder)
    delattr(model, _SOURCE)


def copy_or_read(into: Mapping[str, Tensor], found: Mapping[str, Any], read: Read) -> None:
    """Fill tensors in place, from tensors of the same names or from files.

    Args:
        into: by name.
        found: a tensor, or a ``StoredTensor``, for each of the names.
        read: fills tensors in place, by their names in the files.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    for name in sorted(into.keys() | found.keys()):
        shapes = [tuple(each[name].shape) if name in each else None for each in (into, found)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"the state is that of another model: {name!r} has the shape {shapes[0]} here and"
                f" {shapes[1]} there"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            if not isinstance(found[name], StoredTensor):
                tensor.copy_(found[name])
    stored = {n: v for n, v in found.items() if isinstance(v, StoredTensor)}
    read({value.name: into[name].detach() for name, value in stored.items()})


def read_nothing(into: Mapping[str, Tensor]) -> None:
    """Be the ``Read`` of a state whose tensors are all in memory."""
    if into:
        raise ValueError(f"{next(iter(into))} is in a file; give what reads it")


def allocate(root: nn.Module, device: torch.device) -> None:
    """Give the meta parameters of a sharded module memory, whose content is arbitrary."""
    real = {n: t.detach().clone() for n, t in root.named_parameters() if not t.is_meta}
    real |= {n: t.detach().clone() for n, t in root.named_buffers() if not t.is_meta}
    root.to_empty(device=device)
    with torch.no_grad():
        named = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        for name, value in real.items():
            named[name].copy_(value)


def read_weights(model: nn.Module, folder: Path) -> None:
    """Read this rank's shards of a model's weights from a Hugging Face folder, in place.

    Persistent buffers are read whole. Adapters are left as they are.
    """
    read_tensors(folder, {name: tensor.detach() for name, tensor in saved_tensors(model)})


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of a model, which its files hold.

    Adapters are left out, and the names are those of the model without them. A tied weight comes
    once.
    """
    kept = model.state_dict(keep_vars=True)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    for name, tensor in chain(model.named_parameters(), buffers):
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def copy_weights(model: nn.Module, whole: nn.Module) -> None:
    """Copy this rank's shards of a model's weights from the same model, not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 - slow to import

    given = dict(saved_tensors(whole))
    with torch.no_grad():
        for name, tensor in saved_tensors(model):
            found = given[name].detach()
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                found = distribute_tensor(found, mesh, placements, src_data_rank=None)
            tensor.copy_(found)


def read_buffers(model: nn.Module, folder: Path) -> None:
    """Read the persistent buffers of a model without adapters, in place; no collective.

    Raises:
        OSError, SafetensorError: a file cannot be read, or is cut.
    """
    buffers = {n: b for n, b in saved_tensors(model) if not isinstance(b, nn.Parameter)}
    for file in _tensor_files(folder):
        with safe_open(file, "pt") as opened:
            for name in buffers.keys() & set(opened.keys()):
                buffers[name].copy_(opened.get_tensor(name))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files in a folder, from the files' headers.

    Raises:
        OSError, SafetensorError: a file cannot be read, is missing, or is cut.
        ValueError: two files hold the same tensor, or the same part of it.
    """
    found = {
        name: each
        for name, each in _reader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    for name, each in found.items():
        if len({chunk.offsets for chunk in each.chunks}) < len(each.chunks):
            _refuse_twice(folder, name)
    return {
        name: StoredTensor(name, tuple(each.size), each.properties.dtype)
        for name, each in found.items()
    }


def read_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors in place; this rank reads only its rows of a sharded tensor.

    Args:
        folder: holds safetensors files with whole tensors or shards, from any number of ranks.
        into: the tensors by their names in the files. All ranks must give the same names.
    """
    if not into:
        return
    with _plain_errors():
        load(dict(into), storage_reader=_reader(folder), no_dist=_alone())


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], bucket_bytes: int) -> None:
    """Write tensors, each rank its shards, into files of its own.

    Args:
        folder: made if missing.
        tensors: by name. All ranks must give the same names.
        bucket_bytes: the most bytes that a rank holds in addition to the tensors.
    """
    most = max(1, bucket_bytes * rank_and_size()[1] // _COPIES)
    files: dict[str, int] = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if held and held + size > most:
            number, held = number + 1, 0
        files[name] = number
        held += size
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _plain_errors():
        live = {name: tensor.detach() for name, tensor in tensors.items()}
        save(live, storage_writer=writer, no_dist=_alone())


def write_weights(folder: Path, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
    """Write the files of a model's weights: a file per bucket, by one rank after the other.

    Args:
        folder: it exists, and all ranks see it.
        buckets: whole tensors, the same on all ranks; see ``Learner.weight_buckets``.
    """
    rank, size = rank_and_size()
    names: list[list[str]] = []
    total = 0
    for number, bucket in enumerate(buckets):
        names.append([name for name, _ in bucket])
        total += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        with together():
            if number % size == rank:
                host = {name: tensor.contiguous().cpu() for name, tensor in bucket}
                save_file(host, folder / f"{number}.part", metadata={"format": "pt"})
                del host
    with together():
        if rank == 0:
            _name_files(folder, names, total)


def _name_files(folder: Path, names: list[list[str]], total: int) -> None:
    """Give the parts the names that transformers looks for, and write the index of weights."""
    if len(names) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    where: dict[str, str] = {}
    for number, each in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        where |= dict.fromkeys(each, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _tensor_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model; all of another folder.

    Raises:
        FileNotFoundError: one that the index names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = [folder / name for name in sorted(set(named.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {INDEX} names")
    return files


def _reader(folder: Path) -> Any:
    """DCP's reader of a folder's safetensors files."""
    reader: Any = HuggingFaceStorageReader(str(folder))
    # Its own choice is all files, and the last one that holds a name. An error in here reaches all
    # ranks: DCP collects it.
    reader.fs.ls = lambda path: [str(file) for file in _tensor_files(folder)]
    return reader


def _refuse_twice(folder: Path, name: str) -> NoReturn:
    """Name the files that hold the same tensor."""
    holders = []
    for file in _tensor_files(folder):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118 - it is no dict
                holders.append(str(file))
    raise ValueError(
        f"{name!r} is in each of {' and '.join(holders)}; move the file that does not belong to"
        " the others out of the folder"
    )


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise on all ranks the cause of DCP's error, and hide its warning about a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        if not isinstance(cause, Exception):
            raise
        raise_together(cause)
