"""The arrays that the index and its compiled search exchange."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]


class Postings(NamedTuple):
    """The postings of all terms, one term after the other, each in ascending order of rows."""

    rows: Array  # (postings,) int32
    impacts: Array  # (postings,) float32


class Clauses(NamedTuple):
    """The terms of some queries: one entry per distinct term of a query, by descending bounds."""

    starts: Array  # (clauses,) int64: the term's first posting
    ends: Array  # (clauses,) int64: one past its last posting
    times: Array  # (clauses,) float64: how often the query repeats the term
    bounds: Array  # (clauses,) float64: the most that the clause adds to a score


class Best(NamedTuple):
    """The best passages of a query, or, with one more dimension, of several queries."""

    rows: Array  # (top_k,) int32
    scores: Array  # (top_k,) float32
