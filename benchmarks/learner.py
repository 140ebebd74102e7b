"""What an update of the weights costs on the CPU, beside TRL's GRPOTrainer.

``python -m benchmarks.learner [--trajectories N] [--scale S] [--steps N] [--rounds N]``

TRL gets the same trajectories through its ``rollout_func``: GRPO without KL, AdamW, segments as
long as those of real searches, a model whose head is a fifth of it, as in Qwen2.5-1.5B. Every
competitor has a process of its own. After one update loss, gradient norm and step must be the same.
"TRL's defaults" are those for number format (bf16), checkpointing (on) and batch size (8), against
our defaults (float32); "TRL's best" is the quickest of five batch sizes in float32 without
checkpointing, against our best.

``python -m benchmarks.learner --head-memory whole|pieces``: what the log-probabilities of a
vocabulary of 150,000 need, with the logits whole and in pieces.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.recorded import read_trajectories
from benchmarks.synthetic import TINY, make_groups, make_model, reward_last_turn
from research_agent.algorithms.grpo import GRPO
from research_agent.batch import make_batch, micro_batches
from research_agent.config import LearnerConfig
from research_agent.learner import Learner
from research_agent.models.policy import TokenLogprobs, batch_logprobs, token_logprobs
from research_agent.trajectory import Group, Segment, Trajectory
from research_env.errors import DataNotFoundError

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
        count: number of trajectories, in groups of ``SAMPLES``.
        vocabulary: tokens are drawn from it.
        scale: lengths are multiplied by this.

    Returns:
        The groups. Where ``RESEARCH_DATA`` has no recordings, lengths are drawn like theirs.
    """
    rng = random.Random(3)
    try:
        every = [each for each in read_trajectories() if each.dataset == "HotpotQA"]
    except DataNotFoundError:
        lengths = [round(scale * rng.lognormvariate(7.25, 0.35)) for _ in range(count)]
        return make_groups(lengths, vocabulary, SAMPLES)

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(rng.choices(range(1, vocabulary), k=max(1, round(scale * len(text) / 4.3))))

    made = []
    for number, recorded in enumerate(rng.sample(every, count)):
        segments = [Segment("prompt", tokens(recorded.question * 3))]
        for action, observation in zip_longest(recorded.actions, recorded.observations):
            sampled = tokens(action)
            segments.append(Segment("action", sampled, (-1.0,) * len(sampled)))
            if observation is not None:
                segments.append(Segment("observation", tokens(observation)))
        episode, sample = divmod(number, SAMPLES)
        reward = float(sample == number // SAMPLES % SAMPLES) + 0.1 * rng.random()
        ended = reward_last_turn(segments, reward)
        made.append(Trajectory(episode, sample, ended, reward, True, False))
    return [Group(i, made[i : i + SAMPLES]) for i in range(0, count, SAMPLES)]


def _sampled_by(model: Any, groups: Sequence[Group]) -> list[Group]:
    """The same trajectories with the model's own log-probabilities, as a sampler reports them."""
    found = iter(batch_logprobs(TokenLogprobs(model), make_batch(groups), 4096).tolist())

    def scored(segment: Segment) -> Segment:
        if segment.provenance != "action":
            return segment
        return replace(segment, logprobs=tuple(next(found) for _ in segment.tokens))

    return [
        replace(
            group,
            trajectories=[
                replace(t, segments=tuple(map(scored, t.segments))) for t in group.trajectories
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


def difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two sets of tensors, over the length of the reference."""
    pairs = [(ours[name].double(), reference[name].double()) for name in reference]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(b.square().sum()) for _, b in pairs))


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
        "step": difference(moved["ours, best"], moved[best]),
    }

    def ratio(ours: str, other: str, key: str) -> float:
        return float(rows[other][key] / rows[ours][key])

    pairs = {
        "TRL's defaults": ("ours, defaults", "TRL, defaults"),
        "TRL's best": ("ours, best", best),
    }
    return {
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
    """Print what was measured, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    result = race(arguments.trajectories, arguments.scale, arguments.steps, arguments.rounds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
