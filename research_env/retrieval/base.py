"""What a retriever is: passages, scored hits, and one method that answers a batch of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from research_env.errors import ConfigurationError, RetrievalError

MAX_QUERY_CHARACTERS = 1_000
"""A longer query is cut here, so that no engine fails because a policy rambles."""


# One step of many environments makes a thousand passages and hits. They hold no cycles, so the
# garbage collector need not look at them (gc=False).
class Passage(msgspec.Struct, frozen=True, gc=False):
    """One unit of retrieval: an id that is unique in its corpus, a title, and a text."""

    id: str
    title: str
    text: str


class Hit(msgspec.Struct, frozen=True, gc=False):
    """A passage that a search returned, with the engine's score (higher is better)."""

    passage: Passage
    score: float


SearchResult = list[Hit] | RetrievalError
"""The hits of a query, best first, or the error of that query alone."""


def check_top_k(top_k: int) -> None:
    """Refuse a number of hits that no search can return.

    Raises:
        ConfigurationError: ``top_k`` is below 1.
    """
    if top_k < 1:
        raise ConfigurationError(f"top_k={top_k!r} must be 1 or more")


class Retriever(Protocol):
    """Anything that answers queries with passages.

    One thread at a time calls ``search``. A retriever that can be called by several has an
    attribute ``in_flight: int``, the most threads that may.
    """

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch.

        Args:
            queries: texts of a model, searched as words; nothing in them is syntax. A blank query
                finds nothing.
            top_k: the most hits per query, at least 1.

        Returns:
            One entry per query, in order: its hits, best first, or the error of that query alone.

        Raises:
            ConfigurationError: ``top_k`` is below 1.
            RetrievalError: the whole batch could not be answered.
        """
        ...

    def close(self) -> None:
        """Release files and connections; calling it twice is harmless."""
        ...
