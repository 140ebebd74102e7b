"""Two evaluations of the same questions: what differs, and whether that may be chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
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
    """A metric of both, and of B minus A with its 95 % bootstrap interval and two-sided p."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Questions by who answers them correctly, and the exact two-sided p of no difference.

    A question is correct where the mean of the metric over its samples is above 0.5.
    """

    metric: str
    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``compare`` finds; void episodes are left out of both, pair by pair."""

    questions: int  # with a pair of episodes of which none is void
    pairs: int  # pairs of episodes
    void_a: int
    void_b: int
    metrics: Mapping[str, Difference]
    mcnemar: McNemar


def compare(a: Path, b: Path, *, metric: str | None = None, seed: int = 0) -> Comparison:
    """Compare two evaluations, question by question.

    An episode of A is paired with that of B which is of the same question and has the same sample
    number; questions are resampled with all their pairs (paired bootstrap).

    Args:
        a: a ``predictions.jsonl``, or its folder.
        b: another one.
        metric: what McNemar's test takes as correct, above 0.5; None: exact match, or else the
            environment's first metric, or else the reward.
        seed: seed of the bootstrap's draws.

    Raises:
        PredictionsError: the files are of different questions, or have different samples of them;
            one cannot be read; all pairs are void; or there is no such metric.
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
    totals, weights = np.array(list(sums.values())), np.array(list(counts.values()))
    means = totals.sum(axis=0) / weights.sum()  # [2, metrics]
    drawn = bootstrap(totals[:, 1] - totals[:, 0], weights, seed=seed)
    metrics = {
        name: Difference(float(of_a), float(of_b), float(of_b - of_a), spread, p)
        for name, of_a, of_b, spread, p in zip(
            names, *means, interval(drawn), two_sided_p(drawn), strict=True
        )
    }
    correct = (
        totals[:, :, names.index(chosen)] / weights[:, None] > CORRECT_THRESHOLD
    )  # [questions, 2]
    return Comparison(
        questions=len(weights),
        pairs=len(pairs),
        void_a=sum(one.void for one in first.values()),
        void_b=sum(one.void for one in second.values()),
        metrics=metrics,
        mcnemar=_mcnemar(chosen, correct[:, 0], correct[:, 1]),
    )


def table(comparison: Comparison) -> Table:
    """The differences for a terminal."""
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
    """What the table does not show: how many questions, who gets which correct, what was void."""
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
    of_a, of_b = ({question for question, _ in each} for each in (first, second))
    if of_a != of_b:
        parts = [
            f"{len(only)} are in {path} only ({_listed(only)})"
            for only, path in ((of_a - of_b, a), (of_b - of_a, b))
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
    """All metrics of any episode, the reward first and those of the trainer's own last."""
    names = dict.fromkeys(name for pair in pairs for one in pair for name in one.metrics)
    return ["reward", *(name for name in names if name not in TRAINER_METRICS), *TRAINER_METRICS]


def _mcnemar(metric: str, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> McNemar:
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(
        metric=metric,
        both=int((a & b).sum()),
        only_a=only_a,
        only_b=only_b,
        neither=int((~a & ~b).sum()),
        p=mcnemar(only_a, only_b),
    )
