"""Two processes on this machine, by torchrun or as it starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[2]


def torchrun(module: str, *words: str, restarts: int = 0) -> str:
    """Run a module in both, one thread each; what they print. They must end well."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "-m"]
    done = subprocess.run(
        [sys.executable, *command, module, *words],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def in_two_processes(module: str, *words: str) -> str:
    """The same without torchrun, whose own process takes as long to start as theirs."""
    ends, said, errors = in_processes(2, module, *words)
    assert ends == [0, 0], errors[-4000:]
    return said


def in_processes(count: int, module: str, *words: str) -> tuple[list[int], str, str]:
    """Run a module on so many ranks; returns exit statuses, what they print, and their errors.

    A word "RANK" becomes the number of the rank. When one fails, the others are killed soon after,
    as torchrun does.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *(rank if w == "RANK" else w for w in words)],
                cwd=HERE,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, **shared},
                stdout=said,
                stderr=errors,
            )
            for rank in map(str, range(count))
        ]
        try:
            ends = _ends(processes)
        finally:
            for process in processes:
                process.kill()
        for file in (said, errors):
            file.seek(0)
        return ends, said.read(), errors.read()


def _ends(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; once one has failed the others have twenty seconds."""
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            break
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + 20)
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    return [process.wait(30) for process in processes]
