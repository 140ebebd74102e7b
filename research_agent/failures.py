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
        trajectories: what the step played.

    Raises:
        NonFiniteError: the original error; its message names the file.
    """
    try:
        yield
    except NonFiniteError as error:
        if rank_and_size()[0]:
            raise
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
            where = f"are in {path}"
        except OSError as problem:
            where = f"could not be written ({problem})"
        message = (
            f"step {step + 1}: {error}. The trajectories {where}; the last checkpoint is "
            f"{checkpoint.latest(output / 'checkpoints') or 'none'}"
        )
        raise NonFiniteError(message) from error
