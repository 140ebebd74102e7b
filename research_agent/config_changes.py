"""Which settings of a run may change when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_agent.config import RunConfig, TrainConfig, as_json, flatten
from research_agent.errors import CheckpointError

# Settings that change only how long a run is, how closely it is watched, and where it writes.
FREE = frozenset(
    {
        "preset",
        "run.steps",
        "run.output",
        "run.time_limit",
        "run.save_every",
        "run.keep",
        "run.eval_every",
        "run.eval_args",
        "run.eval_limit",
        "run.eval_temperature",
        "run.trace",
        "run.wandb",
        "run.log_episodes",
        "run.collective_timeout",
        "run.plan",
        "run.override",
        "run.quiet",
        "run.json",
        "algorithm.max_void_fraction",
    }
)
# Settings that change memory, speed or place. The same numbers come out, up to rounding.
NEUTRAL = frozenset(
    {
        "policy.device",
        "sampling.max_in_flight",
        "sampling.overlap",
        "learner.micro_batch_tokens",
        "learner.packing",
        "learner.gradient_checkpointing",
        "learner.compile",
        "learner.bucket_bytes",
        "learner.shard_ranks",
        "rollout.overlong_prompts",  # what has been learned from had no such prompt
    }
)
# With a rollback these decide which checkpoints a collapsed run can go back to.
ROLLBACK = frozenset({"run.save_every", "run.keep"})
RUN_DATE = "policy.chat_template_date"  # where none is given, the saved run's is taken
# The environment's fingerprints decide whether these change the episodes, if it has any.
ENVIRONMENT = frozenset({"environment.env", "environment.env_args"})


@dataclass(frozen=True)
class Changes:
    """Settings in which a saved run and a configuration differ: name to (saved, present) value.

    Attributes:
        results: settings that change what the run computes.
        neutral: settings that change memory, speed or place only.
    """

    results: Mapping[str, tuple[Any, Any]]
    neutral: Mapping[str, tuple[Any, Any]]


def changes(
    saved: Mapping[str, Any], config: TrainConfig, *, same_environment: bool | None = None
) -> Changes:
    """Compare a saved configuration with this one.

    Args:
        saved: the configuration of the run that is continued, as JSON values.
        config: the configuration to continue with.
        same_environment: whether the environments have equal fingerprints; None if that is not
            known, and then the environment's settings must be equal.
    """
    defaults = dict(flatten(as_json(TrainConfig())))  # for settings that an older version lacks
    before, now = defaults | dict(flatten(saved)), dict(flatten(as_json(config)))
    free = FREE - ROLLBACK if rolls_back(config.run) else FREE
    skips = before.get("rollout.overlong_prompts") == "skip"
    results: dict[str, tuple[Any, Any]] = {}
    neutral: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | now.keys()):
        pair = before.get(key), now.get(key)
        if key in free or pair[0] == pair[1] or (key == RUN_DATE and pair[1] is None):
            continue
        kinds = {str(value).partition(":")[0] for value in pair}
        is_neutral = (
            key in NEUTRAL
            or (key in ENVIRONMENT and same_environment is True)
            or (key == "sampling.max_prompt" and not skips and (pair[1] or 0) >= (pair[0] or 0))
            # The engine is the same with other GPUs, another share of memory, or other addresses.
            or (key == "sampling.engine" and len(kinds) == 1)
        )
        (neutral if is_neutral else results)[key] = pair
    return Changes(results, neutral)


def rolls_back(run: RunConfig) -> bool:
    """Whether a run goes back to a checkpoint when it collapses."""
    return run.collapse is not None and run.on_collapse == "rollback"


def require_same(found: Changes, where: Path, *, override: bool = False) -> None:
    """Refuse changes of the results, unless they are asked for.

    Raises:
        CheckpointError: naming every setting that differs, with both values.
    """
    if found.results and not override:
        raise CheckpointError(
            f"{where} holds a run of another configuration:\n{in_lines(found.results)}\n"
            "Give another --output, the same settings to continue that run, or --override to "
            "continue it with these."
        )


def in_lines(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Write settings with their (saved, present) values, a line each."""
    return "\n".join(
        f"  {key}: {before!r} in the folder, {now!r} now" for key, (before, now) in changed.items()
    )
