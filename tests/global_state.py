"""The global state of a process, which tests must leave as they found it.

A module that leaves a thread, a child process, an environment variable, a process group or a
changed default behind lets later modules pass or fail by their order.
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
    """The values that tests must not change, by name."""
    umask = os.umask(0)
    os.umask(umask)
    found: dict[str, Any] = {
        "working folder": str(Path.cwd()),
        "sys.path": tuple(path for path in sys.path if "site-packages" not in path),
        "root logger": (logging.root.level, logging.root.disabled, logging.root.manager.disable),
        "process umask": umask,
    }
    for name, value in os.environ.items():
        if name.startswith(_VARIABLES):
            found[f"environment variable {name}"] = value
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        found[f"handler of {number.name}"] = signal.getsignal(number)
    return {**found, **_torch_state()}


def _torch_state() -> dict[str, Any]:
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
    """Our threads, and all child processes."""
    threads = {
        f"thread {each.name}" for each in threading.enumerate() if each.name.startswith(_OURS)
    }
    return threads | {f"process {each.name}" for each in multiprocessing.active_children()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """The changes in words. What torch sets when it is first loaded is no change."""
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
    """Threads and children that did not run before, and do not end by themselves in time."""
    if running() - before:
        gc.collect()  # closes environments that nobody closed
    deadline = time.monotonic() + _TIMEOUT
    while (new := running() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return new


def seed_all() -> None:
    """Seed the global random generators of the process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is reset
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
