"""The embedded search engine: BM25 with Elasticsearch's scores, from one folder on disk.

The scores are those of Lucene's BM25 as Elasticsearch uses it, kept as impacts
(:mod:`research_env.retrieval.bm25.index`) of terms that are analysed as Lucene's ``english``
analyzer does it (:mod:`research_env.retrieval.bm25.analyzer`). Title and text are one field.

An index is a folder: the files of the impacts, ``passages.bin`` (ids, titles and texts, one after
the other), ``offsets.bin`` (where each ends) and ``meta.json``, which tells what the others must
be. All is read through memory maps, so that opening takes no time and many processes share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_env.errors import ConfigurationError, DataError, RetrievalError, StaleIndexError
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.bm25.analyzer import analyze, first_words
from research_env.retrieval.bm25.index import Impacts, ImpactsWriter

if TYPE_CHECKING:
    from research_env.datasets.base import Corpus

FORMAT = 2  # of the folder, the analysis and the impacts: raise it when any of them changes
REPORT_EVERY = 500  # passages between two reports of progress

_META = "meta.json"
_CHECKED = 1 << 20  # bytes at either end of a file that the checksum covers, however large it is
_THREAD_WORK = 1_000_000  # queries times passages for which a further thread pays


def build_index(
    corpus: Corpus, folder: str | Path, progress: Callable[[int], None] | None = None
) -> int:
    """Make sure that a folder holds the index of a corpus, which is read once, as a stream.

    The index is made in a temporary folder beside it and renamed when it is complete: a reader
    never sees half of it, and a build that is killed leaves none. Of several builds of the same
    index at the same time, one works and the others wait for it.

    Args:
        corpus: the passages, with their fingerprint.
        folder: where the index shall be. An older one is replaced.
        progress: called now and then with the number of passages indexed so far.

    Returns:
        The number of passages.

    Raises:
        DataError: the corpus cannot be read, holds no words, or changed meanwhile.
        ConfigurationError: the folder holds something else than an index.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  (a link is kept as it is)
    if folder.exists() and not (folder.is_dir() and _is_index_or_empty(folder)):
        raise ConfigurationError(f"{folder} holds other things; name a new folder for the index")
    fingerprint = corpus.fingerprint()
    with _only_builder(folder):
        with contextlib.suppress(StaleIndexError):
            return int(_check(folder, fingerprint, corpus.name)["passages"])
        ours = re.compile(rf"\.{re.escape(folder.name)}\.\w+(\.old)?\.building")
        for left in folder.parent.iterdir():  # by a build that was killed
            if ours.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        building = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".building", dir=folder.parent)
        )
        try:
            count = _write(corpus, building, progress or (lambda _: None))
            if corpus.fingerprint() != fingerprint:
                raise DataError(f"corpus {corpus.name!r} changed meanwhile; index it again")
            meta = {
                "format": FORMAT,
                "corpus": corpus.name,
                "fingerprint": fingerprint,
                "passages": count,
                "files": {
                    path.relative_to(building).as_posix(): _checksum(path)
                    for path in sorted(building.rglob("*"))
                    if path.is_file()
                },
            }
            (building / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            building.chmod(0o755)
            if folder.exists():
                folder.rename(building.with_suffix(".old.building"))
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(building.with_suffix(".old.building"), ignore_errors=True)
    return count


def is_current(folder: str | Path, corpus: Corpus) -> bool:
    """Whether a folder holds a whole index of this corpus, in the format of this version."""
    try:
        _check(Path(folder), corpus.fingerprint(), corpus.name)
    except StaleIndexError:
        return False
    return True


class EmbeddedRetriever:
    """Search in an index that :func:`build_index` made. It may be used by several threads."""

    def __init__(self, folder: str | Path, corpus: Corpus | None = None) -> None:
        """Open an index.

        Args:
            folder: that of the index.
            corpus: the passages that must be in it; None takes the index as it is.

        Raises:
            StaleIndexError: there is no index, or it is truncated, of another version, or made
                for another corpus.
        """
        self._folder = Path(folder)
        meta = _check(
            self._folder,
            corpus.fingerprint() if corpus is not None else None,
            corpus.name if corpus is not None else "",
        )
        self.corpus_name = str(meta["corpus"])
        self.fingerprint = str(meta["fingerprint"])  # of that corpus
        self.num_passages = int(meta["passages"])
        self._passages = _map(self._folder / "passages.bin")
        self._offsets_file = _map(self._folder / "offsets.bin")
        self._offsets = memoryview(self._offsets_file).cast("Q")
        self._impacts: Impacts | None = Impacts(self._folder, len(self._offsets) // 3)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Any text is searched as words. A query without words has no hits. Hits with equal scores
        come in the order of the corpus, as in Lucene.

        Raises:
            ConfigurationError: ``top_k`` below 1.
            RetrievalError: the index has been closed.
        """
        if top_k < 1:
            raise ConfigurationError(f"top_k={top_k!r} must be 1 or more")
        if self._impacts is None:
            raise RetrievalError("the index has been closed; open it again")
        threads = min(
            os.cpu_count() or 1, 1 + len(queries) * self.num_passages // _THREAD_WORK, len(queries)
        )
        found = self._impacts.best(
            [analyze(first_words(query)) for query in queries], top_k, threads
        )
        return [[Hit(self._passage(row), score) for row, score in best] for best in found]

    def close(self) -> None:
        """Release the files; calling it twice is harmless."""
        self._impacts = None
        self._offsets.release()
        self._offsets_file.close()
        self._passages.close()

    def _passage(self, row: int) -> Passage:
        start, title, text, end = self._offsets[3 * row : 3 * row + 4]
        data = self._passages
        return Passage(
            _decode(data[start:title]), _decode(data[title:text]), _decode(data[text:end])
        )


def _write(corpus: Corpus, folder: Path, progress: Callable[[int], None]) -> int:
    writer = ImpactsWriter(folder)
    count = rows = end = 0
    with (
        (folder / "passages.bin").open("wb") as passages,
        (folder / "offsets.bin").open("wb") as offsets,
    ):
        offsets.write(array("Q", [0]))
        for count, passage in enumerate(corpus, start=1):
            terms = analyze(f"{passage.title}\n{passage.text}")
            if terms:  # Lucene's statistics leave out a passage without words; it is never found
                writer.add(terms)
                rows += 1
                for part in (passage.id, passage.title, passage.text):
                    end += passages.write(part.encode("utf-8", "surrogatepass"))
                    offsets.write(array("Q", [end]))
            if count % REPORT_EVERY == 0:
                progress(count)
    if not rows:
        raise DataError(f"corpus {corpus.name!r} holds no passage with a word to index")
    writer.finish()
    progress(count)
    return count


def _check(folder: Path, fingerprint: str | None, corpus: str) -> dict[str, Any]:
    """The meta data of an index whose files are whole and of the right corpus and version."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        version, files, found = meta["format"], dict(meta["files"]), str(meta["fingerprint"])
        int(meta["passages"]), str(meta["corpus"])
    except FileNotFoundError as error:
        raise _stale(folder, "is no index: there is none in that folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _stale(folder, f"is no index ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise _stale(folder, f"is of format {version}, this version reads format {FORMAT}")
    if fingerprint not in (None, found):
        raise _stale(
            folder,
            f"was made for another corpus: {meta['corpus']!r} with fingerprint {found[:12]}, not "
            f"{corpus!r} with {str(fingerprint)[:12]}",
        )
    for name, checksum in files.items():
        try:
            whole = _checksum(folder / name) == checksum
        except OSError:
            whole = False
        if not whole:
            raise _stale(folder, f"is damaged: {name} is missing, cut off or changed")
    return dict(meta)


def _stale(folder: Path, what: str) -> StaleIndexError:
    return StaleIndexError(
        f"the index {folder} {what}. Make it again: research-env index --corpus FILE --to {folder}"
    )


def _checksum(path: Path) -> list[int | str]:
    """Size of a file, and a hash of its beginning and end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = blake2b(file.read(_CHECKED), digest_size=16)
        file.seek(max(_CHECKED, size - _CHECKED))
        digest.update(file.read(_CHECKED))
    return [size, digest.hexdigest()]


def _is_index_or_empty(folder: Path) -> bool:
    return (folder / _META).exists() or not any(folder.iterdir())


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Wait until no other process builds this index; the lock ends with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
