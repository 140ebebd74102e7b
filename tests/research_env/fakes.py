"""A tiny data set and engines that tests control; they pickle, as they can be imported."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from typing import Any

from research_env import Dataset, Hit, Passage, Question, testing
from research_env.errors import RetrievalError
from research_env.sessions import Sessions

TIMEOUT = 20.0  # seconds after which a test that hangs fails


class Terminal(StringIO):
    """Stands in for a standard error that is a terminal."""

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


class Gate(Engine):
    """An engine that answers no batch before it is opened.

    Args:
        in_flight: threads that may ask it at the same time.
        pause: seconds after which it answers without being opened; 0: it fails after TIMEOUT.
        engine: answers the queries.

    Attributes:
        asked: is released for each batch that comes in.
        opened: let the batches be answered by ``opened.set()``.
        most: the most batches that it held at the same time.
    """

    def __init__(
        self, in_flight: int = 1, *, pause: float = 0.0, engine: Engine | None = None
    ) -> None:
        super().__init__()
        self.in_flight = in_flight
        self.engine = engine or Engine()
        self.batches = self.engine.batches
        self.asked = threading.Semaphore(0)
        self.opened = threading.Event()
        self.now = self.most = 0
        self._pause = pause
        self._lock = threading.Lock()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.asked.release()
        assert self.opened.wait(self._pause or TIMEOUT) or self._pause
        with self._lock:
            self.now -= 1
        return self.engine.search(queries, top_k)


def forked(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked child, which fails after TIMEOUT if it hangs."""
    forks = multiprocessing.get_context("fork")
    reader, writer = forks.Pipe(duplex=False)
    process = forks.Process(target=lambda: writer.send(function()), daemon=True)
    process.start()
    try:
        assert reader.poll(TIMEOUT)
        return reader.recv()
    finally:
        process.kill()
        process.join()


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
