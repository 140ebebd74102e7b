"""What a retriever is: passages, scored hits, and one method that answers a batch of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from research_env.errors import RetrievalError

# Structs of msgspec: a step of many environments makes a thousand of each, and the collector of
# garbage need not look at them (gc=False), as they hold no cycles.

MAX_QUERY_CHARACTERS = 1_000
"""A longer query is cut here, so that no engine fails because a policy rambles."""


class Passage(msgspec.Struct, frozen=True, gc=False):
    """One unit of retrieval: an id that is unique in its corpus, a title, and a text."""

    id: str
    title: str
    text: str


class Hit(msgspec.Struct, frozen=True, gc=False):
    """A passage that a search returned, with the engine's score (higher is better)."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Anything that answers queries with passages. One new file makes a new one.

    One that has an attribute ``in_flight`` may be asked by so many threads at the same time; any
    other is asked by one at a time.
    """

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """Answer every query of a batch.

        Args:
            queries: texts of a model, searched as words; nothing in them is syntax. One of blanks
                only finds nothing.
            top_k: the most hits that a query may return, best first.

        Returns:
            One entry per query, in order: its hits, or the error that befell that query alone.

        Raises:
            RetrievalError: the whole batch could not be answered.
        """
        ...

    def close(self) -> None:
        """Release files and connections; calling it twice is harmless."""
        ...
