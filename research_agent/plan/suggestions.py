"""Settings with which a run fits, found by trying them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from research_agent.config import TrainConfig
from research_agent.errors import ConfigError
from research_agent.plan import memory, timing
from research_agent.plan.machines import NODE, Machines
from research_agent.plan.sampler import choose_sampler, max_tokens
from research_agent.plan.shapes import Shape

Settings = Mapping[str, Any]
"""Settings by their names in ``TrainConfig``, such as "sampling.engine"."""

_LORA: Settings = {"learner.lora_rank": 32}  # changes what is learned: only where nothing else fits


def apply(config: TrainConfig, settings: Settings) -> TrainConfig:
    """The configuration with other settings."""
    for name, value in settings.items():
        section, _, field = name.partition(".")
        changed = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: changed})
    return config


def as_flags(settings: Settings) -> str:
    """The settings as words of the command line."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.partition(".")[2].replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def suggest(config: TrainConfig, shape: Shape, machines: Machines) -> list[Settings]:
    """Settings that make a run fit: as few as can be, and those of the quickest steps.

    Returns:
        One or two collections of settings, or none if nothing that was tried fits.
    """
    found = _fitting(config, shape, machines, {})
    if not found and not memory.needs_critic(config):
        found = _fitting(config, shape, machines, _LORA)
    if not found:
        return []
    least = min(len(settings) for settings, _ in found)
    fewest = _quickest([each for each in found if len(each[0]) == least])
    quickest = _quickest(found)
    return [fewest] if fewest == quickest else [fewest, quickest]


def _quickest(found: list[tuple[Settings, float]]) -> Settings:
    """The first settings that are as quick as any, as exactly as a plan can know."""
    best = min(seconds for _, seconds in found)
    return next(settings for settings, seconds in found if seconds < 1.1 * best)


def more_nodes(
    config: TrainConfig, shape: Shape, machines: Machines
) -> tuple[Machines, Settings] | None:
    """The fewest nodes of the same GPUs on which a run fits, and with which settings."""
    for nodes in (1, 2, 4, 8, 16):
        larger = Machines(nodes, NODE, machines.name)
        with suppress(ConfigError):  # the run's own settings may not divide these nodes
            if larger.count > machines.count and (found := suggest(config, shape, larger)):
                return larger, found[0]
    return None


def _fitting(
    config: TrainConfig, shape: Shape, machines: Machines, also: Settings
) -> list[tuple[Settings, float]]:
    """All settings that were tried and fit, with the seconds of a step."""
    found: list[tuple[Settings, float]] = []
    for tried in _combinations(config, shape, machines):
        settings = {**tried, **also}
        changed = apply(config, settings)
        sampler = choose_sampler(changed, shape, machines)
        if memory.measure(changed, shape, machines, sampler).fits(machines):
            found.append((settings, timing.measure(changed, shape, machines, sampler).step))
    return found


def _combinations(config: TrainConfig, shape: Shape, machines: Machines) -> Iterator[Settings]:
    """Settings of memory to try; what the configuration has already is left out."""
    least = max_tokens(config, shape)
    shares = ("", "memory=0.3", "memory=0.2", "memory=0.15")
    engines = [":".join(filter(None, ("vllm", share))) for share in shares]
    for tp in (1, 2, 4, 8):
        if machines.per_node % tp or shape.heads % tp:
            continue
        spread = f"tp={tp},dp={machines.per_node // tp}"
        engines += ["serve:" + ",".join(filter(None, (spread, share))) for share in shares]
    choices: dict[str, tuple[Any, ...]] = {
        "sampling.engine": (config.sampling.engine, *engines),
        "learner.precision": (config.learner.precision, "bfloat16"),
        "learner.gradient_checkpointing": (config.learner.gradient_checkpointing, True),
        "learner.micro_batch_tokens": (config.learner.micro_batch_tokens, least),
        "learner.shard_ranks": (config.learner.shard_ranks, machines.count),
        "learner.optimizer": (config.learner.optimizer, "adamw_offload"),
    }
    present = {name: options[0] for name, options in choices.items()}
    present["learner.shard_ranks"] = memory.shard_ranks(config, machines)
    for values in product(*(dict.fromkeys(options) for options in choices.values())):
        chosen = dict(zip(choices, values, strict=True))
        yield {
            name: value
            for name, value in chosen.items()
            if value is not None and value != present[name]
        }
