"""Bytes on each GPU, on the host and on the disk, from the same shapes that the code allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from research_agent.algorithms import algorithm
from research_agent.algorithms.base import Algorithm, UsesCritic
from research_agent.config import TrainConfig
from research_agent.errors import ConfigError
from research_agent.plan import assumptions as given
from research_agent.plan import sampler as samplers
from research_agent.plan.machines import Machines
from research_agent.plan.sampler import Sampler
from research_agent.plan.shapes import Shape

_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "adamw_offload": 0}  # bytes of a weight


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run needs of each GPU, of the host of each node, and of the disk, in bytes.

    Attributes:
        gpu: bytes while it learns, by what takes them.
        peaks: the most of each phase, all together: "learning", "end of a backward pass", "saving",
            "resuming", "starting the sampler", "weights to the sampler".
        servers: bytes on each GPU of servers that run elsewhere; empty without them.
        host: bytes of a node's memory, by what takes them.
        disk: bytes of the run's folder and of TMPDIR, by what takes them.
        problem: why the run cannot start whatever else there is; empty if it can.
    """

    gpu: Mapping[str, float]
    peaks: Mapping[str, float]
    servers: Mapping[str, float]
    host: Mapping[str, float]
    disk: Mapping[str, float]
    problem: str

    @property
    def most(self) -> float:
        """Bytes of a GPU in the phase that needs most."""
        return max(self.peaks.values())

    def fits(self, machines: Machines) -> bool:
        """Whether the memory of each GPU is enough, with a little to spare."""
        return not self.problem and self.most <= (1 - given.FREE) * machines.gpu.memory


def needs_reference(config: TrainConfig) -> bool:
    """Whether a reference policy runs."""
    return _rule(config).needs_reference


def needs_critic(config: TrainConfig) -> bool:
    """Whether the algorithm learns a critic."""
    return isinstance(_rule(config), UsesCritic)


def _rule(config: TrainConfig) -> Algorithm:
    return algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)


def shard_ranks(config: TrainConfig, machines: Machines) -> int:
    """Ranks that one copy of the learner's weights is spread over.

    Raises:
        ConfigError: --shard-ranks does not divide the ranks.
    """
    ranks = config.learner.shard_ranks or machines.per_node
    if machines.count % ranks:
        raise ConfigError(
            f"--shard-ranks {ranks} does not divide the {machines.count} ranks on {machines}"
        )
    return ranks


