"""Whole runs on two ranks in one start: what each rank says and how it ends, into a file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from research_agent import step_metrics, trainer
from research_agent.cli import main, program
from research_agent.curriculum import CollapseMonitor
from research_agent.engines.transformers import TransformersEngine
from research_agent.errors import EngineError
from research_agent.learner import Learner
from research_agent.player import Player
from research_agent.player_process import PlayerProcess
from research_agent.trajectory import Group

TIMEOUT = 12.0
"""Seconds that a rank waits for one that hangs."""
FAULTS: dict[str, tuple[type[Any], str]] = {
    "start": (Player, "start"),
    "weights": (TransformersEngine, "load_weights"),
    "stage": (Player, "open_stage"),
    "restore": (PlayerProcess, "restore"),
    "hang": (Player, "start"),
}


def ended(words: Sequence[str]) -> tuple[int, str]:
    """Exit status of a command, and what it writes to standard error."""
    errors = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stderr(errors):
        try:
            main(words)
        except SystemExit as end:
            status = end.code
    if dist.is_initialized():  # a rank that fails does not part from the others
        dist.destroy_process_group()
    return int(status or 0), errors.getvalue()


def collapse_after_three_steps(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let rewards be 1, 1, 1, and then 0, with averages over two steps.

    ``put`` may be a monkeypatch's ``setattr``.
    """
    describe = step_metrics.of_episodes

    def given(trajectories: Sequence[Any]) -> dict[str, float]:
        step = trajectories[0].episode // 4 + 1  # four tasks a step
        return {**describe(trajectories), "reward": float(step <= 3)}

    put(step_metrics, "of_episodes", given)
    put(trainer, "CollapseMonitor", partial(CollapseMonitor, window=2))


def fault(name: str) -> contextlib.AbstractContextManager[Any]:
    """Let a method fail; one that gathers weights has gathered the first by then."""

    def fail(_: Any, *arguments: Any, **settings: Any) -> None:
        if name == "weights":
            next(iter(arguments[0]))
        if name == "hang":
            time.sleep(TIMEOUT + 3)
        raise EngineError(f"{name}: out of order")

    return mock.patch.object(*FAULTS[name], fail)


def die_once(marker: Path, step: int) -> None:
    """Let the last rank be killed in an update, the first time that it comes there."""
    update = Learner.update

    def watched(self: Learner, groups: Sequence[Group]) -> dict[str, float]:
        if groups[0].episode // 4 + 1 == step and dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, groups)

    Learner.update = watched  # type: ignore[method-assign]


def run_all(file: Path) -> None:
    """Run the commands of a file, one after the other, on all ranks."""
    rank = int(os.environ["RANK"])
    plan = json.loads(file.read_text())
    for name, case in plan.items():
        if case.get("collapse"):
            collapse_after_three_steps()
        os.environ["MASTER_PORT"] = str(case["port"])  # a store that nobody has met in before
        words = [word.replace("RANK", str(rank)) for word in case["words"]]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead
        if case.get("limit") and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], before[1]))
        with fault(name) if name in FAULTS and rank == 1 else contextlib.nullcontext():
            found = ended(words)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        file.with_name(f"{name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "die":
        die_once(Path(sys.argv[2]), int(sys.argv[3]))
        program(sys.argv[4:])
    else:
        run_all(Path(sys.argv[1]))
