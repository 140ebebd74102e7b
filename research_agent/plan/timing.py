"""Seconds of a training step, from the assumptions that a plan prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from research_agent.config import TrainConfig
from research_agent.plan import assumptions as given
from research_agent.plan import memory
from research_agent.plan import sampler as samplers
from research_agent.plan.machines import NETWORK, Machines
from research_agent.plan.sampler import Sampler, episodes
from research_agent.plan.shapes import Shape


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a step."""

    parts: Mapping[str, float]  # by activity
    step: float  # total; with --max-staleness above 0, sampling and the rest run at the same time


SAMPLING = ("sample", "wait for the environment")
"""Activities that run at the same time as the rest with --max-staleness above 0."""


def mean_tokens(config: TrainConfig) -> float:
    """Mean tokens per episode."""
    sampling = config.sampling
    return min(given.EPISODE_TOKENS, sampling.max_prompt + sampling.max_response)


def longest_tokens(config: TrainConfig) -> float:
    """Tokens of the longest episode of a step."""
    sampling = config.sampling
    return min(given.LONGEST * mean_tokens(config), sampling.max_prompt + sampling.max_response)


def measure(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> Times:
    """Estimate the seconds of a step on some machines."""
    sample, steps = _sampling(config, shape, machines, sampler)
    saving = memory.checkpoint_bytes(config, shape) / given.DISK
    parts = {
        "sample": sample,
        "wait for the environment": _waiting(config, sampler, steps),
        "gather episodes": given.GATHER_SECONDS * episodes(config),
        "forward passes before": _passes_before(config, shape, machines),
        "forward and backward": _learning(config, shape, machines),
        "optimizer on the host": _offloaded(config, shape, machines),
        "weights to the sampler": _transfer(config, shape, machines, sampler),
        "save, per step": saving / config.run.save_every,
    }
    parts = {name: time for name, time in parts.items() if time}
    sampling = sum(parts[name] for name in SAMPLING)
    rest = sum(parts.values()) - sampling
    return Times(parts, max(sampling, rest) if config.rollout.max_staleness else sampling + rest)


def _sampling(
    config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler
) -> tuple[float, float]:
    """Seconds of sampling, and its number of decoding steps.

    First all slots are busy; then the longest episode continues alone.
    """
    gpu, parallel = machines.gpu, sampler.tensor_parallel
    mean, longest = mean_tokens(config), longest_tokens(config)
    plain = sampler.kind == "transformers"
    slots: float = samplers.slots(config, sampler.copies)
    if not plain:
        room = samplers.cache(sampler, shape, config, machines)
        slots = max(1, min(slots, samplers.held_episodes(sampler, shape, room)))
    per_copy = episodes(config) / sampler.copies
    overhead = given.TRANSFORMERS_SECONDS if plain else given.DECODE_SECONDS

    def decode(busy: float) -> float:
        """Seconds of a decoding step with so many episodes."""
        cached = busy * mean / 2 * samplers.cache_bytes(sampler, shape)
        read = sampler.number * shape.parameters / parallel + cached
        compute = 2 * shape.parameters * busy / parallel / (given.LEARN_FLOPS * gpu.flops)
        reduce = 2 * shape.layers * given.TENSOR_PARALLEL_SECONDS if parallel > 1 else 0.0
        slowest = max(read / (given.SAMPLE_BANDWIDTH * gpu.bandwidth), compute)
        return slowest + reduce + overhead

    bulk = max(1.0, per_copy / slots) * given.ACTION_SHARE * mean
    tail = max(0.0, given.ACTION_SHARE * longest - bulk)
    prefill = 2 * shape.parameters * per_copy * mean / parallel / (given.LEARN_FLOPS * gpu.flops)
    return bulk * decode(slots) + tail * decode(1) + prefill, bulk + tail


def _waiting(config: TrainConfig, sampler: Sampler, steps: float) -> float:
    """Seconds in which nothing is sampled because episodes wait for the environment.

    With overlap only the longest episode waits. In lockstep all episodes wait whenever one ends a
    turn. If turns end at random, that is in 1 - exp(-turns / steps) of the decoding steps.
    """
    if config.sampling.overlap or config.rollout.max_staleness:
        return given.CALLS * given.CALL_SECONDS
    turns = given.CALLS * episodes(config) / sampler.copies
    return steps * (1 - math.exp(-turns / max(1.0, steps))) * given.CALL_SECONDS


def _passes_before(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Seconds of the forward passes over all tokens of a step before its first update."""
    recomputed = config.learner.old_logprobs == "recomputed"
    count = recomputed + memory.needs_reference(config) + memory.needs_critic(config)
    tokens = _busiest_tokens(episodes(config) * mean_tokens(config), config, machines)
    return count * _pass_seconds(config, shape, machines, tokens, flops=2, moved=2)


def _learning(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Seconds of all forward and backward passes of a step, the critic's included."""
    updates = config.learner.minibatches
    part = episodes(config) * mean_tokens(config) / updates
    tokens = _busiest_tokens(part, config, machines)
    again = 2 if config.learner.gradient_checkpointing else 0
    number = memory.gathered_bytes(config, machines)
    moved = 2 * number + 4
    each = _pass_seconds(config, shape, machines, tokens, flops=6 + again, moved=moved)
    return updates * each * (1 + memory.needs_critic(config))


def _busiest_tokens(tokens: float, config: TrainConfig, machines: Machines) -> float:
    """Tokens of the busiest rank: its share, but at least the longest episode."""
    return max(tokens / machines.count, longest_tokens(config))


def _pass_seconds(
    config: TrainConfig, shape: Shape, machines: Machines, tokens: float, *, flops: int, moved: int
) -> float:
    """Seconds of a rank's passes: of computing or of receiving weights, whichever is longer.

    Args:
        config: the run's configuration.
        shape: sizes of the model.
        machines: machines of the run.
        tokens: tokens of the rank.
        flops: FLOPs per token and parameter.
        moved: bytes per parameter that a rank receives in each pass.
    """
    gpu = machines.gpu
    compute = flops * shape.parameters * tokens / (given.LEARN_FLOPS * gpu.flops)
    if machines.count == 1:
        return compute
    across = memory.shard_ranks(config, machines) > machines.per_node
    speed = given.LINK_SHARE * (NETWORK if across else gpu.link)
    passes = math.ceil(tokens / memory.pass_tokens(config, shape))
    return max(compute, passes * moved * shape.parameters / speed)


def _offloaded(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Seconds of AdamW on the host: transfers to and from it, and its memory traffic."""
    if config.learner.optimizer != "adamw_offload":
        return 0.0
    mine = memory.trained(config, shape, memory.shard_ranks(config, machines))
    travel = 3 * 4 * mine / given.HOST_LINK
    compute = 7 * 4 * mine * machines.per_node / given.HOST_BANDWIDTH
    return config.learner.minibatches * (travel + compute)


def _transfer(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> float:
    size = sampler.number * shape.parameters
    if memory.sends_through_files(config, sampler, machines):  # written, and read again
        return 2 * size / given.DISK
    return size / given.TRANSFER
