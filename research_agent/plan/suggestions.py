"""Find settings with which a run fits, by trying them."""

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

Overrides = Mapping[str, Any]
"""Settings by their names in ``TrainConfig``, such as "sampling.engine"."""

_LORA: Overrides = {"learner.lora_rank": 32}  # changes what is learned, so it is tried last


def apply(config: TrainConfig, settings: Overrides) -> TrainConfig:
    """Return the configuration with some settings changed."""
    for name, value in settings.items():
        section, _, field = name.partition(".")
        changed = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: changed})
    return config


def as_flags(settings: Overrides) -> str:
    """The settings as command-line flags."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.partition(".")[2].replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def suggest(config: TrainConfig, shape: Shape, machines: Machines) -> list[Overrides]:
    """Settings that make a run fit: the fewest changes, and the changes with the fastest steps.

    Returns:
        One or two sets of settings; empty if nothing that was tried fits.
    """
    found = _fitting(config, shape, machines, {})
    if not found and not memory.needs_critic(config):
        found = _fitting(config, shape, machines, _LORA)
    if not found:
        return []
    least = min(len(settings) for settings, _ in found)
    fewest = _fastest([each for each in found if len(each[0]) == least])
    fastest = _fastest(found)
    return [fewest] if fewest == fastest else [fewest, fastest]


def _fastest(found: list[tuple[Overrides, float]]) -> Overrides:
    """The first settings within 10 % of the fastest; a plan is no more exact than that."""
    best = min(seconds for _, seconds in found)
    return next(settings for settings, seconds in found if seconds < 1.1 * best)


def more_nodes(
    config: TrainConfig, shape: Shape, machines: Machines
) -> tuple[Machines, Overrides] | None:
    """The fewest full nodes of the same GPUs on which a run fits, and the settings for it."""
    for nodes in (1, 2, 4, 8, 16):
        larger = Machines(nodes, NODE, machines.name)
        with suppress(ConfigError):  # the run's own settings may not divide these nodes
            if larger.count > machines.count and (found := suggest(config, shape, larger)):
                return larger, found[0]
    return None


def _fitting(
    config: TrainConfig, shape: Shape, machines: Machines, also: Overrides
) -> list[tuple[Overrides, float]]:
    """All settings that fit, with the seconds per step; ``also`` is added to each."""
    found: list[tuple[Overrides, float]] = []
    for tried in _combinations(config, shape, machines):
        settings = {**tried, **also}
        changed = apply(config, settings)
        sampler = choose_sampler(changed, shape, machines)
        if memory.measure(changed, shape, machines, sampler).fits(machines):
            found.append((settings, timing.measure(changed, shape, machines, sampler).step))
    return found


def _combinations(config: TrainConfig, shape: Shape, machines: Machines) -> Iterator[Overrides]:
    """Sets of settings that save memory; settings that the configuration has are left out."""
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
