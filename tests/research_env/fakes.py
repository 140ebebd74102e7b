"""A tiny data set and engines that tests can steer; importable by name, so that they pickle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from typing import Any

from research_env import Dataset, Hit, Passage, Question, testing
from research_env.errors import RetrievalError
from research_env.sessions import Sessions


class Terminal(StringIO):
    """Stands in for a standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


QUESTIONS = tuple(
    Question(
        id=f"q{i}",
        question=f"Who founded company {i}?",
        answers=(f"Founder {i}", f"F. {i}"),
        supporting=(f"p{i}",),
    )
    for i in range(5)
)
DATASET = Dataset("tiny", QUESTIONS, None)


def hit(number: int, text: str = "", title: str = "", score: float = 1.0) -> Hit:
    return Hit(Passage(f"p{number}", title or f"Title {number}", text or f"Text {number}."), score)


@dataclass(frozen=True)
class ListCorpus:
    """Passages of a test, as a corpus."""

    passages: tuple[Passage, ...]
    name: str = "list"

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages)

    def fingerprint(self) -> str:
        return sha256(repr(self.passages).encode("utf-8", "surrogatepass")).hexdigest()


class Engine:
    """Finds passages by the numbers in a query; remembers its batches.

    "fail" in a query fails that query, "down" the whole batch, "crash" is a bug.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[str, ...]] = []
        self.closed = 0

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.batches.append(tuple(queries))
        if any("down" in query for query in queries):
            raise RetrievalError("the engine is down")
        if any("crash" in query for query in queries):
            raise ZeroDivisionError("a bug in the retriever")
        return [self._answer(query, top_k) for query in queries]

    def close(self) -> None:
        self.closed += 1

    @staticmethod
    def _answer(query: str, top_k: int) -> list[Hit] | RetrievalError:
        if "fail" in query:
            return RetrievalError(f"no answer for {query!r}")
        numbers = [int(word) for word in query.split() if word.isdecimal() and len(word) < 4]
        return [hit(n, text=f"About {query} number {n}.", score=9.0 - n) for n in numbers][:top_k]


@contextmanager
def suite_sessions(**more: Any) -> Iterator[tuple[Sessions, testing.Engine]]:
    """Sessions for the conformance suite, and their engine."""
    settings = testing.settings()
    with Sessions(**{"max_wait": 0.05, **more}, **settings) as sessions:
        yield sessions, settings["retriever"]


def search(query: str) -> str:
    return f"<think>I look it up.</think><search>{query}</search>"


def answer(text: str) -> str:
    return rf"<think>I know.</think><answer>It is \boxed{{{text}}}</answer>"
