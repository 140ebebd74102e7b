"""Doing the runs: worlds, what runs begin with, training, and an evaluation in both worlds."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs

from benchmarks.ablations.registry import GRPO, STARTER, Arm
from benchmarks.runs import is_finished as has_all_steps
from benchmarks.runs import training_process
from research_agent.config import (
    AlgorithmConfig,
    EnvironmentConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
    as_json,
)
from research_agent.config_changes import changes
from research_agent.config_changes import require_same as require_same_training
from research_agent.errors import ConfigError
from research_agent.presets import PRESETS
from research_agent.system.files import write_atomic
from research_env.datasets import miniworld, miniworld_hard
from research_env.datasets.files import question_record

MINIWORLD = PRESETS["miniworld"]

ENV, NOISY = "research_env:SearchQA-v0", "benchmarks.ablations.noise:NoisySearchQA-v0"
# Seed, and relations of which the world has no facts: a shorter passage is harder to read for the
# starter, and out of domain are relations that training never met.
WORLDS = {
    "in": (0, {"spouse", "writer", "chair", "twin", "poet"}),
    "out": (1, {"employer", "studio", "seat", "architect", "ally"}),
}
HARD, DIFFICULTY = "hard", 1  # a world of its own, with all relations
HARD_RESPONSE = 640  # tokens: six searches and more
QUESTIONS = {"train": 4000, "dev": 400}
SLOTS = 128  # episodes of an evaluation that are played at the same time
EPOCHS = 3  # passes of SFT over right episodes
STARTS: dict[str, dict[str, Any]] = {  # what the starter is shown, and how it learns
    "warm": {
        "demonstration_args": {"top_k": 1, "habit_share": 0.0},
        "count": 600,
        "learning_rate": 1e-4,
    },
    "verbose": {  # a new habit takes more than a stronger one
        "demonstrations": "benchmarks.ablations.verbose_starter:demonstrations",
        "demonstration_args": {"top_k": 1},
        "count": 3000,
        "learning_rate": 5e-4,
    },
}
GRADED, GRADE_SAMPLES, GRADER_SEED = 1600, 4, 1000


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    output: Path
    steps: int
    prompts_per_step: int
    group_size: int
    questions: int  # held-out ones of an evaluation
    device: str = "cpu"

    @property
    def prepared(self) -> Path:
        """Folder of what several runs begin with."""
        return self.output / "prepared"


# --- what a run is --------------------------------------------------------------------------------


def folder_of(settings: Settings, arm: Arm, seed: int) -> Path:
    """Where a run is kept."""
    name = arm.name.replace(", ", "-").replace(" = ", "").replace(" ", "-")
    return settings.output / "runs" / name / f"seed-{seed}"


def worlds_of(arm: Arm) -> tuple[str, ...]:
    """The worlds that a run is evaluated in; it is trained in the first."""
    return (HARD,) if arm.hard else tuple(WORLDS)


def sampling_of(arm: Arm) -> SamplingConfig:
    """How a run's episodes are played, but for the number of them."""
    limits: dict[str, Any] = {"max_response": HARD_RESPONSE} if arm.hard else {}
    return replace(MINIWORLD.sampling, **limits)


def world_of(settings: Settings, name: str) -> dict[str, Any]:
    """Arguments of the environment for one of the worlds."""
    place = settings.output / "worlds" / name
    return {
        "questions": str(place / "questions.jsonl"),
        "corpus": str(place / "corpus.jsonl"),
        "template": "question",
        "top_k": 1,
    }


