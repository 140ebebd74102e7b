"""The oracle benchmark: its queries, its sums, and its numbers on real questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.oracle import gold_plan, main, measure, play, sub_questions
from research_env import Dataset, Hit, Hop, Passage, Question
from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, RetrievalError
from tests.research_env.fakes import ListCorpus


class ByTitle:
    """Finds the passages whose title is in the query; fails when asked for trouble."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self.queries: list[str] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.queries += queries
        return [
            RetrievalError("down")
            if "trouble" in query
            else [Hit(p, 1.0) for p in self.passages if p.title in query][:top_k]
            for query in queries
        ]

    def close(self) -> None: ...


PASSAGES = tuple(Passage(f"p{title}", title, f"about {title}") for title in "ABCD")
TWO = Question(
    "two",
    "who is B of A?",
    ("Ann", "Anna"),
    ("pA", "pB"),
    2,
    decomposition=(Hop("A >> b", "B", "pA"), Hop("#1 >> c", "Ann", "pB")),
)
FOUR = Question(
    "four",
    "D?",
    ("Bob",),
    ("pA", "pB", "pC", "pD"),
    4,
    decomposition=(
        Hop("A", "x1"), Hop("nothing", "x2"), Hop("#2 and C B", "x3"), Hop("D #1 #3", "Bob")
    ),
)  # fmt: skip


def environment(questions: Sequence[Question]) -> tuple[SearchQAEnv, ByTitle]:
    engine = ByTitle(PASSAGES)
    data = Dataset("test", questions, ListCorpus(PASSAGES))
    return SearchQAEnv(dataset=data, retriever=engine), engine


def test_sub_questions_have_earlier_answers_filled_in() -> None:
    assert sub_questions(TWO) == ["A >> b", "B >> c"]
    assert sub_questions(FOUR) == ["A", "nothing", "x2 and C B", "D x1 x3"]


def test_ten_hops_are_told_apart_from_one() -> None:
    hops = (*(Hop(f"q{i}", f"a{i}") for i in range(1, 11)), Hop("#10 #1", "end"))
    assert sub_questions(Question("q", "q", ("end",), decomposition=hops))[-1] == "a10 a1"


def test_titles_are_the_queries_where_there_is_no_decomposition() -> None:
    bare = Question("bare", "?", ("x",), ("pC", "pA"))
    plan = gold_plan([TWO, bare], ListCorpus(PASSAGES))
    assert plan(bare) == ["C", "A"]
    assert plan(TWO) == ["A", "B"]
    assert gold_plan([TWO], ListCorpus(PASSAGES))(TWO) == ["A >> b", "B >> c"]


def test_questions_without_gold_passages_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'none' names no gold passages"):
        gold_plan([TWO, Question("none", "?", ("x",))], ListCorpus(PASSAGES))


def test_recall_after_each_search_is_averaged_by_hops_and_over_all() -> None:
    env, engine = environment([TWO, FOUR])
    summary = measure(env, [TWO, FOUR], sub_questions)
    assert engine.queries == ["A >> b", "B >> c", "A", "nothing", "x2 and C B", "D x1 x3"]
    assert (summary.questions, summary.errors) == (2, 0)
    assert (summary.mean_reward, summary.least_reward) == (1.0, 1.0)
    assert summary.recall == {
        "2": [0.5, 1.0],
        "4": [0.25, 0.25, 0.75, 1.0],
        "all": [0.375, 0.625, 0.875, 1.0],  # the shorter one keeps its 1.0
    }


def test_an_engine_that_fails_is_an_error_of_that_episode_alone() -> None:
    bad = Question("bad", "trouble", ("x",), ("pA",), 2)
    env, _ = environment([bad, TWO])
    summary = measure(env, [bad, TWO], lambda question: [question.question])
    assert (summary.errors, summary.least_reward, summary.mean_reward) == (1, 0.0, 0.5)
    assert summary.recall["all"] == [0.5]


def test_a_question_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    env, _ = environment([TWO])
    assert play(env, FOUR, ["A"]).failed
    assert "'four'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("ReSearch-MuSiQue-v0", (459, 0.9060, 0.4517)),
        ("ReSearch-HotpotQA-v0", (863, 0.9890, 0.7509)),
        ("ReSearch-2Wiki-v0", (264, 0.9915, 0.6780)),
    ],
)
@pytest.mark.usefixtures("data_and_cache")
def test_real_questions_are_all_answered_and_their_passages_found(
    env: str, expected: tuple[int, float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The one-search recall on MuSiQue, .4517, is that of a real Elasticsearch server."""
    assert main(env=env, json=True) == 0
    result = json.loads(capsys.readouterr().out)
    questions, gold, single = expected
    for way, recall in (("gold queries", gold), ("one search", single)):
        assert result[way]["questions"] == questions
        assert (result[way]["errors"], result[way]["least_reward"]) == (0, 1.0)
        assert result[way]["recall"]["all"][-1] == pytest.approx(recall, abs=5e-4)


@pytest.fixture
def data_and_cache(research_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))


def test_the_tables_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    assert main(env="ReSearch-MiniWorld-v0", limit=20) == 0
    printed = capsys.readouterr().out
    assert "gold queries: support recall after each search" in printed
    assert "20 questions, reward 1.0000 (least 1.0000), errors 0" in printed


def test_a_set_without_gold_passages_is_refused(
    research_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    with pytest.raises(ConfigurationError, match="no corpus of its own"):
        main(env="ReSearch-Bamboogle-v0", split="test")
