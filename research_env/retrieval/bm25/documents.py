"""Find passages of an embedded index by id and by title, for reading whole documents.

The table of a large index is made once, by reading all ids and titles, and kept in the cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research_env.retrieval.base import Passage
from research_env.retrieval.documents import Document, chunk_of, chunks_around, window
from research_env.system.paths import cache_folder

_KEPT = 100_000  # rows; the table of a smaller index is made in less than a second

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Where passages are, by the hashes of their ids and of their titles.

    Attributes:
        count: number of passages.
        passage_at: the passage in a row.
        ids: hashes of the ids in ascending order, and their rows. Shape (count,) each.
        titles: the same of the titles, in lower case.
    """

    count: int
    passage_at: Callable[[int], Passage]
    ids: tuple[Hashes, Rows]
    titles: tuple[Hashes, Rows]

    def find(self, name: str) -> Document | None:
        """The document of a passage's id, or of a title; None if there is none."""
        for row in _rows(self.ids, name):
            passage = self.passage_at(row)
            if passage.id == name:
                if chunk_of(name):
                    return chunks_around(row, self.count - 1, self.passage_at)
                return self._read(self._titled(passage.title) or [row], row)
        places = self._titled(name)
        return self._read(places, None) if places else None

    def _titled(self, title: str) -> list[int]:
        """The rows of passages of this title, which is not blank, ascending."""
        folded = title.strip().lower()
        if not folded:
            return []
        found = sorted(_rows(self.titles, folded))
        return [row for row in found if self.passage_at(row).title.strip().lower() == folded]

    def _read(self, places: list[int], asked: int | None) -> Document:
        rows, at = window(places, asked)
        return Document(tuple(self.passage_at(row) for row in rows), at)


def document_table(
    count: int, passage_at: Callable[[int], Passage], fingerprint: str
) -> DocumentTable:
    """Make the table of an index, or open that of an earlier process.

    Args:
        count: number of passages.
        passage_at: the passage in a row.
        fingerprint: fingerprint of the corpus; names the files in the cache.
    """
    files = [cache_folder() / "documents" / f"{fingerprint[:32]}-{name}.npy" for name in _NAMES]
    if count >= _KEPT:
        with contextlib.suppress(OSError, ValueError):
            return DocumentTable(count, passage_at, *_opened(files, count))
    keys = np.empty((2, count), np.uint64)
    for row in range(count):
        passage = passage_at(row)
        keys[0, row] = _hash(passage.id)
        keys[1, row] = _hash(passage.title.strip().lower())
    ids, titles = _sorted(keys[0]), _sorted(keys[1])
    if count >= _KEPT:
        with contextlib.suppress(OSError, ValueError):
            _keep(files, [*ids, *titles])
            return DocumentTable(count, passage_at, *_opened(files, count))
    return DocumentTable(count, passage_at, ids, titles)


def _sorted(keys: Hashes) -> tuple[Hashes, Rows]:
    order = np.argsort(keys, kind="stable").astype(np.int32)
    return keys[order], order


_NAMES = ("ids", "id-rows", "titles", "title-rows")


def _opened(files: list[Path], count: int) -> tuple[tuple[Hashes, Rows], tuple[Hashes, Rows]]:
    arrays = [np.load(file, mmap_mode="r") for file in files]
    if any(array.shape != (count,) for array in arrays):
        raise ValueError("tables of another index")
    return (arrays[0], arrays[1]), (arrays[2], arrays[3])


def _keep(files: list[Path], arrays: Sequence[npt.NDArray[Any]]) -> None:
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, array in zip(files, arrays, strict=True):
        unfinished = file.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, array)
        unfinished.replace(file)


def _rows(table: tuple[Hashes, Rows], key: str) -> Iterator[int]:
    """Rows whose hash is that of a key; a few may be of other keys."""
    hashes, rows = table
    wanted = np.uint64(_hash(key))
    first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
    yield from map(int, rows[first:last])


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
