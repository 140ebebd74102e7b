"""How many bytes of tensors are alive at once: the peak, on the host as on a device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self
from unittest.mock import patch

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
        self._alive = 0
        for tensor in held:
            self._see(tensor)

    def __enter__(self) -> Self:
        # No operation: so FSDP frees what it has gathered, and takes room for it again.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._see_storage(storage)
            return done

        self._patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
            self._see_storage(tensor.untyped_storage())

    def _see_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        reference, before = self._storages.get(key, (None, 0))
        if reference is None or reference() is None:
            reference = weakref.ref(storage, lambda gone: self._forget(key, gone))
        elif size == before:
            return
        self._storages[key] = (reference, size)
        self._alive += size - before
        self.peak = max(self.peak, self._alive)

    def _forget(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        if key in self._storages and self._storages[key][0] is gone:
            self._alive -= self._storages.pop(key)[1]
