"""The environment variables that torchrun sets for each process."""

from __future__ import annotations

import os
from collections.abc import Mapping

_NAMES = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
})  # fmt: skip


def torchrun(variable: str, default: int) -> int:
    """Read one of torchrun's numbers, such as LOCAL_RANK."""
    return int(os.environ.get(variable, default))


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return torchrun("RANK", 0) == 0


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without torchrun's variables, for a child process that is no rank."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _NAMES and not name.startswith("TORCHELASTIC_")
    }
