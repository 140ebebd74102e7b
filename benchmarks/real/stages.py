"""The stages: a command each, and how to see that it is finished."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from research_agent.errors import ConfigError

ENV = "research_env:SearchQA-v0"
BLANKED = "benchmarks.blanked:Blanked-SearchQA-v0"  # results without text
AGENT, PAPER_TABLE = "research-agent", "python -m benchmarks.paper_table"
TRAINED_ON, HELD_OUT = ("hotpotqa", "2wiki"), "musique"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is demonstrated, trained and evaluated; the rest is as in the presets."""

    questions: int  # per data set, in each evaluation
    demonstrations: int  # per part of the warm start
    parts: int  # stages of the warm start
    batch: int  # demonstrations per optimizer step
    sft_micro_batch_tokens: int  # per pass of the warm start, padding included
    steps: int  # GRPO training steps
    prompts_per_step: int
    group_size: int
    lora_rank: int
    eval_every: int
    max_response: int
    max_turn_tokens: int
    max_in_flight: int
    micro_batch_tokens: int
    total_seconds: float | None = None  # the time for all stages; GRPO gets what others leave


CPU = Scale(
    questions=100,
    demonstrations=400,
    parts=2,
    batch=8,
    sft_micro_batch_tokens=512,
    steps=60,
    prompts_per_step=4,
    group_size=8,
    lora_rank=16,
    eval_every=5,
    max_response=1536,
    max_turn_tokens=192,
    max_in_flight=32,
    micro_batch_tokens=2048,
)
GPU = replace(
    CPU,
    questions=250,
    demonstrations=1200,
    parts=1,
    batch=16,
    sft_micro_batch_tokens=8192,
    prompts_per_step=32,
    eval_every=20,
    max_in_flight=256,
    total_seconds=720.0,
    micro_batch_tokens=65536,
)
TINY: dict[str, Any] = {
    "questions": 4,
    "demonstrations": 8,
    "batch": 4,
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "lora_rank": 2,
    "eval_every": 1,
    "max_response": 160,
    "max_turn_tokens": 24,
    "max_in_flight": 8,
}


