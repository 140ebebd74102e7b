"""What an update of the weights costs.

``python -m benchmarks.learner [--rounds N]``: on the CPU, a race with TRL's GRPOTrainer on the same
trajectories, which it gets through its ``rollout_func``: GRPO without KL, AdamW, segments as long
as those of real searches, a model whose head is a fifth of it, as in Qwen2.5-1.5B. Every competitor
has a process of its own. After one update loss, gradient norm and step must be the same. "TRL's
defaults" are those for number format (bf16), checkpointing (on) and batch size (8), against our
defaults (float32); "TRL's best" is the quickest of five batch sizes in float32 without
checkpointing, against our best.

``python -m benchmarks.learner --head-memory whole|pieces``: what the log-probabilities of a
vocabulary of 150,000 need, with the logits whole and in pieces.

``python -m benchmarks.learner --mfu [--tiny]``: model FLOP utilization on a GPU, at the sizes of
Qwen2.5-1.5B with random weights, on search trajectories of 8,192 tokens: bf16 products, float32
weights, optimizer and softmax. First it checks that the packed bf16 gradient is that of float32
rows.

The time is that of ``Learner.update``: tensors made from trajectories, advantages, forward,
log-probabilities, backward, clipping, AdamW. The FLOPs are those that the mathematics needs; what
is computed twice (checkpointed layers, pieces of the softmax) counts once. For trajectories of T
tokens with A action tokens, L layers of width h, N parameters in the layers and a vocabulary of V::

    sum of 6 N T + 6 V h A + 6 L h T^2

The last term is causal attention: half of T^2 pairs, 2 products forward and 4 backward. Utilization
is FLOPs / seconds / 989e12, the dense bf16 peak of an H100 or H200. The other convention, printed
beside it, counts whole T^2 and logits everywhere: sum of 6 (N + V h) T + 12 L h T^2.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from research_agent.algorithms.grpo import GRPO
from research_agent.batch import make_batch, micro_batches
from research_agent.config import LearnerConfig
from research_agent.learner import Learner
from research_agent.models.policy import TokenLogprobs, batch_logprobs, token_logprobs
from research_agent.trajectory import Group, Segment, Trajectory, reward_last_turn

PEAK = 989e12
TARGET_MFU = 0.40

QWEN_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
}
SMALL = {**QWEN_1_5B, "vocab_size": 8192, "num_hidden_layers": 4}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def make_model(sizes: dict[str, int], device: str) -> Any:
    """Make a Qwen2 of random float32 weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = Qwen2Config(**sizes, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        return Qwen2ForCausalLM(config).eval()


def make_groups(
    lengths: Sequence[int], vocabulary: int, samples: int = 4, seed: int = 0
) -> list[Group]:
    """Make search trajectories of given lengths: actions and observations take turns.

    Their lengths are drawn like those of 625 real ones of R1-Searcher: actions of about 90 tokens,
    observations of 350 to 770, so that roughly a fifth of the tokens are actions.
    """
    rng = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocabulary), k=count))

    def make(number: int, length: int) -> Trajectory:
        segments = [Segment("prompt", some(min(200, length // 4)))]
        left = length - len(segments[0].tokens)
        while left:
            acts = min(left, max(10, round(rng.gauss(92, 30))))
            seen = 0 if left < acts + 800 else rng.randint(350, 770)
            if left < acts + 800:
                acts = left if left < 400 else acts
                seen = max(0, left - acts - 92) if acts < left else 0
            logprobs = tuple(rng.uniform(-1.1, -0.9) * math.log(vocabulary) for _ in range(acts))
            segments.append(Segment("action", some(acts), logprobs))
            if seen:
                segments.append(Segment("observation", some(seen)))
            left -= acts + seen
        episode, sample = divmod(number, samples)
        reward = rng.random()
        ended = reward_last_turn(segments, reward)
        return Trajectory(episode, sample, ended, reward, True, False)

    made = [make(number, length) for number, length in enumerate(lengths)]
    return [Group(i, made[i : i + samples]) for i in range(0, len(made), samples)]


def needed_flops(sizes: dict[str, int], groups: Sequence[Group]) -> tuple[float, float]:
    """FLOPs of an update that the mathematics needs, and by the other convention."""
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


def gradient(
    sizes: dict[str, int], device: str, groups: Sequence[Group], **settings: Any
) -> dict[str, torch.Tensor]:
    """The gradient of an update: AdamW's first moment, which forgets nothing at beta 0."""
    learner = Learner(
        make_model(sizes, device),
        GRPO(kl_coef=0.0),
        LearnerConfig(learning_rate=0.0, max_grad_norm=math.inf, betas=(0.0, 0.999), **settings),
    )
    learner.update(groups)
    return {name: m["exp_avg"] for name, m in learner.state_dict()["moments"].items()}


def agreement(
    ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Cosine, ratio of lengths, and length of the difference over that of the reference."""
    pairs = [(ours[name].double(), reference[name].double()) for name in reference]
    dot = sum(float((a * b).sum()) for a, b in pairs)
    mine, other, apart = (
        math.sqrt(sum(float(value.square().sum()) for value in values))
        for values in ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs])
    )
    return {"cosine": dot / mine / other, "norm": mine / other, "difference": apart / other}


def check_gradients(device: str, tiny: bool, say: Callable[[str], None]) -> bool:
    """Compare gradients with those of float32 rows, one trajectory a pass."""
    sizes, scale = (TINY, 8) if tiny else (SMALL, 1)
    rng = random.Random(1)
    lengths = [rng.randint(600, 4200) // scale for _ in range(12)]
    groups = make_groups(lengths, sizes["vocab_size"])
    exact = gradient(sizes, device, groups, micro_batch_tokens=1, packing="off")
    budget = 8192 // scale
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "float32 packed": ({"packing": "on"}, 1e-4),
        "bfloat16 rows": ({"packing": "off", "precision": "bfloat16"}, 0.1),
        "bfloat16 packed": ({"packing": "on", "precision": "bfloat16"}, 0.1),
        "bfloat16 packed checkpointed": (
            {"packing": "on", "precision": "bfloat16", "gradient_checkpointing": True},
            0.1,
        ),
        "bfloat16 packed compiled": (
            {"packing": "on", "precision": "bfloat16", "compile": True},
            0.1,
        ),
    }
    good = True
    for name, (settings, bound) in ways.items():
        try:
            got = gradient(sizes, device, groups, micro_batch_tokens=budget, **settings)
            numbers = agreement(got, exact)
            good &= (holds := numbers["difference"] <= bound)
            shown = " ".join(f"{key} {value:.7f}" for key, value in numbers.items())
            say(f"gradient, {name}: {shown} (difference at most {bound:g}: {holds})")
        except Exception as error:
            good = False
            say(f"gradient, {name}: failed, {_in_short(error)}")
        _free(device)
    return good


def measure(
    sizes: dict[str, int],
    device: str,
    groups: Sequence[Group],
    repeats: int,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Time updates of a fresh learner; the first, which compiles, is told apart."""
    learner = Learner(make_model(sizes, device), GRPO(kl_coef=0.0), LearnerConfig(**settings))

    def update() -> float:
        _wait(device)
        start = time.perf_counter()
        learner.update(groups)
        _wait(device)
        return time.perf_counter() - start

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = update()
    seconds = statistics.median(update() for _ in range(repeats))
    strict, loose = needed_flops(sizes, groups)
    tokens = sum(len(t.tokens) for group in groups for t in group.trajectories)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "first_seconds": first,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": strict / seconds / PEAK,
        "mfu_other_convention": loose / seconds / PEAK,
        "peak_gib": peak / 2**30,
    }


def mfu(device: str, *, tiny: bool = False, seconds: float = 330.0) -> dict[str, Any]:
    """Check gradients, then measure settings until the time is over, the likeliest best first."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    place = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    say(f"torch {torch.__version__} on {place}; {_version('transformers')}")
    scale = 64 if tiny else 1
    sizes = TINY if tiny else QWEN_1_5B
    long = make_groups([8192 // scale] * 16, sizes["vocab_size"])
    rng = random.Random(0)
    ragged_lengths = [
        min(8192, max(200, round(rng.lognormvariate(7.25, 0.35)))) // scale for _ in range(96)
    ]
    ragged = make_groups(ragged_lengths, sizes["vocab_size"], seed=1)
    every = [t for group in long for t in group.trajectories]
    actions = sum(t.num_action_tokens for t in every) / sum(len(t.tokens) for t in every)
    say(f"16 trajectories of {8192 // scale} tokens, {actions:.0%} of them actions")
    correct = check_gradients(device, tiny, say)

    half = {"precision": "bfloat16"}
    packed = {**half, "packing": "on", "compile": True}

    def of(settings: dict[str, Any], tokens: int) -> dict[str, Any]:
        return {**settings, "micro_batch_tokens": tokens // scale}

    rows_ = {**packed, "packing": "off"}
    checked = {**packed, "gradient_checkpointing": True}
    typical = "ragged (median 1.4k tokens)"
    ways: list[tuple[str, Sequence[Group], dict[str, Any], bool]] = [
        ("packed, compiled, 16k", long, of(packed, 16384), False),
        ("packed, compiled, 32k", long, of(packed, 32768), False),
        ("rows, compiled, cuDNN attention, 16k", long, of(rows_, 16384), True),
        ("packed, not compiled, 16k", long, of({**packed, "compile": False}, 16384), False),
        ("packed, compiled, checkpointed, 32k", long, of(checked, 32768), False),
        ("packed, compiled, 8k", long, of(packed, 8192), False),
        (f"{typical}: packed, compiled, 32k", ragged, of(packed, 32768), False),
        (f"{typical}: rows, compiled, 32k", ragged, of(rows_, 32768), False),
        ("rows, compiled, 16k", long, of(rows_, 16384), False),
        ("packed, compiled, 64k", long, of(packed, 65536), False),
    ]
    rows: list[dict[str, Any]] = []
    for name, groups, settings, cudnn in ways:
        if time.perf_counter() - start > seconds:
            say(f"{name}: left out, the time is over")
            continue
        try:
            with _attention(cudnn and device == "cuda"):
                row = measure(sizes, device, groups, 2, settings)
        except torch.OutOfMemoryError:
            say(f"{name}: out of memory")
        except Exception as error:
            say(f"{name}: failed, {_in_short(error)}")
        else:
            rows.append({"setting": name, **row})
            say(
                f"{name}: {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%} (other "
                f"convention {row['mfu_other_convention']:.1%}), {row['seconds']:.2f} s an update, "
                f"first {row['first_seconds']:.0f} s, peak {row['peak_gib']:.1f} GiB"
            )
        _free(device)
    if device == "cuda":
        try:
            table = profile(sizes, device, long, of(packed, 32768))
        except Exception as error:
            table = f"failed, {_in_short(error)}"
        say(f"kernels of packed, compiled, 32k: {table}")
    best = max((row["mfu"] for row in rows), default=0.0)
    say(f"gradients agree: {correct}; best MFU {best:.1%}; at least 40 %: {best >= TARGET_MFU}")
    return {"gradients_agree": correct, "rows": rows, "reached": best >= TARGET_MFU}


def profile(
    sizes: dict[str, int], device: str, groups: Sequence[Group], settings: dict[str, Any]
) -> str:
    """Table of the kernels of an update, those that take longest first."""
    from torch.profiler import ProfilerActivity  # noqa: PLC0415

    learner = Learner(make_model(sizes, device), GRPO(kl_coef=0.0), LearnerConfig(**settings))
    learner.update(groups[:2])
    _wait(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        start = time.perf_counter()
        learner.update(groups[:2])
        _wait(device)
        total = time.perf_counter() - start
    kernels = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:30]
    busy = sum(e.device_time_total for e in trace.key_averages()) / 1e6
    lines = [f"{busy:.3f} s of kernels in {total:.3f} s"]
    lines += [f"{e.device_time_total / 1e3:9.1f} ms {e.count:6d} x {e.key[:110]}" for e in kernels]
    return "\n".join(lines)


@contextmanager
def _attention(cudnn: bool) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

    if not cudnn:
        yield
        return
    both = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(both, set_priority=True):
        yield


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _free(device: str) -> None:
    gc.collect()
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _version(name: str) -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return f"{name} {version(name)}"


# ---------------------------------------------------------------------------------------------
# The race


COMPETITORS: dict[str, dict[str, Any]] = {
    "ours, defaults": {"system": "ours"},
    "ours, best": {"system": "ours", "packing": "on", "micro_batch_tokens": 2048},
    "ours, bfloat16": {"system": "ours", "packing": "on", "precision": "bfloat16"},
    "TRL, defaults": {"system": "trl", "per_device_train_batch_size": 8},
    **{
        f"TRL, float32, no checkpointing, batch {size}": {
            "system": "trl",
            "per_device_train_batch_size": size,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        for size in (1, 2, 4, 8, 16)
    },
}
RACE_SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
}
SAMPLES = 4
RATE = 1e-4


def real_groups(count: int, vocabulary: int, scale: float) -> list[Group]:
    """Make trajectories whose segments are as long as real ones of R1-Searcher, in tokens.

    Args:
        count: count of trajectories, in groups of ``SAMPLES``.
        vocabulary: tokens are drawn from it.
        scale: lengths are multiplied by this.

    Returns:
        The groups; without the data, lengths are drawn like theirs.
    """
    rng = random.Random(3)
    root = Path(os.environ.get("RESEARCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = root / "r1searcher_trajectories" / "hotpotqa_qwen.jsonl.gz"
    if not file.exists():
        lengths = [round(scale * rng.lognormvariate(7.25, 0.35)) for _ in range(count)]
        return make_groups(lengths, vocabulary, SAMPLES)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        every = [json.loads(line) for line in lines]

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(rng.choices(range(1, vocabulary), k=max(1, round(scale * len(text) / 4.3))))

    made = []
    for number, record in enumerate(rng.sample(every, count)):
        segments = [Segment("prompt", tokens(record["question"] * 3))]
        for segment in record["segments"]:
            if "action" in segment:
                sampled = tokens(segment["action"])
                segments.append(Segment("action", sampled, (-1.0,) * len(sampled)))
            else:
                segments.append(Segment("observation", tokens(segment["observation"])))
        episode, sample = divmod(number, SAMPLES)
        reward = float(sample == number // SAMPLES % SAMPLES) + 0.1 * rng.random()
        ended = reward_last_turn(segments, reward)
        made.append(Trajectory(episode, sample, ended, reward, True, False))
    return [Group(i, made[i : i + SAMPLES]) for i in range(0, count, SAMPLES)]


def _sampled_by(model: Any, groups: Sequence[Group]) -> list[Group]:
    """The same trajectories with the model's own log-probabilities, as a sampler reports them."""
    batch = make_batch(groups)
    found = iter(batch_logprobs(TokenLogprobs(model), batch, 4096).tolist())
    return [
        Group(
            group.episode,
            [
                replace(
                    t,
                    segments=tuple(
                        replace(s, logprobs=tuple(next(found) for _ in s.tokens))
                        if s.provenance == "action"
                        else s
                        for s in t.segments
                    ),
                )
                for t in group.trajectories
            ],
        )
        for group in groups
    ]


def race_alone(name: str, count: int, scale: float, updates: int, folder: Path) -> dict[str, Any]:
    """Run one competitor in this process; its weights after the first update go into a file."""
    settings = dict(COMPETITORS[name])
    model = make_model(RACE_SIZES, "cpu")
    groups = real_groups(count, RACE_SIZES["vocab_size"], scale)
    groups = _sampled_by(model, groups)
    run = _run_ours if settings.pop("system") == "ours" else _run_trl
    file = folder / f"{name}.pt"
    result = run(model, groups, updates, settings, file)
    tokens = sum(len(t.tokens) for group in groups for t in group.trajectories)
    times = result.pop("times")[1:]
    wall, cpu = (min(row[i] for row in times) for i in (0, 1))
    return {**result, "tokens": tokens, "seconds": wall, "cpu_seconds": cpu}


def _run_ours(
    model: Any, groups: list[Group], updates: int, settings: dict[str, Any], file: Path
) -> dict[str, Any]:
    rule = GRPO(kl_coef=0.0, entropy_coef=0.0, std_epsilon=1e-4)
    learner = Learner(model, rule, LearnerConfig(learning_rate=RATE, weight_decay=0.0, **settings))
    spent = _time_model_code(learner)
    memory = _peak_memory()
    times, reports = [], []
    inside = 0.0
    for number in range(updates):
        before, start = spent[0], (time.perf_counter(), time.process_time())
        reports.append(learner.update(groups))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        inside = spent[0] - before
        if number == 0:
            torch.save({n: w.clone() for n, w in learner.weights()}, file)
    return {
        "times": times,
        "loss": reports[0]["loss"],
        "grad_norm": reports[0]["grad_norm"],
        "outside": 1 - inside / times[-1][0],
        "memory_mib": memory(),
    }


def _time_model_code(learner: Learner) -> list[float]:
    """Count the seconds in forward and backward passes, clipping and optimizer steps."""
    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return run

    score: Any = learner._logprobs
    score.forward = timed(score.forward)
    torch.Tensor.backward = timed(torch.Tensor.backward)  # type: ignore[method-assign]
    torch.nn.utils.clip_grad_norm_ = timed(torch.nn.utils.clip_grad_norm_)
    learner._optimizer.step = timed(learner._optimizer.step)  # type: ignore[method-assign]
    return spent


def _numbers_tokenizer() -> Any:
    """A tokenizer whose words are the numbers of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    words = {f"t{i}": i for i in range(RACE_SIZES["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t0", pad_token="t0")


def _in_trls_form(played: Sequence[Trajectory]) -> dict[str, Any]:
    """Return trajectories as TRL's ``rollout_func`` does."""
    begins = [len(t.segments[0].tokens) for t in played]
    return {
        "prompt_ids": [list(t.segments[0].tokens) for t in played],
        "completion_ids": [t.tokens[b:] for t, b in zip(played, begins, strict=True)],
        "env_mask": [
            [int(m) for m in t.action_mask[b:]] for t, b in zip(played, begins, strict=True)
        ],
        "logprobs": [
            [p for s in t.segments[1:] for p in (s.logprobs or [0.0] * len(s.tokens))]
            for t in played
        ],
        "given": [t.reward for t in played],
    }


def _run_trl(
    model: Any, groups: list[Group], updates: int, settings: dict[str, Any], file: Path
) -> dict[str, Any]:
    import warnings  # noqa: PLC0415

    import trl  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415

    warnings.simplefilter("ignore")
    played = [t for group in groups for t in group.trajectories]
    times: list[tuple[float, float]] = []
    started: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            started.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wall, cpu = started[-1]
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
            if len(times) == 1:
                torch.save({n: p.detach().clone() for n, p in model.named_parameters()}, file)

    size = settings["per_device_train_batch_size"]
    peer: Any = trl
    trainer = peer.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, given, **_: given,
        args=peer.GRPOConfig(
            output_dir=str(file.with_suffix("")),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            max_steps=updates,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            num_generations=SAMPLES,
            gradient_accumulation_steps=len(played) // size,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(groups))]),
        processing_class=_numbers_tokenizer(),
        rollout_func=lambda prompts, trainer: _in_trls_form(played),
        callbacks=[Clock()],
    )
    memory = _peak_memory()
    trainer.train()
    log = trainer.state.log_history[0]
    return {
        "times": times,
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
        "memory_mib": memory(),
    }


def _peak_memory() -> Callable[[], float]:
    """Start to watch this process; the result says by how many MiB it grew at most since."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(key: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    before = read("VmRSS")
    return lambda: read("VmHWM") - before


def race(count: int, scale: float, updates: int, rounds: int) -> dict[str, Any]:
    """Run all competitors, each in a process of its own, in turn; take the best round of each."""
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in COMPETITORS:
                words = [name, str(count), str(scale), str(updates), folder]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.learner", "--alone", *words],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
                if number and row["cpu_seconds"] > rows[name]["cpu_seconds"]:
                    row |= {k: rows[name][k] for k in ("seconds", "cpu_seconds")}
                rows[name] = row
                print(
                    f"{name:42}{row['tokens'] / row['seconds']:9.0f} tokens/s"
                    f"{row['cpu_seconds']:8.2f} s of CPU{row['memory_mib']:9.0f} MiB",
                    flush=True,
                )
        start = make_model(RACE_SIZES, "cpu").state_dict()
        moved = {
            name: {n: w - start[n] for n, w in torch.load(Path(folder) / f"{name}.pt").items()}
            for name in rows
        }
    theirs = {n: r for n, r in rows.items() if n.startswith("TRL, float32")}
    best = min(theirs, key=lambda n: theirs[n]["cpu_seconds"])
    same = {
        "loss": abs(rows["ours, best"]["loss"] - rows[best]["loss"]),
        "grad_norm": abs(rows["ours, best"]["grad_norm"] / rows[best]["grad_norm"] - 1),
        "step": agreement(moved["ours, best"], moved[best])["difference"],
    }

    def ratio(ours: str, other: str, key: str) -> float:
        return float(rows[other][key] / rows[ours][key])

    pairs = {
        "TRL's defaults": ("ours, defaults", "TRL, defaults"),
        "TRL's best": ("ours, best", best),
    }
    return {
        "rows": rows,
        "trl_best": best,
        "differences_after_one_step": same,
        "same": same["loss"] < 1e-5 and same["grad_norm"] < 1e-4 and same["step"] < 1e-2,
        "speed": {
            k: {key: ratio(*pair, key) for key in ("seconds", "cpu_seconds")}
            for k, pair in pairs.items()
        },
        "memory": {k: 1 / ratio(*pair, "memory_mib") for k, pair in pairs.items()},
        "outside_model_code": rows["ours, best"]["outside"],
    }


def head_memory(whole: bool) -> dict[str, float]:
    """Grow by the log-probabilities of 2,000 action tokens, vocabulary 150,000, with gradient."""
    words, tokens = 150_000, 2_000
    model = make_model({**TINY, "vocab_size": words}, "cpu")
    rng = random.Random(0)
    sampled = tuple(rng.choices(range(words), k=tokens))
    segments = (Segment("prompt", (1,)), Segment("action", sampled, (-1.0,) * tokens))
    batch = make_batch([Group(0, [Trajectory(0, 0, segments, 0.0, True, False)])])
    (micro,) = micro_batches(batch, 10**6)
    grown = _peak_memory()
    logprobs, entropy = token_logprobs(model, micro, max_logits=words * tokens if whole else None)
    torch.autograd.backward(logprobs.sum() + entropy.sum())
    return {"matrix_mib": 4 * words * tokens / 2**20, "grown_mib": grown()}


def main() -> None:
    """Print what was measured, or write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mfu", action="store_true", help="model FLOP utilization, on a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--seconds", type=float, default=330, help="start no setting after these")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--trajectories", type=int, default=16, help="trajectories of the race")
    parser.add_argument("--scale", type=float, default=1.0, help="scales their lengths")
    parser.add_argument(
        "--steps", type=int, default=3, help="updates per competitor; the first is warm-up"
    )
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the race")
    parser.add_argument(
        "--head-memory", choices=["whole", "pieces"], help="memory of a large head, by its logits"
    )
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        name, count, scale, updates, folder = arguments.alone
        row = race_alone(name, int(count), float(scale), int(updates), Path(folder))
        print(json.dumps(row))
        return
    if arguments.head_memory:
        print(json.dumps(head_memory(arguments.head_memory == "whole")))
        return
    if arguments.mfu:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = mfu(device, tiny=arguments.tiny, seconds=arguments.seconds)
    else:
        result = race(arguments.trajectories, arguments.scale, arguments.steps, arguments.rounds)
        print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
