"""MaxScore search in a large index, compiled by numba.

Most postings are never read. Once ``top_k`` passages are known, a passage whose terms' greatest
impacts add up to less than the worst of them cannot be among the best. So the frequent terms at the
end of a query bring in no new passage, and only add to the passages that the other terms bring in
(MaxScore: Turtle and Flood, "Query evaluation: strategies and optimizations", 1995). As in Lucene's
``MaxScoreBulkScorer``, passages are scored in windows of rows whose sums fit into the first-level
cache. The result is exact.

The arrays are those of :mod:`research_env.retrieval.bm25.postings`. The best passages so far are a
heap with the worst at its root; its empty places hold the row ``num_rows``.

No content of ``rows`` or ``impacts`` can make this code read or write outside its arrays or run
forever: a place in a window is the last bits of a row, and each window moves past one posting at
least. ``starts`` and ``ends`` must lie within the postings, which the index checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit

from research_env.retrieval.bm25.postings import Array, Best, Clauses, Postings

_WINDOW = 4096  # rows; a power of two
_PLACE = _WINDOW - 1  # the bits of a row that say its place in its window
_GROWTH = 3  # a term with this many times the postings read so far gets a rehearsal without it
_MANY = 400  # postings per window; from here on places are not tracked
_CLOSE = 16  # postings per place; below it adding all is faster than looking up some
_NOTHING = 1e-300  # less than any sum
_SLACK = 1 + 1e-6  # more than summation order and rounding to single precision can change a sum

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    """Compile at the first call, and keep the code for later processes where that is possible."""
    try:
        compiled: Any = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        compiled = njit(nogil=True)(function)
    return cast(Function, compiled)


class Clause(NamedTuple):
    """The postings of a term in a window, and how often the query repeats the term."""

    start: int
    end: int
    times: float


class Scratch(NamedTuple):
    """Buffers that all windows share."""

    sums: Array  # (_WINDOW,) float64, zeros between two windows
    places: Array  # (_WINDOW + 1,) int32: the places in the window that are tracked


@_compiled
def _is_worse(score: np.float32, row: int, other_score: np.float32, other_row: int) -> bool:
    return bool(score < other_score or (score == other_score and row > other_row))


@_compiled
def _sink(best: Best, size: int) -> None:
    """Restore a heap whose root alone may be in the wrong place."""
    rows, scores = best
    at, row, score = 0, rows[0], scores[0]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        other = child + 1
        if other < size and _is_worse(scores[other], rows[other], scores[child], rows[child]):
            child = other
        if not _is_worse(scores[child], rows[child], score, row):
            break
        rows[at], scores[at] = rows[child], scores[child]
        at = child
    rows[at], scores[at] = row, score


@_compiled
def _seek(rows: Array, first: int, last: int, row: int) -> int:
    """The first posting whose row is not below ``row``, by galloping search."""
    step = 1
    while first + step <= last and rows[first + step - 1] < row:
        first += step
        step *= 2
    last = min(first + step - 1, last)
    while first < last:
        middle = (first + last) // 2
        if rows[middle] < row:
            first = middle + 1
        else:
            last = middle
    return first


@_compiled
def _find(rows: Array, first: int, last: int, row: int, base: int) -> int:
    """The posting of a row among those of its window, or -1: guessed, then walked to."""
    if first == last:
        return -1
    posting = first + (last - first) * (row - base) // _WINDOW
    while posting < last - 1 and rows[posting] < row:
        posting += 1
    while posting > first and rows[posting] > row:
        posting -= 1
    return posting if rows[posting] == row else -1


@_compiled
def _add_few(postings: Postings, clause: Clause, found: int, scratch: Scratch) -> int:
    """Add a clause to the sums of a window; return how many places have a sum now."""
    sums, places = scratch
    for posting in range(clause.start, clause.end):
        place = postings.rows[posting] & _PLACE
        if sums[place] == 0:
            places[found] = place
            found = min(found + 1, _WINDOW)  # only impacts of 0 could come to more
        sums[place] += clause.times * postings.impacts[posting]
    return found


@_compiled
def _add(postings: Postings, clause: Clause, scratch: Scratch) -> None:
    """Add a clause to the sums of a window without keeping track of places."""
    for posting in range(clause.start, clause.end):
        scratch.sums[postings.rows[posting] & _PLACE] += clause.times * postings.impacts[posting]


@_compiled
def _look_up(postings: Postings, clause: Clause, base: int, found: int, scratch: Scratch) -> None:
    """Add a clause to the sums of some places."""
    for place in scratch.places[:found]:
        posting = _find(postings.rows, clause.start, clause.end, base + place, base)
        if posting >= 0:
            scratch.sums[place] += clause.times * postings.impacts[posting]


@_compiled
def _all_from(least: float, scratch: Scratch) -> int:
    """Keep track of all places whose sums reach ``least``; return how many these are."""
    found = 0
    for place in range(_WINDOW):
        scratch.places[found] = place
        found += scratch.sums[place] >= least
    return found


@_compiled
def _kept(least: float, found: int, scratch: Scratch) -> int:
    """Drop the places whose sums are below ``least``; return how many are left."""
    sums, places = scratch
    left = 0
    for place in places[:found]:
        if sums[place] >= least:
            places[left] = place
            left += 1
        else:
            sums[place] = 0
    return left


@_compiled
def _raised(postings: Postings, clauses: Clauses, known: int, best: Best) -> float:
    """The worst score of the best passages by the first clauses, with all other clauses added."""
    worst = np.inf
    for place in range(len(best.rows)):
        score = float(best.scores[place])
        for clause in range(known, len(clauses.starts)):
            posting = _seek(
                postings.rows, clauses.starts[clause], clauses.ends[clause], best.rows[place]
            )
            if posting < clauses.ends[clause] and postings.rows[posting] == best.rows[place]:
                score += clauses.times[clause] * postings.impacts[posting]
        worst = min(worst, score)
    return worst / _SLACK


@_compiled
def _score_window(  # noqa: PLR0917  (numba knows no keywords)
    postings: Postings,
    clauses: Clauses,
    needed: int,
    rest: float,
    at: Array,
    base: int,
    is_tracked: bool,
    scratch: Scratch,
    best: Best,
) -> None:
    """Score the passages of a window that the first clauses bring in, and keep the best.

    ``needed`` is the number of those clauses and ``rest`` the most that the others add. ``at``
    holds the next posting of each clause and is moved. ``is_tracked``: keep a list of the places
    with a sum, which is faster than a look at all places when they are few.
    """
    rows = postings.rows
    sums, places = scratch
    ends, times = clauses.ends, clauses.times
    found = 0
    for i in range(needed):
        clause = Clause(at[i], _seek(rows, at[i], ends[i], base + _WINDOW), times[i])
        at[i] = clause.end
        if is_tracked:
            found = _add_few(postings, clause, found, scratch)
        else:
            _add(postings, clause, scratch)
    least = best.scores[0] / _SLACK
    if is_tracked:
        found = _kept(least - rest, found, scratch)
    else:
        found = _all_from(max(least - rest, _NOTHING), scratch)
    for i in range(needed, len(at)):
        if found:
            start = _seek(rows, at[i], ends[i], base)
            at[i] = _seek(rows, start, ends[i], base + _WINDOW)
            clause = Clause(start, at[i], times[i])
            if clause.end - clause.start < _CLOSE * found:
                _add(postings, clause, scratch)
                is_tracked = False
            else:
                _look_up(postings, clause, base, found, scratch)
            rest -= clauses.bounds[i]
            found = _kept(least - rest, found, scratch)
    for place in places[:found]:
        score = np.float32(sums[place])
        sums[place] = 0
        if _is_worse(best.scores[0], best.rows[0], score, base + place):
            best.rows[0], best.scores[0] = base + place, score
            _sink(best, len(best.rows))
    if not is_tracked:
        sums[:] = 0


@_compiled
def _collect(  # noqa: PLR0917
    postings: Postings, clauses: Clauses, num_rows: int, floor: float, scratch: Scratch, best: Best
) -> None:
    """Fill a heap with the best passages of one query.

    ``floor``: a score that at least ``top_k`` passages exceed.
    """
    starts, ends, _, bounds = clauses
    best.rows[:] = num_rows
    best.scores[:] = floor
    at = starts.copy()
    needed = len(at)  # clauses from here on bring in no passage
    rest = 0.0  # the most that they add
    while True:
        while needed and (rest + bounds[needed - 1]) * _SLACK < best.scores[0]:
            needed -= 1
            rest += bounds[needed]
        next_row, left = num_rows, 0
        for i in range(needed):
            if at[i] < ends[i]:
                next_row = min(next_row, postings.rows[at[i]])
                left += ends[i] - at[i]
        if next_row == num_rows:
            return
        base = next_row - next_row % _WINDOW
        is_tracked = left * _WINDOW < _MANY * (num_rows - base)
        _score_window(postings, clauses, needed, rest, at, base, is_tracked, scratch, best)


@_compiled
def search(  # noqa: PLR0917
    rows: Array,
    impacts: Array,
    starts: Array,
    ends: Array,
    times: Array,
    bounds: Array,
    offsets: Array,
    num_rows: int,
    best_rows: Array,
    best_scores: Array,
) -> None:
    """Write the best passages of some queries, best first.

    The arguments are flat because a tuple that crosses from Python costs more than a short search.

    Args:
        rows: see ``Postings``.
        impacts: see ``Postings``.
        starts: see ``Clauses``; of all queries.
        ends: see ``Clauses``.
        times: see ``Clauses``.
        bounds: see ``Clauses``.
        offsets: (queries + 1,) where the clauses of each query start.
        num_rows: passages in the index.
        best_rows: (queries, top_k), written; ``num_rows`` where fewer passages are found.
        best_scores: (queries, top_k), written.
    """
    postings = Postings(rows, impacts)
    scratch = Scratch(np.zeros(_WINDOW), np.empty(_WINDOW + 1, np.int32))
    for query in range(len(offsets) - 1):
        mine = Best(best_rows[query], best_scores[query])
        first, last = offsets[query], offsets[query + 1]
        top_k = len(mine.rows)
        mine.rows[:] = num_rows
        floor = 0.0
        read = 0
        # Before each term that is much more frequent than the terms before it, rehearse without it:
        # the worst of the best is then a floor for the whole search, which skips what is below it
        for end in range(first + 1, last + 1):
            read += ends[end - 1] - starts[end - 1]
            if end < last and (read < top_k or ends[end] - starts[end] <= _GROWTH * read):
                continue
            part = Clauses(starts[first:end], ends[first:end], times[first:end], bounds[first:end])
            _collect(postings, part, num_rows, floor, scratch, mine)
            if end < last and mine.rows[0] < num_rows:
                whole = Clauses(
                    starts[first:last], ends[first:last], times[first:last], bounds[first:last]
                )
                floor = max(floor, _raised(postings, whole, end - first, mine))
        for size in range(top_k - 1, 0, -1):
            row, score = mine.rows[0], mine.scores[0]
            mine.rows[0], mine.scores[0] = mine.rows[size], mine.scores[size]
            mine.rows[size], mine.scores[size] = row, score
            _sink(mine, size)