def measure(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> Memory:
    """What a run needs on some machines."""
    held = _held(config, shape, machines)
    sampling = samplers.memory(sampler, shape, config, machines)
    passing = _passing(config, shape, machines)
    whole = _gathered(config, shape, machines)
    bucket = _bucket(config, shape, machines)
    fixed = sum(held.values()) + sum(sampling.values()) + given.CUDA_BYTES
    gradients = 4.0 * trained(config, shape, shard_ranks(config, machines))  # float32
    gpu = {
        **held,
        "learner: gradients": gradients,
        "learner: weights of a pass": whole,
        **passing,
        "CUDA, NCCL, fragments": given.CUDA_BYTES,
        **sampling,
    }
    peaks = {
        "learning": sum(gpu.values()),
        "end of a backward pass": fixed + gradients + _reduced(config, shape, machines),
        "weights to the sampler": fixed + 2 * bucket,
        "saving": fixed + bucket,
        "resuming": fixed + bucket,
        "starting the sampler": fixed
        - sum(held.values())
        + _loaded(config, shape, machines, sampler),
    }
    return Memory(
        gpu=gpu,
        peaks=peaks,
        servers=samplers.own_memory(sampler, shape, machines) if sampler.kind == "server" else {},
        host=_host(config, shape, machines, sampler),
        disk=_disk(config, shape, sampler),
        problem=_problem(config, shape, machines, sampler),
    )


def _held(config: TrainConfig, shape: Shape, machines: Machines) -> dict[str, float]:
    """What the learner always has on each GPU."""
    learner, ranks = config.learner, shard_ranks(config, machines)
    mine, learns = shape.shard(ranks), trained(config, shape, ranks)
    number = gathered_bytes(config, machines)
    moments = _MOMENTS[learner.optimizer]
    needed: dict[str, float] = {"learner: weights": 4 * mine}
    if learner.lora_rank:
        needed["learner: adapters"] = 4 * learns
    needed["learner: moments"] = moments * learns
    if needs_reference(config) and not learner.lora_rank:
        needed["reference policy"] = number * mine
    if needs_critic(config):
        needed["critic: weights and moments"] = (4 + 8) * _body(shape, config, machines)
    return needed


def _body(shape: Shape, config: TrainConfig, machines: Machines) -> float:
    """Numbers of a critic that a rank holds: the model without its head."""
    ranks = shard_ranks(config, machines)
    head = 0 if shape.tied else -(-shape.vocabulary // ranks) * shape.hidden
    return shape.shard(ranks) - head


def trained(config: TrainConfig, shape: Shape, ranks: int) -> int:
    """Numbers that learn, of those that a rank holds."""
    rank = config.learner.lora_rank
    return shape.adapter_shard(rank, ranks) if rank else shape.shard(ranks)


def gathered_bytes(config: TrainConfig, machines: Machines) -> int:
    """Bytes of a weight as passes see it."""
    return 2 if config.learner.precision == "bfloat16" and machines.count > 1 else 4


def _gathered(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Weights that are whole during a pass: the layer at work, the next one, head and last norm.

    A single process has all of them anyway; in bfloat16 autocast keeps its copy of them.
    """
    if machines.count == 1:
        return 2.0 * shape.parameters if config.learner.precision == "bfloat16" else 0.0
    number = gathered_bytes(config, machines)
    head = shape.vocabulary * shape.hidden
    head_gradient = 0 if config.learner.lora_rank else number * head
    return number * (2 * shape.layer_parameters + head + shape.hidden) + head_gradient


def _reduced(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """What the gradients of embedding and head take at the end of a backward pass.

    They are whole, and once more in float32 while they are summed over the ranks.
    """
    if machines.count == 1 or config.learner.lora_rank:
        return 0.0
    return (4 + gathered_bytes(config, machines)) * shape.root_parameters


def _passing(config: TrainConfig, shape: Shape, machines: Machines) -> dict[str, float]:
    """Activations and logits of a pass."""
    tokens = pass_tokens(config, shape)
    inside, residual = layer_bytes(config, shape, machines)
    if config.learner.gradient_checkpointing:
        kept = tokens * (residual * shape.layers + inside)
    else:
        kept = tokens * inside * shape.layers
    logits = min(given.HEAD_LOGITS, tokens * shape.vocabulary)
    return {"activations": float(kept), "logits of a piece": float(given.LOGIT_BYTES * logits)}


def pass_tokens(config: TrainConfig, shape: Shape) -> int:
    """The most tokens of a pass: an episode is never cut."""
    return max(config.learner.micro_batch_tokens, samplers.max_tokens(config, shape))


def layer_bytes(config: TrainConfig, shape: Shape, machines: Machines) -> tuple[int, int]:
    """Bytes of a token that a layer keeps for its backward pass, and that its input takes.

    Counted from what autograd saves in a layer of transformers' Qwen2 and Llama, with packed rows.
    A single process has float32 weights under autocast: its residual stream is float32. Queries
    that are wider than it (``head_dim``) count as its width, which is more than they take.
    """
    h, i, kv = max(shape.hidden, shape.queries), shape.intermediate, shape.kv
    if config.learner.precision == "float32":
        return 36 * h + 16 * i + 8 * kv, 4 * shape.hidden
    if machines.count == 1:
        return 32 * h + 8 * i + 4 * kv, 4 * shape.hidden
    return 22 * h + 8 * i + 4 * kv, 2 * shape.hidden


def _bucket(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Weights that a rank has whole while they are saved or given to the sampler."""
    if machines.count == 1:
        return 0.0
    largest = 4 * max(math.prod(each) for each in shape.root_tensors)
    return float(max(config.learner.bucket_bytes, largest))


def _loaded(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> float:
    """The whole model that a rank loads to start vLLM in its process, before it learns."""
    if sampler.kind != "vllm" or (machines.count == 1 and not config.rollout.max_staleness):
        return 0.0
    return float(sampler.number * shape.parameters)


def _host(
    config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler
) -> dict[str, float]:
    ranks = machines.per_node
    tokens = samplers.episodes(config) * min(given.EPISODE_TOKENS, config.sampling.max_response)
    needed = {
        "ranks": ranks * given.HOST_RANK,
        "episodes of a step": float(ranks * tokens * given.HOST_TOKEN),
    }
    if config.learner.optimizer == "adamw_offload":
        learns = trained(config, shape, shard_ranks(config, machines))
        needed["weights, gradients and moments"] = float(16 * ranks * learns)
    if sampler.kind in ("vllm", "transformers"):
        needed["models that ranks load whole"] = float(ranks * sampler.number * shape.parameters)
    if sampler.kind == "serve":
        copies = max(1, ranks // sampler.tensor_parallel)
        needed["vLLM"] = copies * sampler.tensor_parallel * given.HOST_SERVER
    return needed


def checkpoint_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes of a checkpoint."""
    learner = config.learner
    moments = _MOMENTS[learner.optimizer] or 8
    size = 4.0 * shape.parameters + moments * trained(config, shape, 1)
    if learner.lora_rank:
        size += 4 * trained(config, shape, 1)
    if needs_critic(config):
        head = 0 if shape.tied else shape.vocabulary * shape.hidden
        size += 12 * (shape.parameters - head)
    return size


def _disk(config: TrainConfig, shape: Shape, sampler: Sampler) -> dict[str, float]:
    """Checkpoints that stay, one that is being written, and weights on their way to samplers."""
    each = checkpoint_bytes(config, shape)
    kept = config.run.keep + bool(config.run.eval_every)
    needed = {f"{kept} checkpoints": kept * each, "one being written": each}
    weights = float(sampler.number * shape.parameters)
    if config.sampling.engine.startswith("server:"):
        needed["TMPDIR: weights for the servers"] = 2 * weights
    elif config.rollout.max_staleness and sampler.kind != "serve":
        needed["TMPDIR: weights for the players"] = weights
    return needed


def _problem(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> str:
    """Why the run cannot start whatever memory there is."""
    if config.learner.optimizer == "adamw_8bit" and machines.count > 1:
        return "--optimizer adamw_8bit works in one process only"
    if sampler.kind == "transformers":
        return ""
    if shape.heads % sampler.tensor_parallel:
        return f"vLLM cannot spread {shape.heads} heads over tp={sampler.tensor_parallel} GPUs"
    room = sampler.share * machines.gpu.memory
    needed = samplers.needs_bytes(sampler, shape, config)
    if needed <= room:
        return ""
    return (
        f"vLLM's weights and the cache of one episode are {needed / 1e9:.0f} GB on each GPU, and "
        f"{sampler.share:.0%} of a GPU is {room / 1e9:.0f}"
    )
