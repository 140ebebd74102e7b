"""The data of the page: an index that it shows at first, and records that a click shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from research_agent.config import flatten
from research_agent.evaluation.predictions import record_key
from research_agent.evaluation.summary import (
    CORRECT_THRESHOLD,
    Part,
    main_metric,
    outcome,
    summarize,
)
from research_agent.report.curve import series
from research_agent.report.page import as_json
from research_agent.report.sources import Predictions, Sources, names

CHUNK = 400_000  # characters of JSON per compressed chunk; a click unpacks one chunk
_QUESTION = 300  # characters from the end of a prompt that stand in for an unnamed question

Record = Mapping[str, Any]


def make_index(
    sources: Sources, limit: int | None = None
) -> tuple[dict[str, Any], list[list[str]]]:
    """Match the samples of all evaluations by question, and collect what the page needs of each.

    Args:
        sources: the runs and evaluations that were read.
        limit: most samples to show, the first ones; None: all.

    Returns:
        The index as plain JSON values, and chunks of records as JSON. The records of a question
        are in one chunk, because they are read together and compress better.
    """
    by_key: dict[tuple[str, int], list[Record | None]] = {}
    for number, predictions in enumerate(sources.predictions):
        for record in predictions.records:
            sides = by_key.setdefault(record_key(record), [None] * len(sources.predictions))
            sides[number] = record
    shown = list(by_key.items())[:limit]
    notes = list(sources.notes)
    if len(shown) < len(by_key):
        notes.append(f"The first {len(shown)} of {len(by_key)} samples are shown (--limit).")

    metrics = [
        main_metric(dict.fromkeys(name for record in each.records for name in record["metrics"]))
        for each in sources.predictions
    ]
    items: list[dict[str, Any]] = []
    details: list[list[str]] = []
    length = CHUNK
    for (name, sample), sides in shown:
        if length >= CHUNK:
            details.append([])
            length = 0
        shown_sides: list[dict[str, Any] | None] = []
        for side, predictions, metric in zip(sides, sources.predictions, metrics, strict=True):
            if side is None:
                shown_sides.append(None)
                continue
            at = [len(details) - 1, len(details[-1])]  # its chunk, and its place there
            shown_sides.append({**_side(side, metric, read_shows(predictions)), "at": at})
            details[-1].append(as_json(side))
            length += len(details[-1][-1])
        question = _question(next(side for side in sides if side is not None))
        items.append({"id": linkable(name), "sample": sample, **question, "sides": shown_sides})
    trainings = sources.trainings
    index = {
        "notes": notes,
        "runs": [
            {"name": name, "curves": series(run.log), "settings": dict(flatten(run.config))}
            for name, run in zip(names([run.path for run in trainings]), trainings, strict=True)
        ],
        "sets": [
            {"name": name, **_set(predictions)}
            for name, predictions in zip(
                names([p.path for p in sources.predictions]), sources.predictions, strict=True
            )
        ],
        "items": items,
    }
    return index, details


def read_shows(predictions: Predictions) -> dict[str, str]:
    """The environment's description of its observations, ``metadata["shows"]``; {} without one."""
    shows = predictions.header.get("shows")
    return {str(k): str(v) for k, v in shows.items()} if isinstance(shows, Mapping) else {}


def _side(record: Record, metric: str, shows: Mapping[str, str]) -> dict[str, Any]:
    """What the list shows of a record and filters by."""
    return {
        "correct": None if record["void"] else outcome(record).score(metric) > CORRECT_THRESHOLD,
        "reward": record["reward"],
        "stop": linkable(str(record.get("stop_reason") or "")),
        "requests": record["metrics"].get(shows.get("requests", "")),
        "prediction": _text(record["info"].get("prediction")),
    }


def _question(record: Record) -> dict[str, Any]:
    info = record["info"]
    question = _text(info.get("question"))
    if not question:
        prompts = (s["text"] for s in record["segments"] if s["provenance"] == "prompt")
        question = next(prompts, "").strip()[-_QUESTION:]
    answers = info.get("answers") or []
    strata = info.get("strata")
    known = strata.items() if isinstance(strata, Mapping) else ()
    return {
        "question": question,
        "answers": [_text(a) for a in (answers if isinstance(answers, list) else [answers])],
        "strata": {linkable(k): linkable(str(v)) for k, v in known if v not in ("", None)},
    }


def linkable(text: str) -> str:
    """Escape lone surrogates, which a URL cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _set(predictions: Predictions) -> dict[str, Any]:
    """Means, intervals, strata and settings of an evaluation, computed from its records."""
    summary = summarize(map(outcome, predictions.records))
    whole = Part(**{f.name: getattr(summary, f.name) for f in fields(Part)})
    numbers = _numbers(whole)
    for metric, estimates in summary.pass_at.items():
        for k, estimate in estimates.items():
            numbers["values"][f"{metric} pass@{k}"] = estimate.mean
            numbers["intervals"][f"{metric} pass@{k}"] = estimate.interval
    if summary.majority:
        metric = main_metric(summary.metrics)
        voted = _numbers(summary.majority)
        for kind in ("values", "intervals"):
            numbers[kind][f"{metric} of the majority"] = voted[kind][metric]
    return {
        "path": str(predictions.path),
        "shows": read_shows(predictions),
        "settings": dict(flatten(predictions.header)),
        **numbers,
        "strata": {
            linkable(key): {linkable(value): _numbers(part) for value, part in parts.items()}
            for key, parts in summary.strata.items()
        },
    }


def _numbers(part: Part) -> dict[str, Any]:
    values = {"reward": part.reward, **part.metrics} if part.episodes else {}
    return {
        "episodes": part.episodes,
        "void": part.void,
        "values": values,
        "intervals": dict(part.intervals),
    }
