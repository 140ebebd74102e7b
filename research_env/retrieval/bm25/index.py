"""An inverted index whose postings hold impacts: what a term adds to the score of a passage.

BM25 is a sum over terms, and every summand is known when the index is made. Kept as one number a
posting, a search only adds. The numbers are those of Elasticsearch, to the last bit: Lucene's
``BM25Similarity`` (k1 = 1.2, b = 0.75, lengths rounded to one byte, single precision), times
k1 + 1.

An index is five flat files in a folder, read through memory maps; in each, one entry a term in the
order of the terms' hashes, or one entry a posting in the order of terms, then of rows:

- ``terms.bin``: the terms' hashes, 64 bits each (two of ten million terms share one by a chance of
  one in 400,000);
- ``starts.bin``: where a term's postings start, and, last, their number, 64 bits each;
- ``maxima.bin``: the greatest impact of a term, single precision;
- ``rows.bin``: the row of a passage that holds the term, 32 bits;
- ``impacts.bin``: what the term adds to its score, single precision.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import blake2b
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

K1, B, ONE = np.float32(1.2), np.float32(0.75), np.float32(1)

_RUN = 1 << 21  # words after which a sorted run is written, and postings merged at a time
_SMALL = 20_000  # passages below which scoring all of them beats loading a compiler
_KNOWN_TERMS = 1 << 16  # terms of queries whose numbers are remembered
_TYPES = {"terms": "<u8", "starts": "<i8", "maxima": "<f4", "rows": "<i4", "impacts": "<f4"}

Array = npt.NDArray[Any]


def term_hash(term: str) -> int:
    """The 64 bits by which an index knows a term."""
    return int.from_bytes(blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def rounded_lengths() -> Array:
    """The 256 lengths that one byte can tell: Lucene's ``SmallFloat.byte4ToInt``.

    Exact up to 40, from there on the four leading bits of what exceeds 24.
    """
    lengths = list(range(24))
    for code in range(256 - 24):
        bits, shift = code & 7, (code >> 3) - 1
        lengths.append(24 + (bits if shift < 0 else (bits | 8) << shift))
    return np.array(lengths, np.int64)


class _Run(NamedTuple):
    """The postings of some consecutive passages: terms in order of their hashes, then rows."""

    hashes: Array  # (terms,) uint64
    starts: Array  # (terms + 1,) int64
    rows: Array  # (postings,) int32, on disk
    times: Array  # (postings,) int32, on disk: how often the term stands in the passage


class ImpactsWriter:
    """Makes an index from passages that come one by one.

    Memory is bounded but for five bytes a passage and some a distinct term of each run: sorted runs
    of postings go to disk, and are merged a few million postings at a time.
    """

    def __init__(self, folder: Path) -> None:
        """Start an index in a folder that exists."""
        self._folder = folder
        self._scratch = folder / "runs"
        self._scratch.mkdir()
        self._runs: list[_Run] = []
        self._codes: list[Array] = []  # the lengths of the passages of each run, a byte each
        self._words = self._rows = 0
        self._begin_run()

    def add(self, terms: Sequence[str]) -> None:
        """Append a passage, given as its terms (at least one); it gets the next row."""
        self._tokens.extend([self._ids[term] for term in terms])
        self._lengths.append(len(terms))
        if len(self._tokens) >= _RUN:
            self._end_run()
            self._begin_run()

    def finish(self) -> None:
        """Write the files of the index."""
        self._end_run()
        runs = self._runs
        hashes = np.unique(np.concatenate([run.hashes for run in runs]))
        frequencies = np.zeros(len(hashes), np.int64)  # passages that hold the term
        for run in runs:
            frequencies[np.searchsorted(hashes, run.hashes)] += np.diff(run.starts)
        starts = np.concatenate(([0], np.cumsum(frequencies)))
        idf = np.log(1 + (self._rows - frequencies + 0.5) / (frequencies + 0.5))
        weights = (ONE + K1) * idf.astype(np.float32)
        norms = self._inverse_norms()[np.concatenate(self._codes)]
        maxima = np.empty(len(hashes), np.float32)
        steps = np.searchsorted(starts, np.arange(0, starts[-1], _RUN))
        with self._file("rows").open("wb") as rows_file, self._file("impacts").open("wb") as file:
            for first, last in pairwise(np.unique([*steps, len(hashes)]).tolist()):
                part = slice(first, last)
                rows, times = _merge(runs, hashes[part], starts[first : last + 1])
                weight = np.repeat(weights[part], frequencies[part])
                impacts = weight - weight / (ONE + times.astype(np.float32) * norms[rows])
                # more than 0, as a passage that has the term is found however long it is
                impacts = np.maximum(impacts, np.finfo(np.float32).tiny)
                maxima[part] = np.maximum.reduceat(impacts, starts[part] - starts[first])
                rows_file.write(rows.data)  # not tofile: it hides that a disk is full
                file.write(impacts.data)
        for name, values in (("terms", hashes), ("starts", starts), ("maxima", maxima)):
            self._file(name).write_bytes(values.astype(_TYPES[name]).data)
        shutil.rmtree(self._scratch)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _begin_run(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict(count().__next__)
        self._tokens, self._lengths = array("I"), array("I")

    def _end_run(self) -> None:
        if not self._lengths:
            return
        hashes = np.fromiter(map(term_hash, self._ids), np.uint64, len(self._ids))
        order = np.argsort(hashes)
        rank = np.empty(len(order), np.uint64)
        rank[order] = np.arange(len(order), dtype=np.uint64)
        lengths = np.array(self._lengths, np.int64)
        rows = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
        postings = rank[np.array(self._tokens)] << np.uint64(32) | rows
        postings.sort()
        first = np.flatnonzero(np.diff(postings, prepend=postings[0] + np.uint64(1)))
        times = np.diff(first, append=len(postings)).astype(np.int32)
        postings = postings[first]
        frequencies = np.bincount((postings >> np.uint64(32)).astype(np.int64))
        self._runs.append(
            _Run(
                hashes[order],
                np.concatenate(([0], np.cumsum(frequencies))),
                self._store((postings & np.uint64(0xFFFFFFFF)).astype(np.int32) + self._rows),
                self._store(times),
            )
        )
        codes = np.searchsorted(rounded_lengths(), lengths, side="right") - 1
        self._codes.append(codes.astype(np.uint8))
        self._words += int(lengths.sum())
        self._rows += len(lengths)

    def _store(self, values: Array) -> Array:
        path = self._scratch / str(len(list(self._scratch.iterdir())))
        path.write_bytes(values.data)
        return np.memmap(path, values.dtype, "r")

    def _inverse_norms(self) -> Array:
        """1 / (k1 (1 - b + b length / mean length)) for each of the 256 lengths."""
        mean = np.float32(self._words / self._rows)
        lengths = rounded_lengths().astype(np.float32)
        return ONE / (K1 * ((ONE - B) + B * lengths / mean))


def _merge(runs: Sequence[_Run], hashes: Array, starts: Array) -> tuple[Array, Array]:
    """Rows and times of the postings of consecutive terms, from all runs."""
    rows, times = (np.empty(starts[-1] - starts[0], np.int32) for _ in range(2))
    ends = starts[:-1] - starts[0]  # of what is written of each term
    for run in runs:
        first = np.searchsorted(run.hashes, hashes[0])
        last = np.searchsorted(run.hashes, hashes[-1], side="right")
        mine = run.starts[first : last + 1]
        terms = np.searchsorted(hashes, run.hashes[first:last])
        frequencies = np.diff(mine)
        to = np.repeat(ends[terms] - mine[:-1], frequencies) + np.arange(mine[0], mine[-1])
        rows[to] = run.rows[mine[0] : mine[-1]]
        times[to] = run.times[mine[0] : mine[-1]]
        ends[terms] += frequencies
    return rows, times


class Postings(NamedTuple):
    """Of all terms, one after the other, each in the order of rows."""

    rows: Array  # (postings,) int32
    impacts: Array  # (postings,) float32


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads for all searches of a process; those of another are lost at a fork."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "impacts")


class Clauses(NamedTuple):
    """What to add for some queries: one entry a distinct term of a query, by falling bounds."""

    starts: Array  # (clauses,) int64: the first posting
    ends: Array  # (clauses,) int64: behind the last one
    times: Array  # (clauses,) float64: how often the query repeats the term
    bounds: Array  # (clauses,) float64: the most that the clause adds to a score


class Best(NamedTuple):
    """The best passages of a query, or, with one more dimension, of several."""

    rows: Array  # (top_k,) int32
    scores: Array  # (top_k,) float32


class Impacts:
    """An open index: the best passages for queries that are given as terms."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        """Map the files of a folder.

        Args:
            folder: where an :class:`ImpactsWriter` put them.
            num_rows: the number of passages that it was given.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is empty.
        """
        self.num_rows = num_rows
        # plain arrays: slicing a numpy.memmap takes ten times as long
        self._terms, self._starts, self._maxima, rows, impacts = (
            np.asarray(np.memmap(folder / f"{name}.bin", kind, "r"))
            for name, kind in _TYPES.items()
        )
        self._postings = Postings(rows, impacts)
        self._term = lru_cache(_KNOWN_TERMS)(self._find)

    def best(
        self, queries: Sequence[Sequence[str]], top_k: int, threads: int = 1
    ) -> list[list[tuple[int, float]]]:
        """Rows and scores of the best passages, equal scores in the order of the rows.

        Scores are summed in double precision, then rounded to single, as in Lucene.

        Args:
            queries: the terms of each; a term that a query repeats counts as often.
            top_k: the most passages a query may have, 1 or more.
            threads: how many to use for a large index.
        """
        if not queries:
            return []
        clauses, offsets = self._clauses(queries)
        if self.num_rows < _SMALL:
            return [
                self._best_of_all(Clauses(*(part[first:last] for part in clauses)), top_k)
                for first, last in pairwise(offsets.tolist())
            ]
        from research_env.retrieval.bm25.maxscore import search  # noqa: PLC0415  (loads numba)

        shape = len(queries), min(top_k, self.num_rows)
        best = Best(np.empty(shape, np.int32), np.empty(shape, np.float32))

        def answer(first: int, last: int) -> None:
            part = best.rows[first:last], best.scores[first:last]
            search(*self._postings, *clauses, offsets[first : last + 1], self.num_rows, *part)

        cuts = np.linspace(0, len(queries), threads + 1).astype(int).tolist()
        others = []
        if threads > 1:  # the kernel lets go of the interpreter
            pool = _pool(os.getpid())
            others = [pool.submit(answer, *part) for part in pairwise(cuts[1:])]
        answer(*cuts[:2])
        for other in others:
            other.result()
        return [
            [(row, score) for row, score in zip(*found, strict=True) if row < self.num_rows]
            for found in zip(best.rows.tolist(), best.scores.tolist(), strict=True)
        ]

    def _find(self, term: str) -> int:
        """The number of a term, or -1 where no passage holds it."""
        wanted = np.uint64(term_hash(term))
        number = int(np.searchsorted(self._terms, wanted))
        return number if number < len(self._terms) and self._terms[number] == wanted else -1

    def _clauses(self, queries: Sequence[Sequence[str]]) -> tuple[Clauses, Array]:
        """Those of all queries, and where those of each start."""
        numbers: list[int] = []
        times: list[int] = []
        offsets = [0]
        for terms in queries:
            counted = Counter(map(self._term, terms))
            counted.pop(-1, None)
            numbers += counted.keys()
            times += counted.values()
            offsets.append(len(numbers))
        number, weight = np.array(numbers, np.int64), np.array(times, np.float64)
        bounds = self._maxima[number] * weight
        query = np.repeat(np.arange(len(queries)), np.diff(offsets))
        order = np.lexsort((number, -bounds, query))
        number = number[order]
        clauses = Clauses(
            self._starts[number], self._starts[number + 1], weight[order], bounds[order]
        )
        return clauses, np.array(offsets)

    def _best_of_all(self, clauses: Clauses, top_k: int) -> list[tuple[int, float]]:
        """Score every passage for one query: for a small index the quickest, without numba."""
        sums = np.zeros(self.num_rows)
        for start, end, times in zip(*clauses[:3], strict=True):
            sums[self._postings.rows[start:end]] += self._postings.impacts[start:end] * times
        scores = sums.astype(np.float32)
        found = np.flatnonzero(scores)
        if top_k < len(found):
            worst = np.partition(scores[found], len(found) - top_k)[len(found) - top_k]
            found = found[scores[found] >= worst]
        found = found[np.argsort(-scores[found], kind="stable")[:top_k]]
        return list(zip(found.tolist(), scores[found].tolist(), strict=True))
