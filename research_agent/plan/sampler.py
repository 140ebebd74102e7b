"""Where the sampler runs, and the GPU memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from research_agent.config import TrainConfig
from research_agent.engines.spec import parse_engine
from research_agent.errors import ConfigError
from research_agent.plan.assumptions import EPISODE_TOKENS, SERVER_BYTES, VLLM_WORK
from research_agent.plan.machines import Machines
from research_agent.plan.shapes import Shape


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a run samples."""

    kind: str
    """"transformers" or "vllm" in the learner's process; "serve" in processes beside it on the same
    GPUs; "server" on other GPUs."""
    tensor_parallel: int  # GPUs per copy of the weights
    copies: int  # copies of the weights on all machines
    share: float  # fraction of a GPU's memory for vLLM
    number: int  # bytes per weight and per number in the cache

    def weights(self, shape: Shape) -> float:
        """Bytes of weights per GPU."""
        return self.number * shape.parameters / self.tensor_parallel


OWN_SHARE = 0.9
"""Fraction of a GPU's memory that a vLLM server takes if it has the GPU to itself."""


def choose_sampler(config: TrainConfig, shape: Shape, machines: Machines) -> Sampler:
    """How a run samples; servers elsewhere get the fewest GPUs per copy that the model needs.

    Raises:
        ConfigError: the engine is not known, or does not divide the GPUs of a node.
    """
    spec = parse_engine(config.sampling.engine)
    number = 4 if config.learner.precision == "float32" else 2
    if spec.kind == "transformers":
        return Sampler(spec.kind, 1, machines.count, 0.0, number)
    if spec.kind == "server":
        sizes = [tp for tp in (1, 2, 4, 8) if shape.heads % tp == 0]
        tried = [Sampler(spec.kind, tp, len(spec.urls), OWN_SHARE, number) for tp in sizes]
        room = OWN_SHARE * machines.gpu.memory
        enough = (each for each in tried if needs_bytes(each, shape, config) <= room)
        return next(enough, tried[-1])
    copies = machines.per_node // spec.tp if spec.kind == "vllm" else spec.dp
    if machines.per_node % spec.tp or not 0 < copies * spec.tp <= machines.per_node:
        raise ConfigError(
            f"--engine {config.sampling.engine}: the {machines.per_node} GPUs of a node cannot be "
            "divided so; tp must divide them, and tp x dp be no more"
        )
    return Sampler(spec.kind, spec.tp, machines.nodes * copies, spec.memory, number)


def needs_bytes(sampler: Sampler, shape: Shape, config: TrainConfig) -> float:
    """Bytes per GPU that the sampler needs to start: weights and the longest possible episode."""
    episode = max_tokens(config, shape) * cache_bytes(sampler, shape)
    return sampler.weights(shape) + episode + (VLLM_WORK if sampler.kind != "transformers" else 0.0)


def episodes(config: TrainConfig) -> int:
    """Episodes per step."""
    return config.rollout.prompts_per_step * config.rollout.group_size


def max_tokens(config: TrainConfig, shape: Shape) -> int:
    """Most tokens per episode."""
    return min(shape.positions, config.sampling.max_prompt + config.sampling.max_response)


def cache_bytes(sampler: Sampler, shape: Shape) -> float:
    """Bytes of keys and values per token and GPU."""
    return sampler.number * shape.kv_numbers / min(sampler.tensor_parallel, shape.kv_heads)


def slots(config: TrainConfig, copies: int) -> int:
    """Episodes that a copy of the weights plays at a time, if its memory allows."""
    share = -(-episodes(config) // copies)
    ahead = share * (1 + config.rollout.max_staleness)
    return min(ahead, config.sampling.max_in_flight or share)


def memory(
    sampler: Sampler, shape: Shape, config: TrainConfig, machines: Machines
) -> dict[str, float]:
    """Bytes that the sampler takes on each of the learner's GPUs, by purpose."""
    if sampler.kind == "server":
        return {}
    if sampler.kind == "transformers":
        held = slots(config, sampler.copies) * max_tokens(config, shape)
        cache = held * cache_bytes(sampler, shape)
        own = {"weights": sampler.weights(shape), "keys and values": cache}
    else:
        own = own_memory(sampler, shape, machines)
    if sampler.kind == "serve" or config.rollout.max_staleness:
        own["CUDA"] = SERVER_BYTES
    return {f"sampler: {what}": size for what, size in own.items()}


def own_memory(sampler: Sampler, shape: Shape, machines: Machines) -> dict[str, float]:
    """Bytes of vLLM's share of each GPU, by purpose."""
    weights, room = sampler.weights(shape), sampler.share * machines.gpu.memory
    return {
        "weights": weights,
        "activations and graphs": VLLM_WORK,
        "keys and values": room - weights - VLLM_WORK,
    }


def cache(sampler: Sampler, shape: Shape, config: TrainConfig, machines: Machines) -> float:
    """Bytes per GPU for keys and values."""
    if sampler.kind == "server":
        return own_memory(sampler, shape, machines)["keys and values"]
    return memory(sampler, shape, config, machines)["sampler: keys and values"]


def held_episodes(sampler: Sampler, shape: Shape, room: float) -> int:
    """Number of mean episodes whose keys and values fit into a cache of ``room`` bytes per GPU."""
    return int(room / (EPISODE_TOKENS * cache_bytes(sampler, shape)))
