from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research_agent.cli import main
from research_agent.errors import PredictionsError
from research_agent.evaluation.compare import compare


def record(
    id_: str, metrics: Mapping[str, float], sample: int = 0, *, void: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "episode": 0,
        "sample": sample,
        "reward": 0.0,
        "void": void,
        "metrics": dict(metrics),
        "segments": [{"provenance": "action", "text": "x", "tokens": 3}],
        "info": {"question_id": id_, "question": f"{id_}?"} | more,
    }


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def em(path: Path, marks: str) -> Path:
    """Question q0, q1, ... right where the mark is +, void where it is 0."""
    records = [
        record(f"q{i}", {"em": float(mark == "+")}, void=mark == "0")
        for i, mark in enumerate(marks)
    ]
    return write(path, records)


def test_counts_and_mcnemar_by_hand(tmp_path: Path) -> None:
    a = em(tmp_path / "a.jsonl", "++++----------")
    b = em(tmp_path / "b.jsonl", "+++-++++++++--")
    found = compare(a, b)
    test = found.mcnemar
    assert (test.metric, test.both, test.only_a, test.only_b, test.neither) == ("em", 3, 1, 8, 2)
    assert test.p == 2 * (1 + 9) / 2**9
    of_em = found.metrics["em"]
    assert (of_em.a, of_em.b) == (4 / 14, 11 / 14)
    assert of_em.difference == pytest.approx(0.5)
    assert 0 < of_em.interval[0] < 0.5 < of_em.interval[1] < 1
    assert 0 < of_em.p < 0.05
    assert list(found.metrics) == ["reward", "em", "tokens", "turns"]
    assert (found.metrics["tokens"].a, found.metrics["tokens"].p) == (3.0, 1.0)


def test_the_same_file_differs_in_nothing(tmp_path: Path) -> None:
    a = em(tmp_path / "a.jsonl", "++--")
    found = compare(a, a)
    assert found.mcnemar.p == 1.0
    same = found.metrics["em"]
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_bootstrap_is_paired(tmp_path: Path) -> None:
    # The questions differ widely, B is always 0.1 better: unpaired, nothing could be seen.
    scores = [i / 20 for i in range(18)]
    a = write(tmp_path / "a", [record(f"q{i}", {"f1": s}) for i, s in enumerate(scores)])
    b = write(tmp_path / "b", [record(f"q{i}", {"f1": s + 0.1}) for i, s in enumerate(scores)])
    f1 = compare(a, b).metrics["f1"]
    assert f1.interval == pytest.approx((0.1, 0.1))
    assert f1.p == pytest.approx(2 / 10_001)


@pytest.mark.parametrize(("questions", "p"), [(1, 1.0), (2, 0.5), (5, 1 / 16), (16, 2 / 10_001)])
def test_few_questions_that_all_differ_show_no_more_than_their_number(
    tmp_path: Path, questions: int, p: float
) -> None:
    a, b = (em(tmp_path / f"{mark}.jsonl", mark * questions) for mark in "-+")
    found = compare(a, b)
    assert found.metrics["em"].p == pytest.approx(p)
    assert found.mcnemar.p == 2 ** (1 - questions)


def test_a_mean_that_is_not_finite_has_no_p(tmp_path: Path) -> None:
    a, b = (
        write(tmp_path / name, [record(f"q{i}", {"f1": score}) for i in range(20)])
        for name, score in (("a", 0.5), ("b", float("nan")))
    )
    assert math.isnan(compare(a, b).metrics["f1"].p)


def test_the_bootstrap_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    numbers = random.Random(3)
    of_a, of_b = ({(q, s): numbers.random() for q in range(9) for s in range(2)} for _ in range(2))
    a = write(tmp_path / "a", [record(f"q{q}", {"f1": v}, s) for (q, s), v in of_a.items()])
    # The order of the lines says nothing.
    b = write(
        tmp_path / "b", [record(f"q{q}", {"f1": v}, s) for (q, s), v in reversed(of_b.items())]
    )
    found = compare(a, b, seed=7).metrics["f1"]

    generator = np.random.default_rng(7)
    means = []
    for drawn in generator.integers(9, size=(10_000, 9)):
        differences = [of_b[q, s] - of_a[q, s] for q in drawn for s in range(2)]
        means.append(sum(differences) / len(differences))
    assert found.interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    far_side = min(sum(m <= 0 for m in means), sum(m >= 0 for m in means))
    assert found.p == pytest.approx(min(1, 2 * (far_side + 1) / 10_001))
    assert found.difference == pytest.approx((sum(of_b.values()) - sum(of_a.values())) / 18)


