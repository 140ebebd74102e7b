"""Atomic writes, and locks that let a single process write to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from research_agent.errors import FolderInUseError

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_log = logging.getLogger(__name__)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: under a temporary name, flushed to the disk, then renamed.

    Args:
        path: file to write or replace; its folder must exist.
        text: the whole content.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block.

    The kernel releases the lock when the process ends, also when it is killed. The lock works on
    local disks, and between machines on NFS (Linux maps ``flock`` to locks of the server). On a
    file system without locks a warning is logged.

    Args:
        folder: folder to lock; created if it is missing. Its lock file names the process.

    Raises:
        FolderInUseError: another process has the lock; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            message = f"{owner} writes to {folder}; wait for it, or give another --output"
            raise FolderInUseError(message) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning("%s cannot be locked (%s): start one process per folder", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Some network file systems refuse this for folders; nothing more can be done there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in {errno.EINVAL, errno.EBADF, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
