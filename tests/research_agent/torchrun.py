"""Several processes on this machine, by torchrun or as it starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

from tests.forks import ROOT, outputs


def torchrun(module: str, *words: str, restarts: int = 0) -> str:
    """Run a module in both, one thread each; what they print. They must end well."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "-m"]
    done = subprocess.run(
        [sys.executable, *command, module, *words],
        cwd=ROOT,
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


def in_processes(count: int, module: str, *words: str) -> tuple[list[int | None], str, str]:
    """Run a module on so many ranks; returns exit statuses, what they print, and their errors.

    A word "RANK" becomes the number of the rank. When one fails, the others are killed soon after,
    as torchrun does.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    with outputs() as output:
        processes = [
            output.process(
                module,
                *(rank if word == "RANK" else word for word in words),
                env=shared | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in map(str, range(count))
        ]
        try:
            for process in processes:
                process.start()
            ends = _ends(processes)
        finally:
            for process in processes:
                process.kill()
        return ends, output.said.read_text(), output.errors.read_text()


def _ends(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for all; once one has failed the others have twenty seconds."""
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            break
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 20)
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.terminate()
        process.join(30)
    return [process.exitcode for process in processes]
