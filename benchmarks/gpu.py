"""What one H200 does: updates, a checkpoint, weights on their way to a sampler, training steps.

``python -m benchmarks.gpu --output FOLDER [--parts learner checkpoint transfer steps] [--tiny]``

All parts together take under eight minutes on one H200; a part that would begin later than
``--seconds`` is left out. Each measurement is a line of JSON, on the terminal and in
``FOLDER/gpu.jsonl``. ``--tiny`` runs the same code with a small model, in seconds on a CPU.

- ``learner``: updates of a model with the sizes of Qwen2.5-1.5B and random weights, on 256
  trajectories of 1,300 tokens in the mean: tokens per second and model FLOP utilization
  (:func:`needed_flops` over the GPU's peak), for several settings of memory.
- ``checkpoint``: seconds and bytes of a checkpoint of that learner, and the most memory that
  saving takes beside what was there, on the GPU and on the host.
- ``transfer``: gigabytes per second of bfloat16 weights that another process copies from this
  process's GPU memory (CUDA IPC), bucket by bucket.
- ``steps``: whole GRPO steps with the transformers engine in MiniWorld, with that model and the
  tokenizer of the shipped warm-start checkpoint.

It runs with Python 3.12, torch 2.11 and transformers 5.17 as well as with the locked versions.
Of the other packages it needs msgspec and tyro with its docstring-parser and typeguard (all parts),
and gymnasium with its farama-notifications, and PyStemmer (``steps``).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from benchmarks.synthetic import QWEN_1_5B, TINY, make_groups, make_model
from research_agent import checkpoint
from research_agent.algorithms.grpo import GRPO
from research_agent.config import LearnerConfig
from research_agent.learner import Learner
from research_agent.trajectory import Group

STARTER = Path(__file__).parents[1] / "research_agent" / "starters" / "miniworld-starter"
STARTER_VOCABULARY = 1041
FILE = "gpu.jsonl"
GRACE = 80.0
"""Seconds that a measurement may go on after the time in which it may begin."""
PEAK = 989e12
"""FLOPs per second of an H100 or H200 with dense bfloat16."""
MICRO_BATCH_TOKENS = 16384
ANSWER_TIMEOUT = 60.0
"""Seconds for the process that receives weights to take a bucket, or to start."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": True, "micro_batch_tokens": 2 * MICRO_BATCH_TOKENS},
    {"gradient_checkpointing": True, "compile": True},
)
"""Settings of the learner that are measured, besides packed rows in bfloat16."""


