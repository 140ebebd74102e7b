"""Bytes per GPU, host and disk, computed from the shapes that the trainer allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.base import Algorithm, UsesCritic
from research_agent.config import TrainConfig
from research_agent.errors import ConfigError
from research_agent.plan import assumptions as given
from research_agent.plan import sampler as samplers
from research_agent.plan.machines import Machines
from research_agent.plan.sampler import Sampler
from research_agent.plan.shapes import Shape

_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "adamw_offload": 0}  # bytes on the GPU per weight


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory and disk that a run needs, in bytes by purpose."""

    gpu: Mapping[str, float]  # per GPU, while it learns
    peaks: Mapping[str, float]  # per GPU, the total of each phase, such as "learning", "saving"
    servers: Mapping[str, float]  # per GPU of servers elsewhere; empty without them
    host: Mapping[str, float]  # per node
    disk: Mapping[str, float]  # in the run's folder and in TMPDIR
    problem: str  # why the run cannot start with any amount of memory; "" if it can

    @property
    def most(self) -> float:
        """Bytes per GPU in the phase that needs most."""
        return max(self.peaks.values())

    def fits(self, machines: Machines) -> bool:
        """Whether each GPU has enough memory, with ``assumptions.FREE`` to spare."""
        return not self.problem and self.most <= (1 - given.FREE) * machines.gpu.memory


def needs_reference(config: TrainConfig) -> bool:
    """Whether a reference policy runs."""
    return _rule(config).needs_reference


def needs_critic(config: TrainConfig) -> bool:
    """Whether the algorithm learns a critic."""
    return isinstance(_rule(config), UsesCritic)


def _rule(config: TrainConfig) -> Algorithm:
    return make_algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)


def shard_ranks(config: TrainConfig, machines: Machines) -> int:
    """Number of ranks over which one copy of the learner's weights is sharded.

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
    """Compute the memory and disk that a run needs on some machines."""
    state = _learner_state(config, shape, machines)
    sampling = samplers.memory(sampler, shape, config, machines)
    bucket = _bucket(config, shape, machines)
    fixed = sum(state.values()) + sum(sampling.values()) + given.CUDA_BYTES
    gradients = 4.0 * trained(config, shape, shard_ranks(config, machines))  # float32
    gpu = {
        **state,
        "learner: gradients": gradients,
        "learner: weights of a pass": _gathered_weights(config, shape, machines),
        **_activations(config, shape, machines),
        "CUDA, NCCL, fragments": given.CUDA_BYTES,
        **sampling,
    }
    before_learner = fixed - sum(state.values())
    peaks = {
        "learning": sum(gpu.values()),
        "end of a backward pass": fixed + gradients + _root_gradients(config, shape, machines),
        "weights to the sampler": fixed + 2 * bucket + _sent(config, shape, machines, sampler),
        "saving": fixed + bucket,
        "resuming": fixed + bucket,
        "starting the sampler": before_learner + _loaded(config, shape, machines, sampler),
    }
    return Memory(
        gpu=gpu,
        peaks=peaks,
        servers=samplers.own_memory(sampler, shape, machines) if sampler.kind == "server" else {},
        host=_host(config, shape, machines, sampler),
        disk=_disk(config, shape, machines, sampler),
        problem=_problem(config, shape, machines, sampler),
    )


def _learner_state(config: TrainConfig, shape: Shape, machines: Machines) -> dict[str, float]:
    """Bytes per GPU that the learner keeps all the time."""
    learner, ranks = config.learner, shard_ranks(config, machines)
    mine, learns = shape.shard(ranks), trained(config, shape, ranks)
    needed: dict[str, float] = {"learner: weights": 4 * mine}
    if learner.lora_rank:
        needed["learner: adapters"] = 4 * learns
    needed["learner: moments"] = _MOMENTS[learner.optimizer] * learns
    if needs_reference(config) and not learner.lora_rank:
        needed["reference policy"] = gathered_bytes(config, machines) * mine
    if needs_critic(config):
        head = 0 if shape.tied else -(-shape.vocabulary // ranks) * shape.hidden
        needed["critic: weights and moments"] = (4 + 8) * (mine - head)
    return needed


def trained(config: TrainConfig, shape: Shape, ranks: int) -> int:
    """Numbers per rank that learn: the adapters' with LoRA, otherwise all."""
    rank = config.learner.lora_rank
    return shape.adapter_shard(rank, ranks) if rank else shape.shard(ranks)


def gathered_bytes(config: TrainConfig, machines: Machines) -> int:
    """Bytes per weight in a forward or backward pass."""
    return 2 if config.learner.precision == "bfloat16" and machines.count > 1 else 4


