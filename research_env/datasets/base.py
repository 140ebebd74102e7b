"""The types of a question, a corpus and a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from research_env.errors import DataError
from research_env.retrieval.base import Passage


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's gold decomposition.

    ``question`` may refer to the answer of an earlier hop as ``#1``, ``#2``, ... (MuSiQue's way).
    """

    question: str
    answer: str
    support: str | None = None  # id of the gold passage


class ReadOnly(Mapping[str, Any]):
    """A mapping that cannot be changed, and that can be pickled (``MappingProxyType`` cannot)."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        """Copy ``items``."""
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


_NO_EXTRA = ReadOnly({})


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers (the first is the main one, aliases follow).

    Attributes:
        id: unique in its data set.
        question: the text that the policy is asked.
        answers: gold answers; one of them is enough.
        supporting: ids of the gold passages.
        hops: how many passages it takes to answer it; None: not known.
        split: "train", "dev", ...; None: not known.
        type: kind of question, as its data set names it.
        decomposition: its gold steps, in order.
        extra: every other field of the question's record, for rewards: for example
            ``question.extra["difficulty"]``. It cannot be changed and is not part of the hash.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()
    hops: int | None = None
    split: str | None = None
    type: str | None = None
    decomposition: tuple[Hop, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=lambda: _NO_EXTRA, hash=False)

    def __post_init__(self) -> None:
        for name in ("answers", "supporting"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f"question {self.id!r}: {name} is {texts!r:.80}; give a tuple of texts, such "
                    'as ("Paris",)'
                )
        if not isinstance(self.extra, ReadOnly):
            object.__setattr__(self, "extra", ReadOnly(self.extra))


class Corpus(Protocol):
    """Passages that can be streamed, with a fingerprint that changes when they do."""

    @property
    def name(self) -> str:
        """The corpus's name in messages and in the names of indexes."""
        ...

    def __iter__(self) -> Iterator[Passage]:
        """Stream the passages, in a fixed order, without holding them in memory."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the content: equal exactly when the passages are equal."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Questions of one split, and the corpus that answers them.

    Attributes:
        name: as in :data:`research_env.datasets.DATASETS`, or a name of your own.
        questions: their ids are unique.
        corpus: None: the user names a search engine that has one.
        metric_language: by whose rules answers are compared (`metrics.LANGUAGES`); None: each
            question's own field ``metric_language``, or English.
    """

    name: str
    questions: Sequence[Question]
    corpus: Corpus | None
    metric_language: str | None = None
