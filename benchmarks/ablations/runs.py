"""The runs: what each is, training, and an evaluation in its worlds."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ablations.registry import STARTER, Arm
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
from research_agent.presets import PRESETS
from research_agent.system.files import write_atomic

MINIWORLD = PRESETS["miniworld"]

ENV, NOISY = "research_env:SearchQA-v0", "benchmarks.ablations.noise:NoisySearchQA-v0"
# Each world's seed, and the relations that it has no facts of. Shorter passages are harder to read
# for the starter, and the world out of domain has relations that training never met.
WORLDS = {
    "in": (0, {"spouse", "writer", "chair", "twin", "poet"}),
    "out": (1, {"employer", "studio", "seat", "architect", "ally"}),
}
HARD, DIFFICULTY = "hard", 1  # a world of its own, with all relations
HARD_RESPONSE = 640  # tokens: six searches and more
SLOTS = 128  # episodes that an evaluation plays at the same time
EPOCHS = 3  # passes of SFT over the right episodes


@dataclass(frozen=True)
class Settings:
    """What all runs of an output folder have in common."""

    output: Path
    steps: int
    prompts_per_step: int
    group_size: int
    questions: int  # held-out questions per evaluation
    device: str = "cpu"

    @property
    def prepared(self) -> Path:
        """Folder of the models and grades that runs begin with."""
        return self.output / "prepared"


# --- what a run is --------------------------------------------------------------------------------


def folder_of(settings: Settings, arm: Arm, seed: int) -> Path:
    """Folder of a run."""
    name = arm.name.replace(", ", "-").replace(" = ", "").replace(" ", "-")
    return settings.output / "runs" / name / f"seed-{seed}"


def worlds_of(arm: Arm) -> tuple[str, ...]:
    """The worlds that a run is evaluated in; it is trained in the first."""
    return (HARD,) if arm.hard else tuple(WORLDS)


def sampling_of(arm: Arm) -> SamplingConfig:
    """Temperature and limits of a run's episodes."""
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
    """The configuration of a training run; one of SFT plays as many episodes as this run would.

    A step has the same number of episodes, however large its groups are.
    """
    samples = arm.group_size or settings.group_size
    episodes = settings.prompts_per_step * settings.group_size
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
    """Whether a run has a result, measured with the number of questions that is asked for.

    Raises:
        CheckpointError: the result is that of another configuration.
    """
    folder = folder_of(settings, arm, seed)
    result = read_result(folder)
    if not result:
        return False
    require_same_training(changes(result["training"], training_of(settings, arm, seed)), folder)
    return bool(result["questions"] == settings.questions)


def read_result(folder: Path) -> dict[str, Any]:
    """Read the result of a run; empty if it is not finished."""
    path = folder / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


# --- runs -----------------------------------------------------------------------------------------


def do(settings: Settings, arm: Arm, seed: int) -> str:
    """Train and evaluate in a process of its own; says how it went."""
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
    """Reinforcement learning.

    Returns:
        The model and the seconds of training.
    """
    from research_agent.trainer import train  # noqa: PLC0415

    training = training_of(settings, arm, seed)
    summary = train(training)
    require_not_stopped(summary)
    if not has_all_steps(training.run.output, settings.steps):
        raise RuntimeError(summary.message)
    return str(training.run.output), float(summary.numbers["seconds of training"])


def _by_sft(settings: Settings, arm: Arm, seed: int) -> tuple[str, float]:
    """Rejection sampling: play as many episodes as other runs, and imitate the right ones.

    Returns:
        The model and the seconds of playing and training.
    """
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


def require_not_stopped(summary: Any) -> None:
    """Raise RuntimeError if a training run was stopped by a signal."""
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
    """Play questions with a model, and write the predictions.

    Args:
        settings: says where the model runs.
        model: folder or name.
        env_args: of the environment.
        output: folder of the predictions.
        temperature: 0 is greedy.
        limit: number of questions.
        samples_per_task: episodes of each question.
        seed: seed of the sampled tokens.
        sampling: limits of an episode; its temperature is not used.

    Returns:
        Means over the episodes: the environment's metrics, ``reward``, ``tokens`` (of actions),
        ``turns``, and ``answer words``, the number of words of a prediction.
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
    renderer = load_renderer(resolve_model(model))
    engine = make_engine("transformers", policy, renderer, max_slots=SLOTS, max_context=context)
    environments = open_environments(ENV, SLOTS, env_args)
    try:
        summary = evaluate(
            engine,
            environments,
            renderer,
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
