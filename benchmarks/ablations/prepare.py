"""What runs begin with: worlds, models other than the shipped starter, and graded questions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs

from benchmarks.ablations.registry import GRPO, STARTER, Arm
from benchmarks.ablations.runs import (
    DIFFICULTY,
    HARD,
    WORLDS,
    AblationsConfig,
    play,
    require_not_stopped,
    training_of,
)
from benchmarks.runs import training_process
from research_agent.errors import ConfigError
from research_agent.system.files import write_atomic
from research_env.datasets import miniworld, miniworld_hard
from research_env.datasets.files import question_record

QUESTIONS = {"train": 4000, "dev": 400}
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


def claim_folder(config: AblationsConfig) -> None:
    """Make the output folder, and note in it the settings that all its runs share.

    Raises:
        ConfigError: the folder holds runs of another size. Stages and grades depend on the
            number of steps, so a run of 30 steps is not the beginning of one of 40.
    """
    path = config.output / "settings.json"
    ours = {name: getattr(config, name) for name in ("steps", "prompts_per_step", "group_size")}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ConfigError(
                f"{config.output} holds runs with {theirs}, not {ours}; give another --output"
            )
        return
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(ours) + "\n")


def write_worlds(config: AblationsConfig, names: Iterable[str] = WORLDS) -> None:
    """Write questions and passages of the worlds that are missing."""
    for name in names:
        place = config.output / "worlds" / name
        if not place.exists():
            _write_folder(place, partial(_write_world, name))


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


def _write_folder(place: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place, and move it there when it is complete."""
    temporary = place.with_name(f"{place.name}.tmp")
    write(temporary)
    temporary.rename(place)


def missing(config: AblationsConfig, arms: Iterable[Arm]) -> list[str]:
    """The models and files of grades that arms need and that are not there: see ``prepare``."""
    named = {"grades.jsonl" if arm.grade else arm.start for arm in arms} - {"starter"}
    return sorted(name for name in named if not (config.prepared / name).exists())


def prepare(config: AblationsConfig, name: str) -> str:
    """Make a model, or the file of grades, in a process of its own; says what was made."""
    with training_process():
        return _grades(config) if name == "grades.jsonl" else _model(config, name)


def _model(config: AblationsConfig, name: str) -> str:
    """Make a model: ``nothing`` has random weights; others are the starter, shown more."""
    from research_agent import sft  # noqa: PLC0415

    own = replace(sft.PRESETS["miniworld"], quiet=True)
    if name == "nothing":
        own = replace(own, count=own.batch)  # sft takes one small step at least
    else:
        own = replace(own, model=STARTER, vocabulary=None, warmup_steps=10, **STARTS[name])
    _write_folder(config.prepared / name, lambda at: sft.run(replace(own, output=at)))
    return f"{own.count} demonstrations"


def _grades(config: AblationsConfig) -> str:
    """Grade training questions by the samples of a policy after half of a run's steps."""
    from research_agent.evaluation.difficulty import write_grades  # noqa: PLC0415
    from research_agent.trainer import train  # noqa: PLC0415

    training = training_of(config, GRPO, GRADER_SEED)
    steps, output = max(1, config.steps // 2), config.prepared / "grader"
    run = replace(training.run, steps=steps, output=output, eval_every=None)
    require_not_stopped(train(replace(training, run=run)))
    played = config.prepared / "graded"
    play(
        config,
        str(output),
        training.environment.env_args,
        played,
        temperature=1.0,
        limit=GRADED,
        samples_per_task=GRADE_SAMPLES,
        seed=GRADER_SEED,
    )
    counts = write_grades(played, config.prepared / "grades.jsonl")
    return ", ".join(f"{counts[grade]} {grade}" for grade in ("easy", "medium", "hard"))
