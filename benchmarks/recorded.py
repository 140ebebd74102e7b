"""The 625 recorded trajectories of R1-Searcher-Qwen-7B: 500 on HotpotQA, 125 on Bamboogle.

They come with the verdict of a GPT-4o judge on each prediction (their field is ``gpt4o_output``;
the code beside them, ``evaluation/metric_calc_gpt_as_judge.py``, asks gpt-4o-mini).
"""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_env.errors import DataError, DataNotFoundError

FILES = {"HotpotQA": "hotpotqa_qwen", "Bamboogle": "bamboogle_qwen"}
QUERY = re.compile(r"<\|begin_of_query\|>((?:(?!<\|begin_of_query\|>).)*)<\|end_of_query\|>$", re.S)


@dataclass(frozen=True, slots=True)
class RecordedTrajectory:
    """One episode.

    Attributes:
        id: id of its question.
        dataset: a key of ``FILES``.
        question: the question.
        answers: its gold answers.
        prediction: the model's answer.
        is_correct: whether the judge calls the prediction correct.
        actions: what the model wrote, turn by turn.
        observations: what it was shown after each action but the last.
    """

    id: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    is_correct: bool
    actions: tuple[str, ...]
    observations: tuple[str, ...]


def recorded_folder(data: str | Path | None = None) -> Path:
    """The folder of the recordings.

    Args:
        data: the folder that holds ``r1searcher_trajectories``; None: ``RESEARCH_DATA``.

    Raises:
        DataNotFoundError: there is no such folder.
    """
    named = data or os.environ.get("RESEARCH_DATA")
    folder = Path(named or ".") / "r1searcher_trajectories"
    if named is None or not folder.is_dir():
        raise DataNotFoundError(
            f"no folder {folder}; give --data, or set RESEARCH_DATA, to the folder that holds it"
        )
    return folder


def read_trajectories(data: str | Path | None = None) -> list[RecordedTrajectory]:
    """Read the recordings, those on HotpotQA first.

    Args:
        data: as for :func:`recorded_folder`.

    Raises:
        DataNotFoundError: the folder or a file in it is missing.
        DataError: a verdict is neither True nor False.
    """
    folder = recorded_folder(data)
    trajectories = []
    for dataset, name in FILES.items():
        file = folder / f"{name}.jsonl.gz"
        if not file.is_file():
            raise DataNotFoundError(f"no file {file}, which is a part of the recordings")
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            trajectories += [_trajectory(dataset, json.loads(line)) for line in lines]
    return trajectories


def _trajectory(dataset: str, record: dict[str, Any]) -> RecordedTrajectory:
    if record["judge"] not in ("True", "False"):
        raise DataError(f"{record['id']}: the verdict {record['judge']!r} is not True or False")
    segments = record["segments"]
    return RecordedTrajectory(
        id=record["id"],
        dataset=dataset,
        question=record["question"],
        answers=tuple(record["answers"]),
        prediction=record["prediction"],
        is_correct=record["judge"] == "True",
        actions=tuple(s["action"] for s in segments if "action" in s),
        observations=tuple(s["observation"] for s in segments if "observation" in s),
    )
