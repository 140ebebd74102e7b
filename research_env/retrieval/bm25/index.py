"""An inverted index whose postings hold impacts: what a term adds to the score of a passage.

BM25 is a sum over terms, and every summand is known when the index is made. It is kept as one
number per posting, so a search only adds. The numbers are Elasticsearch's to the last bit: Lucene's
``BM25Similarity`` (k1 = 1.2, b = 0.75, lengths rounded to one byte, single precision), times
k1 + 1.

An index is five flat files in a folder, read through memory maps. Each has one entry per term in
the order of the terms' hashes, or one entry per posting in the order of terms, then of rows:

- ``terms.bin``: the term's hash, 64 bits (two of ten million terms share one with a probability of
  one in 400,000);
- ``starts.bin``: the term's first posting, 64 bits, and at the end the number of postings;
- ``maxima.bin``: the greatest impact of the term, single precision;
- ``rows.bin``: the row of a passage that holds the term, 32 bits;
- ``impacts.bin``: what the term adds to the passage's score, single precision.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import blake2b
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research_env.retrieval.bm25.postings import Array, Best, Clauses, Postings

_K1, _B, _ONE = np.float32(1.2), np.float32(0.75), np.float32(1)
_RUN = 1 << 21  # words per sorted run, and postings that are merged or checked at a time
_SMALL = 20_000  # passages; in a smaller index, scoring all is faster than loading a compiler
_CACHED_TERMS = 1 << 16  # query terms whose numbers are cached
_TYPES = {"terms": "<u8", "starts": "<i8", "maxima": "<f4", "rows": "<i4", "impacts": "<f4"}
FILES = tuple(f"{name}.bin" for name in _TYPES)
"""The names of the files of an index."""


def hash_text(text: str) -> int:
    """Return the 64-bit hash that stands for a term, an id or a title in files of an index."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def rounded_lengths() -> Array:
    """Return the 256 lengths that one byte can hold: Lucene's ``SmallFloat.byte4ToInt``.

    Lengths are exact up to 40; above it, only the four leading bits of ``length - 24`` are kept.
    """
    lengths = list(range(24))
    for code in range(256 - 24):
        bits, shift = code & 7, (code >> 3) - 1
        lengths.append(24 + (bits if shift < 0 else (bits | 8) << shift))
    return np.array(lengths, np.int64)


class _Run(NamedTuple):
    """The postings of some consecutive passages, sorted by the terms' hashes, then by rows."""

    hashes: Array  # (terms,) uint64
    starts: Array  # (terms + 1,) int64, where they begin in the two files of all runs


class IndexWriter:
    """Make an index from passages that come one by one.

    Sorted runs of postings go to disk, one after the other in two files: ``rows``, and ``times``,
    how often the passage holds the term, both int32. They are merged a few million postings at a
    time. Memory grows by five bytes per passage and a few bytes per distinct term of each run.
    """

    def __init__(self, folder: Path) -> None:
        """Start an index in a folder that exists."""
        self._folder = folder
        self._scratch = folder / "runs"
        self._scratch.mkdir()
        self._runs: list[_Run] = []
        self._codes: list[Array] = []  # per run, uint8: the rounded length of each passage
        self._words = self._rows = self._postings = 0
        self._begin_run()

    def add(self, terms: Sequence[str]) -> None:
        """Append a passage, given as its terms (at least one), in the next row."""
        self._tokens.extend([self._ids[term] for term in terms])
        self._lengths.append(len(terms))
        if len(self._tokens) >= _RUN:
            self._end_run()
            self._begin_run()

    def finish(self) -> None:
        """Write the files of the index."""
        self._end_run()
        runs = self._runs
        stored = [np.memmap(self._scratch / name, np.int32, "r") for name in ("rows", "times")]
        hashes = np.unique(np.concatenate([run.hashes for run in runs]))
        frequencies = np.zeros(len(hashes), np.int64)  # passages that hold the term
        for run in runs:
            frequencies[np.searchsorted(hashes, run.hashes)] += np.diff(run.starts)
        starts = np.concatenate(([0], np.cumsum(frequencies)))
        idf = np.log(1 + (self._rows - frequencies + 0.5) / (frequencies + 0.5))
        weights = (_ONE + _K1) * idf.astype(np.float32)
        norms = self._inverse_norms()[np.concatenate(self._codes)]
        maxima = np.empty(len(hashes), np.float32)
        with self._file("rows").open("wb") as rows_file, self._file("impacts").open("wb") as file:
            for first, last in _term_parts(starts):
                part = slice(first, last)
                rows, times = _merge(runs, stored, hashes[part], starts[first : last + 1])
                weight = np.repeat(weights[part], frequencies[part])
                impacts = weight - weight / (_ONE + times.astype(np.float32) * norms[rows])
                # Above 0, so that a passage that has the term is found however long it is.
                impacts = np.maximum(impacts, np.finfo(np.float32).tiny)
                maxima[part] = np.maximum.reduceat(impacts, starts[part] - starts[first])
                rows_file.write(rows.data)  # tofile hides a full disk
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
        hashes = np.fromiter(map(hash_text, self._ids), np.uint64, len(self._ids))
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
        ends = np.cumsum(np.concatenate(([self._postings], frequencies)))
        self._runs.append(_Run(hashes[order], ends))
        self._postings = int(ends[-1])
        self._store("rows", (postings & np.uint64(0xFFFFFFFF)).astype(np.int32) + self._rows)
        self._store("times", times)
        codes = np.searchsorted(rounded_lengths(), lengths, side="right") - 1
        self._codes.append(codes.astype(np.uint8))
        self._words += int(lengths.sum())
        self._rows += len(lengths)

    def _store(self, name: str, values: Array) -> None:
        with (self._scratch / name).open("ab") as file:
            file.write(values.data)

    def _inverse_norms(self) -> Array:
        """1 / (k1 (1 - b + b length / mean length)) for each of the 256 lengths."""
        mean = np.float32(self._words / self._rows)
        lengths = rounded_lengths().astype(np.float32)
        return _ONE / (_K1 * ((_ONE - _B) + _B * lengths / mean))


