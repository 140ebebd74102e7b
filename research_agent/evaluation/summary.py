"""Summarize an evaluation: means with intervals, over all questions and by strata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from research_agent.evaluation.predictions import record_key
from research_agent.evaluation.statistics import bootstrap, interval, pass_at_k
from research_agent.system.terminal import printable

Interval = tuple[float, float]
TRAINER_METRICS = ("tokens", "turns")  # added to the environment's metrics
CORRECT_THRESHOLD = 0.5  # an episode whose main metric is above this is correct
UNKNOWN = "unknown"  # stratum of questions for which the environment gives none


@dataclass(frozen=True, slots=True)
class Part:
    """Means over some questions, with 95 % bootstrap intervals."""

    episodes: int  # without void ones
    void: int  # episodes lost to failed infrastructure, in no mean
    reward: float
    metrics: Mapping[str, float]  # the environment's, then action "tokens" and "turns"
    questions: int  # with at least one episode that is not void
    intervals: Mapping[str, Interval]  # for "reward" and each metric


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions, with its 95 % bootstrap interval."""

    mean: float
    interval: Interval
    questions: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The content of ``summary.json``. The first six fields are a ``Part`` over all questions."""

    episodes: int
    void: int
    reward: float
    metrics: Mapping[str, float]
    questions: int
    intervals: Mapping[str, Interval]
    samples: int  # most samples per question
    strata: Mapping[str, Mapping[str, Part]]  # such as "hops" -> "2" -> means over 2-hop questions
    pass_at: Mapping[str, Mapping[str, Estimate]]  # "em" -> "4" -> pass@4; if several samples
    majority: Part | None  # over the majority's episodes; None unless several samples predict
    header: Mapping[str, Any]  # header of the predictions


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a summary needs from an episode's record, without its texts."""

    question: str  # question id, or else the episode's number
    sample: int
    void: bool
    reward: float
    metrics: Mapping[str, float]
    strata: Mapping[str, str]
    prediction: str | None
    asked: str  # the question's text; "" if the environment does not give it

    def score(self, metric: str) -> float:
        """The reward, or a metric; 0 if the episode lacks it."""
        return self.reward if metric == "reward" else self.metrics.get(metric, 0.0)


def outcome(record: Mapping[str, Any]) -> Outcome:
    """Take the outcome from a record of ``predictions.jsonl``."""
    actions = [s for s in record["segments"] if s["provenance"] == "action"]
    own = {"tokens": float(sum(s["tokens"] for s in actions)), "turns": float(len(actions))}
    metrics = {
        name: math.nan if value is None else float(value)
        for name, value in record["metrics"].items()
    }
    question, sample = record_key(record)
    prediction = record["info"].get("prediction")
    strata = record["info"].get("strata") or {}
    return Outcome(
        question=question,
        sample=sample,
        void=bool(record["void"]),
        reward=float(record["reward"]),
        metrics=metrics | {name: value for name, value in own.items() if name not in metrics},
        strata={str(name): str(value) for name, value in strata.items() if value},
        prediction=None if prediction is None else str(prediction),
        asked=str(record["info"].get("question") or ""),
    )


def summarize(outcomes: Iterable[Outcome], header: Mapping[str, Any] | None = None) -> Summary:
    """Summarize an evaluation.

    - Means are over episodes that are not void. A metric that an episode lacks counts as 0 (the
      token budget may have cut the episode short). Intervals come from resampled questions.
    - ``strata``: the same for each value of each entry of the environment's ``info["strata"]``.
    - ``pass_at``: pass@k (see ``statistics.pass_at_k``) for k = 1, 2, 4, ... and n, over questions
      with at least k samples that are not void. A sample is correct if its main metric is above
      ``CORRECT_THRESHOLD``.
    - ``majority``: self-consistency (Wang et al. 2022). The samples of a question vote with their
      ``info["prediction"]``, in lower case and with whitespace collapsed. Empty predictions do not
      vote, unless all are empty. The first seen wins a tie, in the order of samples. The question
      gets all metrics of the first episode with the winning prediction.

    Args:
        outcomes: outcomes of all episodes, in any order.
        header: header of the predictions.
    """
    ordered = sorted(outcomes, key=lambda o: (o.question, o.sample))
    whole = part(ordered)
    by_question = [list(samples) for _, samples in groupby(ordered, lambda o: o.question)]
    samples = max(map(len, by_question), default=0)
    names = dict.fromkeys(name for o in ordered for name in o.strata)
    strata: dict[str, dict[str, Part]] = {}
    for name in names:
        values = sorted({o.strata.get(name, UNKNOWN) for o in ordered})
        strata[name] = {
            value: part([o for o in ordered if o.strata.get(name, UNKNOWN) == value])
            for value in values
        }
    several = samples > 1
    metric = main_metric(whole.metrics)
    votes = [winner for each in by_question if (winner := _majority(each))] if several else []
    return Summary(
        episodes=whole.episodes,
        void=whole.void,
        reward=whole.reward,
        metrics=whole.metrics,
        questions=whole.questions,
        intervals=whole.intervals,
        samples=samples,
        strata=strata,
        pass_at={metric: _pass_at(by_question, metric, samples)} if several else {},
        majority=part(votes) if votes else None,
        header=header or {},
    )


