"""The numbers of an ablation's table, read from the folders of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations.registry import AFTER, BEFORE, LEVELS, MIDDLE, Ablation, Arm
from benchmarks.ablations.runs import AblationsConfig, folder_of, read_result
from benchmarks.runs import read_log
from research_agent.evaluation.predictions import read_predictions

Values = dict[str, float]
TOKENS, SEARCHES = "all tokens", "all searches"
LONG = "em, 5+ hops"


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run has left on disk."""

    log: Sequence[Mapping[str, Any]]  # a line per training step; empty for SFT
    final: Mapping[str, Mapping[str, float]]  # world to means of the greedy evaluation at the end
    seconds: float  # training time


def read_run(config: AblationsConfig, arm: Arm, seed: int) -> FinishedRun | None:
    """Read a run; None if it is not finished."""
    folder = folder_of(config, arm, seed)
    result = read_result(folder)
    if not result:
        return None
    log = [{**line, **_corrections(folder, line)} for line in read_log(folder)]
    final = {
        name: {**means, **_long(folder / "final" / name)} for name, means in result["final"].items()
    }
    return FinishedRun(with_totals(log), final, result["seconds"])


def _long(place: Path) -> Values:
    """Exact match on the questions of an evaluation that need five facts or more."""
    if not (place / "predictions.jsonl").exists():
        return {}
    asked = [(record["info"].get("strata", {}), record) for record in read_predictions(place)[1]]
    long = [r["metrics"]["em"] for strata, r in asked if int(strata.get("hops", 0)) > 4]
    return {LONG: statistics.fmean(long)} if long else {}