def _term_parts(starts: Array) -> Iterator[tuple[int, int]]:
    """Yield the first term and the end of consecutive parts of about ``_RUN`` postings each."""
    steps = np.searchsorted(starts, np.arange(0, starts[-1], _RUN))
    return pairwise(np.unique([*steps, len(starts) - 1]).tolist())


def _merge(
    runs: Sequence[_Run], stored: Sequence[Array], hashes: Array, starts: Array
) -> tuple[Array, Array]:
    """Rows and times of the postings of consecutive terms, from all runs."""
    rows, times = (np.empty(starts[-1] - starts[0], np.int32) for _ in range(2))
    ends = starts[:-1] - starts[0]  # per term: where its next posting is written
    for run in runs:
        first = np.searchsorted(run.hashes, hashes[0])
        last = np.searchsorted(run.hashes, hashes[-1], side="right")
        mine = run.starts[first : last + 1]
        terms = np.searchsorted(hashes, run.hashes[first:last])
        frequencies = np.diff(mine)
        to = np.repeat(ends[terms] - mine[:-1], frequencies) + np.arange(mine[0], mine[-1])
        rows[to], times[to] = (values[mine[0] : mine[-1]] for values in stored)
        ends[terms] += frequencies
    return rows, times


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads for all searches of a process; a forked process starts its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "impacts")


class IndexReader:
    """An open index: the best passages for queries that are given as terms."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        """Map the files of a folder.

        Only their sizes are checked; see :meth:`check`.

        Args:
            folder: where an :class:`IndexWriter` put them.
            num_rows: the number of passages that it was given.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: the size of a file does not fit the others.
        """
        self.num_rows = num_rows
        # Plain arrays: slicing a numpy.memmap takes ten times as long.
        self._terms, self._starts, self._maxima, rows, impacts = (
            np.asarray(np.memmap(folder / f"{name}.bin", kind, "r"))
            for name, kind in _TYPES.items()
        )
        self._postings = Postings(rows, impacts)
        self._term = lru_cache(_CACHED_TERMS)(self._find)
        if not len(self._starts) == len(self._terms) + 1 == len(self._maxima) + 1:
            raise ValueError("terms.bin, starts.bin and maxima.bin hold different numbers of terms")
        if not len(rows) == len(impacts) == self._starts[-1]:
            raise ValueError("rows.bin and impacts.bin are not as long as starts.bin says")

    def check(self) -> None:
        """Read everything and check what a search relies on: bounds and order.

        Raises:
            ValueError: says which file is wrong, and in what.
        """
        starts, (rows, impacts) = self._starts, self._postings
        if not (self._terms[:-1] < self._terms[1:]).all():
            raise ValueError("terms.bin is not in ascending order")
        if starts[0] != 0 or not (starts[:-1] < starts[1:]).all():
            raise ValueError("starts.bin does not ascend from 0")
        for first, last in _term_parts(starts):
            begin, end = starts[first], starts[last]
            part, terms = rows[begin:end], starts[first:last] - begin
            if part.min() < 0 or part.max() >= self.num_rows:
                raise ValueError(f"rows.bin holds a row outside 0 to {self.num_rows - 1}")
            descents = 1 + np.flatnonzero(np.diff(part) <= 0)
            if not (starts[np.searchsorted(starts, begin + descents)] == begin + descents).all():
                raise ValueError("rows.bin is not in ascending order within a term")
            # Written so that it refuses NaN, too.
            if not (impacts[begin:end].min() > 0 and impacts[begin:end].max() < np.inf):
                raise ValueError("impacts.bin holds a number that no impact can be")
            maxima = np.maximum.reduceat(impacts[begin:end], terms)
            if not (maxima == self._maxima[first:last]).all():
                raise ValueError("maxima.bin does not hold the greatest impact of each term")

    def best(
        self, queries: Sequence[Sequence[str]], top_k: int, threads: int = 1
    ) -> list[list[tuple[int, float]]]:
        """Rows and scores of the best passages, equal scores in the order of the rows.

        Scores are summed in double precision, then rounded to single, as in Lucene.

        Args:
            queries: the terms of each query; a repeated term counts each time.
            top_k: the most passages per query, at least 1.
            threads: how many threads to use for a large index.

        Returns:
            (row, score) pairs for each query, best first.

        Raises:
            ValueError: the index holds rows that cannot be.
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
        if threads > 1:  # the compiled search releases the interpreter's lock
            pool = _pool(os.getpid())
            others = [pool.submit(answer, *part) for part in pairwise(cuts[1:])]
        answer(*cuts[:2])
        for other in others:
            other.result()
        if best.rows.min() < 0:
            raise ValueError("rows.bin holds a row below 0")
        return [
            [(row, score) for row, score in zip(*found, strict=True) if row < self.num_rows]
            for found in zip(best.rows.tolist(), best.scores.tolist(), strict=True)
        ]

    def _find(self, term: str) -> int:
        """The number of a term, or -1 where no passage holds it."""
        wanted = np.uint64(hash_text(term))
        number = int(np.searchsorted(self._terms, wanted))
        return number if number < len(self._terms) and self._terms[number] == wanted else -1

    def _clauses(self, queries: Sequence[Sequence[str]]) -> tuple[Clauses, Array]:
        """The clauses of all queries, and where those of each query start."""
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
        """Score every passage for one query: the fastest way for a small index, without numba."""
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
