"""Grade questions by difficulty, and keep correct episodes, both from an evaluation.

``research-agent eval --samples-per-task N --temperature 1`` plays every task N times. From its
predictions ``grade`` makes a grade for each question, by which an environment can filter and mix
its tasks, and ``sample`` keeps correct episodes as demonstrations for ``sft`` (rejection sampling).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from research_agent.errors import ConfigError
from research_agent.evaluation.predictions import read_predictions, record_key
from research_agent.evaluation.summary import CORRECT_THRESHOLD, main_metric, outcome
from research_agent.system.files import write_atomic

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grade:
    """How difficult a question is for the policy that was evaluated."""

    question_id: str
    grade: str  # easy, medium or hard
    correct: int  # samples whose metric is above CORRECT_THRESHOLD
    samples: int  # episodes that are not void


def grades(
    records: Iterable[Record],
    *,
    metric: str | None = None,
    easy: float = 2 / 3,
    hard: float = 1 / 3,
) -> list[Grade]:
    """Grade questions by how many of their samples are correct.

    R1-Searcher (Song et al. 2025, section 3.2) counts samples until one is correct. Here every
    question has the same number of samples, and the share of correct ones decides.

    Args:
        records: records of an evaluation.
        metric: metric that decides what is correct; None: em if there is one, else the first.
        easy: a question is easy from this share of correct samples on.
        hard: a question is hard up to this share; between the two it is medium.

    Returns:
        Grades in the order of the records; questions whose samples are all void have none.

    Raises:
        ConfigError: ``hard`` is not below ``easy``, there is no such metric, or a record has no
            question id.
    """
    if not 0 <= hard < easy <= 1:
        raise ConfigError(f"--hard {hard} and --easy {easy} are shares, the first below the other")
    records = [record for record in records if not record["void"]]
    name = _metric(records, metric)
    correct: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for record in records:
        if record["info"].get("question_id") in (None, ""):
            raise ConfigError("these predictions name no question_id; nothing could use grades")
        question, _ = record_key(record)
        samples[question] += 1
        correct[question] += _is_correct(record, name)

    def called(share: float) -> str:
        return "easy" if share >= easy else "hard" if share <= hard else "medium"

    return [Grade(q, called(correct[q] / n), correct[q], n) for q, n in samples.items()]


def demonstrations(
    records: Iterable[Record], *, metric: str | None = None, each: int = 1, chat: bool = False
) -> list[list[tuple[str, Any]]]:
    """Correct episodes as lists of (provenance, content), which ``sft`` learns from.

    The content is what a rollout renders; see ``research_agent.demonstrations``. Void and truncated
    episodes are left out.

    Args:
        records: records of an evaluation.
        metric: metric that decides what is correct; None: em if there is one, else the first.
        each: most episodes per task; the first ones are kept.
        chat: where a record has the prompt as chat messages, take these instead of its text.

    Raises:
        ConfigError: no such metric, ``each`` is below 1, or a record with chat tokens does not say
            which tokens ended its turns.
    """
    if each < 1:
        raise ConfigError(f"--each {each} keeps no episode; give at least 1")
    records = [record for record in records if not record["void"]]
    name = _metric(records, metric)
    kept: Counter[int] = Counter()
    chosen = []
    for record in records:
        correct = _is_correct(record, name) and not record.get("truncated")
        if correct and kept[record["episode"]] < each:
            kept[record["episode"]] += 1
            _require_ends(record)
            chosen.append([(s["provenance"], _content(s, chat)) for s in record["segments"]])
    return chosen


def _require_ends(record: Record) -> None:
    """Refuse calls of tools whose turns would be learned without the tokens that end them."""
    segments = record["segments"]
    framed = any("tools" in s or s.get("info", {}).get("chat_markup") for s in segments)
    if framed and any(s["provenance"] == "action" and "end" not in s for s in segments):
        raise ConfigError(
            f"episode {record['episode']} calls tools, and its record does not say which tokens "
            "ended its turns: an endpoint played it, or a training run, or an earlier version "
            "wrote it; evaluate a local model again"
        )


def _content(segment: Record, chat: bool) -> Any:
    """What ``sft`` needs to render a segment as the rollout did."""
    text = segment["text"]
    special = {"end": segment["end"]} if "end" in segment else {}
    if markup := segment.get("chat_markup") or segment.get("info", {}).get("chat_markup"):
        special["chat_markup"] = markup
    if special:
        return {"text": text, **special}
    if not chat:
        return text
    messages = segment.get("messages")
    if tools := segment.get("tools"):
        return {"messages": messages or [{"role": "user", "content": text}], "tools": tools}
    return messages or text


def write_grades(predictions: Path, output: Path, **settings: Any) -> Counter[str]:
    """Grade an evaluation's questions, and write a line of JSON per question.

    Args:
        predictions: a ``predictions.jsonl``, or its folder.
        output: file to write.
        settings: see ``grades``.

    Returns:
        The number of questions with each grade.

    Raises:
        ConfigError: see ``grades``, or all episodes are void.
        PredictionsError: see ``read_predictions``.
    """
    _, records = read_predictions(predictions)
    found = grades(records, **settings)
    if not found:
        raise ConfigError(
            f"all {len(records)} episodes of {predictions} are void, so no question has a grade; "
            "evaluate again"
        )
    _write(output, map(asdict, found))
    return Counter(g.grade for g in found)


def write_demonstrations(predictions: Path, output: Path, **settings: Any) -> tuple[int, int]:
    """Keep an evaluation's correct episodes, a line of JSON per episode.

    Args:
        predictions: a ``predictions.jsonl``, or its folder.
        output: file to write.
        settings: see ``demonstrations``.

    Returns:
        The number of episodes that were kept, and of all episodes.

    Raises:
        ConfigError: see ``demonstrations``, or none is correct.
        PredictionsError: see ``read_predictions``.
    """
    header, records = read_predictions(predictions)
    chat = bool(header.get("settings", {}).get("chat_template"))
    chosen = demonstrations(records, chat=chat, **settings)
    if not chosen:
        raise ConfigError(f"none of the {len(records)} episodes of {predictions} is correct")
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