RESERVE, LEAST_GRPO = 90.0, 60.0
"""Seconds for what no stage counts (speed, a last step that goes on), and for GRPO in any case."""


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
    """Sizes for one GPU. GRPO gets the time that the other stages leave of twelve minutes; nobody
    has measured on an H200 how much that is. With --tiny the commands of a GPU are tried in
    miniature, on a CPU if there is no GPU."""
    until: str | None = None
    """Stop after this stage, such as zero-shot or warm-start; none runs all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of sampling and of the matrix products of learning. bfloat16 is two to four
    times as fast on some CPUs that have instructions for it (avx512_bf16 or amx_bf16 in lscpu), and
    slower than float32 on others; speed.json in the output folder says how fast this one is."""
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

    @property
    def device(self) -> str:
        """Where models live."""
        if self.gpu:
            return "auto" if self.tiny else "cuda"
        return "cpu"

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The number format: ``precision`` on a CPU, bfloat16 on a GPU."""
        return "bfloat16" if self.gpu else self.precision


@dataclass(frozen=True, slots=True)
class Stage:
    """One command, and how to see that it is finished."""

    name: str
    program: str  # AGENT or PAPER_TABLE
    words: tuple[str, ...]  # arguments of the program
    done: Callable[[], bool]


def scale_of(config: RealConfig) -> Scale:
    """The sizes that suit the machine, but for those that the configuration gives."""
    scale = replace(GPU if config.gpu else CPU, **(TINY if config.tiny else {}))
    given = {n: getattr(config, n) for n in ("questions", "demonstrations", "steps")}
    return replace(scale, **{name: value for name, value in given.items() if value is not None})


def plan(config: RealConfig, scale: Scale, model: str) -> list[Stage]:
    """List the stages in order. The time limit of GRPO depends on those that are over.

    Args:
        config: output folder, engine, retriever and number format.
        scale: the sizes, from ``scale_of``.
        model: the untrained model. That of ``--tiny`` follows no instructions, so its plan lacks
            the papers' table.
    """
    output, instruct = config.output, not config.tiny
    stages = [_table(config, scale, "zero-shot", model)] if instruct else []
    start = model
    for part in range(scale.parts):
        folder = output / f"warm-start-{part + 1}"
        stages.append(_warm_start(config, scale, start, folder, part))
        start = str(folder)
    stages += _evaluations(config, scale, "before", start)
    stages.append(_grpo(config, scale, start))
    trained = str(output / "grpo")
    stages += _evaluations(config, scale, "after", trained)
    stages += _evaluations(config, scale, "blanked", trained, env=BLANKED)
    return [*stages, _table(config, scale, "trained", trained)] if instruct else stages


def _flags(**values: object) -> list[str]:
    """Flags with their values, as they are typed; one without a value (None) is left out."""
    given = {name: value for name, value in values.items() if value is not None}
    return [word for name in given for word in (f"--{name.replace('_', '-')}", str(given[name]))]


def _table(config: RealConfig, scale: Scale, name: str, model: str) -> Stage:
    """The five methods of the papers' table, with the papers' prompts."""
    folder = config.output / name
    words = ["--models", f"smollm2-instruct={model}", "--datasets", *TRAINED_ON, HELD_OUT]
    words += _flags(
        split="dev",
        limit=scale.questions,
        top_k=2,
        max_prompt=2048,
        max_response=1024,
        max_turn_tokens=96,
        max_in_flight=scale.max_in_flight,
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        engine=config.engine,
        output=folder,
        retriever=config.retriever,
    )
    return Stage(name, PAPER_TABLE, tuple(words), (folder / "table.json").is_file)


def _warm_start(config: RealConfig, scale: Scale, model: str, folder: Path, part: int) -> Stage:
    flags = _flags(
        model=model,
        output=folder,
        count=scale.demonstrations,
        batch=scale.batch,
        micro_batch_tokens=scale.sft_micro_batch_tokens,
        warmup_steps=5,
        seed=1000 * config.seed + part,
        precision=config.dtype,
    )
    words = ("sft", "smollm2-wiki", "--quiet", *flags)
    name = "warm-start" if part == scale.parts - 1 else f"warm-start-{part + 1}"
    return Stage(name, AGENT, words, (folder / "model.safetensors").is_file)


def _grpo_seconds(config: RealConfig, scale: Scale) -> float | None:
    """What the other stages leave of the time for all.

    Those after GRPO, the table again and every evaluation twice, take as long as those before it.
    """
    if scale.total_seconds is None:
        return None
    times = {"zero-shot": 2, "warm-start": 1, "before": 3}
    others = sum(
        seconds * number
        for stage, seconds in seconds_by_stage(config.output).items()
        for prefix, number in times.items()
        if stage.startswith(prefix)
    )
    return max(scale.total_seconds - others - RESERVE, LEAST_GRPO)


def _grpo(config: RealConfig, scale: Scale, model: str) -> Stage:
    folder, limit = config.output / "grpo", _grpo_seconds(config, scale)
    flags = _flags(
        model=model,
        output=folder,
        steps=scale.steps,
        seed=config.seed,
        device=config.device,
        prompts_per_step=scale.prompts_per_step,
        group_size=scale.group_size,
        max_response=scale.max_response,
        max_turn_tokens=scale.max_turn_tokens,
        lora_rank=scale.lora_rank,
        eval_every=scale.eval_every,
        eval_limit=scale.questions,
        save_every=5,
        precision=config.dtype,
        engine=config.engine,
        micro_batch_tokens=scale.micro_batch_tokens,
        time_limit=limit,
    )

    def done() -> bool:
        from research_agent import checkpoint  # noqa: PLC0415
        from research_agent.run_logger import read_lines  # noqa: PLC0415

        newest = checkpoint.latest(folder / "checkpoints")
        if newest is None:
            return False
        # A step is logged before it is saved: one without a checkpoint is made again.
        step = int(newest.name.removeprefix("step-"))
        spent = [r["seconds"] for r in read_lines(folder / "timings.jsonl") if r["step"] <= step]
        return step >= scale.steps or bool(limit and spent and spent[-1] >= limit)

    return Stage("grpo", AGENT, ("train", "smollm2-wiki", *flags), done)


def _evaluations(
    config: RealConfig, scale: Scale, name: str, model: str, *, env: str = ENV
) -> Iterator[Stage]:
    """An evaluation of each data set, of which the last was not trained on."""
    for dataset in (*TRAINED_ON, HELD_OUT):
        folder = config.output / name / dataset
        words = ["eval", "--env", env, "--quiet"]
        words += ["--env-args", f"dataset={dataset}", "split=dev", "template=question", "top_k=2"]
        words += ["max_passage_chars=600", "max_searches=4"]
        if config.retriever is not None:
            words += [f"retriever={config.retriever.replace('{dataset}', dataset)}"]
        words += _flags(
            model=model,
            output=folder,
            limit=scale.questions,
            seed=config.seed,
            device=config.device,
            max_prompt=256,
            max_response=scale.max_response,
            max_turn_tokens=scale.max_turn_tokens,
            max_in_flight=scale.max_in_flight,
            dtype=config.dtype,
            engine=config.engine,
        )
        yield Stage(f"{name}-{dataset}", AGENT, tuple(words), (folder / "summary.json").is_file)


def seconds_by_stage(output: Path) -> Counter[str]:
    """How long the stages of a run have taken so far, those that were stopped included."""
    seconds: Counter[str] = Counter()
    log = output / "seconds.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        record = json.loads(line)
        seconds[record["stage"]] += record["seconds"]
    return seconds


def run_stage(stage: Stage, output: Path) -> None:
    """Run a command in this process, as the shell would, and note how long it took.

    Args:
        stage: its command is printed first.
        output: folder of the run; a record ``{"stage": name, "seconds": seconds}`` is appended to
            its seconds.jsonl, also for a command that is stopped or fails.

    Raises:
        ConfigError: the command failed.
        KeyboardInterrupt: the command was stopped by a signal.
    """
    from benchmarks import paper_table  # noqa: PLC0415
    from research_agent import cli  # noqa: PLC0415

    print(f"\n$ {stage.program} {' '.join(stage.words)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        (cli.main if stage.program == AGENT else paper_table.main)(list(stage.words))
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            raise KeyboardInterrupt from None
        if error.code:
            message = f"the stage {stage.name} failed, as said above; the same command continues it"
            raise ConfigError(message) from None
    finally:
        record = {"stage": stage.name, "seconds": round(time.perf_counter() - start, 1)}
        with (output / "seconds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
