"""The embedded search engine: BM25 with Elasticsearch's scores, from one folder on disk.

The scores are those of Lucene's BM25 as Elasticsearch uses it, stored as impacts
(:mod:`research_env.retrieval.bm25.index`) of the terms that Lucene's ``english`` analyzer makes
(:mod:`research_env.retrieval.bm25.analyzer`). Title and text are one field.

An index is a folder: the files of the impacts, ``passages.bin`` (ids, titles and texts, one after
the other), ``offsets.bin`` (where each of these ends) and ``meta.json``, which holds the size and
the hash of each file. Everything is read through memory maps, so opening takes no time and many
processes share the memory.

The first time that a machine opens an index it reads all of it, compares the hashes and checks what
compiled code relies on. A note in the cache spares later openings that work, until a file of the
index changes or the machine is restarted: a crash may have cost what was not on the disk yet.
:func:`check_index` repeats the check at any time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import shutil
import stat
import tempfile
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from research_env.errors import ConfigurationError, DataError, RetrievalError, StaleIndexError
from research_env.retrieval.base import Hit, Passage, SearchResult, check_top_k
from research_env.retrieval.bm25.analyzer import analyze, first_words
from research_env.retrieval.bm25.index import FILES, IndexReader, IndexWriter
from research_env.retrieval.json_text import replace_surrogates
from research_env.system.locks import exclusive_lock
from research_env.system.paths import cached, read_small_file

if TYPE_CHECKING:
    from research_env.datasets.base import Corpus
    from research_env.retrieval.bm25.documents import DocumentTable
    from research_env.retrieval.documents import Document

log = logging.getLogger(__name__)

_FORMAT = 3  # raise it when the folder, the analysis or the impacts change
_REPORT_EVERY = 500  # passages between two reports of progress
_META = "meta.json"
_CHUNK = 1 << 26  # bytes that are hashed at a time
_THREAD_WORK = 1_000_000  # queries times passages that are worth one more thread
_ATTEMPTS = 10  # to open an index that other processes replace
_FILES = sorted(("passages.bin", "offsets.bin", *FILES))
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: another one after each start


class Meta(msgspec.Struct, frozen=True):
    """The content of ``meta.json``."""

    format: int
    corpus: str
    fingerprint: str
    passages: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    files: dict[str, tuple[int, str]]  # size, and BLAKE2b-128 of the hashes of chunks of 64 MiB


class _Format(msgspec.Struct):
    format: int


def _require_ours(folder: Path) -> None:
    """Check that a folder is new, empty or an index, since it will be deleted.

    Raises:
        ConfigurationError: it holds something other than an index.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    others = names - {*_FILES, _META}
    if others or names == {_META}:
        raise ConfigurationError(
            f"{folder} holds other things, such as {min(others or names)!r}; name a new folder for "
            "the index"
        )


def _require_replaceable(folder: Path) -> None:
    """Refuse, before hours of work, a folder that cannot be renamed or that somebody stands in.

    Raises:
        ConfigurationError: it is a mount point, or the working directory.
    """
    if not folder.is_dir():
        return
    mounted = os.path.ismount(folder)
    if mounted or folder.samefile(os.curdir):
        what = "a mount point" if mounted else "the working directory"
        raise ConfigurationError(
            f"{folder} is {what}, which an index cannot replace; name a folder in it, such as "
            f"{folder / 'index'}"
        )


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What tells the folder of an index from one that has replaced it; None: there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def build_index(
    corpus: Corpus, folder: str | Path, progress: Callable[[int], None] | None = None
) -> int:
    """Make sure that a folder holds the index of a corpus, which is read once, as a stream.

    The index is made in a temporary folder beside it, flushed to the disk and renamed when it is
    complete: a reader never sees half of it, and a build that is killed leaves none. If several
    processes build the same index at the same time, one works and the others wait for it.

    Args:
        corpus: the passages, with their fingerprint.
        folder: where the index is written. It replaces an older one.
        progress: called regularly with the number of passages indexed so far.

    Returns:
        The number of passages.

    Raises:
        DataError: the corpus cannot be read, holds no words, or changed meanwhile.
        ConfigurationError: the folder holds something other than an index, or cannot be replaced.
    """
    folder = Path(os.path.realpath(folder))  # a link is kept: what it names is replaced
    fingerprint = corpus.fingerprint()
    with contextlib.suppress(StaleIndexError):  # without the lock: the folder may be read-only
        return _checked(folder, corpus.name, fingerprint)[0].passages
    _require_ours(folder)
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.parent / f".{folder.name}.lock"):  # one process builds, others wait
        with contextlib.suppress(StaleIndexError):
            return _checked(folder, corpus.name, fingerprint)[0].passages
        ours = re.compile(rf"\.{re.escape(folder.name)}\.\w+(\.old)?\.building")
        for left in folder.parent.iterdir():  # by a build that was killed
            if ours.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        building = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".building", dir=folder.parent)
        )
        old = building.with_suffix(".old.building")
        try:
            count = _write(corpus, building, progress or (lambda _: None))
            if corpus.fingerprint() != fingerprint:
                raise DataError(f"corpus {corpus.name!r} changed meanwhile; index it again")
            files = {name: _checksum(building / name) for name in _FILES}
            meta = Meta(_FORMAT, replace_surrogates(corpus.name), fingerprint, count, files)
            (building / _META).write_bytes(msgspec.json.format(msgspec.json.encode(meta), indent=1))
            for name in (*_FILES, _META, ""):  # all is on the disk before readers see it
                _sync(building / name)
            building.chmod(0o755)
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
            _sync(folder.parent)
            cached(_note_kind(), _paths(folder), dict)  # whoever makes an index need not check it
        finally:
            if old.exists() and not folder.exists():  # interrupted between the two
                old.rename(folder)
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    return count


