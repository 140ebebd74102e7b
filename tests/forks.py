"""Processes that need not load torch, since they are forked from one that has."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0
NOTHING: Mapping[str, str] = {}


class _Process(ForkServerProcess):
    """A process with the environment variables of its parent, not of the fork server.

    Its own children are forked from the same server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environ = dict(os.environ)
        server: Any = forkserver._forkserver
        server.ensure_running()
        self._address = server._forkserver_address

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environ)
        server: Any = forkserver._forkserver
        server._forkserver_address = self._address
        server.ensure_running = lambda: None  # it would start another server
        multiprocessing.get_context = lambda method=None: FORKS  # type: ignore[assignment]
        super().run()


class _Context(ForkServerContext):
    Process = _Process


FORKS = _Context()
"""A context of multiprocessing whose processes start without the seconds that loading takes."""
FORKS.set_forkserver_preload(
    [
        "research_agent.trainer",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "transformers.models.qwen2.modeling_qwen2",
        "tests.research_agent.conftest",
    ]
)


class Output:
    """Files that hold what processes print."""

    def __init__(self, folder: Path) -> None:
        self.said, self.errors = folder / "said", folder / "errors"
        self.said.touch()
        self.errors.touch()

    def process(
        self, program: str, *words: str, cwd: Path = ROOT, env: Mapping[str, str] = NOTHING
    ) -> ForkServerProcess:
        """A process, not yet started, that runs a program as Python's command does.

        Args:
            program: a file of Python, or the name of a module.
            words: its arguments.
            cwd: its working folder.
            env: environment variables, besides those of this process.
        """
        return FORKS.Process(target=self._run, args=([program, *words], cwd, dict(env)))

    def _run(self, argv: list[str], cwd: Path, env: dict[str, str]) -> None:
        for path, number in ((self.said, 1), (self.errors, 2)):
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        os.environ.update(env)
        os.chdir(cwd)
        sys.argv = argv
        if argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


@contextmanager
def outputs() -> Iterator[Output]:
    """The output of processes that end within the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield Output(Path(folder))


def run(
    program: str, *words: str, cwd: Path = ROOT, env: Mapping[str, str] = NOTHING
) -> CompletedProcess[str]:
    """Run a program to its end, as ``subprocess.run`` does; see `Output.process`."""
    with outputs() as output:
        process = output.process(program, *words, cwd=cwd, env=env)
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        status = process.exitcode or 0
        return CompletedProcess(
            [program, *words], status, output.said.read_text(), output.errors.read_text()
        )
