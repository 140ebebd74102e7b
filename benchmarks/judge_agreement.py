"""How far exact match, F1 and cover exact match agree with a judge that none of us wrote.

    python -m benchmarks.judge_agreement --data ../shared/data

The judge is that of the recorded trajectories (:mod:`benchmarks.recorded`). Each metric of this
project decides too: exact match, F1 above 0.5, and cover exact match, with SQuAD's normalization
and with R1-Searcher's own. Printed for each: the fraction of predictions on which metric and judge
agree, Cohen's kappa (agreement above chance), and how they differ: a false positive is correct by
the metric and incorrect by the judge, a false negative the reverse.
"""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.recorded import FILES, RecordedTrajectory, read_trajectories
from benchmarks.tables import print_table
from research_env.errors import ResearchEnvError
from research_env.metrics import (
    cover_exact_match,
    exact_match,
    f1,
    normalize,
    normalize_r1_searcher,
)

NORMALIZERS = {"SQuAD": normalize, "R1-Searcher": normalize_r1_searcher}

Metric = Callable[[str, Sequence[str], Callable[[str], str]], bool]
METRICS: dict[str, Metric] = {
    "EM": lambda prediction, answers, norm: exact_match(prediction, answers, norm) == 1.0,
    "F1 > 0.5": lambda prediction, answers, norm: f1(prediction, answers, norm) > 0.5,
    "CEM": lambda prediction, answers, norm: cover_exact_match(prediction, answers, norm) == 1.0,
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """A metric beside the judge: how many predictions each of the four cases has."""

    both_correct: int
    false_positives: int  # correct by the metric alone
    false_negatives: int  # correct by the judge alone
    both_incorrect: int

    @property
    def n(self) -> int:
        """All predictions."""
        return self.both_correct + self.false_positives + self.false_negatives + self.both_incorrect

    @property
    def accuracy(self) -> float:
        """The share on which they agree."""
        return (self.both_correct + self.both_incorrect) / self.n

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, ``(p_o - p_e) / (1 - p_e)``; None where chance alone agrees everywhere.

        ``p_o`` is the accuracy, ``p_e`` what two raters of these shares would agree on by chance
        (J. Cohen, A Coefficient of Agreement for Nominal Scales, 1960).
        """
        metric = (self.both_correct + self.false_positives) / self.n
        judge = (self.both_correct + self.false_negatives) / self.n
        chance = metric * judge + (1 - metric) * (1 - judge)
        return None if chance == 1.0 else (self.accuracy - chance) / (1 - chance)


def agreement(
    judged: Sequence[RecordedTrajectory], metric: Metric, normalizer: Callable[[str], str]
) -> Agreement:
    """Count in how many predictions a metric says what the judge says."""
    said = [(metric(j.prediction, j.answers, normalizer), j.is_correct) for j in judged]
    return Agreement(
        said.count((True, True)),
        said.count((True, False)),
        said.count((False, True)),
        said.count((False, False)),
    )


def main(*, data: str | None = None, json: bool = False) -> int:
    """Print how far the metrics agree with the recorded verdicts.

    Args:
        data: the folder that holds r1searcher_trajectories; by default RESEARCH_DATA.
        json: print one line of JSON in place of the table.

    Returns:
        The exit status, 0.
    """
    every = read_trajectories(data)
    judged = {name: [each for each in every if each.dataset == name] for name in FILES}
    rows: list[dict[str, Any]] = []
    for name, predictions in (judged | {"both": every}).items():
        for metric, is_correct in METRICS.items():
            for normalization, normalizer in NORMALIZERS.items():
                found = agreement(predictions, is_correct, normalizer)
                row = {"data set": name, "metric": metric, "normalization": normalization}
                numbers = {"n": found.n, "accuracy": found.accuracy, "kappa": found.kappa}
                rows.append(row | numbers | asdict(found))
    if json:
        print(json_format.dumps(rows))
        return 0
    print_table(
        "each metric beside the judge; correct, judge: the fraction that each calls correct",
        ("data set", "metric", "normalization", "n", "correct", "judge", "agree", "kappa",
         "false positives", "false negatives"),
        [_cells(row) for row in rows],
    )  # fmt: skip
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    n, both = row["n"], row["both_correct"]
    return [
        row["data set"],
        row["metric"],
        row["normalization"],
        str(n),
        f"{(both + row['false_positives']) / n:.3f}",
        f"{(both + row['false_negatives']) / n:.3f}",
        f"{row['accuracy']:.3f}",
        "-" if row["kappa"] is None else f"{row['kappa']:.3f}",
        str(row["false_positives"]),
        str(row["false_negatives"]),
    ]


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(tyro.cli(main, prog="python -m benchmarks.judge_agreement"))
    except ResearchEnvError as error:
        print(f"benchmarks.judge_agreement: {error}", file=sys.stderr)
        sys.exit(2)
