"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys


def test_gaps_in_the_heap_are_given_back_once_they_are_large() -> None:
    """In a process of its own, since the heap of this one has gaps of other tests."""
    program = """
import ctypes
from pathlib import Path
from research_agent.system.memory import trim_heap

def resident():  # MB
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) >> 10

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def freed(count):  # MB given back of so many freed blocks of a tenth of a megabyte
    blocks = [libc.malloc(100_000) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking
        libc.free(ctypes.c_void_p(block))
    before = resident()
    trim_heap()
    return before - resident()

print(freed(4_000), freed(15_000))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    little, much = map(int, done.stdout.split())
    assert little < 100 and much > 1_000
