"""Keep the trajectories that led to a number that is not finite in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from research_agent import checkpoint
from research_agent.distributed import rank_and_size
from research_agent.errors import NonFiniteError
from research_agent.evaluation.predictions import as_record
from research_agent.trajectory import Trajectory


@contextmanager
def saved_for_inspection(
    output: Path, step: int, trajectories: Sequence[Trajectory]
) -> Iterator[None]:
    """Write the trajectories that led to a number that is not finite to a file.

    Args:
        output: folder of the run. A new file in its ``failures`` gets the cause and the
            trajectories with tokens and log-probabilities. Nothing there is overwritten.
        step: training steps done.
        trajectories: what the step played; without any there is no file.

    Raises:
        NonFiniteError: the original error; its message names the file.
    """
    try:
        yield
    except NonFiniteError as error:
        if rank_and_size()[0]:
            raise
        where = _write(output, step, error, trajectories) if trajectories else ""
        message = (
            f"step {step + 1}: {error}.{where} The last checkpoint is "
            f"{checkpoint.latest(output / 'checkpoints') or 'none'}"
        )
        raise NonFiniteError(message) from error


def _write(
    output: Path, step: int, error: NonFiniteError, trajectories: Sequence[Trajectory]
) -> str:
    """Write the file; returns the sentence that says where it is."""
    record = {
        "step": step + 1,
        "cause": str(error),
        "trajectories": [
            {**as_record(trajectory), "segments": [asdict(s) for s in trajectory.segments]}
            for trajectory in trajectories
        ],
    }
    folder = output / "failures"
    names = (folder / f"step-{step + 1:06d}-{n}.json" for n in range(1, 10_000))
    try:
        folder.mkdir(exist_ok=True)
        path = next(name for name in names if not name.exists())
        path.write_text(json.dumps(record, default=str), encoding="utf-8")
    except OSError as problem:
        return f" The trajectories could not be written ({problem})."
    return f" The trajectories are in {path}."
