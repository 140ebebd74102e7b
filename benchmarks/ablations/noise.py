"""A search engine that misses: it loses the best passage of a fraction of all queries.

``benchmarks.ablations.noise:NoisySearchQA-v0`` is ``SearchQA-v0`` with such an engine. It returns
the next best passages, which mention words of the query too. The same queries lose their best
passage every time, so asking again helps only in other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import gymnasium as gym

from research_env.datasets.files import FileCorpus
from research_env.env import SearchQAEnv
from research_env.errors import RetrievalError
from research_env.retrieval import open_retriever
from research_env.retrieval.base import Hit, Retriever
from research_env.vector_env import SearchQAVectorEnv

NOISY = "NoisySearchQA-v0"


class MissingRetriever:
    """A retriever that loses the best hit of a fraction of the queries.

    Args:
        inner: the engine.
        miss: the fraction, from 0 to 1.
    """

    def __init__(self, inner: Retriever, miss: float) -> None:
        self._inner = inner
        self._miss = miss

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """The hits of the engine, or those from the second on."""
        answers = self._inner.search(queries, top_k + 1)
        return [
            found if isinstance(found, RetrievalError) else found[self._lost(query) :][:top_k]
            for query, found in zip(queries, answers, strict=True)
        ]

    def _lost(self, query: str) -> int:
        """1 if the best hit is lost, else 0; case and blanks do not matter."""
        digest = blake2b(" ".join(query.lower().split()).encode("utf-8", "replace"), digest_size=8)
        return int(int.from_bytes(digest.digest()) / 2**64 < self._miss)

    def close(self) -> None:
        """Close the engine."""
        self._inner.close()


def noisy_env(*, miss: float, **settings: Any) -> SearchQAEnv:
    """``SearchQA-v0`` with an engine that loses the best hit of a fraction ``miss`` of queries."""
    return SearchQAEnv(retriever=_engine(settings, miss), dataset="custom", **settings)


def noisy_vector_env(*, miss: float, **settings: Any) -> SearchQAVectorEnv:
    """The vector environment of ``noisy_env``."""
    return SearchQAVectorEnv(retriever=_engine(settings, miss), dataset="custom", **settings)


def _engine(settings: dict[str, Any], miss: float) -> Retriever:
    corpus = Path(settings["corpus"])
    return MissingRetriever(open_retriever(None, FileCorpus(corpus.name, corpus)), miss)


if NOISY not in gym.registry:
    gym.register(
        NOISY,
        entry_point=f"{__name__}:noisy_env",
        vector_entry_point=f"{__name__}:noisy_vector_env",
    )
