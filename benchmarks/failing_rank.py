"""A rank of a training run in which a fault is caused, as ``distributed_faults`` starts it.

``python -m benchmarks.failing_rank FAULT FOLDER train ...``. In the folder it writes what happened.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.distributed_faults import PROMPTS
from research_agent.cli import main
from research_agent.engines.servers.client import Client
from research_agent.learner import Learner

Returned = Callable[[], bool]


def train(fault: str, folder: Path, words: Sequence[str]) -> None:
    """Train, and fail where the fault says.

    Args:
        fault: a key of ``distributed_faults.FAULTS``.
        folder: where the rank writes what happened; the servers' files are beside it.
        words: the command.
    """
    torch.set_num_threads(1)
    is_first = os.environ["RANK"] == "0"
    happened = folder / "happened"
    url = words[words.index("--engine") + 1].removeprefix("server:").split(",")[0]
    process = folder.parent / "server-0"
    before = process.read_text()

    def has_returned() -> bool:
        return happened.exists() and process.read_text() != before

    def kill_server() -> None:
        happened.touch()
        os.killpg(int(before), signal.SIGKILL)

    if is_first:
        with (folder / "starts").open("a") as file:
            file.write("start\n")
    done = _watch_updates(fault, folder, is_first=is_first, has_returned=has_returned)
    if fault in ("turn", "weights"):
        kill = kill_server if is_first else None
        _watch_requests(fault, url, folder, done, kill=kill, has_returned=has_returned)
    main(words)


def _watch_updates(
    fault: str, folder: Path, *, is_first: bool, has_returned: Returned
) -> list[int]:
    """Die in the update of step 3, or wait for a killed server before an update.

    Returns:
        A list to which the number of each step is added once it is learned from.
    """
    update, done = Learner.update, [0]
    happened = folder / "happened"

    def watched(self: Learner, groups: Sequence[Any]) -> dict[str, float]:
        step = groups[0].episode // PROMPTS + 1
        if step == 3 and fault == "rank" and not is_first and not happened.exists():
            happened.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while fault in ("turn", "weights") and happened.exists() and not has_returned():
            time.sleep(0.2)
        learned = update(self, groups)
        done.append(step)
        (folder / f"step-{step}").touch()
        return learned

    Learner.update = watched  # type: ignore[method-assign]
    return done


def _watch_requests(
    fault: str,
    url: str,
    folder: Path,
    done: Sequence[int],
    *,
    kill: Callable[[], None] | None,
    has_returned: Returned,
) -> None:
    """Kill the server while it answers a request, once; count what it samples afterwards."""
    ask = Client.ask

    async def watched(
        self: Client, method: str, path: str, payload: Any = None, **more: Any
    ) -> Any:
        request = asyncio.create_task(ask(self, method, path, payload, **more))
        is_turn = path.endswith("generate") and "stop" in payload["sampling_params"]
        is_reload = path == "collective_rpc" and payload["method"] == "reload_weights"
        if self._base != f"{url}/" or not (is_turn or is_reload):
            return await request
        due = (is_turn and done[-1] >= 1) if fault == "turn" else (is_reload and done[-1] >= 2)
        if due and kill and not (folder / "happened").exists():
            await asyncio.sleep(0.01)  # the server has begun
            if not request.done():
                kill()
        answer = await request
        if is_turn and has_returned():
            with (folder / "turns").open("a") as file:
                file.write("turn\n")
        return answer

    Client.ask = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
