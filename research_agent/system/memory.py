"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim_heap() -> None:
    """Let the C library return what has been freed; it does nothing where the library is not glibc.

    glibc keeps freed blocks between others in its heap. Passes of learning allocate tensors of
    another length each time, which fit these gaps badly: without this a process on a CPU grows from
    step to step.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
