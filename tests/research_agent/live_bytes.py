"""How many bytes of tensors are alive at once: the peak, on the host as on a device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that operations see inside the context.

    Args:
        held: tensors that are alive already.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        found = {key: storage() for key, storage in self._storages.items()}
        alive = {key: each.nbytes() for key, each in found.items() if each is not None}
        self._storages = {key: self._storages[key] for key in alive}
        # FSDP frees what it has gathered by resizing its storage to nothing.
        self.peak = max(self.peak, sum(alive.values()))
        return out

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)
