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

import tyro

from benchmarks.ablations.registry import STARTER, Arm
from benchmarks.runs import is_finished as has_all_steps
from benchmarks.runs import training_process
from research_agent.config import (
    AlgorithmConfig,
    EnvironmentConfig,
    EvalConfig,
    PolicyConfig,
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
class AblationsConfig:
    """The papers' ablations in miniature: runs of several seeds, a table, a picture, verdicts.

    The same command again continues where it was stopped, and ablations share the runs of the same
    name. The first argument is the name of an ablation; list prints all with the papers' findings.
    """

    ablation: tyro.conf.Positional[str]
    """Name of an ablation, or all, or list."""
    output: Path = Path("runs/ablations")
    """Folder of the runs, and of a folder for each ablation with table.md, curves.png and
    results.json."""
    steps: int = 30
    """Training steps of a run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs. Verdicts need at least two."""
    prompts_per_step: int = MINIWORLD.rollout.prompts_per_step
    """Tasks per step."""
    group_size: int = MINIWORLD.rollout.group_size
    """Episodes of each task."""
    questions: int = 200
    """Held-out questions per evaluation."""
    workers: int = 2
    """Runs at the same time, each with one thread."""
    device: str = "cpu"
    """Device of the models, such as cpu or cuda."""
    tiny: bool = False
    """Two steps of two small groups, one seed: to see that it works."""

    @property
    def prepared(self) -> Path:
        """Folder of the models and grades that runs begin with."""
        return self.output / "prepared"


def folder_of(config: AblationsConfig, arm: Arm, seed: int) -> Path:
    """Folder of a run."""
    name = arm.name.replace(", ", "-").replace(" = ", "").replace(" ", "-")
    return config.output / "runs" / name / f"seed-{seed}"


def worlds_of(arm: Arm) -> tuple[str, ...]:
    """The worlds that a run is evaluated in; it is trained in the first."""
    return (HARD,) if arm.hard else tuple(WORLDS)


def sampling_of(arm: Arm) -> SamplingConfig:
    """Temperature and limits of a run's episodes."""
    limits: dict[str, Any] = {"max_response": HARD_RESPONSE} if arm.hard else {}
    return replace(MINIWORLD.sampling, **limits)


def world_of(config: AblationsConfig, name: str) -> dict[str, Any]:
    """Arguments of the environment for one of the worlds."""
    place = config.output / "worlds" / name
    return {
        "questions": str(place / "questions.jsonl"),
        "corpus": str(place / "corpus.jsonl"),
        "template": "question",
        "top_k": 1,
    }


def training_of(config: AblationsConfig, arm: Arm, seed: int) -> TrainConfig:
    """The configuration of a training run; one of SFT plays as many episodes as this run would.

    A step has the same number of episodes, however large its groups are.
    """
    samples = arm.group_size or config.group_size
    episodes = config.prompts_per_step * config.group_size
    graded: dict[str, Any] = {}
    if arm.grade is not None:
        graded = {"grades": str(config.prepared / "grades.jsonl"), "grade": arm.grade}
    part = max(1, config.steps // 3)
    return replace(
        MINIWORLD,
        preset="",
        environment=EnvironmentConfig(
            env=NOISY if arm.miss else ENV,
            env_args={
                **world_of(config, worlds_of(arm)[0]),
                "split": "train",
                **({"miss": arm.miss} if arm.miss else {}),
                **graded,
                **arm.env_args,
            },
        ),
        policy=replace(
            MINIWORLD.policy,
            model=STARTER if arm.start == "starter" else str(config.prepared / arm.start),
            device=config.device,
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
            steps=config.steps,
            output=folder_of(config, arm, seed),
            save_every=10,
            eval_every=max(1, config.steps // 6),
            eval_limit=config.questions,
            eval_temperature=1.0,
            eval_args={"split": "dev", **dict.fromkeys(graded)},
            log_episodes=1,
            quiet=True,
        ),
    )


def is_finished(config: AblationsConfig, arm: Arm, seed: int) -> bool:
    """Whether a run has a result, measured with the number of questions that is asked for.

    Raises:
        CheckpointError: the result is that of another configuration.
    """
    folder = folder_of(config, arm, seed)
    result = read_result(folder)
    if not result:
        return False
    require_same_training(changes(result["training"], training_of(config, arm, seed)), folder)
    return bool(result["questions"] == config.questions)


def read_result(folder: Path) -> dict[str, Any]:
    """Read the result of a run; empty if it is not finished."""
    path = folder / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def do(config: AblationsConfig, arm: Arm, seed: int) -> str:
    """Train and evaluate in a process of its own; says how it went."""
    folder = folder_of(config, arm, seed)
    with training_process(masked=arm.masked):
        learn = _by_sft if arm.by == "sft" else _by_rl
        model, seconds = learn(config, arm, seed)
        final = {
            world: play(
                config,
                model,
                {**world_of(config, world), "split": "dev"},
                folder / "final" / world,
                limit=config.questions,
                seed=seed,
                sampling=sampling_of(arm),
            )
            for world in worlds_of(arm)
        }
    result = {
        "questions": config.questions,
        "seconds": seconds,
        "final": final,
        "training": as_json(training_of(config, arm, seed)),
    }
    write_atomic(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return ", ".join(f"exact match {final[world]['em']:.2f} {world}" for world in final)


def _by_rl(config: AblationsConfig, arm: Arm, seed: int) -> tuple[str, float]:
    """Reinforcement learning.

    Returns:
        The model and the seconds of training.
    """
    from research_agent.trainer import train  # noqa: PLC0415

    training = training_of(config, arm, seed)
    summary = train(training)
    require_not_stopped(summary)
    if not has_all_steps(training.run.output, config.steps):
        raise RuntimeError(summary.message)
    return str(training.run.output), float(summary.numbers["seconds of training"])


def _by_sft(config: AblationsConfig, arm: Arm, seed: int) -> tuple[str, float]:
    """Rejection sampling: play as many episodes as other runs, and imitate the right ones.

    Returns:
        The model and the seconds of playing and training.
    """
    from research_agent import sft  # noqa: PLC0415
    from research_agent.evaluation.difficulty import write_demonstrations  # noqa: PLC0415
    from research_env.datasets import load_dataset  # noqa: PLC0415

    training, start = training_of(config, arm, seed), time.perf_counter()
    folder, args = training.run.output, training.environment.env_args
    asked = load_dataset("custom", split="train", questions=args["questions"]).questions
    tasks = min(config.steps * config.prompts_per_step, len(asked))
    play(
        config,
        training.policy.model,
        args,
        folder / "played",
        temperature=1.0,
        limit=tasks,
        samples_per_task=math.ceil(
            config.steps * config.prompts_per_step * config.group_size / tasks
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
    config: AblationsConfig,
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
        config: says where the model runs.
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
    from research_agent.evaluation.evaluate_model import evaluate_model  # noqa: PLC0415
    from research_agent.evaluation.predictions import read_predictions  # noqa: PLC0415

    summary = evaluate_model(
        EvalConfig(
            EnvironmentConfig(env=ENV, env_args=dict(env_args)),
            PolicyConfig(model=model, device=config.device),
            output,
            replace(sampling, temperature=temperature, max_in_flight=SLOTS),
            limit=limit,
            samples_per_task=samples_per_task,
            seed=seed,
            quiet=True,
        )
    )
    _, records = read_predictions(output)
    words = [len(str(record["info"].get("prediction", "")).split()) for record in records]
    return {
        **summary.metrics,
        "reward": summary.reward,
        "answer words": statistics.fmean(words) if words else 0.0,
    }
