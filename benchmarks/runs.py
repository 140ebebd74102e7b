"""Training runs that are compared: done several at a time, each once, and read again.

A run is a folder: one that is finished is not run again, and one that was stopped continues. The
learning curves and the ablations of the papers are made of such runs.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from research_agent.run_logger import METRICS, TIMINGS, read_lines

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def run_all(
    do: Callable[..., object], jobs: Mapping[str, Sequence[Any]], workers: int, *, finished: int = 0
) -> list[str]:
    """Do jobs in processes with one thread each, several at a time.

    Args:
        do: a function of a module. It is called with the arguments of a job, and what it returns is
            printed.
        jobs: label to arguments.
        workers: jobs at the same time.
        finished: number of jobs that were done before, for what is printed.

    Returns:
        The labels of the jobs that failed.
    """
    console = Console(stderr=True)
    console.print(f"{finished + len(jobs)} runs, {len(jobs)} of them to do; {workers} at once")
    if not jobs:
        return []
    failed = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        patch.dict(os.environ, dict.fromkeys(_THREADS, "1")),  # new processes inherit it
        ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool,
    ):
        futures = {pool.submit(do, *arguments): label for label, arguments in jobs.items()}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                label, minutes = futures[future], (time.perf_counter() - start) / 60
                error = future.exception()
                said = _failure(error) if error else future.result()
                failed += [label] if error else []
                line = f"{minutes:5.1f} min  {count}/{len(jobs)}  {label}: {said}"
                console.print(line, soft_wrap=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # running ones save what they have
            raise
    return failed


def _failure(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):  # every job that waits reports it, too
        return "failed: a process was killed; was there memory for so many --workers?"
    return f"failed: {error!r}"


def _end_with_parent() -> None:
    """Let this process end if its parent is killed: after a restart two would write a run."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)  # no cleanup, as if killed; a run continues from its last checkpoint

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def training_process(*, masked: bool = True) -> Iterator[None]:
    """Set a process up for training runs: one thread, no progress bars of transformers.

    Args:
        masked: whether tokens of observations are left out of the loss, as they should be.
    """
    import torch  # noqa: PLC0415 - the process that starts others needs none
    from transformers.utils import logging  # noqa: PLC0415

    from research_agent import trainer  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with patch.object(trainer, "Learner", Learner if masked else unmasked(Learner)):
            yield
    finally:
        torch.set_num_threads(threads)


def unmasked(learner: type[Any]) -> type[Any]:
    """Make a learner that learns from tokens of observations too, which ``learner`` never does.

    No sampler reports their log-probabilities. A run has to recompute them before each update.
    """

    class Unmasked(learner):  # type: ignore[misc]
        def update(self, groups: Sequence[Any]) -> Any:
            def as_action(segment: Any) -> Any:
                if segment.provenance != "observation":
                    return segment
                given = tuple(0.0 for _ in segment.tokens)
                return replace(segment, provenance="action", logprobs=given)

            def as_actions(trajectory: Any) -> Any:
                return replace(trajectory, segments=tuple(map(as_action, trajectory.segments)))

            return super().update(
                [replace(g, trajectories=[as_actions(t) for t in g.trajectories]) for g in groups]
            )

    return Unmasked


def is_finished(folder: Path, steps: int, episodes: int | None = None) -> bool:
    """Whether a run has all its steps, or has played ``episodes``, and its last checkpoint."""
    lines = read_lines(folder / METRICS)
    if not lines:
        return False
    step, played = lines[-1]["step"], sum(line.get("episodes", 0) for line in lines)
    enough = step >= steps or (episodes is not None and played >= episodes)
    return enough and (folder / "checkpoints" / f"step-{step:06d}").is_dir()


def read_log(folder: Path, episodes: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to so many episodes.

    Two numbers are added to each: ``played``, the episodes until the end of its step, and
    ``seconds`` of training until then.
    """
    seconds = {t["step"]: t["seconds"] for t in read_lines(folder / TIMINGS)}
    played, found = 0, []
    for line in read_lines(folder / METRICS):
        played += int(line.get("episodes", 0))
        too_many = episodes is not None and played > episodes
        if too_many or line["step"] not in seconds:  # the latter: killed between two logs
            break
        found.append({**line, "played": played, "seconds": seconds[line["step"]]})
    return found
