"""Stands in for CUDA and NCCL, so that vLLM's weight transfers run where there is no GPU.

All else of them is vLLM's own, on both sides. A test calls ``install`` for its own process; a vLLM
server does so as a plugin, which ``as_plugin`` makes of this module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_left = [0]  # pieces of weights until a transfer breaks off; 0: it does not


def break_off(after: int) -> None:
    """Let a transfer from this process fail after so many pieces of weights."""
    _left[0] = after + 1


def _piece() -> None:
    if _left[0]:
        _left[0] -= 1
        if not _left[0]:
            raise RuntimeError("NCCL error: unhandled system error")


class _Buffer:
    """The buffer itself in place of a handle; it goes through the request, as handles do."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def _handle(tensor: Any) -> tuple[None, tuple[Any, ...]]:
    return None, (_Buffer(tensor), 0, 0, 0, 0, 0, "device")


def _empty(*size: Any, device: Any = None, **settings: Any) -> Any:
    import torch

    return torch.empty(*size, **settings)


class _Stand:
    """A module with some of its attributes replaced."""

    def __init__(self, module: Any, **instead: Any) -> None:
        self._module = module
        self.__dict__ |= instead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Communicator:
    """NCCL's broadcast, by way of the store through which its members have found each other."""

    def __init__(self, group: Any, device: Any) -> None:
        self.available, self.disabled = True, False
        self._group = group
        group.barrier()  # NCCL's members wait for each other

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        if self.disabled:
            return
        if self._group.rank == src:
            _piece()
        tensor.copy_(self._group.broadcast_obj(tensor, src))
        self._group.all_gather_obj(None)  # nor is any far ahead of the others

    def destroy(self) -> None:
        self._group = None  # and the store with it: who waits for a broadcast hears of it
        self.available, self.disabled = False, True


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put the doubles in place; ``put`` may be a monkeypatch's ``setattr``."""
    import torch
    from torch.multiprocessing import reductions
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    put(torch.accelerator, "current_device_index", lambda: 0)
    put(torch.accelerator, "synchronize", lambda: None)
    put(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="the GPU"))
    put(torch.cuda, "ipc_collect", lambda: None)
    put(pynccl, "PyNcclCommunicator", Communicator)
    put(packed_tensor, "_get_streams", lambda _, count: (stream,) * count)
    piece = SimpleNamespace(synchronize=_piece)
    cuda = _Stand(torch.cuda, current_stream=lambda: piece)
    put(packed_tensor, "torch", _Stand(torch, cuda=cuda, empty=_empty))
    put(packed_tensor, "reduce_tensor", _handle)
    put(reductions, "rebuild_cuda_tensor", lambda buffer, *_: buffer.tensor)


def as_plugin(folder: Path) -> Path:
    """Make a plugin of this module; the folder in which a vLLM server finds it."""
    made = folder / "cuda_double-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-double\nVersion: 0\n")
    (made / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\ncuda_double = {__name__}:install\n"
    )
    return folder
