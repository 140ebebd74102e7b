"""Estimate the memory and time that a run needs on some machines: ``--plan 8xH100``.

Nothing is loaded. Bytes follow from the model's shape and from what this trainer keeps. Seconds
follow from assumptions that every plan prints: they tell hours from weeks, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from research_agent.config import TrainConfig
from research_agent.plan import assumptions, memory, suggestions, timing
from research_agent.plan.machines import Machines, parse_machines
from research_agent.plan.memory import Memory
from research_agent.plan.sampler import Sampler, choose_sampler, episodes
from research_agent.plan.shapes import read_shape
from research_agent.plan.suggestions import as_flags
from research_agent.plan.timing import Times

GB = 1e9


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs."""

    machines: Machines
    sampler: Sampler
    memory: Memory
    tokens: float  # in all episodes of a step
    times: Times  # seconds of a step
    steps: int  # steps in the whole run
    environment: Mapping[str, str]  # the environment's own needs; empty if it gives none
    suggestions: tuple[str, ...]  # flags with which the run would fit; empty if it fits

    @property
    def fits(self) -> bool:
        """Whether each GPU has enough memory."""
        return self.memory.fits(self.machines)

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.times.step * self.steps / 3600


def plan(config: TrainConfig, machines: str) -> Plan:
    """Estimate what a run needs on some machines.

    Args:
        config: the run's configuration.
        machines: such as ``8xH100``, or ``2x8xH100`` for two nodes.

    Raises:
        ConfigError: machines, model or engine are not known, or --shard-ranks does not divide the
            ranks.
    """
    where = parse_machines(machines)
    shape = read_shape(config.policy.model)
    sampler = choose_sampler(config, shape, where)
    needed = memory.measure(config, shape, where, sampler)
    found: tuple[str, ...] = ()
    if not needed.fits(where):
        found = tuple(map(as_flags, suggestions.suggest(config, shape, where)))
        if not found and (larger := suggestions.more_nodes(config, shape, where)):
            found = (f"{as_flags(larger[1])} on {larger[0]}".strip(),)
    return Plan(
        machines=where,
        sampler=sampler,
        memory=needed,
        tokens=episodes(config) * timing.mean_tokens(config),
        times=timing.measure(config, shape, where, sampler),
        steps=config.run.steps,
        environment=_environment(config),
        suggestions=found,
    )


def _environment(config: TrainConfig) -> Mapping[str, str]:
    """What the environment's package says about its own needs (its function ``footprint``)."""
    module, _, _ = config.environment.env.rpartition(":")
    try:
        footprint = getattr(import_module(module), "footprint", None) if module else None
    except ImportError:
        return {}
    return dict(footprint(**config.environment.env_args)) if footprint else {}


def show(config: TrainConfig, found: Plan) -> str:
    """A plan as text for the terminal."""
    gpu, needed = found.machines.gpu, found.memory
    ranks = memory.shard_ranks(config, found.machines)
    lines = [
        f"{config.preset or config.policy.model} on {found.machines}, one rank per GPU, weights "
        f"spread over {ranks}",
        "",
        "memory of a GPU while it learns, GB",
        *_gigabytes(needed.gpu),
        *(f"  {f'in all, {name}':36}{size / GB:9.1f}" for name, size in needed.peaks.items()),
        f"  {'that a GPU has':36}{gpu.memory / GB:9.1f}",
        "",
        "memory of a node's host, GB",
        *_gigabytes(needed.host),
        "",
        "disk, GB",
        *_gigabytes(needed.disk),
        "",
        "a step",
        f"  {'tokens of all episodes':36}{found.tokens:9,.0f}",
        *(f"  {f'seconds: {what}':36}{time:9.1f}" for what, time in found.times.parts.items()),
        f"  {'seconds, all together':36}{found.times.step:9.0f}",
        f"  {f'hours of {found.steps:,} steps':36}{found.hours:9.1f}",
        "",
    ]
    if needed.servers:
        parallel = found.sampler.tensor_parallel
        lines.append(f"memory of a server's GPU, GB, with {parallel} per copy of the weights")
        lines += [*_gigabytes(needed.servers), ""]
    if found.environment:
        lines.append("the environment")
        lines += [f"  {what:36}{text}" for what, text in found.environment.items()] + [""]
    lines += _assumptions(config)
    if not found.fits:
        free = f"{assumptions.FREE:.0%} are left free"
        most = f"{needed.most / GB:.0f} GB of {gpu.memory / GB:.0f}, of which {free}"
        why = needed.problem or most
        lines += ["", f"It does not fit: {why}."]
        if found.suggestions:
            lines += ["It fits with", *(f"  {each}" for each in found.suggestions)]
        else:
            lines.append("It needs a smaller model, or GPUs with more memory.")
    return "\n".join(lines)


def _gigabytes(sizes: Mapping[str, float]) -> list[str]:
    return [f"  {what:36}{size / GB:9.1f}" for what, size in sizes.items()]


def _assumptions(config: TrainConfig) -> list[str]:
    """The assumptions of the plan, as lines of text."""
    beside = (
        "Sampling runs beside learning (--max-staleness)."
        if config.rollout.max_staleness
        else "Sampling and learning take turns (--max-staleness 0)."
    )
    waits = (
        "Other episodes go on while one waits for the environment."
        if config.sampling.overlap or config.rollout.max_staleness
        else "All episodes wait for the environment together (no --overlap)."
    )
    return [
        "Bytes follow from the model's shape and from what this trainer keeps. Seconds assume",
        f"- episodes of {timing.mean_tokens(config):,.0f} tokens, {assumptions.ACTION_SHARE:.0%} "
        f"of them sampled; the longest is {timing.longest_tokens(config):,.0f};",
        f"- {assumptions.CALLS} calls of the environment per episode, "
        f"{assumptions.CALL_SECONDS:g} s each, as over a network;",
        f"- {assumptions.LEARN_FLOPS:.0%} of the peak in passes, "
        f"{assumptions.SAMPLE_BANDWIDTH:.0%} of the memory's bandwidth in decoding, and "
        f"{assumptions.DECODE_SECONDS * 1000:g} ms beside it;",
        f"- {assumptions.LINK_SHARE:.0%} of the links between GPUs, "
        f"{assumptions.DISK / GB:g} GB/s to the disk.",
        f"{beside} {waits}",
        "Nothing of this was measured on such GPUs.",
    ]


def as_numbers(found: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "fits": found.fits,
        "problem": found.memory.problem,
        "machines": str(found.machines),
        "memory": dict(found.memory.gpu),
        "peaks": dict(found.memory.peaks),
        "available": found.machines.gpu.memory,
        "servers": dict(found.memory.servers),
        "host": dict(found.memory.host),
        "disk": dict(found.memory.disk),
        "tokens": found.tokens,
        "seconds": dict(found.times.parts),
        "seconds_per_step": found.times.step,
        "steps": found.steps,
        "hours": found.hours,
        "environment": dict(found.environment),
        "suggestions": list(found.suggestions),
    }
