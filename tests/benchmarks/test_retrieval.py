"""The benchmark of retrieval: its corpora, its sums, and a whole run over few passages."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import retrieval
from benchmarks.corpora import GeneratedCorpus, Together, model_queries, real_corpus
from benchmarks.retrieval import main, medians, recall
from research_env import Hit, Passage, Question
from research_env.datasets.files import FileCorpus
from research_env.errors import RetrievalError
from research_env.retrieval.bm25.analyzer import analyze


class Fixed:
    """Finds passages named a, b, c, ... for every query; fails when asked for trouble."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        hits = [Hit(Passage(name, "", ""), 1.0) for name in "abcdefghijkl"[:top_k]]
        return [RetrievalError("down") if query == "trouble" else hits for query in queries]

    def close(self) -> None:
        pass


def question(text: str, *gold: str) -> Question:
    return Question(text, text, ("x",), gold)


def test_recall_worked_by_hand() -> None:
    questions = [question("one", "a", "c"), question("two", "b"), question("three", "j", "z")]
    row = recall(Fixed(), questions)
    assert row == {
        "questions": 3,
        "recall@2": pytest.approx((0.5 + 1 + 0) / 3),
        "all@2": pytest.approx(1 / 3),
        "recall@5": pytest.approx((1 + 1 + 0) / 3),
        "all@5": pytest.approx(2 / 3),
        "recall@10": pytest.approx((1 + 1 + 0.5) / 3),
        "all@10": pytest.approx(2 / 3),
    }


def test_a_failed_search_is_no_recall() -> None:
    with pytest.raises(RetrievalError, match="down"):
        recall(Fixed(), [question("one", "a"), question("trouble", "a")])


def test_medians_leave_out_the_first_turn_and_take_turns() -> None:
    turns: list[str] = []
    found = medians({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 4
    assert set(found) == {"a", "b"}


def test_generated_passages_are_like_wikipedias() -> None:
    corpus = GeneratedCorpus(2_000)
    passages = list(corpus)
    assert passages == list(corpus)
    assert len({each.id for each in passages}) == len(corpus) == 2_000
    assert passages != list(GeneratedCorpus(2_000, seed=1))
    lengths = [len(each.text.split()) for each in passages]
    assert 80 < sum(lengths) / 2_000 < 120
    held = Counter(term for each in passages for term in set(analyze(each.text)))
    shares = sorted((count / 2_000 for count in held.values()), reverse=True)
    assert 0.1 < shares[10] < 0.6  # real passages: .1 to .3 for the commonest terms
    assert 0.002 < shares[1_000] < 0.02  # real passages: .007
    assert sum(count == 1 for count in held.values()) > len(held) / 4


def test_generated_queries_ask_for_passages_that_are_there() -> None:
    corpus = GeneratedCorpus(2_000)
    queries = corpus.queries(100)
    assert len(queries) == len(set(queries)) == 100
    titles = {word for each in corpus for word in each.title.split()}
    assert all(titles & set(re.findall(r"\w+", query)) for query in queries)
    assert all(3 <= len(query.split()) <= 14 for query in queries)


def test_a_prefix_of_a_generated_corpus_does_not_hang_on_its_size() -> None:
    assert list(islice(GeneratedCorpus(30_000), 5)) == list(islice(GeneratedCorpus(10_000), 5))


def test_corpora_together(tmp_path: Path) -> None:
    parts = []
    for name in ("a", "b"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"id": name, "title": "", "text": name}) + "\n")
        parts.append(FileCorpus(name, file))
    assert [each.id for each in Together(tuple(parts))] == ["a", "b"]
    assert Together(tuple(parts)).fingerprint() != Together(tuple(parts[::-1])).fingerprint()


def test_real_passages_and_queries(research_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    passages = list(real_corpus())
    assert len(passages) == len({each.id for each in passages}) == 8_335 + 11_357 + 9_616
    queries = model_queries()
    assert len(queries) == 1_303
    assert queries[0] == "Irish Home Rule Movement party campaigned"


@pytest.mark.slow
def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path))
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(retrieval, "THREADS", (1,))  # numba compiles bm25s anew for two
    monkeypatch.setattr(retrieval, "BATCHES", (16,))
    main(passages=2_000, build=1_000, rounds=1, json=True)
    output = capsys.readouterr().out
    tables = json.loads(output[output.index("{") :])
    race = tables["queries per second"]
    assert [(row["threads"], row["batch"]) for row in race] == [(1, 16)]
    for row in race:
        assert row["ours / bm25s"] == pytest.approx(row["ours"] / row["bm25s"])
    built = {row["system"]: row for row in tables["build"]}
    assert list(built) == ["embedded", "bm25s"]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 10 for row in built.values())
    assert all(row["disk_mb"] > 0.1 for row in built.values())


@pytest.mark.elasticsearch
def test_against_a_real_server(
    elasticsearch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = GeneratedCorpus(300)
    monkeypatch.setattr(retrieval, "RAW_BATCHES", (16,))
    rows = retrieval.against_raw(elasticsearch, corpus, corpus.queries(70), 1)
    assert len(rows) == 2
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
