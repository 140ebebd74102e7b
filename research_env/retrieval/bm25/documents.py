"""Find passages of an embedded index by id and by title, to read whole documents.

The table that this needs is made by reading all ids and titles; that of a large index is kept in
the cache folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research_env.retrieval.base import Passage
from research_env.retrieval.bm25.index import hash_text
from research_env.retrieval.documents import Document, chunk_of, chunks_around, window
from research_env.system.paths import cache_folder

_CACHED_FROM = 100_000  # rows; the table of a smaller index is made in less than a second
_NAMES = ("ids", "id-rows", "titles", "title-rows")  # the files of a table

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Finds the rows of passages by the hashes of their ids and of their titles.

    Attributes:
        count: number of passages.
        passage_at: returns the passage in a row.
        ids: hashes of the ids in ascending order, and the row of each. Both have shape (count,).
        titles: the same for the titles in lower case.
    """

    count: int
    passage_at: Callable[[int], Passage]
    ids: tuple[Hashes, Rows]
    titles: tuple[Hashes, Rows]

    def find(self, name: str) -> Document | None:
        """Return the document that a passage's id or else a title names; None if there is none."""
        for row in _rows(self.ids, name):
            passage = self.passage_at(row)
            if passage.id == name:
                if chunk_of(name):
                    return chunks_around(row, self.count - 1, self.passage_at)
                return self._read(self._titled(passage.title) or [row], row)
        rows = self._titled(name)
        return self._read(rows, None) if rows else None

    def _titled(self, title: str) -> list[int]:
        """The rows of the passages with this title, ascending; none for a blank title."""
        folded = title.strip().lower()
        if not folded:
            return []
        found = sorted(_rows(self.titles, folded))
        return [row for row in found if self.passage_at(row).title.strip().lower() == folded]

    def _read(self, rows: list[int], asked: int | None) -> Document:
        shown, position = window(rows, asked)
        return Document(tuple(map(self.passage_at, shown)), position)


def document_table(
    count: int, passage_at: Callable[[int], Passage], fingerprint: str
) -> DocumentTable:
    """Open the table of an index that an earlier process kept in the cache, or make it.

    Args:
        count: number of passages.
        passage_at: returns the passage in a row.
        fingerprint: fingerprint of the corpus; names the files in the cache.
    """
    key = sha256(fingerprint.encode()).hexdigest()[:32]  # an index of a stranger may say anything
    files = [cache_folder() / "documents" / f"{key}-{name}.npy" for name in _NAMES]
    if count >= _CACHED_FROM:
        with contextlib.suppress(OSError, ValueError):
            return DocumentTable(count, passage_at, *_open(files, count))
    keys = np.empty((2, count), np.uint64)
    for row in range(count):
        passage = passage_at(row)
        keys[0, row] = hash_text(passage.id)
        keys[1, row] = hash_text(passage.title.strip().lower())
    ids, titles = _sorted(keys[0]), _sorted(keys[1])
    if count >= _CACHED_FROM:
        with contextlib.suppress(OSError, ValueError):
            _save(files, [*ids, *titles])
            return DocumentTable(count, passage_at, *_open(files, count))
    return DocumentTable(count, passage_at, ids, titles)


def _sorted(keys: Hashes) -> tuple[Hashes, Rows]:
    order = np.argsort(keys, kind="stable").astype(np.int32)
    return keys[order], order


def _open(files: list[Path], count: int) -> tuple[tuple[Hashes, Rows], tuple[Hashes, Rows]]:
    arrays = [np.load(file, mmap_mode="r") for file in files]
    if any(array.shape != (count,) for array in arrays):
        raise ValueError("tables of another index")
    return (arrays[0], arrays[1]), (arrays[2], arrays[3])


def _save(files: list[Path], arrays: Sequence[npt.NDArray[Any]]) -> None:
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, array in zip(files, arrays, strict=True):
        unfinished = file.with_suffix(f".{os.getpid()}.npy")
        with unfinished.open("wb") as opened:
            np.save(opened, array)
            opened.flush()
            os.fsync(opened.fileno())  # after a crash a file of zeros would find nothing
        unfinished.replace(file)


def _rows(table: tuple[Hashes, Rows], key: str) -> Iterator[int]:
    """The rows with the hash of a key; a few may have another key with the same hash."""
    hashes, rows = table
    wanted = np.uint64(hash_text(key))
    first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
    yield from map(int, rows[first:last])