def is_current(folder: str | Path, corpus: Corpus) -> bool:
    """Return whether a folder holds a whole index of this corpus, in this version's format."""
    try:
        _checked(Path(folder), corpus.name, corpus.fingerprint())
    except StaleIndexError:
        return False
    return True


def check_index(folder: str | Path) -> int:
    """Read a whole index and compare it with the hashes made when it was built.

    Returns:
        The number of passages.

    Raises:
        StaleIndexError: there is no index, or it is damaged or of another version.
    """
    return _checked(Path(folder), again=True)[0].passages


class EmbeddedRetriever:
    """Search in an index that :func:`build_index` made. It may be used by several threads."""

    def __init__(self, folder: str | Path, corpus: Corpus | None = None) -> None:
        """Open an index.

        Args:
            folder: the folder of the index.
            corpus: the passages that must be in it; None takes the index as it is.

        Raises:
            StaleIndexError: there is no index, or it is damaged, of another version, or made for
                another corpus.
        """
        self._folder = Path(folder)
        for _ in range(_ATTEMPTS):
            before = _identity(self._folder)
            try:
                self._open(corpus)
            except (StaleIndexError, OSError):
                if _identity(self._folder) == before:
                    raise
                continue
            if _identity(self._folder) == before:
                return
            self.close()  # the index was replaced meanwhile: its files are of two
        raise _stale(self._folder, "is replaced by another process again and again")

    def _open(self, corpus: Corpus | None) -> None:
        self._index: IndexReader | None
        if corpus is None:
            meta, self._index = _checked(self._folder)
        else:
            meta, self._index = _checked(self._folder, corpus.name, corpus.fingerprint())
        self.fingerprint = meta.fingerprint  # the fingerprint of the corpus
        self.num_passages = meta.passages
        self._passages = _map(self._folder / "passages.bin")
        self._offsets_file = _map(self._folder / "offsets.bin")
        self._offsets = memoryview(self._offsets_file).cast("Q")
        self._documents: DocumentTable | None = None  # made when it is needed

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Any text is searched as words. A query without words has no hits. Hits with equal scores
        come in the order of the corpus, as in Lucene.

        Raises:
            ConfigurationError: ``top_k`` is below 1.
            RetrievalError: the index has been closed, or turns out to be damaged.
        """
        check_top_k(top_k)
        index = self._open_index()
        threads = min(
            os.cpu_count() or 1, 1 + len(queries) * self.num_passages // _THREAD_WORK, len(queries)
        )
        terms = [analyze(first_words(query)) for query in queries]
        try:
            found = index.best(terms, top_k, threads)
        except (ValueError, IndexError) as error:
            raise RetrievalError(self._damaged(error)) from error
        return [self._hits(best) for best in found]

    def prepare_reading(self) -> None:
        """Make or open the table of ids and titles, which :meth:`read` needs."""
        if self._documents is None:
            from research_env.retrieval.bm25.documents import document_table  # noqa: PLC0415

            rows = len(self._offsets) // 3
            self._documents = document_table(rows, self._passage, self.fingerprint)

    def read(self, names: Sequence[str]) -> list[Document | RetrievalError | None]:
        """Read whole documents by id or title.

        Raises:
            RetrievalError: the index has been closed, or turns out to be damaged.
        """
        self._open_index()
        self.prepare_reading()
        assert self._documents is not None
        try:
            return [self._documents.find(name) for name in names]
        except ValueError as error:
            raise RetrievalError(self._damaged(error)) from error

    def close(self) -> None:
        """Release the files; calling it twice is harmless."""
        self._index = None
        self._documents = None
        self._offsets.release()
        self._offsets_file.close()
        self._passages.close()

    def _open_index(self) -> IndexReader:
        if self._index is None:
            raise RetrievalError("the index has been closed; open it again")
        return self._index

    def _hits(self, best: Sequence[tuple[int, float]]) -> SearchResult:
        try:
            return [Hit(self._passage(row), score) for row, score in best]
        except ValueError as error:  # fewer than four offsets, or bytes that are not UTF-8
            return RetrievalError(self._damaged(error))

    def _passage(self, row: int) -> Passage:
        start, title, text, end = self._offsets[3 * row : 3 * row + 4]
        data = self._passages
        return Passage(
            _decode(data[start:title]), _decode(data[title:text]), _decode(data[text:end])
        )

    def _damaged(self, error: Exception) -> str:
        return (
            f"the index {self._folder} is damaged: {error}. Check it: research-env index --check "
            f"--to {self._folder}"
        )


def _write(corpus: Corpus, folder: Path, progress: Callable[[int], None]) -> int:
    writer = IndexWriter(folder)
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
            if count % _REPORT_EVERY == 0:
                progress(count)
    if not rows:
        raise DataError(f"corpus {corpus.name!r} holds no passage with a word to index")
    writer.finish()
    progress(count)
    return count


def _checked(
    folder: Path, corpus: str = "", fingerprint: str | None = None, again: bool = False
) -> tuple[Meta, IndexReader]:
    """Open an index of the right corpus and version; check it unless a note says that it was.

    Args:
        folder: the folder of the index.
        corpus: the name of the corpus that must be in it, for messages.
        fingerprint: the fingerprint of that corpus; None accepts any.
        again: check it whatever the note says.

    Raises:
        StaleIndexError: there is no index, or it is damaged, of another version, or made for
            another corpus.
    """
    meta = _read_meta(folder)
    if fingerprint not in (None, meta.fingerprint):
        raise _stale(
            folder,
            f"was made for another corpus: {meta.corpus!r} with fingerprint "
            f"{meta.fingerprint[:12]}, not {corpus!r} with {str(fingerprint)[:12]}; name it as "
            f"embedded:{folder}?corpus=any to search it all the same",
        )
    for name in _FILES:
        path = folder / name
        if name not in meta.files or not _is_file(path, meta.files[name][0]):
            raise _stale(folder, f"is damaged: {name} is missing, cut off or changed")
    try:
        index = IndexReader(folder, _num_rows(folder))

        def check() -> dict[str, Any]:
            _check_all(folder, meta, index)
            return {}

        cached(_note_kind(), _paths(folder), check, again=again)
    except (OSError, ValueError) as error:
        raise _stale(folder, f"is damaged: {error}") from error
    return meta, index


def _check_all(folder: Path, meta: Meta, index: IndexReader) -> None:
    """Read all files; compare their hashes, and check what a search relies on.

    Raises:
        ValueError: says which file is wrong, and in what.
    """
    size = sum(meta.files[name][0] for name in _FILES)
    log.info("checking the whole index %s (%.1f GB)", folder, size / 1e9)
    for name in _FILES:
        if _checksum(folder / name) != meta.files[name]:
            raise ValueError(f"{name} has changed since the index was made")
    index.check()
    offsets = np.memmap(folder / "offsets.bin", "<u8", "r")
    if offsets[0] != 0 or offsets[-1] != meta.files["passages.bin"][0]:
        raise ValueError("offsets.bin does not span passages.bin")
    for first in range(0, len(offsets), _CHUNK // 8):
        part = offsets[first : first + _CHUNK // 8 + 1]
        if not (part[:-1] <= part[1:]).all():
            raise ValueError("offsets.bin is not in ascending order")


def _read_meta(folder: Path) -> Meta:
    try:
        data = read_small_file(folder / _META)
        version = msgspec.json.decode(data, type=_Format).format
        if version != _FORMAT:
            raise _stale(folder, f"is of format {version}, this version reads format {_FORMAT}")
        return msgspec.json.decode(data, type=Meta)
    except FileNotFoundError as error:
        raise _stale(folder, "is no index: there is none in that folder") from error
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _stale(folder, f"is no index ({_META}: {error})") from error


def _num_rows(folder: Path) -> int:
    """The number of passages with words; each has three entries, after the first entry, 0."""
    entries, rest = divmod((folder / "offsets.bin").stat().st_size, 8)
    if rest or entries < 4 or entries % 3 != 1:
        raise ValueError("offsets.bin has a size that it cannot have")
    return entries // 3


def _note_kind() -> str:
    """The kind of the notes on checked indexes: another one after each start of the machine."""
    with contextlib.suppress(OSError):
        return f"checked/{_BOOT_ID.read_text(encoding='ascii').strip()}"
    return "checked/unknown"


def _paths(folder: Path) -> list[Path]:
    return [folder / name for name in (*_FILES, _META)]


def _stale(folder: Path, what: str) -> StaleIndexError:
    return StaleIndexError(
        f"the index {folder} {what}. Make it again: research-env index --corpus FILE --to {folder}"
    )


def _is_file(path: Path, size: int) -> bool:
    """Whether this is a regular file of that size, without opening it: it may be a pipe."""
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size > 0


def _checksum(path: Path) -> tuple[int, str]:
    """The size of a file and its hash, made with several processors."""
    size = path.stat().st_size

    def digest(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return blake2b(file.read(_CHUNK), digest_size=16).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each holds a chunk
        digests = b"".join(pool.map(digest, range(0, size, _CHUNK)))
    return size, blake2b(digests, digest_size=16).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Some network file systems refuse this for folders; nothing more can be done there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in {errno.EINVAL, errno.EBADF, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
