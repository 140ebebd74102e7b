"""Search results that say nothing: an answer that is right all the same was not read in them.

``research-agent eval --env benchmarks.blanked:Blanked-SearchQA-v0 ...`` plays the episodes of
``research_env:SearchQA-v0`` with blank results; the arguments are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from research_env import Hit, Passage
from research_env.datasets import load_dataset
from research_env.env import SearchQAEnv
from research_env.errors import RetrievalError
from research_env.retrieval import open_retriever
from research_env.retrieval.base import Retriever
from research_env.vector_env import SearchQAVectorEnv

ENV = "Blanked-SearchQA-v0"


class BlankRetriever:
    """A retriever whose passages have neither title nor text.

    Args:
        inner: the retriever that finds them.
    """

    def __init__(self, inner: Retriever) -> None:
        self._inner = inner

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """The hits of the inner retriever, blanked."""
        return [
            found
            if isinstance(found, RetrievalError)
            else [Hit(Passage(hit.passage.id, "", ""), hit.score) for hit in found]
            for found in self._inner.search(queries, top_k)
        ]

    def close(self) -> None:
        """Close the inner retriever."""
        self._inner.close()


def _blanked(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(settings)
    data = load_dataset(kept.pop("dataset"), split=kept.pop("split", "train"))
    found = open_retriever(kept.pop("retriever", None), data.corpus)
    return {**kept, "dataset": data, "retriever": BlankRetriever(found)}


def make(**settings: Any) -> SearchQAEnv:
    """Make an environment whose results are blank; see ``SearchQAEnv`` for the arguments."""
    return SearchQAEnv(**_blanked(settings))


def make_vector(num_envs: int, **settings: Any) -> SearchQAVectorEnv:
    """Make a vector environment whose results are blank; see ``SearchQAVectorEnv``."""
    return SearchQAVectorEnv(num_envs, **_blanked(settings))


if ENV not in gym.registry:
    gym.register(
        ENV,
        entry_point=make,
        vector_entry_point="benchmarks.blanked:make_vector",
        order_enforce=False,
    )
