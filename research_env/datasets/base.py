"""What a question is, and what a data set is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from research_env.retrieval.base import Passage


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's gold decomposition.

    ``question`` may refer to the answer of an earlier hop as ``#1``, ``#2``, ... (MuSiQue's way).
    """

    question: str
    answer: str
    support: str | None = None  # id of the gold passage


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers (the first is the main one, aliases follow)."""

    id: str
    question: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()  # ids of the gold passages
    hops: int | None = None
    split: str | None = None
    type: str | None = None
    decomposition: tuple[Hop, ...] = ()


class Corpus(Protocol):
    """Passages that can be streamed, with a fingerprint that changes when they do."""

    @property
    def name(self) -> str:
        """What it is called in messages and in the names of indexes."""
        ...

    def __iter__(self) -> Iterator[Passage]:
        """Stream the passages, in a fixed order, without holding them in memory."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the content: equal exactly when the passages are equal."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Questions of one split, and the corpus that answers them (None: bring your own)."""

    name: str
    questions: Sequence[Question]
    corpus: Corpus | None