def test_a_question_is_right_where_most_of_its_samples_are(tmp_path: Path) -> None:
    marks = {"q0": "++-", "q1": "+--", "q2": "+++"}
    a = write(
        tmp_path / "a",
        [record(q, {"em": float(m == "+")}, i) for q in marks for i, m in enumerate(marks[q])],
    )
    b = write(tmp_path / "b", [record(q, {"em": 1.0}, i) for q in marks for i in range(3)])
    found = compare(a, b)
    assert (found.questions, found.pairs) == (3, 9)
    assert (found.mcnemar.both, found.mcnemar.only_b) == (2, 1)
    assert found.metrics["em"].a == pytest.approx(6 / 9)


def test_another_metric_counts_as_right_above_a_half(tmp_path: Path) -> None:
    f1s = [0.5, 0.51, 0.9]
    a = write(tmp_path / "a", [record(f"q{i}", {"em": 0, "f1": v}) for i, v in enumerate(f1s)])
    b = write(tmp_path / "b", [record(f"q{i}", {"em": 0, "f1": 1.0}) for i in range(3)])
    test = compare(a, b, metric="f1").mcnemar
    assert (test.metric, test.both, test.only_b) == ("f1", 2, 1)
    assert compare(a, b).mcnemar.neither == 3
    with pytest.raises(PredictionsError, match="no metric 'acc'; there is reward, em, f1, tokens"):
        compare(a, b, metric="acc")


def test_void_episodes_are_counted_and_left_out_with_their_partners(tmp_path: Path) -> None:
    a = em(tmp_path / "a.jsonl", "++-0-")
    b = em(tmp_path / "b.jsonl", "0+++-")
    found = compare(a, b)
    assert (found.questions, found.pairs, found.void_a, found.void_b) == (3, 3, 1, 1)
    test = found.mcnemar
    assert (test.both, test.only_a, test.only_b, test.neither) == (1, 0, 1, 1)
    assert found.metrics["em"].a == pytest.approx(1 / 3)
    with pytest.raises(PredictionsError, match="has a void one"):
        compare(em(tmp_path / "c", "0+"), em(tmp_path / "d", "+0"))


def test_files_over_different_questions_are_refused(tmp_path: Path) -> None:
    a = em(tmp_path / "a.jsonl", "+++++++")
    b = em(tmp_path / "b.jsonl", "++")
    with pytest.raises(PredictionsError) as caught:
        compare(a, b)
    message = str(caught.value)
    assert f"5 are in {a} only (q2, q3, q4, ...)" in message
    assert str(b) not in message
    c = write(tmp_path / "c.jsonl", [record("q0", {}), record("other", {})])
    with pytest.raises(PredictionsError) as caught:
        compare(b, c)
    assert f"1 are in {b} only (q1) and 1 are in {c} only (other)" in str(caught.value)


def test_other_samples_and_other_texts_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [record("q0", {}), record("q1", {})])
    b = write(tmp_path / "b", [record("q0", {}), record("q1", {}), record("q1", {}, 1)])
    with pytest.raises(PredictionsError, match=r"1 questions \(q1\) have other samples"):
        compare(a, b)
    c = write(tmp_path / "c", [record("q0", {}), record("q1", {}, question="Which?")])
    with pytest.raises(PredictionsError, match=r"1 questions \(q1\) have the same id .* another"):
        compare(a, c)
    with pytest.raises(PredictionsError, match="holds no episode"):
        compare(a, write(tmp_path / "d", []))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, marks in (("a", "++--0"), ("b", "-++++")):
        (tmp_path / name).mkdir()
        em(tmp_path / name / "predictions.jsonl", marks)
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert "correct by em: both 1, only A 1, only B 2, neither 0; McNemar's exact p = 1" in shown
    assert "4 questions, 4 pairs of episodes" in shown
    assert "1 void episodes of A and 0 of B" in shown
    assert "+0.250" in shown
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--metric", "em", "--json"])
    [line] = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["metrics"]["em"]["difference"] == 0.25
    assert told["mcnemar"] == {
        "metric": "em",
        "both": 1,
        "only_a": 1,
        "only_b": 2,
        "neither": 0,
        "p": 1.0,
    }
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert "there is no file" in capsys.readouterr().err