def with_totals(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add to each line what was spent until then: ``all tokens`` and ``all searches``.

    What a tree shares was sampled once. The last turn of an episode is an answer; all others are
    searches.
    """
    tokens = accumulate(line.get("sampled_tokens", 0.0) for line in log)
    searches = accumulate(
        line.get("sampled_turns", 0.0) - line.get("episodes", 0.0) for line in log
    )
    return [
        {**line, TOKENS: spent, SEARCHES: searched}
        for line, spent, searched in zip(log, tokens, searches, strict=True)
    ]


def _corrections(folder: Path, line: Mapping[str, Any]) -> Values:
    """Numbers of ``self_correction`` for the evaluation that a line of the log reports."""
    place = folder / "evaluations" / f"step-{line['step']:06d}"
    if "eval/em" not in line or not (place / "predictions.jsonl").exists():
        return {}
    _, records = read_predictions(place)
    return {f"eval/{name}": value for name, value in self_correction(records).items()}


def self_correction(records: Iterable[Mapping[str, Any]]) -> Values:
    """Count how episodes go on after a useless result: one without a gold passage.

    Args:
        records: records of an evaluation, see ``research_agent.evaluation.predictions``. Void
            episodes, and questions whose gold passages are not known, are left out.

    Returns:
        ``met useless`` is the fraction of episodes with a useless result. ``searched again`` and
        ``recovered`` are fractions of these: episodes that searched after the first useless result,
        and that found a gold passage by it. A fraction of no episodes is left out.
    """
    episodes = met = again = recovered = 0
    for record in records:
        golds = set(record["info"].get("supporting_ids") or ())
        if record["void"] or not golds:
            continue
        found = [
            not golds.isdisjoint(segment["info"].get("passage_ids", ()))
            for segment in record["segments"]
            if segment["provenance"] == "observation" and segment["info"].get("query")
        ]
        episodes += 1
        if False in found:
            later = found[found.index(False) + 1 :]
            met += 1
            again += bool(later)
            recovered += any(later)
    counts = {
        "met useless": (met, episodes),
        "searched again": (again, met),
        "recovered": (recovered, met),
    }
    return {name: part / whole for name, (part, whole) in counts.items() if whole}


def largest_fall(rewards: Sequence[float], window: int = 5) -> float:
    """The largest drop of the mean reward of ``window`` steps below its highest value before."""
    starts = range(max(1, len(rewards) - window + 1)) if rewards else ()
    means = [statistics.fmean(rewards[i : i + window]) for i in starts]
    highest = accumulate(means, max)
    return max((high - mean for high, mean in zip(highest, means, strict=True)), default=0.0)


def _mean_in_training(run: FinishedRun, name: str, first: float, last: float) -> float | None:
    """Mean of a logged number over a part of training: 0.9 to 1 is the last tenth of its steps."""
    values = [float(line[name]) for line in run.log if line.get(name) is not None]
    steps = values[int(first * len(values)) : max(1, round(last * len(values)))]
    return statistics.fmean(steps) if steps else None


def _final(world: str, name: str) -> Callable[[FinishedRun], float | None]:
    return lambda run: run.final.get(world, {}).get(name)


def _evaluations(run: FinishedRun, cost: str) -> list[tuple[float, float]]:
    """What a run had spent at each evaluation, and its exact match there."""
    return [(float(line[cost]), float(line["eval/em"])) for line in run.log if "eval/em" in line]


def _until(level: float, cost: str) -> Callable[[FinishedRun], float | None]:
    """Make a function: what a run has spent when it reaches a level, infinity if it never does.

    Args:
        level: exact match on held-out questions, interpolated between evaluations.
        cost: name of a logged number that grows over the run.
    """

    def found(run: FinishedRun) -> float | None:
        points = _evaluations(run, cost)
        if points and points[0][1] >= level:
            return points[0][0]
        for (spent, low), (more, high) in pairwise(points):
            if high >= level:
                return spent + (more - spent) * (level - low) / (high - low)
        return math.inf if points else None

    return found


def at_equal_budget(
    one: Sequence[FinishedRun], other: Sequence[FinishedRun], cost: str
) -> tuple[list[float], list[float]]:
    """Exact match of two arms when all their runs have spent the same.

    The budget is what the run that spent least spent in all.

    Args:
        one: runs of an arm, one per seed.
        other: runs of another arm, one per seed.
        cost: ``all tokens`` or ``all searches``.

    Returns:
        For each arm the exact match of its runs, interpolated between evaluations.
    """
    evaluated = [[_evaluations(run, cost) for run in runs] for runs in (one, other)]
    budget = min((points[-1][0] for runs in evaluated for points in runs if points), default=0.0)

    def reached(points: Sequence[tuple[float, float]]) -> float:
        spent, right = zip(*points, strict=True)
        return float(np.interp(budget, spent, right))

    first, second = ([reached(points) for points in runs if points] for runs in evaluated)
    return first, second


def _last(name: str) -> Callable[[FinishedRun], float | None]:
    return lambda run: next((float(x[name]) for x in reversed(run.log) if name in x), None)


_UNITS = {"episodes": "played", "tokens": TOKENS, "searches": SEARCHES}
EQUAL_BUDGETS = {"em at equal tokens": TOKENS, "em at equal searches": SEARCHES}
"""Numbers that compare two arms when they have spent the same: name to what was spent."""
THIRD = 1 / 3
NUMBERS: dict[str, tuple[int, Callable[[FinishedRun], float | None]]] = {
    "em in": (3, _final("in", "em")),
    "em out": (3, _final("out", "em")),
    "f1 in": (3, _final("in", "f1")),
    "cem in": (3, _final("in", "cem")),
    "tokens": (1, _final("in", "tokens")),
    "searches": (2, _final("in", "searches")),
    "answer words": (2, _final("in", "answer words")),
    "reward": (3, lambda run: _mean_in_training(run, "reward", 0.9, 1)),
    "fall": (3, lambda run: largest_fall([x["reward"] for x in run.log if "reward" in x])),
    "format early": (3, lambda run: _mean_in_training(run, "env/format", 0, THIRD)),
    "searches early": (2, lambda run: _mean_in_training(run, "env/searches", 0, THIRD)),
    "seconds": (0, lambda run: run.seconds),
    "em hard": (3, _final("hard", "em")),
    LONG: (3, _final("hard", LONG)),
    "em, T = 1": (3, _last("eval/em")),
    **{
        f"{unit} to {level}": (0, _until(float(level), name))
        for level in LEVELS
        for unit, name in _UNITS.items()
    },
    TOKENS: (0, _last(TOKENS)),
    SEARCHES: (0, _last(SEARCHES)),
}
"""Columns of ablations that compare arms: digits after the point, and what finds the number."""


def rows_of(
    ablation: Ablation, runs: Mapping[str, Sequence[FinishedRun]]
) -> dict[str, dict[str, Sequence[float]]]:
    """The rows of an ablation's table.

    Args:
        ablation: says which numbers are wanted.
        runs: finished runs by the name of their arm, one per seed.

    Returns:
        Row to number to its values, one per seed. A row is an arm, or a moment of training.
    """
    if not ablation.over_time:
        return {
            arm.name: {
                number: _known(NUMBERS[number][1](run) for run in runs.get(arm.name, ()))
                for number in ablation.numbers
            }
            for arm in ablation.arms
        }
    evaluations = [
        [line for line in run.log if "eval/em" in line]
        for run in runs.get(ablation.arms[0].name, ())
    ]
    at = {BEFORE: 0.0, MIDDLE: 0.5, AFTER: 1.0}
    return {
        moment: {
            number: _known(
                _line_at(lines, share).get(f"eval/{number}") for lines in evaluations if lines
            )
            for number in ablation.numbers
        }
        for moment, share in at.items()
    }


def _line_at(lines: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any]:
    """Return the line whose step is nearest to a share of the last step."""
    return min(lines, key=lambda line: abs(line["step"] - share * lines[-1]["step"]))


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]
