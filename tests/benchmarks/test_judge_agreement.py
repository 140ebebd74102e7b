"""Agreement of metrics with a judge: predictions worked by hand, and the recorded ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judge_agreement import Agreement, main
from benchmarks.recorded import read_trajectories
from research_env.errors import DataError, DataNotFoundError

HOTPOTQA = [
    (" Paris ", "Paris", "True"),  # right by all
    ("Paris, France", "Paris", "False"),  # F1 2/3, and covered: right by F1 and CEM alone
    ("acid house", "acid-house", "True"),  # right only where the hyphen becomes a space
    ("Rome", "Paris", "False"),  # wrong by all
    ("Paris Lyon Nice", "Paris", "True"),  # F1 exactly 1/2, which is not above; covered
]
BAMBOOGLE = [("Paris", "Paris", "True")]


def write(folder: Path, **rows: list[tuple[str, str, str]]) -> Path:
    inside = folder / "r1searcher_trajectories"
    inside.mkdir(exist_ok=True)
    for name, each in rows.items():
        with gzip.open(inside / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, (prediction, answer, judge) in enumerate(each):
                record = {"id": f"{name}_{number}", "question": "?", "answers": [answer]}
                record |= {"prediction": prediction, "judge": judge, "segments": []}
                file.write(json.dumps(record) + "\n")
    return folder


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], Any]:
    assert main(data=str(folder), json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    return {(row["data set"], row["metric"], row["normalization"]): row for row in rows}


def cases(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return (
        row["both_correct"],
        row["false_positives"],
        row["false_negatives"],
        row["both_incorrect"],
    )


@pytest.mark.parametrize(
    ("metric", "normalization", "expected"),
    [
        ("EM", "SQuAD", (1, 0, 2, 2)),
        ("F1 > 0.5", "SQuAD", (1, 1, 2, 1)),
        ("CEM", "SQuAD", (2, 1, 1, 1)),
        ("EM", "R1-Searcher", (2, 0, 1, 2)),
        ("F1 > 0.5", "R1-Searcher", (2, 1, 1, 1)),
        ("CEM", "R1-Searcher", (3, 1, 0, 1)),
    ],
)
def test_the_cases_by_hand(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    normalization: str,
    expected: tuple[int, int, int, int],
) -> None:
    rows = table(write(tmp_path, hotpotqa_qwen=HOTPOTQA, bamboogle_qwen=BAMBOOGLE), capsys)
    assert cases(rows["HotpotQA", metric, normalization]) == expected
    assert cases(rows["Bamboogle", metric, normalization]) == (1, 0, 0, 0)
    right, *others = expected
    assert cases(rows["both", metric, normalization]) == (right + 1, *others)


def test_accuracy_and_kappa_by_hand() -> None:
    # metric right 1/5, judge right 3/5: by chance 3/25 + 8/25 = 11/25
    em = Agreement(1, 0, 2, 2)
    assert (em.n, em.accuracy) == (5, 0.6)
    assert em.kappa == pytest.approx((15 / 25 - 11 / 25) / (14 / 25))
    # metric right 2/5, judge right 3/5: by chance 6/25 + 6/25
    f1 = Agreement(1, 1, 2, 1)
    assert f1.accuracy == 0.4
    assert f1.kappa == pytest.approx(-2 / 13)
    assert Agreement(2, 0, 0, 3).kappa == pytest.approx(1.0)
    assert Agreement(1, 0, 0, 0).kappa is None
    assert Agreement(0, 0, 0, 4).kappa is None
    assert Agreement(0, 2, 0, 2).kappa == pytest.approx(0.0)


def test_the_recorded_verdicts(research_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """375 of 500 and 68 of 125 are right, says the judge."""
    rows = table(research_data, capsys)
    for name, n, right in (("HotpotQA", 500, 375), ("Bamboogle", 125, 68), ("both", 625, 443)):
        for metric in ("EM", "F1 > 0.5", "CEM"):
            row = rows[name, metric, "SQuAD"]
            assert row["n"] == n
            assert row["both_correct"] + row["false_negatives"] == right
            # A check of the metrics: none is far from a judge that we did not write
            assert row["kappa"] > 0.6
            assert row["false_positives"] <= 0.05 * n
    main(data=str(research_data))
    shown = capsys.readouterr().out
    assert "Bamboogle" in shown
    assert "0.750" in shown


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESEARCH_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match="give --data, or set RESEARCH_DATA"):
        read_trajectories()
    with pytest.raises(DataNotFoundError, match=r"no folder .*r1searcher_trajectories"):
        read_trajectories(tmp_path)
    write(tmp_path, hotpotqa_qwen=HOTPOTQA)
    with pytest.raises(DataNotFoundError, match="bamboogle"):
        read_trajectories(tmp_path)
    write(tmp_path, bamboogle_qwen=[("Paris", "Paris", "I think so")])
    with pytest.raises(DataError, match="bamboogle_qwen_0: the verdict 'I think so'"):
        read_trajectories(tmp_path)