def main_metric(metrics: Iterable[str]) -> str:
    """The metric that decides correctness: exact match, else the first, else the reward."""
    names = [name for name in metrics if name not in TRAINER_METRICS]
    return "em" if "em" in names else next(iter(names), "reward")


def part(outcomes: Sequence[Outcome]) -> Part:
    """Means and intervals over outcomes that are sorted by question."""
    valid = [o for o in outcomes if not o.void]
    names = [
        *dict.fromkeys(n for o in valid for n in o.metrics if n not in TRAINER_METRICS),
        *TRAINER_METRICS,
    ]
    if not valid:
        return Part(0, len(outcomes), 0.0, {}, 0, {})
    table = np.array([[o.score(name) for name in ("reward", *names)] for o in valid])
    counts = np.array(list(Counter(o.question for o in valid).values()))
    starts = np.cumsum(counts) - counts
    means = table.mean(axis=0)
    spread = interval(bootstrap(np.add.reduceat(table, starts), counts))
    return Part(
        episodes=len(valid),
        void=len(outcomes) - len(valid),
        reward=float(means[0]),
        metrics=dict(zip(names, map(float, means[1:]), strict=True)),
        questions=len(counts),
        intervals=dict(zip(["reward", *names], spread, strict=True)),
    )


def _pass_at(
    by_question: Sequence[Sequence[Outcome]], metric: str, samples: int
) -> dict[str, Estimate]:
    correct = [
        [o.score(metric) > CORRECT_THRESHOLD for o in each if not o.void] for each in by_question
    ]
    sizes = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    found: dict[str, Estimate] = {}
    for k in [*sizes, samples]:
        scores = [pass_at_k(len(each), sum(each), k) for each in correct if len(each) >= k]
        if scores:
            [spread] = interval(bootstrap(np.array(scores)[:, None], np.ones(len(scores))))
            found[str(k)] = Estimate(float(np.mean(scores)), spread, len(scores))
    return found


def _majority(samples: Sequence[Outcome]) -> Outcome | None:
    """The first episode with the prediction that most samples of a question made."""
    predicted = [(" ".join((o.prediction or "").lower().split()), o) for o in samples if not o.void]
    if all(o.prediction is None for _, o in predicted):
        return None
    votes = Counter(text for text, _ in predicted if text)
    winner = votes.most_common(1)[0][0] if votes else ""  # the first seen wins a tie
    return next(o for text, o in predicted if text == winner)


def tables(summary: Summary) -> list[Table]:
    """Tables of the summary for a terminal: all questions, then one table per kind of strata.

    Strata with a single value are left out.
    """
    names = ["reward", *summary.metrics]
    whole: Any = summary  # has the fields of a Part
    columns: dict[str, Part] = {"all": whole}
    if summary.majority is not None:
        columns[f"majority of {summary.samples}"] = summary.majority
    first = _table("", columns, names)
    for metric, estimates in summary.pass_at.items():
        for k, estimate in estimates.items():
            first.add_row(
                Text(printable(f"{metric} pass@{k}")), _cell(estimate.mean, estimate.interval)
            )
    several = {name: parts for name, parts in summary.strata.items() if len(parts) > 1}
    return [first, *(_table(name, parts, names) for name, parts in several.items())]


def print_tables(*shown: Table) -> None:
    """Print tables, in their full width if standard output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(*shown, sep="\n")


def _table(title: str, columns: Mapping[str, Part], names: Sequence[str]) -> Table:
    table = Table(title=Text(printable(f"by {title}")) if title else None, title_justify="left")
    table.add_column("mean, 95 % interval", overflow="fold")
    for name in columns:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for count in ("questions", "episodes", "void"):
        table.add_row(count, *(str(getattr(part, count)) for part in columns.values()))
    for name in names:
        table.add_row(Text(printable(name)), *(_mean(name, part) for part in columns.values()))
    return table


def _mean(name: str, part: Part) -> Text:
    mean = part.reward if name == "reward" else part.metrics.get(name, 0.0)
    return _cell(mean, part.intervals[name]) if name in part.intervals else Text("–")


def _cell(mean: float, spread: Interval) -> Text:
    low, high = map(_digits, spread)
    return Text(f"{_digits(mean)} [{low},{high}]")  # a narrow terminal wraps the interval


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
