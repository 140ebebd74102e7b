"""Grades of questions, and demonstrations, from the predictions of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from research_agent.cli import main
from research_agent.errors import ConfigError
from research_agent.evaluation.difficulty import Grade, demonstrations, grades, write_grades


def record(question: int, sample: int, em: float, **more: Any) -> dict[str, Any]:
    said = f"{question}.{sample}"
    segments = [("prompt", "Q"), ("action", "<a>"), ("observation", "<o>"), ("action", said)]
    return {
        "episode": question,
        "sample": sample,
        "reward": em / 2,
        "truncated": False,
        "void": False,
        "metrics": {"f1": 1.0, "em": em, "turns": 2},
        "segments": [{"provenance": p, "text": t, "tokens": 1} for p, t in segments],
        "info": {"question_id": f"q{question}"},
        **more,
    }


def of(*rights: str) -> list[dict[str, Any]]:
    """Records of questions; each has a sample a character: 1 right, 0 wrong, v void."""
    return [
        record(question, sample, float(each == "1"), void=each == "v")
        for question, each_question in enumerate(rights)
        for sample, each in enumerate(each_question)
    ]


def names(found: Sequence[Grade]) -> list[str]:
    return [grade.grade for grade in found]


def test_grades_are_shares_of_right_samples() -> None:
    found = grades(of("111", "110", "1100", "100", "000", "1v", "vv"))
    assert found[1] == Grade("q1", correct=2, samples=3, grade="easy")
    assert names(found) == ["easy", "easy", "medium", "hard", "hard", "easy"]  # the void one: none
    assert names(grades(of("110", "100"), easy=0.7, hard=0.2)) == ["medium", "medium"]
    assert names(grades(of("000"), metric="f1")) == ["easy"]
    assert names(grades(of("111"), metric="reward")) == ["hard"]  # .5 is not right
    numbered = [record(n, 0, 1.0, info={"question_id": n}) for n in range(2)]
    assert [grade.question_id for grade in grades(numbered)] == ["0", "1"]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--hard 0\.5 and --easy 0\.5"):
        grades(of("1"), easy=0.5, hard=0.5)
    with pytest.raises(ConfigError, match="known: f1, em, turns"):
        grades(of("1"), metric="cem")
    for each in (0, -1):
        with pytest.raises(ConfigError, match=f"--each {each} keeps no episode; give at least 1"):
            demonstrations(of("1"), each=each)
    with pytest.raises(ConfigError, match="no question_id"):
        grades([record(0, 0, 1.0, info={})])


def test_an_evaluation_whose_episodes_are_all_void_has_no_grades(tmp_path: Path) -> None:
    lines = [json.dumps(each) + "\n" for each in of("vv", "v")]
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    with pytest.raises(ConfigError, match=r"all 3 episodes of .* are void.*; evaluate again"):
        write_grades(tmp_path, tmp_path / "grades.jsonl")
    assert not (tmp_path / "grades.jsonl").exists()


def test_right_episodes_become_demonstrations() -> None:
    records = [*of("0110", "v1", "00"), record(9, 0, 1.0, truncated=True)]
    first, second = demonstrations(records)
    assert first == [("prompt", "Q"), ("action", "<a>"), ("observation", "<o>"), ("action", "0.1")]
    assert second[-1] == ("action", "1.1")
    assert [d[-1][1] for d in demonstrations(records, each=2)] == ["0.1", "0.2", "1.1"]


def test_calls_of_tools_are_refused_where_the_ends_of_turns_are_not_known() -> None:
    framed, listing = record(3, 0, 1.0), record(3, 0, 1.0)
    framed["segments"][2]["info"] = {"chat_markup": ["<|im_end|>"]}
    listing["segments"][0]["tools"] = [{"type": "function"}]
    for each in (framed, listing):
        with pytest.raises(ConfigError, match=r"episode 3 calls tools, .*ended its turns: an endp"):
            demonstrations([each])
        for segment in each["segments"][1::2]:
            segment["end"] = "<|im_end|>"
        [parts] = demonstrations([each])
        assert parts[1] == ("action", {"text": "<a>", "end": "<|im_end|>"})


def test_from_an_evaluation_to_grades_and_to_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "eval --env research_env:ReSearch-MiniWorld-v0 --split dev --limit 6 --samples-per-task 4"
    )
    words += " --env-args template=question top_k=1 --temperature 1 --max-turn-tokens 64 --quiet"
    main([*words.split(), "--model", "miniworld-starter", "--output", str(tmp_path / "eval")])
    capsys.readouterr()

    main(["grade", str(tmp_path / "eval"), "--output", str(tmp_path / "grades.jsonl"), "--json"])
    counts = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "grades.jsonl").read_text().splitlines()]
    assert sum(counts.values()) == len(lines) == 6
    assert {line["samples"] for line in lines} == {4}

    file = tmp_path / "demonstrations.jsonl"
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "eval"), "--output", str(file), "--metric", "nothing"])
    assert "known: em" in capsys.readouterr().err
    main(["sample", str(tmp_path / "eval"), "--output", str(file), "--metric", "format"])
    assert "episodes" in capsys.readouterr().out
    learn = ["sft", "own", "--demonstrations", str(file), "--count", "4", "--batch", "2", "--quiet"]
    main([*learn, "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").exists()
