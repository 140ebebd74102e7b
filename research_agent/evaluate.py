"""Play tasks once each, write what happened, and average what the environment says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from research_agent.codec import Codec
from research_agent.collect import Sampling, collect
from research_agent.engines.base import Engine
from research_agent.environments import Environments
from research_agent.errors import ConfigError
from research_agent.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Summary:
    """An evaluation in numbers: means over the episodes that are not void."""

    episodes: int  # that are not void
    void: int  # failed infrastructure: in no mean
    reward: float
    metrics: Mapping[str, float]  # the environment's; one that an episode lacks counts as 0


def evaluate(
    engine: Engine,
    environments: Environments,
    codec: Codec,
    sampling: Sampling,
    output: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    show: bool = True,
) -> Summary:
    """Play every task of the environment once, or the first ones of its order.

    Writes ``predictions.jsonl`` (a line an episode, as they end) and at last ``summary.json``.

    Args:
        engine: see ``collect``.
        environments: see ``collect``.
        codec: see ``collect``.
        sampling: see ``collect``; temperature 0 is greedy.
        output: folder to write to; made where it is missing.
        limit: at most so many tasks.
        seed: of the order of the tasks, and of the draws.
        show: a progress bar on standard error.

    Raises:
        ConfigError: the environment does not say how many tasks it has, and no limit is given.
    """
    if environments.num_tasks is None and limit is None:
        raise ConfigError("this environment has no last task; say how many to play (--limit)")
    count = min(n for n in (environments.num_tasks, limit) if n is not None)
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context((output / "predictions.jsonl").open("w", encoding="utf-8"))
        progress = stack.enter_context(_progress(show))
        task = progress.add_task("", total=count)
        rewards: list[float] = []

        def finished(trajectory: Trajectory) -> None:
            file.write(json.dumps(as_record(trajectory)) + "\n")
            file.flush()
            if not trajectory.void:
                rewards.append(trajectory.reward)
            mean = f"reward {np.mean(rewards):.3f}" if rewards else ""
            progress.update(task, advance=1, description=mean)

        trajectories = collect(
            engine,
            environments,
            codec,
            [(episode, 0) for episode in range(count)],
            sampling,
            seed=seed,
            on_finish=finished,
        )
    summary = summarize(trajectories)
    temporary = output / "summary.json.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(summary), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output / "summary.json")
    return summary


def summarize(trajectories: Sequence[Trajectory]) -> Summary:
    """Means over trajectories, those that are void counted apart."""
    valid = [t for t in trajectories if not t.void]
    names = dict.fromkeys(name for t in valid for name in t.metrics)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    return Summary(
        episodes=len(valid),
        void=len(trajectories) - len(valid),
        reward=mean([t.reward for t in valid]),
        metrics={name: mean([t.metrics.get(name, 0.0) for t in valid]) for name in names},
    )


def as_record(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain JSON values: its texts with who wrote them, and how it ended."""
    return {
        "episode": trajectory.episode,
        "sample": trajectory.sample,
        "reward": trajectory.reward,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "stop_reason": trajectory.stop_reason,
        "void": trajectory.void,
        "metrics": dict(trajectory.metrics),
        "segments": [
            {"provenance": s.provenance, "text": s.text, "tokens": len(s.tokens)}
            for s in trajectory.segments
        ],
        "info": {k: _plain(v) for k, v in trajectory.info.items() if k != "metrics"},
    }


def _plain(value: Any) -> Any:
    """JSON's nearest to a value of an info."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic() | np.ndarray():
            return _plain(value.tolist())
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return str(value)


def _progress(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("[bold]evaluating"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=not (show and console.is_terminal),
    )
