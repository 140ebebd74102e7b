"""The limit of files and connections that a process may have open."""

from __future__ import annotations

import resource


def allow_open_files(count: int) -> int:
    """Raise this process's own limit of open files, as far as the system allows.

    Args:
        count: files and connections that may be open at a time.

    Returns:
        The limit now: less than ``count`` where the system allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return count
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted, soft)
