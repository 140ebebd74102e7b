"""What the output folder of a run says: where to continue, and how the run went."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from research_agent import checkpoint
from research_agent.checkpoint import Checkpoint
from research_agent.config import TrainConfig
from research_agent.config_changes import changes, require_same
from research_agent.distributed import alike, gather, raise_together, rank_and_size, together
from research_agent.errors import CheckpointError
from research_agent.formats import RunFormat, StateFormat, read_object, require
from research_agent.run_logger import METRICS, TIMINGS, append, read_lines
from research_agent.system.terminal import show

CHANGES = "changes.jsonl"  # settings with which a run was continued


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a run ended.

    Attributes:
        message: the end in a sentence.
        numbers: first and last values of reward and metrics, and where the results are.
        signal: number of the signal that stopped the run early; 0: none did.
    """

    message: str
    numbers: Mapping[str, float | str]
    signal: int = 0


def newest_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """Find the checkpoint to continue from, the same on all ranks; None for a new run.

    The environments are compared later, by ``require_same_run``: they are not open yet.

    Raises:
        CheckpointError: the folder holds a run of another configuration, or a broken checkpoint.
    """
    run, output = config.run, config.run.output
    newest = checkpoint.latest(output / "checkpoints")
    if len(set(gather([newest]))) > 1:
        message = f"the ranks see different checkpoints in {output}; share the folder"
        raise_together(CheckpointError(message))
    if newest:
        saved = checkpoint.load(newest, deferred=("learner",))
        with alike(), checkpoint.restoring(saved):
            require(saved.config, RunFormat)
            require(saved.state, StateFormat)
        with alike():
            found = changes(saved.config, config, same_environment=True)
            require_same(found, output, override=run.override)
        return saved
    started = output / "config.json"
    with together():
        if started.exists() and read_lines(output / METRICS):
            cure = f"remove it, or give another --output than {output}"
            found = changes(read_object(started, CheckpointError, cure), config)
            require_same(found, output, override=run.override)
    return None


def require_same_run(
    saved: Checkpoint, config: TrainConfig, environment: Mapping[str, str]
) -> None:
    """Compare a checkpoint's configuration and environment with the present ones.

    Settings that may change are noted in ``changes.jsonl`` by the first rank.

    Args:
        saved: the checkpoint that the run continues from.
        config: the present configuration.
        environment: the present environment's fingerprints.

    Raises:
        CheckpointError: something differs that changes the results, without ``--override``.
    """
    run = config.run
    before = saved.state["environment"]
    same_environment = before == environment if before and environment else None
    found = changes(saved.config, config, same_environment=same_environment)
    if same_environment is False:
        differing = {
            f"environment's {name}": (before.get(name), environment.get(name))
            for name in sorted(before.keys() | environment.keys())
            if before.get(name) != environment.get(name)
        }
        found = replace(found, results={**found.results, **differing})
    require_same(found, run.output, override=run.override)
    if rank_and_size()[0] == 0 and (found.results or found.neutral):
        record = {"step": saved.step, "results": found.results, "neutral": found.neutral}
        append(run.output / CHANGES, [record])
        if not run.quiet:
            names = ", ".join([*found.results, *found.neutral])
            show(f"{run.output}: continuing with other settings: {names}", file=sys.stderr)


def best_step(output: Path) -> int | None:
    """The step after which an evaluation gave the highest reward; the first of several."""
    records = read_lines(output / METRICS)
    evaluated = [r for r in records if r["step"] and r.get("eval/reward") is not None]
    return max(evaluated, key=lambda r: r["eval/reward"])["step"] if evaluated else None


def summarize(output: Path, message: str, signal: int = 0) -> TrainSummary:
    """Summarize a run from its logs, so that a finished run reports the same numbers again."""
    records, timings = read_lines(output / METRICS), read_lines(output / TIMINGS)
    numbers: dict[str, float | str] = {"steps": records[-1]["step"] if records else 0}
    if timings:
        numbers["seconds of training"] = timings[-1]["seconds"]
    for name in dict.fromkeys(name for record in records for name in record):
        if name == "reward" or name.startswith(("env/", "eval/")):
            values = [r[name] for r in records if r.get(name) is not None]
            if values:
                numbers |= {f"{name} first": values[0], f"{name} last": values[-1]}
    numbers |= {
        "model": str(checkpoint.latest(output / "checkpoints") or ""),
        "logs": str(output / METRICS),
        "tensorboard": str(output / "tensorboard"),
    }
    return TrainSummary(message, numbers, signal)
