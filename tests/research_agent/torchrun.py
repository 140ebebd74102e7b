"""Several processes on this machine, by torchrun or as it starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).parents[2]

FORKS = multiprocessing.get_context("forkserver")
"""Starts processes that have loaded what a run needs: loading it takes several seconds of each."""
FORKS.set_forkserver_preload(
    [
        "research_agent.trainer",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "transformers.models.qwen2.modeling_qwen2",
        "tests.research_agent.conftest",
    ]
)


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


def in_processes(count: int, module: str, *words: str) -> tuple[list[int | None], str, str]:
    """Run a module on so many ranks; returns exit statuses, what they print, and their errors.

    A word "RANK" becomes the number of the rank. When one fails, the others are killed soon after,
    as torchrun does.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    with tempfile.NamedTemporaryFile("w+") as said, tempfile.NamedTemporaryFile("w+") as errors:
        processes = []
        for rank in map(str, range(count)):
            environ = os.environ | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
            argv = [module, *(rank if word == "RANK" else word for word in words)]
            arguments = (argv, environ | shared, said.name, errors.name)
            processes.append(FORKS.Process(target=_run_module, args=arguments))
            processes[-1].start()
        try:
            ends = _ends(processes)
        finally:
            for process in processes:
                process.kill()
        return ends, said.read(), errors.read()


def _run_module(argv: list[str], environ: dict[str, str], said: str, errors: str) -> None:
    """Be the process that ``python -m`` starts, with its output in two files."""
    for name, number in ((said, 1), (errors, 2)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(HERE)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _ends(processes: list[BaseProcess]) -> list[int | None]:
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
