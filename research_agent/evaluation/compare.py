"""Compare two evaluations of the same questions: differences, intervals and p-values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from research_agent.errors import PredictionsError
from research_agent.evaluation.predictions import Key, read_predictions, record_key
from research_agent.evaluation.statistics import Floats, bootstrap, interval, mcnemar, two_sided_p
from research_agent.evaluation.summary import (
    CORRECT_THRESHOLD,
    TRAINER_METRICS,
    Outcome,
    main_metric,
    outcome,
)
from research_agent.system.terminal import printable

_NAMED = 3  # questions that an error names


@dataclass(frozen=True, slots=True)
class Difference:
    """Means of a metric in A and B; B - A with its 95 % bootstrap interval and two-sided p."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Counts of questions by who answers them correctly, and McNemar's exact two-sided p.

    A question is correct if the mean of the metric over its samples is above 0.5.
    """

    metric: str
    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``compare`` returns. A pair of episodes is left out if one of them is void."""

    questions: int  # with at least one pair left
    pairs: int  # pairs of episodes left
    void_a: int
    void_b: int
    metrics: Mapping[str, Difference]
    mcnemar: McNemar


def compare(a: Path, b: Path, *, metric: str | None = None, seed: int = 0) -> Comparison:
    """Compare two evaluations, question by question.

    An episode of A is paired with the episode of B that has the same question and sample number.
    The bootstrap resamples questions, each with all its pairs.

    Args:
        a: a ``predictions.jsonl``, or its folder.
        b: another one.
        metric: metric that decides what is correct, for McNemar's test; None: exact match if there
            is one, else the environment's first metric, else the reward.
        seed: seed of the bootstrap's draws.

    Raises:
        PredictionsError: the files have different questions or samples; one cannot be read; every
            pair has a void episode; or there is no such metric.
    """
    first, second = _read(a), _read(b)
    _require_same_questions(first, second, a, b)
    pairs = [
        (first[key], second[key])
        for key in sorted(first)
        if not (first[key].void or second[key].void)
    ]
    if not pairs:
        raise PredictionsError(f"each pair of episodes of {a} and {b} has a void one; play them")
    names = _metrics(pairs)
    chosen = metric or main_metric(names[1:])
    if chosen not in names:
        raise PredictionsError(f"there is no metric {chosen!r}; there is {', '.join(names)}")
    sums: dict[str, Floats] = defaultdict(lambda: np.zeros((2, len(names))))
    counts: dict[str, int] = defaultdict(int)
    for pair in pairs:
        sums[pair[0].question] += [[one.score(name) for name in names] for one in pair]
        counts[pair[0].question] += 1
    totals = np.array(list(sums.values()))  # [questions, 2, metrics]
    weights = np.array(list(counts.values()))  # [questions]
    means = totals.sum(axis=0) / weights.sum()  # [2, metrics]
    drawn = bootstrap(totals[:, 1] - totals[:, 0], weights, seed=seed)
    # The bootstrap of a few questions shows too little variance. If A and B are equally good, all
    # questions favor the same one with probability 2^(1 - questions): p cannot be smaller.
    p_values = np.maximum(two_sided_p(drawn), 2.0 ** (1 - len(weights)))
    metrics = {
        name: Difference(float(mean_a), float(mean_b), float(mean_b - mean_a), spread, float(p))
        for name, mean_a, mean_b, spread, p in zip(
            names, *means, interval(drawn), p_values, strict=True
        )
    }
    scores = totals[:, :, names.index(chosen)] / weights[:, None]  # [questions, 2]
    right_a, right_b = (scores > CORRECT_THRESHOLD).T
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return Comparison(
        questions=len(weights),
        pairs=len(pairs),
        void_a=sum(one.void for one in first.values()),
        void_b=sum(one.void for one in second.values()),
        metrics=metrics,
        mcnemar=McNemar(
            metric=chosen,
            both=int((right_a & right_b).sum()),
            only_a=only_a,
            only_b=only_b,
            neither=int((~right_a & ~right_b).sum()),
            p=mcnemar(only_a, only_b),
        ),
    )


def table(comparison: Comparison) -> Table:
    """A table of the differences, for a terminal."""
    shown = Table()
    shown.add_column("mean")
    for name in ("A", "B", "B - A", "95 % interval", "p"):
        shown.add_column(name, justify="right")
    for name, each in comparison.metrics.items():
        low, high = each.interval
        shown.add_row(
            Text(printable(name)),
            f"{each.a:.3f}",
            f"{each.b:.3f}",
            f"{each.difference:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{each.p:.4f}",
        )
    return shown


def in_words(comparison: Comparison) -> str:
    """The text below the table: counts of questions and void episodes, and McNemar's test."""
    test = comparison.mcnemar
    void = comparison.void_a + comparison.void_b
    left_out = (
        f"\n{comparison.void_a} void episodes of A and {comparison.void_b} of B; "
        "they and their partners are left out"
        if void
        else ""
    )
    return (
        f"{comparison.questions} questions, {comparison.pairs} pairs of episodes{left_out}\n"
        f"correct by {test.metric}: both {test.both}, only A {test.only_a}, only B {test.only_b}, "
        f"neither {test.neither}; McNemar's exact p = {test.p:.4g}"
    )


def _read(path: Path) -> dict[Key, Outcome]:
    _, records = read_predictions(path)
    if not records:
        raise PredictionsError(f"{path} holds no episode; evaluate first")
    return {record_key(record): outcome(record) for record in records}


def _require_same_questions(
    first: Mapping[Key, Outcome], second: Mapping[Key, Outcome], a: Path, b: Path
) -> None:
    """Refuse files that cannot be paired."""
    asked_a, asked_b = ({question for question, _ in each} for each in (first, second))
    if asked_a != asked_b:
        parts = [
            f"{len(only)} are in {path} only ({_listed(only)})"
            for only, path in ((asked_a - asked_b, a), (asked_b - asked_a, b))
            if only
        ]
        raise PredictionsError(
            f"the two evaluations are of different questions: {' and '.join(parts)}; evaluate both "
            "on the same, to the end"
        )
    if first.keys() != second.keys():
        differing = {question for question, _ in first.keys() ^ second.keys()}
        raise PredictionsError(
            f"{len(differing)} questions ({_listed(differing)}) have other samples in {a} than in "
            f"{b}; evaluate both with the same --samples-per-task, to the end"
        )
    changed = {
        one.question
        for key, one in first.items()
        if one.asked and second[key].asked and one.asked != second[key].asked
    }
    if changed:
        raise PredictionsError(
            f"{len(changed)} questions ({_listed(changed)}) have the same id in {a} and {b}, and "
            "another text; evaluate both on the same data"
        )


def _listed(questions: Collection[str]) -> str:
    named = ", ".join(sorted(questions)[:_NAMED])
    return named if len(questions) <= _NAMED else f"{named}, ..."


def _metrics(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    """Names of all metrics: the reward first, the trainer's own metrics last."""
    names = dict.fromkeys(name for pair in pairs for one in pair for name in one.metrics)
    return ["reward", *(name for name in names if name not in TRAINER_METRICS), *TRAINER_METRICS]