@dataclass(frozen=True)
class Bench:
    """Where, how long and at which size the parts measure.

    Attributes:
        output: folder of the measurements and of what is written on the way.
        tiny: whether the model is a small one.
        device: "cuda" or "cpu".
        start: when the script began, by ``time.perf_counter``.
        seconds: after this time no further measurement begins.
    """

    output: Path
    tiny: bool
    seconds: float
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    start: float = field(default_factory=time.perf_counter)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the model."""
        return TINY if self.tiny else QWEN_1_5B

    @property
    def is_late(self) -> bool:
        """Whether no further measurement may begin."""
        return time.perf_counter() - self.start > self.seconds

    @property
    def seconds_left(self) -> float:
        """How long the measurement that has begun may take."""
        return max(1.0, self.seconds + GRACE - (time.perf_counter() - self.start))

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def write(self, what: str, **numbers: Any) -> None:
        """Print a measurement, and add it to the file."""
        at = round(time.perf_counter() - self.start, 1)
        line = json.dumps({"what": what, "at": at, **numbers})
        print(line, flush=True)
        with (self.output / FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def make_trajectories(bench: Bench) -> list[Group]:
    """Groups of trajectories whose lengths spread as those of search episodes do."""
    count, mean = (8, 60) if bench.tiny else (256, 1300)
    rng = random.Random(0)
    spread = 0.5
    lengths = [round(mean * rng.lognormvariate(-(spread**2) / 2, spread)) for _ in range(count)]
    return make_groups([max(40, length) for length in lengths], bench.sizes["vocab_size"])


def learner(bench: Bench) -> None:
    """Measure updates of the weights."""
    groups = make_trajectories(bench)
    for chosen in SETTINGS[:1] if bench.tiny else SETTINGS:
        if bench.is_late:
            bench.write("learner", **chosen, error="left out, the time is over")
            continue
        settings = {
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "packing": "on",
            "precision": "bfloat16",
            **chosen,
        }
        try:
            row = measure(bench, groups, settings)
        except torch.OutOfMemoryError as error:
            bench.write("learner", **settings, error=str(error)[:200])
        else:
            bench.write("learner", **settings, **{k: float(f"{v:.4g}") for k, v in row.items()})
        _free(bench)


def measure(bench: Bench, groups: Sequence[Group], settings: dict[str, Any]) -> dict[str, float]:
    """Time updates of a fresh learner: the first, which compiles, and the median of two more.

    The time is that of ``Learner.update``: tensors made from trajectories, advantages, forward,
    log-probabilities, backward, clipping, AdamW.
    """
    model = make_model(bench.sizes, bench.device)
    learns = Learner(model, GRPO(kl_coef=0.0), LearnerConfig(**settings))

    def update() -> float:
        bench.synchronize()
        start = time.perf_counter()
        learns.update(groups)
        bench.synchronize()
        return time.perf_counter() - start

    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = update()
    seconds = statistics.median(update() for _ in range(2))
    strict, loose = needed_flops(bench.sizes, groups)
    tokens = sum(len(t.tokens) for group in groups for t in group.trajectories)
    peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else 0
    return {
        "first_seconds": first,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": strict / seconds / PEAK,
        "mfu_other_convention": loose / seconds / PEAK,
        "peak_gib": peak / 2**30,
    }


def needed_flops(sizes: dict[str, int], groups: Sequence[Group]) -> tuple[float, float]:
    """FLOPs that the mathematics of an update needs, by two conventions.

    For trajectories of T tokens with A action tokens, L layers of width h, N parameters in the
    layers and a vocabulary of V, the strict one is the sum of 6 N T + 6 V h A + 6 L h T^2. The last
    term is causal attention: half of T^2 pairs, 2 products forward and 4 backward. What is computed
    twice (checkpointed layers, pieces of the softmax) counts once. The loose one counts whole T^2
    and logits everywhere: 6 (N + V h) T + 12 L h T^2.

    Returns:
        The strict and the loose number.
    """
    hidden, layers, vocabulary = (
        sizes[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    head_size = hidden // sizes["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head_size * sizes["num_key_value_heads"]
    body = layers * (attention + 3 * hidden * sizes["intermediate_size"])
    strict = loose = 0.0
    for trajectory in (t for group in groups for t in group.trajectories):
        tokens, actions = len(trajectory.tokens), trajectory.num_action_tokens
        pairs = layers * hidden * tokens**2
        strict += 6 * body * tokens + 6 * vocabulary * hidden * actions + 6 * pairs
        loose += 6 * (body + vocabulary * hidden) * tokens + 12 * pairs
    return strict, loose


def save(bench: Bench) -> None:
    """Measure a checkpoint, and the memory that it takes."""
    model = make_model(bench.sizes, bench.device)
    weights = sum(p.numel() for p in model.parameters())
    config = LearnerConfig(precision="bfloat16", micro_batch_tokens=MICRO_BATCH_TOKENS)
    learns = Learner(model, GRPO(kl_coef=0.0), config)
    learns.update(make_trajectories(bench)[:2])  # makes the moments
    bench.synchronize()
    held = 0
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    host = _host_peak()
    folder = bench.output / "checkpoints"
    start = time.perf_counter()
    checkpoint.save(
        folder,
        1,
        write_model=model.save_pretrained,
        state=learns.state_dict(),
        config={},
        keep=1,
    )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    peak = torch.cuda.max_memory_allocated() - held if bench.device == "cuda" else 0
    bench.write(
        "checkpoint",
        weights=weights,
        seconds=round(seconds, 2),
        bytes_per_weight=round(size / weights, 2),
        gb_per_second=round(size / seconds / 1e9, 2),
        gpu_peak_gb=round(peak / 1e9, 2),
        host_peak_gb=round((_host_peak() - host) / 1e9, 2),
    )
    shutil.rmtree(folder)
    del model, learns
    _free(bench)


def transfer(bench: Bench) -> None:
    """Measure how fast another process copies weights from this one's memory."""
    context = torch.multiprocessing.get_context("spawn")
    weights = [p.detach() for p in make_model(bench.sizes, bench.device).parameters()]
    size = 2 * sum(weight.numel() for weight in weights)
    inbox, outbox = context.Queue(), context.Queue()
    shapes = [tuple(weight.shape) for weight in weights]
    child = context.Process(target=_receive, args=(inbox, outbox, shapes, bench.device))
    child.start()
    try:
        outbox.get(timeout=ANSWER_TIMEOUT)
        for room in (2**28, 2**28, 2**30, 2**30):  # the second of each is warm
            bench.synchronize()
            start = time.perf_counter()
            for first, last in _buckets([2 * weight.numel() for weight in weights], room):
                flat = torch.cat([weight.reshape(-1).bfloat16() for weight in weights[first:last]])
                bench.synchronize()
                inbox.put((flat, first, last))
                outbox.get(timeout=ANSWER_TIMEOUT)
            seconds = time.perf_counter() - start
            bench.write(
                "transfer",
                bucket_mib=room >> 20,
                gb=float(f"{size / 1e9:.4g}"),
                seconds=round(seconds, 4),
                gb_per_second=round(size / seconds / 1e9, 2),
            )
            del flat
        inbox.put(None)
        child.join(ANSWER_TIMEOUT)
    except Empty:
        message = "the process that receives weights does not answer; its error is above"
        raise RuntimeError(message) from None
    finally:
        child.kill()
    del weights
    _free(bench)


