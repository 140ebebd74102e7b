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
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._most = 0  # at least what is alive
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self._most > self.peak:
            # FSDP frees what it has gathered by resizing its storage to nothing, unseen.
            for key, (reference, _) in list(self._storages.items()):
                storage = reference()
                if storage is not None:
                    self._note(key, reference, storage.nbytes())
            self.peak = max(self.peak, self._most)
        return out

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._storages.get(key)
            if known is None or known[0]() is None:
                reference = weakref.ref(storage, lambda gone: self._forget(key, gone))
            else:
                reference = known[0]
            self._note(key, reference, storage.nbytes())

    def _note(self, key: int, reference: weakref.ref[torch.UntypedStorage], size: int) -> None:
        self._most += size - self._storages.get(key, (None, 0))[1]
        self._storages[key] = (reference, size)

    def _forget(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        if key in self._storages and self._storages[key][0] is gone:
            self._most -= self._storages.pop(key)[1]
