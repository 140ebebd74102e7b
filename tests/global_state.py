"""What a process has only once: tests must leave it as they found it.

A module that leaves a thread, a child, an environment variable, a process group or a default behind
makes those that run after it pass or fail by their order.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TIMEOUT = 20.0  # seconds for threads and children that were told to end
_OURS = ("elasticsearch", "searches", "serve", "leaked")  # names of our threads
_VARIABLES = (
    *("RESEARCH_", "HF_", "OPENAI_", "WANDB_", "ELASTIC", "PYTHONPATH", "HOME", "PATH"),
    *("TMPDIR", "COLUMNS", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_", "CI"),
)
"""Variables that our code or its tests read; libraries set others when they are first loaded."""


def snapshot() -> dict[str, Any]:
    """The values that tests must leave alone, by name."""
    found: dict[str, Any] = {
        "working folder": str(Path.cwd()),
        "sys.path": tuple(path for path in sys.path if "site-packages" not in path),
        "root logger": (logging.root.level, logging.root.disabled, logging.root.manager.disable),
        "process umask": _umask(),
    }
    for name, value in os.environ.items():
        if name.startswith(_VARIABLES):
            found[f"environment variable {name}"] = value
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        found[f"handler of {number.name}"] = signal.getsignal(number)
    return {**found, **_of_torch()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _of_torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_dtype"):
        return {}
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's matrix precision": torch.get_float32_matmul_precision(),
        "torch's process group": torch.distributed.is_initialized(),
    }


def running() -> set[str]:
    """Our threads, and child processes, that somebody has to end."""
    threads = {
        f"thread {each.name}" for each in threading.enumerate() if each.name.startswith(_OURS)
    }
    return threads | {f"process {each.name}" for each in multiprocessing.active_children()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What changed, in words. What a library sets when it is first loaded is no change."""
    for name in sorted(before.keys() | after.keys()):
        first = before.get(name)
        if name.startswith("torch") and name not in before:
            first = _FRESH_TORCH.get(name, after[name])
        if first != after.get(name):
            yield f"{name} was {first!r} and is {after.get(name)!r}"


_FRESH_TORCH = {
    "torch's gradients": True,
    "torch's deterministic algorithms": False,
    "torch's matrix precision": "highest",
    "torch's process group": False,
}


def leftovers(before: set[str]) -> set[str]:
    """Threads and children that did not run before, and do not end by themselves either."""
    if running() - before:
        gc.collect()  # an environment that nobody closed is closed when it is collected
    deadline = time.monotonic() + _TIMEOUT
    while (new := running() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return new


def seed_all() -> None:
    """Give the random numbers of the process the same start for each test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is reset
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
