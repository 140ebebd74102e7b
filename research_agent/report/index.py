"""What the page shows at once (an index), and what it shows on a click (the records)."""

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

CHUNK = 400_000  # characters of JSON that are packed together: what a click on an episode unpacks
_QUESTION = 300  # characters of a prompt that stand for a question that nobody named

Record = Mapping[str, Any]


def make_index(
    sources: Sources, limit: int | None = None
) -> tuple[dict[str, Any], list[list[str]]]:
    """Match the samples of all evaluations by their keys, and collect what the page needs of each.

    Args:
        sources: what was read.
        limit: how many samples to show at most, the first ones; None shows all.

    Returns:
        The index as plain JSON values (``page.js`` reads it), and the records as JSON in chunks.
        Records of one question stand together: they are read together, and their observations
        compress better.
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
        places: list[dict[str, Any] | None] = []
        for side in sides:
            if side is None:
                places.append(None)
                continue
            shows = read_shows(sources.predictions[len(places)])
            told = _side(side, metrics[len(places)], shows)
            places.append({**told, "at": [len(details) - 1, len(details[-1])]})
            details[-1].append(as_json(side))
            length += len(details[-1][-1])
        first = next(side for side in sides if side is not None)
        items.append({"id": linkable(name), "sample": sample, **_question(first), "sides": places})
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
    """What the environment says of the items that its observations show: ``metadata["shows"]``."""
    shows = predictions.header.get("shows")
    return {str(k): str(v) for k, v in shows.items()} if isinstance(shows, Mapping) else {}


def _side(record: Record, metric: str, shows: Mapping[str, str]) -> dict[str, Any]:
    """What a row of the list shows of a record, and what it is filtered by."""
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
    return {
        "question": question,
        "answers": [_text(a) for a in (answers if isinstance(answers, list) else [answers])],
        "strata": _strata(strata),
    }


def _strata(strata: object) -> dict[str, str]:
    """Strata that are known: ``""`` stands for one that is not."""
    if not isinstance(strata, Mapping):
        return {}
    return {
        linkable(key): linkable(str(value))
        for key, value in strata.items()
        if value not in ("", None)
    }


def linkable(text: str) -> str:
    """A text that a URL can hold: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _set(predictions: Predictions) -> dict[str, Any]:
    """The numbers of an evaluation, computed from its records, so it needs no summary."""
    summary = summarize(map(outcome, predictions.records))
    of_all = Part(**{f.name: getattr(summary, f.name) for f in fields(Part)})
    numbers = _numbers(of_all)
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