def training_of(settings: Settings, arm: Arm, seed: int) -> TrainConfig:
    """The whole configuration of a run; of SFT the one whose episodes it plays as many as."""
    samples = arm.group_size or settings.group_size
    episodes = (
        settings.prompts_per_step * settings.group_size
    )  # a step has as many, however large a group is
    graded: dict[str, Any] = {}
    if arm.grade is not None:
        graded = {"grades": str(settings.prepared / "grades.jsonl"), "grade": arm.grade}
    part = max(1, settings.steps // 3)
    return replace(
        MINIWORLD,
        preset="",
        environment=EnvironmentConfig(
            env=NOISY if arm.miss else ENV,
            env_args={
                **world_of(settings, worlds_of(arm)[0]),
                "split": "train",
                **({"miss": arm.miss} if arm.miss else {}),
                **graded,
                **arm.env_args,
            },
        ),
        policy=replace(
            MINIWORLD.policy,
            model=STARTER if arm.start == "starter" else str(settings.prepared / arm.start),
            device=settings.device,
        ),
        sampling=sampling_of(arm),
        rollout=RolloutConfig(
            prompts_per_step=max(1, episodes // samples),
            group_size=samples,
            stages=tuple(stage.format(part=part) for stage in arm.stages),
            **arm.rollout,
        ),
        algorithm=AlgorithmConfig(algorithm=arm.algorithm, algorithm_args=dict(arm.args)),
        learner=replace(MINIWORLD.learner, **arm.learner),
        run=replace(
            MINIWORLD.run,
            seed=seed,
            steps=settings.steps,
            output=folder_of(settings, arm, seed),
            save_every=10,
            eval_every=max(1, settings.steps // 6),
            eval_limit=settings.questions,
            eval_temperature=1.0,
            eval_args={"split": "dev", **dict.fromkeys(graded)},
            log_episodes=1,
            quiet=True,
        ),
    )


def is_finished(settings: Settings, arm: Arm, seed: int) -> bool:
    """Whether a run has its result, from as many held-out questions.

    Raises:
        CheckpointError: it has the result of another configuration.
    """
    folder = folder_of(settings, arm, seed)
    result = read_result(folder)
    if not result:
        return False
    require_same_training(changes(result["training"], training_of(settings, arm, seed)), folder)
    return bool(result["questions"] == settings.questions)


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run came to; empty before its end."""
    path = folder / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


# --- what runs begin with -------------------------------------------------------------------------


def claim_folder(settings: Settings) -> None:
    """Note the settings that all runs of the folder share; make it where it is missing.

    Raises:
        ConfigError: its runs have others. Stages and grades follow from the number of steps, so
            that a finished run is not simply one of more steps cut short.
    """
    path = settings.output / "settings.json"
    ours = {name: getattr(settings, name) for name in ("steps", "prompts_per_step", "group_size")}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ConfigError(
                f"{settings.output} holds runs with {theirs}, not {ours}; give another --output"
            )
        return
    settings.output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(ours) + "\n")


def write_worlds(settings: Settings, names: Iterable[str] = WORLDS) -> None:
    """Write questions and passages of worlds, where they are not yet there."""
    for name in names:
        place = settings.output / "worlds" / name
        if not place.exists():
            _whole(place, partial(_write_world, name))


def _write_world(name: str, folder: Path) -> None:
    if name == HARD:
        asked = [
            question_record(question)
            for split in QUESTIONS
            for question in miniworld_hard.load(split, 0, DIFFICULTY).questions
        ]
        _write_lines(folder / "questions.jsonl", asked)
        hard = miniworld_hard.world(0, DIFFICULTY)
        _write_lines(folder / "corpus.jsonl", map(structs.asdict, hard))
        return
    seed, left_out = WORLDS[name]
    known = {each.name for possible in miniworld.RELATIONS.values() for each in possible}
    world = miniworld.world(seed, known - left_out)
    rng = random.Random(f"studies {seed}")
    drawn = miniworld.questions(world, rng, sum(QUESTIONS.values()))
    questions = [
        {**question_record(question), "id": f"{seed}-{split}-{i}", "split": split}
        for split, count in QUESTIONS.items()
        for i, question in zip(range(count), drawn, strict=False)
    ]
    _write_lines(folder / "questions.jsonl", questions)
    _write_lines(folder / "corpus.jsonl", map(structs.asdict, world))


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def _whole(place: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place, and move it there when it is whole."""
    temporary = place.with_name(f"{place.name}.tmp")
    write(temporary)
    temporary.rename(place)


def missing(settings: Settings, arms: Iterable[Arm]) -> list[str]:
    """What arms begin with that has not been prepared: names for ``prepare``."""
    named = {"grades.jsonl" if arm.grade else arm.start for arm in arms} - {"starter"}
    return sorted(name for name in named if not (settings.prepared / name).exists())


def prepare(settings: Settings, name: str) -> str:
    """Make what arms begin with, in a process of its own: a model, or the file of grades."""
    with training_process():
        return _grades(settings) if name == "grades.jsonl" else _model(settings, name)


def _model(settings: Settings, name: str) -> str:
    """``nothing``: new weights, after one small step. Others: a starter that was shown more."""
    from research_agent import sft  # noqa: PLC0415

    own = replace(sft.PRESETS["miniworld"], quiet=True)
    if name == "nothing":
        own = replace(own, count=own.batch)
    else:
        own = replace(own, model=STARTER, vocabulary=None, warmup_steps=10, **STARTS[name])
    _whole(settings.prepared / name, lambda at: sft.run(replace(own, output=at)))
    return f"{own.count} demonstrations"


def _grades(settings: Settings) -> str:
    """Grade training questions by samples of a policy with half of the training."""
    from research_agent.evaluation.difficulty import write_grades  # noqa: PLC0415
    from research_agent.trainer import train  # noqa: PLC0415

    training = training_of(settings, GRPO, GRADER_SEED)
    steps, output = max(1, settings.steps // 2), settings.prepared / "grader"
    run = replace(training.run, steps=steps, output=output, eval_every=None)
    _require_end(train(replace(training, run=run)))
    played = settings.prepared / "graded"
    play(
        settings,
        str(output),
        training.environment.env_args,
        played,
        temperature=1.0,
        limit=GRADED,
        samples_per_task=GRADE_SAMPLES,
        seed=GRADER_SEED,
    )
    counts = write_grades(played, settings.prepared / "grades.jsonl")
    return ", ".join(f"{counts[grade]} {grade}" for grade in ("easy", "medium", "hard"))


# --- runs -----------------------------------------------------------------------------------------


def do(settings: Settings, arm: Arm, seed: int) -> str:
    """Train and evaluate in the worlds of a run, in a process of its own; says how it went."""
    folder = folder_of(settings, arm, seed)
    with training_process(masked=arm.masked):
        learn = _by_sft if arm.by == "sft" else _by_rl
        model, seconds = learn(settings, arm, seed)
        final = {
            world: play(
                settings,
                model,
                {**world_of(settings, world), "split": "dev"},
                folder / "final" / world,
                limit=settings.questions,
                seed=seed,
                sampling=sampling_of(arm),
            )
            for world in worlds_of(arm)
        }
    result = {
        "questions": settings.questions,
        "seconds": seconds,
        "final": final,
        "training": as_json(training_of(settings, arm, seed)),
    }
    write_atomic(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return ", ".join(f"exact match {final[world]['em']:.2f} {world}" for world in final)


def _by_rl(settings: Settings, arm: Arm, seed: int) -> tuple[str, float]:
    """Reinforcement learning; returns the model and the seconds of training."""
    from research_agent.trainer import train  # noqa: PLC0415

    training = training_of(settings, arm, seed)
    summary = train(training)
    _require_end(summary)
    if not has_all_steps(training.run.output, settings.steps):
        raise RuntimeError(summary.message)
    return str(training.run.output), float(summary.numbers["seconds of training"])


def _by_sft(settings: Settings, arm: Arm, seed: int) -> tuple[str, float]:
    """Rejection sampling: play as many episodes as the others, learn those that are right."""
    from research_agent import sft  # noqa: PLC0415
    from research_agent.evaluation.difficulty import write_demonstrations  # noqa: PLC0415
    from research_env.datasets import load_dataset  # noqa: PLC0415

    training, start = training_of(settings, arm, seed), time.perf_counter()
    folder, args = training.run.output, training.environment.env_args
    asked = load_dataset("custom", split="train", questions=args["questions"]).questions
    tasks = min(settings.steps * settings.prompts_per_step, len(asked))
    play(
        settings,
        training.policy.model,
        args,
        folder / "played",
        temperature=1.0,
        limit=tasks,
        samples_per_task=math.ceil(
            settings.steps * settings.prompts_per_step * settings.group_size / tasks
        ),
        seed=seed,
    )
    demonstrations = folder / "demonstrations.jsonl"
    kept, _ = write_demonstrations(folder / "played", demonstrations, each=10**6)
    own = sft.PRESETS["own"]
    model = sft.run(
        replace(
            own,
            demonstrations=str(demonstrations),
            model=training.policy.model,
            count=max(own.batch, EPOCHS * kept),
            seed=seed,
            output=folder / "model",
            threads=1,
            quiet=True,
        )
    )
    return str(model), time.perf_counter() - start


def _require_end(summary: Any) -> None:
    if summary.signal:
        raise RuntimeError(summary.message)


def play(
    settings: Settings,
    model: str,
    env_args: Mapping[str, Any],
    output: Path,
    *,
    temperature: float = 0.0,
    limit: int,
    samples_per_task: int = 1,
    seed: int,
    sampling: SamplingConfig = MINIWORLD.sampling,
) -> dict[str, float]:
    """Play questions with a model; predictions are in the output folder.

    Returns:
        Means of the environment's metrics, of ``tokens`` (of actions) and ``turns``, and
        ``answer words``, the mean number of words of the predictions.
    """
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.environments import open_environments  # noqa: PLC0415
    from research_agent.evaluation.evaluate import evaluate  # noqa: PLC0415
    from research_agent.evaluation.predictions import read_predictions  # noqa: PLC0415
    from research_agent.models.policy import context_length, load_model  # noqa: PLC0415
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415 - loads torch

    sampling = replace(sampling, temperature=temperature)
    policy = load_model(model, device=settings.device)
    context = context_length(policy, sampling.max_prompt + sampling.max_response)
    engine = make_engine(
        "transformers",
        policy,
        load_renderer(resolve_model(model)),
        max_slots=SLOTS,
        max_context=context,
    )
    environments = open_environments(ENV, SLOTS, env_args)
    try:
        summary = evaluate(
            engine,
            environments,
            load_renderer(resolve_model(model)),
            sampling,
            output,
            limit=limit,
            samples_per_task=samples_per_task,
            seed=seed,
            show=False,
        )
    finally:
        environments.close()
    _, records = read_predictions(output)
    words = [len(str(record["info"].get("prediction", "")).split()) for record in records]
    return {
        **summary.metrics,
        "reward": summary.reward,
        "answer words": statistics.fmean(words) if words else 0.0,
    }
