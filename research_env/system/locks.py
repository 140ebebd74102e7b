"""Locks between processes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[BinaryIO | None]:
    """Hold the exclusive lock of a file, which is created if it is missing.

    The lock ends with the context, or with the process.

    Args:
        path: the file to lock, in a folder that exists.
        wait: whether to wait while another process holds the lock.

    Yields:
        The file, open for reading and appending; None if ``wait`` is false and another process
        holds the lock.
    """
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file
