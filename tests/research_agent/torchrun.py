"""Two processes on this machine, by torchrun or as it starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[2]


def torchrun(module: str, *words: str) -> str:
    """Run a module in both, one thread each; what they print. They must end well."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=HERE,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, **shared},
                stdout=said,
                stderr=errors,
            )
            for rank in ("0", "1")
        ]
        try:
            ends = [process.wait(300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for file in (said, errors):
            file.seek(0)
        assert ends == [0, 0], errors.read()[-4000:]
        return said.read()
