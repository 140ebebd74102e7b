"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_MUCH = 1 << 30  # bytes; with less, giving back costs more time than it is worth


class _Heap(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns; ``fordblks`` is the number of free bytes."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def trim_heap() -> None:
    """Let the C library return what has been freed, if that is more than a gigabyte.

    glibc keeps freed blocks between others in its heap. Passes of learning allocate tensors of
    another length each time, which fit these gaps badly: without this a process on a CPU grows from
    step to step. With another C library, or glibc before 2.33, nothing happens.
    """
    library = ctypes.CDLL(None)
    with suppress(AttributeError):
        library.mallinfo2.restype = _Heap
        if library.mallinfo2().fordblks > _MUCH:
            library.malloc_trim(0)