def _gathered_weights(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Bytes of weights gathered in a pass: the present layer, the next one, head and last norm.

    A single process gathers nothing; in bfloat16 autocast keeps a copy of all weights.
    """
    if machines.count == 1:
        return 2.0 * shape.parameters if config.learner.precision == "bfloat16" else 0.0
    number = gathered_bytes(config, machines)
    head = shape.vocabulary * shape.hidden
    head_gradient = 0 if config.learner.lora_rank else number * head
    return number * (2 * shape.layer_parameters + head + shape.hidden) + head_gradient


def _root_gradients(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Bytes of the gradients of embedding and head at the end of a backward pass.

    They are unsharded, and exist once more in float32 while they are summed over the ranks.
    """
    if machines.count == 1 or config.learner.lora_rank:
        return 0.0
    return (4 + gathered_bytes(config, machines)) * shape.root_parameters


def _activations(config: TrainConfig, shape: Shape, machines: Machines) -> dict[str, float]:
    """Bytes of a pass's activations and logits."""
    tokens = pass_tokens(config, shape)
    inside, residual = layer_bytes(config, shape, machines)
    if config.learner.gradient_checkpointing:
        kept = tokens * (residual * shape.layers + inside)
    else:
        kept = tokens * inside * shape.layers
    logits = min(given.HEAD_LOGITS, tokens * shape.vocabulary)
    return {"activations": float(kept), "logits of a piece": float(given.LOGIT_BYTES * logits)}


def pass_tokens(config: TrainConfig, shape: Shape) -> int:
    """Most tokens per pass; an episode is never cut."""
    return max(config.learner.micro_batch_tokens, samplers.max_tokens(config, shape))


def layer_bytes(config: TrainConfig, shape: Shape, machines: Machines) -> tuple[int, int]:
    """Bytes per token that a layer saves for its backward pass, and bytes per token of its input.

    Counted from what autograd saves in a layer of transformers' Qwen2 and Llama, with packed rows.
    A single process has float32 weights under autocast, so its residual stream is float32. If
    queries are wider than the residual stream, it counts as that wide, which is too much.
    """
    h, i, kv = max(shape.hidden, shape.queries), shape.intermediate, shape.kv
    if config.learner.precision == "float32":
        return 36 * h + 16 * i + 8 * kv, 4 * shape.hidden
    if machines.count == 1:
        return 32 * h + 8 * i + 4 * kv, 4 * shape.hidden
    return 22 * h + 8 * i + 4 * kv, 2 * shape.hidden


def _bucket(config: TrainConfig, shape: Shape, machines: Machines) -> float:
    """Bytes of gathered weights while they are saved or sent to the sampler."""
    if machines.count == 1:
        return 0.0
    return float(max(config.learner.bucket_bytes, 4 * _largest(shape)))


def _largest(shape: Shape) -> int:
    """Numbers of the largest tensor."""
    return max(math.prod(each) for each in shape.root_tensors)


def _sent(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> float:
    """Bytes of weights that are on their way to the sampler, beside the learner's buckets."""
    if sampler.kind == "vllm" and machines.count == 1 and not config.rollout.max_staleness:
        return float(sampler.number * shape.parameters)  # all are checked before any is taken
    if sampler.kind == "serve" or config.sampling.engine.startswith("server+"):
        return float(max(given.TRANSFER_BUFFER, sampler.number * _largest(shape)))
    return 0.0


def _loaded(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> float:
    """Bytes of the whole model, which a rank loads to start vLLM in its own process."""
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
    if config.rollout.max_staleness:
        needed["players"] = ranks * given.HOST_RANK
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


def _disk(
    config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler
) -> dict[str, float]:
    """Bytes of kept checkpoints, of the one being written, and of weights sent through files."""
    each = checkpoint_bytes(config, shape)
    kept = config.run.keep + bool(config.run.eval_every)
    needed = {f"{kept} checkpoints": kept * each, "one being written": each}
    weights = float(sampler.number * shape.parameters)
    if sends_through_files(config, sampler, machines):
        beside = sampler.kind in ("vllm", "transformers")
        reader, times = ("players", 1) if beside else ("servers", 2)
        needed[f"TMPDIR: weights for the {reader}"] = times * weights
    return needed


def sends_through_files(config: TrainConfig, sampler: Sampler, machines: Machines) -> bool:
    """Whether new weights reach the sampler through files, rather than from memory to memory."""
    if sampler.kind in ("vllm", "transformers"):  # in the learner's process, or in a player's
        return config.rollout.max_staleness > 0
    # A server of the run's own takes weights from memory if each of its GPUs has a rank.
    paired = sampler.copies * sampler.tensor_parallel == machines.count
    return config.sampling.engine.startswith("server:") or (sampler.kind == "serve" and not paired)


def _problem(config: TrainConfig, shape: Shape, machines: Machines, sampler: Sampler) -> str:
    """Why the run cannot start with any amount of memory; "" if it can."""
    if config.learner.optimizer == "adamw_8bit" and machines.count > 1:
        return "--optimizer adamw_8bit works in one process only"
    if sampler.kind == "transformers":
        return ""
    if sampler.kind == "vllm" and sampler.tensor_parallel > 1 and machines.count > 1:
        tp = sampler.tensor_parallel
        return f"vllm:tp={tp} works in one process; with several ranks take serve:tp={tp}"
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
