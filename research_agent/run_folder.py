"""What the output folder of a run says: where to continue, and how the run went."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from research_agent import checkpoint
from research_agent.checkpoint import Checkpoint
from research_agent.config import TrainConfig, as_json
from research_agent.config_changes import Changes, changes, in_lines, require_same
from research_agent.distributed import alike, gather, raise_together, rank_and_size, together
from research_agent.errors import CheckpointError
from research_agent.formats import RunFormat, StateFormat, read_object, require
from research_agent.models.source import starting_model
from research_agent.run_logger import METRICS, TIMINGS, append, read_lines
from research_agent.system.files import LOCK, folder_lock, write_atomic
from research_agent.system.terminal import show

CONFIG = "config.json"
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


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """As ``folder_lock``; if the block fails before it writes anything, no lock file is left.

    A folder that was made for the lock is removed too.

    Args:
        output: the output folder.

    Raises:
        FolderInUseError: another process has the lock.
    """
    is_new = not output.exists()
    before = set() if is_new else set(output.glob("*"))
    with folder_lock(output):
        try:
            yield
        except BaseException:
            if set(output.glob("*")) - before == {output / LOCK}:
                with suppress(OSError):
                    (output / LOCK).unlink()
                    if is_new:
                        output.rmdir()
            raise


def newest_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """Find the checkpoint to continue from, the same on all ranks; None for a new run.

    The environments are compared later, by ``require_same_run``: they are not open yet.

    Raises:
        CheckpointError: the folder holds a run of another configuration, or a broken checkpoint.
    """
    run, output = config.run, config.run.output
    cure = f"training would replace it: give another --output than {output}, or remove the file"
    with together():
        if (output / CONFIG).exists():  # a model has a file of this name too
            read_object(output / CONFIG, CheckpointError, cure, RunFormat)
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
    with together():
        if (output / CONFIG).exists() and read_lines(output / METRICS):
            found = changes(read_object(output / CONFIG, CheckpointError, cure), config)
            require_same(found, output, override=run.override)
    return None


@contextmanager
def restoring(saved: Checkpoint, config: TrainConfig) -> Iterator[None]:
    """As ``checkpoint.restoring``; where settings differ, the error names them."""
    found = changes(saved.config, config, same_environment=True)
    with checkpoint.restoring(saved, in_lines(found.results)):
        yield


def saved_origin(saved: Checkpoint, config: TrainConfig) -> str:
    """The model that a saved run began with, if it is the one that the configuration names.

    A run's folder stands for its checkpoints too. With ``--override`` another model than that of
    the configuration is replaced by it.

    Args:
        saved: the checkpoint.
        config: the configuration to continue with.

    Raises:
        CheckpointError: the checkpoint names another model. It may come from somebody else, and
            must not make a run load what nobody asked for. Or it names a checkpoint of another
            run, which that run has dropped.
    """
    model, origin = config.policy.model, str(saved.state["origin"])
    own_checkpoints = Path(model).expanduser() / "checkpoints"
    is_checkpoint = Path(origin).parent == own_checkpoints
    if origin == model or (is_checkpoint and Path(origin).is_dir()):
        return origin
    if config.run.override:
        return starting_model(model)
    if is_checkpoint:
        raise CheckpointError(
            f"{saved.folder} began with the model {origin}, which is gone: its run keeps the "
            f"newest checkpoints only. Put it back, or give --override to take the tokenizer, and "
            f"the weights of a reference or below an adapter, from {starting_model(model)}"
        )
    raise CheckpointError(
        f"{saved.folder} began with the model {origin!r}, which --model {model} does not name; "
        f"give --model {origin} if you trust it, or --override to take {model} instead"
    )


def require_same_run(
    saved: Checkpoint, config: TrainConfig, environment: Mapping[str, str]
) -> Changes:
    """Compare a checkpoint's configuration and environment with the present ones.

    Args:
        saved: the checkpoint that the run continues from.
        config: the present configuration.
        environment: the present environment's fingerprints.

    Returns:
        The settings that differ.

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
    return found


def write_config(config: TrainConfig, step: int, found: Changes | None) -> None:
    """Write ``config.json``, and note settings that have changed in ``changes.jsonl``, on rank 0.

    Args:
        config: the present configuration.
        step: training steps done.
        found: the settings that have changed; None: the run begins.
    """
    run = config.run
    if rank_and_size()[0]:
        return
    write_atomic(run.output / CONFIG, json.dumps(as_json(config), indent=1) + "\n")
    if found and (found.results or found.neutral):
        record = {"step": step, "results": found.results, "neutral": found.neutral}
        append(run.output / CHANGES, [record])
        if not run.quiet:
            names = ", ".join([*found.results, *found.neutral])
            show(f"{run.output}: continuing with other settings: {names}", file=sys.stderr)


def best_step(output: Path) -> int | None:
    """The step after which an evaluation gave the highest reward; the first of several."""
    records = read_lines(output / METRICS)
    evaluated = [r for r in records if r["step"] and r.get("eval/reward") is not None]
    return max(evaluated, key=lambda r: r["eval/reward"])["step"] if evaluated else None


def summarize(output: Path, step: int, message: str, signal: int = 0) -> TrainSummary:
    """Summarize a run from its logs, so that a finished run reports the same numbers again.

    Args:
        output: folder of the run.
        step: training steps done. Records of later steps, which a killed run leaves, do not count.
        message: the end in a sentence.
        signal: number of the signal that stopped the run.
    """
    records, timings = (
        [record for record in read_lines(output / name) if record["step"] <= step]
        for name in (METRICS, TIMINGS)
    )
    numbers: dict[str, float | str] = {"steps": step}
    seconds = [each["seconds"] for each in timings if each.get("seconds") is not None]
    if seconds:
        numbers["seconds of training"] = seconds[-1]
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
