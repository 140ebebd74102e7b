"""What a run would need, before anybody rents a machine for it: ``--plan 8xH100``.

Nothing is loaded. Sizes follow from the shape of the model and from what this trainer keeps; times
follow from assumptions, which are printed with them: they tell hours from weeks, not more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from research_agent.config import TrainConfig
from research_agent.errors import ConfigError
from research_agent.formats import read_object

EPISODE_TOKENS = 1_300  # of an episode with tools: the mean of R1-Searcher's recorded trajectories
ACTION_SHARE = 0.3  # of those, sampled by the policy; the rest is read
LONGEST = 3.0  # the longest episode of a batch, in means: the last one ends the sampling
LEARN_FLOPS = 0.35  # share of the peak that forward and backward passes reach
SAMPLE_BANDWIDTH = 0.6  # share of the memory's peak that decoding reaches
OVERHEAD = 4e9  # bytes a GPU that CUDA, NCCL and fragments take
HEAD_LOGITS = 2**28  # that exist at the same time on a GPU (``policy.MAX_LOGITS_GPU``)
GB = 1e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: memory in bytes, dense bf16 peak in FLOP/s, memory bandwidth in bytes/s.

    Source: the makers' data sheets.
    """

    memory: float
    flops: float
    bandwidth: float


GPUS = {
    "H200": Gpu(141e9, 989e12, 4.8e12),
    "H100": Gpu(80e9, 989e12, 3.35e12),
    "A100": Gpu(80e9, 312e12, 2.04e12),
    "L40S": Gpu(48e9, 362e12, 0.86e12),
    "RTX4090": Gpu(24e9, 165e12, 1.01e12),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder-only transformer (fields of its ``config.json``)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Weights, biases and norms left out (under .1 %)."""
        kv = self.hidden * self.kv_heads // self.heads
        layer = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers of keys and values that one token leaves in the cache."""
        return 2 * self.layers * self.hidden * self.kv_heads // self.heads


# From the config.json that the authors publish.
SHAPES = {
    "Qwen/Qwen2.5-3B": Shape(36, 2048, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-32B": Shape(64, 5120, 40, 8, 27648, 152064, False),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 32, 8, 14336, 128256, False),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs.

    Attributes:
        memory: bytes on each GPU while it trains, by what takes them.
        start: bytes on each GPU at the start, before the learner's weights are sharded.
        available: bytes that a GPU has.
        tokens: of all episodes of a step.
        seconds: of a step, by what takes them.
        steps: of the run.
        index: what the environment says of its own needs; empty where it says nothing.
        cures: settings that would make it fit; empty where it fits.
    """

    memory: Mapping[str, float]
    start: float
    available: float
    tokens: float
    seconds: Mapping[str, float]
    steps: int
    index: Mapping[str, str]
    cures: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU is enough."""
        return max(self.start, sum(self.memory.values())) <= self.available


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Read ``8xH100``.

    Raises:
        ConfigError: no number, or a GPU that is not known.
    """
    found = re.fullmatch(r"([1-9]\d*)x(\w+)", text)
    if not found or found[2] not in GPUS:
        raise ConfigError(
            f"--plan takes GPUS such as 8xH100, not {text!r}; known: {', '.join(GPUS)}"
        )
    return int(found[1]), GPUS[found[2]]


def shape_of(model: str) -> Shape:
    """The sizes of a model: of a folder that has a ``config.json``, or of one that is known.

    Raises:
        ConfigError: neither.
    """
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        held = read_object(file, ConfigError, "get the model's files again")
        try:
            return Shape(
                held["num_hidden_layers"],
                held["hidden_size"],
                held["num_attention_heads"],
                held.get("num_key_value_heads") or held["num_attention_heads"],
                held["intermediate_size"],
                held["vocab_size"],
                bool(held.get("tie_word_embeddings")),
            )
        except KeyError as error:
            raise ConfigError(f"{file} has no {error}; --plan reads a decoder's sizes") from error
    for name, shape in SHAPES.items():
        if model in (name, f"{name}-Instruct"):
            return shape
    raise ConfigError(
        f"the sizes of {model!r} are not known; give a folder with its config.json, or one of "
        + ", ".join(SHAPES)
    )


def plan(config: TrainConfig, gpus: str) -> Plan:
    """What a run needs on some GPUs of a kind.

    The learner's weights, gradients and Adam's two moments are float32 and sharded over the GPUs
    (FSDP2); the sampler has a whole copy of the weights on each GPU.

    Args:
        config: of the run.
        gpus: such as ``8xH100``.

    Raises:
        ConfigError: GPUs or a model that are not known.
    """
    count, gpu = parse_gpus(gpus)
    shape = shape_of(config.policy.model)
    memory = _memory(config, shape, count)
    fits = _fits(config, shape, count, gpu)
    episodes = config.sampling.prompts_per_step * config.sampling.group_size
    tokens = episodes * min(EPISODE_TOKENS, config.sampling.max_response)
    return Plan(
        memory=memory,
        start=_start(config, shape, memory),
        available=gpu.memory,
        tokens=tokens,
        seconds=_seconds(config, shape, count, gpu, tokens),
        steps=config.run.steps,
        index=_index(config),
        cures=() if fits else _cures(config, shape, count, gpu),
    )


def _needs_reference(config: TrainConfig) -> bool:
    return bool(config.algorithm.algorithm_args.get("kl_coef", 0.0))


def _sample_bytes(config: TrainConfig) -> int:
    """Bytes of a number of the sampler; of servers, which choose themselves, what is usual."""
    precise = config.sampling.engine == "vllm" and config.learner.precision == "float32"
    return 4 if precise or config.sampling.engine == "transformers" else 2


def _memory(config: TrainConfig, shape: Shape, count: int) -> dict[str, float]:
    learner, sampling = config.learner, config.sampling
    bytes_per_weight = 4 + 4 + {"adamw": 8, "adamw_8bit": 2, "adamw_offload": 0}[learner.optimizer]
    trained = 1.0 if not learner.lora_rank else _lora_share(shape, learner.lora_rank)
    weights = shape.parameters / count
    needed = {"learner: weights": 4 * weights}
    needed["learner: gradients and optimizer"] = (bytes_per_weight - 4) * weights * trained
    if _needs_reference(config) and not learner.lora_rank:
        needed["reference policy"] = 4 * weights
    number = 2 if learner.precision == "bfloat16" else 4
    tokens = max(learner.micro_batch_tokens, min(sampling.max_prompt + sampling.max_response, 8192))
    inside = number * (10 * shape.hidden + 3 * shape.intermediate)  # of a layer, a token
    kept = (
        number * shape.hidden * shape.layers
        if learner.gradient_checkpointing
        else inside * shape.layers
    )
    needed["activations"] = tokens * (kept + (inside if learner.gradient_checkpointing else 0))
    needed["logits of a piece"] = float(3 * 4 * HEAD_LOGITS)
    size = _sample_bytes(config)
    needed["CUDA, NCCL, fragments"] = OVERHEAD
    needed["sampler: weights"] = float(size * shape.parameters)
    needed["sampler: keys and values"] = float(
        _slots(config, count) * _context(config, size, shape)
    )
    return needed


def _start(config: TrainConfig, shape: Shape, memory: Mapping[str, float]) -> float:
    """The learner's weights whole beside the sampler; vLLM takes room for its cache at once."""
    cache = memory["sampler: keys and values"] if config.sampling.engine == "vllm" else 0.0
    return 4 * shape.parameters + memory["sampler: weights"] + cache + OVERHEAD


def _fits(config: TrainConfig, shape: Shape, count: int, gpu: Gpu) -> bool:
    memory = _memory(config, shape, count)
    return max(sum(memory.values()), _start(config, shape, memory)) <= gpu.memory


def _lora_share(shape: Shape, rank: int) -> float:
    """Share of the weights that adapters of all linear layers have."""
    kv = shape.hidden * shape.kv_heads // shape.heads
    sides = 4 * shape.hidden + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.intermediate)
    return rank * sides * shape.layers / shape.parameters


def _slots(config: TrainConfig, count: int) -> int:
    episodes = -(-config.sampling.prompts_per_step * config.sampling.group_size // count)
    return min(episodes, config.sampling.max_in_flight or episodes)


def _context(config: TrainConfig, size: int, shape: Shape) -> int:
    """Bytes of the cache of a slot: transformers' has room for the longest, vLLM's for the mean."""
    sampling = config.sampling
    longest = sampling.max_prompt + sampling.max_response
    tokens = longest if sampling.engine == "transformers" else min(longest, 2 * EPISODE_TOKENS)
    return tokens * shape.kv_numbers * size


def _seconds(
    config: TrainConfig, shape: Shape, count: int, gpu: Gpu, tokens: float
) -> dict[str, float]:
    size = _sample_bytes(config)
    mean = tokens / (config.sampling.prompts_per_step * config.sampling.group_size)
    slots = _slots(config, count)
    rounds = -(-config.sampling.prompts_per_step * config.sampling.group_size // (count * slots))
    read = size * (shape.parameters + slots * mean / 2 * shape.kv_numbers)
    decode = max(
        read / (SAMPLE_BANDWIDTH * gpu.bandwidth),
        2 * shape.parameters * slots / (LEARN_FLOPS * gpu.flops),
    )
    words = min(LONGEST * mean, config.sampling.max_response) * ACTION_SHARE
    prefill = 2 * shape.parameters * tokens / count / (LEARN_FLOPS * gpu.flops)
    passes = 6.0 + (2 if config.learner.gradient_checkpointing else 0)
    passes += 2 * (config.learner.old_logprobs == "recomputed") + 2 * _needs_reference(config)
    return {
        "sample": rounds * words * decode + prefill,
        "learn": passes * shape.parameters * tokens / (LEARN_FLOPS * gpu.flops * count),
    }


def _index(config: TrainConfig) -> Mapping[str, str]:
    """What the package of the environment says that its index, or the like, needs."""
    module, _, _ = config.environment.env.rpartition(":")
    try:
        footprint = getattr(import_module(module), "footprint", None) if module else None
    except ImportError:
        return {}
    return dict(footprint(**config.environment.env_args)) if footprint else {}


def _cures(config: TrainConfig, shape: Shape, count: int, gpu: Gpu) -> tuple[str, ...]:
    """Single settings, and then all of them together, with which the run fits."""
    sampling, learner = config.sampling, config.learner
    vllm = replace(config, sampling=replace(sampling, engine="vllm"))
    few = replace(config, sampling=replace(sampling, max_in_flight=8))
    small = replace(
        config,
        learner=replace(
            learner, micro_batch_tokens=4096, gradient_checkpointing=True, precision="bfloat16"
        ),
    )
    offload = replace(config, learner=replace(learner, optimizer="adamw_offload"))
    lora = replace(config, learner=replace(learner, lora_rank=32))
    together = replace(
        config,
        sampling=replace(vllm.sampling, max_in_flight=8),
        learner=replace(small.learner, optimizer="adamw_offload"),
    )
    tried = {
        "--engine vllm": vllm,
        "--max-in-flight 8": few,
        "--micro-batch-tokens 4096 --gradient-checkpointing --precision bfloat16": small,
        "--optimizer adamw_offload": offload,
        "--lora-rank 32": lora,
        "--engine vllm --max-in-flight 8 --micro-batch-tokens 4096 --gradient-checkpointing "
        "--precision bfloat16 --optimizer adamw_offload": together,
        "--engine vllm --max-in-flight 8 --micro-batch-tokens 4096 --gradient-checkpointing "
        "--precision bfloat16 --lora-rank 32": replace(
            together, learner=replace(small.learner, lora_rank=32)
        ),
    }
    fitting = [words for words, other in tried.items() if _fits(other, shape, count, gpu)]
    if fitting:
        return tuple(fitting)
    for more in (2 * count, 4 * count, 8 * count, 16 * count):
        if _fits(together, shape, more, gpu):
            last = list(tried)[-2]
            return (f"{more} of these GPUs, with {last}",)
    return ("a smaller model, or GPUs with more memory: each has whole weights at the start",)


def show(config: TrainConfig, gpus: str, found: Plan) -> str:
    """A plan in words."""
    needed = sum(found.memory.values())
    lines = [f"{config.preset or config.policy.model} on {gpus}", "", "memory of a GPU, GB"]
    lines += [f"  {what:36}{size / GB:9.1f}" for what, size in found.memory.items()]
    lines += [f"  {'in all':36}{needed / GB:9.1f}  of {found.available / GB:.0f}"]
    lines += [f"  {'at the start, before sharding':36}{found.start / GB:9.1f}", ""]
    seconds = sum(found.seconds.values())
    lines += ["a step", f"  {'tokens of all episodes':36}{found.tokens:9,.0f}"]
    lines += [f"  {f'seconds to {what}':36}{time:9.0f}" for what, time in found.seconds.items()]
    lines += [f"  {f'hours of {found.steps:,} steps':36}{seconds * found.steps / 3600:9.1f}", ""]
    if found.index:
        lines += ["environment", *(f"  {what:36}{text}" for what, text in found.index.items()), ""]
    lines += [
        "Sizes follow from the model's shape and from what this trainer keeps. Times assume",
        f"{EPISODE_TOKENS:,} tokens an episode, {ACTION_SHARE:.0%} of them sampled, the longest "
        f"{LONGEST:g} times the mean, {LEARN_FLOPS:.0%} of the",
        f"peak in passes and {SAMPLE_BANDWIDTH:.0%} of the memory's bandwidth in decoding; "
        "the environment's work overlaps.",
        "They were not measured on such GPUs.",
    ]
    if not found.fits:
        most = max(needed, found.start) / GB
        lines += ["", f"It does not fit: {most:.0f} GB of {found.available / GB:.0f}. With"]
        lines += [f"  {cure}" for cure in found.cures] + ["it would."]
    return "\n".join(lines)


def as_numbers(found: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "fits": found.fits,
        "memory": dict(found.memory),
        "start": found.start,
        "available": found.available,
        "tokens": found.tokens,
        "seconds": dict(found.seconds),
        "steps": found.steps,
        "index": dict(found.index),
        "cures": list(found.cures),
    }
