"""What every retriever must do, whatever is behind it: one function per clause.

A test opens its engine over PASSAGES and gives a way to open it to each clause::

    @pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
    def test_contract(clause: Clause, ...) -> None:
        clause(lambda: open_retriever(url, None))

and shows by ``fails_in_place`` what happens when what is behind it is gone.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import Hit, Passage, Retriever
from research_env.retrieval.bm25.retriever import build_index
from tests.research_env.fakes import DATASET, search

PASSAGES = (
    Passage("a", "The Beatles", "The Beatles were an English rock band formed in Liverpool."),
    Passage("b", "Liverpool", "Liverpool is a city in England, on the river Mersey."),
    Passage("c", 'Rock "n" roll', "A rock is a stone.\nA rock, a rock! rock band"),
    Passage(
        "d", "Zürich", "<b>Zürich</b> is a city in Switzerland & has a \u2603 river \U0001f300."
    ),
    Passage("e", "River", "A river is water that flows. River river river."),
    Passage("f", "Oslo\tcity", '"Oslo" is a city in Norway; its river is the Akerselva.'),
    Passage("g", "Ringo Starr", "Ringo Starr played the drums in a rock band, The Beatles."),
)
WORDS = ("rock band from Liverpool", "city on a river", "Ringo")
"""Queries that must find something."""

HOSTILE = (
    "",
    " \t\n",
    "the",
    "\0",
    "rock\0band",
    "\ud800",
    "rock \udfff band \ud83d",
    "\ufeff\u202e\x1b[31m\x07\x7f",
    '") OR title:* AND NOT (rock~ /.*/ [a TO z] {!func} ^5 \\ "',
    '{"query": {"match_all": {}}}\n{"index": "*"}',
    "<script>alert(1)</script> ${jndi:ldap://localhost} %00 %s {0} ' OR 1=1 --",
    "\U0001f3b8 ロック バンド صخرة",
    "rock " * 5_000,
    "x" * 1_000_000,
    "rock band " * 100_000,
)
"""Texts that a model may write; each is a query like any other."""

Open = Callable[[], Retriever]
Clause = Callable[[Open], None]


@dataclass(frozen=True)
class ContractCorpus:
    """PASSAGES as a corpus."""

    name: str = "contract"

    def __iter__(self) -> Iterator[Passage]:
        return iter(PASSAGES)

    def fingerprint(self) -> str:
        return sha256(repr(PASSAGES).encode()).hexdigest()


def found(engine: Retriever, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
    """Return the hits for each query, and check that no query failed."""
    answers = engine.search(queries, top_k)
    assert len(answers) == len(queries)
    hits = []
    for query, answer in zip(queries, answers, strict=True):
        assert not isinstance(answer, RetrievalError), f"{query[:40]!r}: {answer}"
        hits.append(answer)
    return hits


def hits_are_passages_best_first_and_only_once(opened: Open) -> None:
    engine = opened()
    known = {passage.id: passage for passage in PASSAGES}
    for hits in found(engine, WORDS, 5):
        assert hits
        assert all(hit.passage == known[hit.passage.id] for hit in hits)
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert len({hit.passage.id for hit in hits}) == len(hits)
    engine.close()


def answers_come_in_the_order_of_the_queries(opened: Open) -> None:
    engine = opened()
    alone = [found(engine, [query], 3)[0] for query in WORDS]
    assert alone[0] != alone[1] != alone[2]
    assert found(engine, WORDS, 3) == alone
    assert found(engine, WORDS[::-1], 3) == alone[::-1]
    assert found(engine, [WORDS[1], *WORDS, WORDS[1]], 3) == [alone[1], *alone, alone[1]]
    engine.close()


def top_k_bounds_the_hits_and_changes_no_order(opened: Open) -> None:
    engine = opened()
    for query in WORDS:
        most = found(engine, [query], 50)[0]
        assert len(most) <= len(PASSAGES)
        for top_k in (1, 2, 3):
            assert found(engine, [query], top_k)[0] == most[:top_k]
    engine.close()


def top_k_below_one_is_refused(opened: Open) -> None:
    engine = opened()
    for top_k in (0, -1):
        with pytest.raises(ConfigurationError, match="top_k"):
            engine.search(["rock"], top_k)
    engine.close()


def any_text_is_a_query_and_harms_no_other(opened: Open) -> None:
    engine = opened()
    alone = found(engine, [WORDS[0]], 3)[0]
    mixed = [query for hostile in HOSTILE for query in (hostile, WORDS[0])]
    answers = found(engine, mixed, 3)
    assert answers[1::2] == [alone] * len(HOSTILE)
    for hits in answers[::2]:
        assert len(hits) <= 3
        assert all(hit.passage in PASSAGES for hit in hits)
    engine.close()


def empty_queries_find_nothing_and_empty_batches_are_empty(opened: Open) -> None:
    engine = opened()
    assert engine.search([], 3) == []
    assert found(engine, ["", " \n", "\t\u3000\xa0\r"], 3) == [[], [], []]
    engine.close()


def closing_twice_is_harmless(opened: Open) -> None:
    engine = opened()
    engine.close()
    engine.close()
    used = opened()
    found(used, WORDS, 1)
    used.close()
    used.close()


def a_closed_engine_says_so(opened: Open) -> None:
    engine = opened()
    found(engine, WORDS[:1], 1)
    engine.close()
    fails_in_place(engine, [*WORDS, "never asked before"])


def a_forked_process_gets_its_own_answers(opened: Open) -> None:
    engine = opened()
    expected = found(engine, WORDS, 3)  # opens what the fork will copy
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def ask(which: int) -> None:
        together.wait(60)
        for _ in range(40):
            assert found(engine, [WORDS[which]], 3) == [expected[which]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the test's own servers
        child = context.Process(target=ask, args=(1,))
        child.start()
    try:
        ask(0)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    assert found(engine, WORDS, 3) == expected
    engine.close()


CLAUSES: tuple[Clause, ...] = (
    hits_are_passages_best_first_and_only_once,
    answers_come_in_the_order_of_the_queries,
    top_k_bounds_the_hits_and_changes_no_order,
    top_k_below_one_is_refused,
    any_text_is_a_query_and_harms_no_other,
    empty_queries_find_nothing_and_empty_batches_are_empty,
    closing_twice_is_harmless,
    a_closed_engine_says_so,
    a_forked_process_gets_its_own_answers,
)


def fails_in_place(engine: Retriever, queries: Sequence[str]) -> list[RetrievalError]:
    """Check that every query fails, each in its place or all as a batch; return the errors."""
    try:
        answers = engine.search(queries, 3)
    except RetrievalError as whole:
        answers = [whole] * len(queries)
    assert len(answers) == len(queries)
    errors = [answer for answer in answers if isinstance(answer, RetrievalError)]
    assert len(errors) == len(queries), answers
    assert all("\n" not in str(error) for error in errors)
    return errors


def environments_travel(url: str) -> None:
    """Check that an environment with this retriever pickles, as vector environments need."""
    env = SearchQAEnv(dataset=DATASET, retriever=url, top_k=2)
    env.reset(seed=1)
    copy = pickle.loads(pickle.dumps(env))
    copy.reset(seed=1)
    assert copy.step(search(WORDS[0]))[0] == env.step(search(WORDS[0]))[0] != ""
    copy.close()
    env.close()


def contract_index(folder: Path) -> Path:
    """Make an embedded index of PASSAGES inside a folder; return its path."""
    build_index(ContractCorpus(), folder / "contract")
    return folder / "contract"
