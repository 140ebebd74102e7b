"""The limit of open files, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from research_agent.system.open_files import allow_open_files
soft, hard, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_open_files(count), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "count", "expected"),
    [
        (64, 256, 128, [128, 128, 256]),
        (64, 256, 1024, [256, 256, 256]),  # no more than the system allows
        (128, 256, 64, [128, 128, 256]),  # never less than before
    ],
)
def test_the_limit_is_raised_as_far_as_the_system_allows(
    soft: int, hard: int, count: int, expected: list[int]
) -> None:
    words = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert list(map(int, done.stdout.split())) == expected
