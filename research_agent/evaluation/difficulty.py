"""The difficulty of tasks for a policy, and its correct episodes, both from an evaluation.

``research-agent eval --samples-per-task N --temperature 1`` plays every task N times. ``grade``
turns its predictions into a grade for each question, by which an environment may filter and mix its
tasks;
``sample`` keeps correct episodes as demonstrations, which ``sft`` learns from (rejection sampling).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_agent.errors import ConfigError
from research_agent.evaluation.predictions import read_predictions
from research_agent.evaluation.summary import CORRECT_THRESHOLD, main_metric, outcome
from research_agent.system.files import write_atomic

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grade:
    """What became of the samples of a question.

    Attributes:
        question_id: question id of the environment.
        correct: samples whose metric is above ``CORRECT_THRESHOLD``.
        samples: episodes that are not void.
        grade: easy, medium or hard.
    """

    question_id: str
    correct: int
    samples: int
    grade: str


def grades(
    records: Iterable[Record],
    *,
    metric: str | None = None,
    easy: float = 2 / 3,
    hard: float = 1 / 3,
) -> list[Grade]:
    """Grade questions by how many of their samples are correct.

    R1-Searcher (Song et al. 2025, section 3.2) counts samples until one is correct. Here all
    questions have the same number of samples, and the grade is the share of correct ones.

    Args:
        records: records of an evaluation.
        metric: the metric that says what is correct; None takes em, or else the first.
        easy: the least share of correct samples of an easy question.
        hard: the greatest share of a hard one; medium is between.

    Returns:
        Grades in the order of the records; questions whose samples are all void have none.

    Raises:
        ConfigError: shares that make no sense, no such metric, or records that name no question.
    """
    if not 0 <= hard < easy <= 1:
        raise ConfigError(f"--hard {hard} and --easy {easy} are shares, the first below the other")
    records = [record for record in records if not record["void"]]
    name = _metric(records, metric)
    correct: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for record in records:
        question = record["info"].get("question_id")
        if not question:
            raise ConfigError("these predictions name no question_id; nothing could use grades")
        samples[question] += 1
        correct[question] += _is_correct(record, name)

    def called(share: float) -> str:
        return "easy" if share >= easy else "hard" if share <= hard else "medium"

    return [Grade(q, correct[q], n, called(correct[q] / n)) for q, n in samples.items()]


def demonstrations(
    records: Iterable[Record], *, metric: str | None = None, each: int = 1, chat: bool = False
) -> list[list[tuple[str, Any]]]:
    """Right episodes as lists of (provenance, text), which ``sft`` learns from.

    Void and truncated episodes are left out.

    Args:
        records: records of an evaluation.
        metric: the metric that says what is correct; None takes em, or else the first.
        each: at most so many episodes of a task, the first ones.
        chat: prompts are chat messages, where the records hold such.

    Raises:
        ConfigError: no such metric.
    """
    records = [record for record in records if not record["void"]]
    name = _metric(records, metric)
    kept: Counter[int] = Counter()
    chosen = []
    for record in records:
        correct = _is_correct(record, name) and not record.get("truncated")
        if correct and kept[record["episode"]] < each:
            kept[record["episode"]] += 1
            chosen.append([(s["provenance"], _said(s, chat)) for s in record["segments"]])
    return chosen


def _said(segment: Mapping[str, Any], chat: bool) -> Any:
    return segment.get("messages", segment["text"]) if chat else segment["text"]


def write_grades(predictions: Path, output: Path, **settings: Any) -> Counter[str]:
    """Grade an evaluation's questions into a file, a line each; returns how many are called what.

    Raises:
        ConfigError, PredictionsError: see ``grades`` and ``read_predictions``.
    """
    _, records = read_predictions(predictions)
    found = grades(records, **settings)
    lines = [
        {"question_id": g.question_id, "grade": g.grade, "correct": g.correct, "samples": g.samples}
        for g in found
    ]
    _write(output, lines)
    return Counter(g.grade for g in found)


def write_demonstrations(predictions: Path, output: Path, **settings: Any) -> tuple[int, int]:
    """Keep an evaluation's correct episodes in a file; returns how many, and of how many.

    Raises:
        ConfigError: see ``demonstrations``, or none is correct.
        PredictionsError: see ``read_predictions``.
    """
    header, records = read_predictions(predictions)
    chat = bool(header.get("settings", {}).get("chat_template"))
    chosen = demonstrations(records, chat=chat, **settings)
    if not chosen:
        raise ConfigError(f"none of the {len(records)} episodes of {predictions} is right")
    _write(output, [{"segments": parts} for parts in chosen])
    return len(chosen), len(records)


def _metric(records: Sequence[Record], metric: str | None) -> str:
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    if metric not in (None, "reward", *names):
        raise ConfigError(f"no metric {metric!r} in these predictions; known: {', '.join(names)}")
    return metric or main_metric(names)


def _is_correct(record: Record, metric: str) -> bool:
    return outcome(record).score(metric) > CORRECT_THRESHOLD


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
