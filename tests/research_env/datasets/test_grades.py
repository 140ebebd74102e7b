"""Questions by how hard a model found them: the file that ``research-agent grade`` writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import gymnasium as gym
import pytest

import research_env  # noqa: F401  (registers the ids)
from research_env.datasets import load_dataset
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
    UnknownNameError,
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"id": f"q{i}", "question": f"What is {i}?", "answers": [str(i)]} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def grades(tmp_path: Path) -> Path:
    path = tmp_path / "grades.jsonl"
    names = ["easy", "easy", "easy", "medium", "medium", "hard", "hard", "hard"]  # q8 has none
    lines = [{"question_id": f"q{i}", "grade": name, "right": 1} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ids(questions: Path, grades: Path, grade: str) -> list[str]:
    data = load_dataset("custom", split="train", questions=questions, grades=grades, grade=grade)
    return [question.id for question in data.questions]


def test_questions_of_a_grade(questions: Path, grades: Path) -> None:
    assert ids(questions, grades, "medium") == ["q3", "q4"]
    assert sorted(ids(questions, grades, "easy+hard")) == ["q0", "q1", "q2", "q5", "q6", "q7"]
    mixed = ids(questions, grades, "medium:1+hard:2")  # two of the hard ones for each medium one
    assert Counter("hard" if id_ in ("q5", "q6", "q7") else "medium" for id_ in mixed) == {
        "hard": 2,
        "medium": 1,
    }


def test_grades_are_arguments_of_an_environment(
    questions: Path, grades: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "p", "title": "", "text": "Nothing."}) + "\n")
    env = gym.make(
        "SearchQA-v0",
        questions=str(questions),
        corpus=str(corpus),
        retriever=f"embedded:{tmp_path / 'index'}",
        grades=str(grades),
        grade="hard",
    )
    asked = {env.reset(seed=0, options={"episode": n})[1]["question_id"] for n in range(3)}
    assert asked == {"q5", "q6", "q7"}
    env.close()


def test_what_cannot_be_used_is_refused(questions: Path, grades: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="easy, hard, medium"):
        ids(questions, grades, "impossible")
    with pytest.raises(DataNotFoundError, match="research-agent grade"):
        ids(questions, tmp_path / "none.jsonl", "easy")
    with pytest.raises(ConfigurationError, match="go together"):
        load_dataset("custom", split="train", questions=questions, grade="easy")
    other = tmp_path / "other.jsonl"
    other.write_text('{"question_id": "q0", "grade": "hard"}\n')
    said = r"no question in .*other\.jsonl is easy \(hard 1\); .* such as 'medium:1\+hard:2'"
    with pytest.raises(ConfigurationError, match=said):
        ids(questions, other, "easy+hard")
    with pytest.raises(ConfigurationError, match=r"from 1 on, as in 'medium:1\+hard:2'"):
        ids(questions, other, "hard:0")
    other.write_text('{"question_id": "x", "grade": "easy"}\n')
    with pytest.raises(ConfigurationError, match="were they made for this data set"):
        ids(questions, other, "easy")
    other.write_text('{"question_id": "x", "grade": "easy"}\n{"question_id"')
    with pytest.raises(DataError, match=r"other.jsonl:2"):
        ids(questions, other, "easy")
