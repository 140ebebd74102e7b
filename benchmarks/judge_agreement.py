"""How far exact match, F1 and cover exact match agree with a judge that none of us wrote.

    python -m benchmarks.judge_agreement --data ../shared/data

The 625 recorded trajectories of R1-Searcher-Qwen-7B (500 on HotpotQA, 125 on Bamboogle) come with
a verdict on each prediction by a GPT-4o judge (their field is gpt4o_output; the code beside them,
``evaluation/metric_calc_gpt_as_judge.py``, asks gpt-4o-mini). Each metric of this project decides
too: exact match, F1 above 0.5, and cover exact match, with SQuAD's normalization and with
R1-Searcher's own. Printed for each: the fraction of predictions on which metric and judge agree,
Cohen's kappa (agreement above chance), and how they differ: a false positive is correct by the
metric and incorrect by the judge, a false negative the reverse.
"""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

from research_env.errors import DataError, DataNotFoundError, ResearchEnvError
from research_env.metrics import (
    cover_exact_match,
    exact_match,
    f1,
    normalize,
    normalize_r1_searcher,
)

FILES = {"HotpotQA": "hotpotqa_qwen", "Bamboogle": "bamboogle_qwen"}
NORMALIZERS = {"SQuAD": normalize, "R1-Searcher": normalize_r1_searcher}

Metric = Callable[[str, Sequence[str], Callable[[str], str]], bool]
METRICS: dict[str, Metric] = {
    "EM": lambda prediction, answers, norm: exact_match(prediction, answers, norm) == 1.0,
    "F1 > 0.5": lambda prediction, answers, norm: f1(prediction, answers, norm) > 0.5,
    "CEM": lambda prediction, answers, norm: cover_exact_match(prediction, answers, norm) == 1.0,
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A prediction and what the judge said of it."""

    prediction: str
    answers: tuple[str, ...]
    correct: bool


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


def read_judged(data: str | Path | None = None) -> dict[str, list[Judged]]:
    """The recorded predictions of each data set.

    Args:
        data: the folder that holds ``r1searcher_trajectories``; by default ``RESEARCH_DATA``.

    Raises:
        DataNotFoundError: there is no such folder, or a file is missing in it.
        DataError: a verdict that is neither True nor False.
    """
    named = data or os.environ.get("RESEARCH_DATA")
    folder = Path(named or ".") / "r1searcher_trajectories"
    judged: dict[str, list[Judged]] = {}
    for name, file in FILES.items():
        path = folder / f"{file}.jsonl.gz"
        if named is None or not path.is_file():
            raise DataNotFoundError(
                f"no file {path}; give --data, or set RESEARCH_DATA, to the folder that holds it"
            )
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            judged[name] = [_judged(loads(line)) for line in lines]
    return judged


def agreement(
    judged: Sequence[Judged], metric: Metric, normalizer: Callable[[str], str]
) -> Agreement:
    """Count in how many predictions a metric says what the judge says."""
    said = [(metric(j.prediction, j.answers, normalizer), j.correct) for j in judged]
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
    judged = read_judged(data)
    judged |= {"both": [each for some in judged.values() for each in some]}
    rows: list[dict[str, Any]] = []
    for name, predictions in judged.items():
        for metric, is_correct in METRICS.items():
            for normalizer, norm in NORMALIZERS.items():
                found = agreement(predictions, is_correct, norm)
                row: dict[str, Any] = {"data set": name, "metric": metric}
                row |= {
                    "normalization": normalizer,
                    "n": found.n,
                    "accuracy": found.accuracy,
                    "kappa": found.kappa,
                }
                rows.append(row | asdict(found))
    if json:
        print(dumps(rows))
    else:
        show(rows)
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table; ``correct`` and ``judge`` are the fractions that each calls correct."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, padding=(0, 1, 0, 0))  # fits into 80 columns
    for column in ("data set", "metric", "normalization"):
        table.add_column(column)
    for column in ("n", "correct", "judge", "agree", "kappa", "false +", "false -"):
        table.add_column(column, justify="right")
    for row in rows:
        n, both = row["n"], row["both_correct"]
        table.add_row(
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
        )
    Console().print(table)


def _judged(record: dict[str, Any]) -> Judged:
    if record["judge"] not in ("True", "False"):
        raise DataError(f"{record['id']}: the verdict {record['judge']!r} is not True or False")
    return Judged(record["prediction"], tuple(record["answers"]), record["judge"] == "True")


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(tyro.cli(main, prog="python -m benchmarks.judge_agreement"))
    except ResearchEnvError as error:
        print(f"benchmarks.judge_agreement: {error}", file=sys.stderr)
        sys.exit(2)