def _receive(inbox: Any, outbox: Any, shapes: Sequence[tuple[int, ...]], device: str) -> None:
    """Fill weights from the sender's memory, until there are no more buckets."""
    own = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    outbox.put("ready")
    while (bucket := inbox.get()) is not None:
        flat, first, last = bucket
        parts = flat.split([weight.numel() for weight in own[first:last]])
        for weight, part in zip(own[first:last], parts, strict=True):
            weight.copy_(part.view(weight.shape))
        if device == "cuda":
            torch.cuda.synchronize()
        del flat, parts, part, bucket  # the sender's memory is free again
        outbox.put("done")


def _buckets(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Cut a row of sizes into pieces that fit into a room, as (first, past the last)."""
    cuts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > room:
            cuts.append(place)
            held = 0
        held += size
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def steps(bench: Bench) -> None:
    """Measure whole training steps: random weights, the tokenizer of the shipped checkpoint."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    folder, run = bench.output / "model", bench.output / "run"
    model = make_model({**bench.sizes, "vocab_size": STARTER_VOCABULARY}, "cpu")
    model.config.eos_token_id = model.config.pad_token_id = 1
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder)
    flags = {
        "--model": folder,
        "--output": run,
        "--steps": 1 if bench.tiny else 3,
        "--prompts-per-step": 2 if bench.tiny else 32,
        "--group-size": 2 if bench.tiny else 8,
        "--max-response": 64 if bench.tiny else 384,
        "--micro-batch-tokens": MICRO_BATCH_TOKENS,
        "--precision": "bfloat16",
        "--engine": "transformers",
        "--save-every": 99,
        "--eval-every": 0,
    }
    words = ["train", "miniworld", "--quiet"]
    words += [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "research_agent.cli", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=bench.seconds_left, check=False
    )
    if done.returncode:
        bench.write("steps", error=done.stderr[-500:])
    else:
        for line in (run / "timings.jsonl").read_text(encoding="utf-8").splitlines():
            bench.write("steps", **json.loads(line))
    for each in (folder, run):
        shutil.rmtree(each, ignore_errors=True)


PARTS: dict[str, Callable[[Bench], None]] = {
    "learner": learner,
    "checkpoint": save,
    "transfer": transfer,
    "steps": steps,
}


def _free(bench: Bench) -> None:
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def _host_peak() -> int:
    """The most bytes of host memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; exits with 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=400.0, help="no part begins later")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen.output, chosen.tiny, chosen.seconds)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "none"
    bench.write("machine", gpu=name, torch=torch.__version__, python=sys.version.split()[0])
    failed = False
    for part in chosen.parts:
        if bench.is_late:
            bench.write(part, error="left out, the time is over")
            continue
        try:
            PARTS[part](bench)
        except Exception as error:  # the other parts are worth their time all the same
            failed = True
            bench.write(part, error=f"{type(error).__name__}: {error}"[:500])
            _free(bench)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
