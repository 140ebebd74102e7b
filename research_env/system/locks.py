"""Locks between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[BinaryIO | None]:
    """Hold the exclusive lock of a file, which is created if it is missing.

    The lock ends with the context, or with the process. On a file system without locks a warning
    is logged, and nothing is locked.

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
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            log.warning("%s cannot be locked (%s): let one process at a time use it", path, error)
        try:
            yield file
        finally:  # a child that was forked meanwhile has the file open, and would keep the lock
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
