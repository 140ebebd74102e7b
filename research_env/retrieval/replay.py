"""Record what a search engine answers, and replay it: ``?cache=FILE`` on any retriever's URL.

The first run records; later runs get the same hits byte for byte, and never open the engine if all
their queries are recorded. ``?cache=FILE&replay=only`` never asks the engine: a query that is not
recorded is an error, and the file is only read. The file is one SQLite database that several
processes may use at once (on a local disk), including the processes of a fork: each opens it anew.

The key of a result is the engine's URL (without the options that change no result, and without user
or password), the query and top_k. Errors are never recorded. Nobody notices that an index has
changed behind the same URL: record into a new file then.

A recording may come from a stranger. It must have exactly the schema below, so that nothing in it
runs. Each row is decoded by type, and a query fails if its row is not a list of at most top_k hits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote
from weakref import WeakSet

import msgspec

from research_env.errors import ConfigurationError, RetrievalError, UnknownNameError
from research_env.retrieval.base import Hit, Passage, Retriever, SearchResult, check_top_k
from research_env.retrieval.json_text import read_json
from research_env.retrieval.retry import Deadline
from research_env.retrieval.url import WITHOUT_EFFECT, split_options

log = logging.getLogger(__name__)

_FORMAT = 1  # version of the table, kept as the file's user_version
_TIMEOUT = 60.0  # seconds that a process waits while another one writes
_MAX_ROW = 64 << 20  # bytes of a row
_LOG_EVERY = 10_000  # queries between two logs of the hit rate
_CLOSED = "the recording has been closed; open it again"
_TABLE = """
CREATE TABLE IF NOT EXISTS found (
    engine TEXT NOT NULL, query BLOB NOT NULL, top_k INTEGER NOT NULL, hits TEXT NOT NULL,
    PRIMARY KEY (engine, query, top_k)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Recording:
    """What the URL of a recorded retriever says.

    Attributes:
        file: holds the results.
        engine: the part of each result's key that names the engine.
        replay_only: whether the engine is never asked.
    """

    file: Path
    engine: str
    replay_only: bool = False


def recording(url: str) -> tuple[str, Recording | None]:
    """Take ``cache`` and ``replay`` out of a retriever's URL.

    Returns:
        The engine's URL, and what the two options say; None if there are none.

    Raises:
        ConfigurationError: ``replay`` without ``cache``, or ``cache`` without a file.
        UnknownNameError: ``replay`` is something other than ``only``.
    """
    base, options = split_options(url)
    if "cache" not in options and "replay" not in options:
        return url, None
    file, replay = options.get("cache"), options.get("replay")
    if not file:
        raise ConfigurationError("a recording needs a file, as in '?cache=searches.sqlite'")
    if replay not in (None, "only"):
        raise UnknownNameError("replay", replay, ["only"])
    parts = [part for part in url.partition("?")[2].split("&") if part]  # still percent-encoded
    engine = [part for part in parts if part.partition("=")[0] not in ("cache", "replay")]
    what = sorted(part for part in engine if part.partition("=")[0] not in WITHOUT_EFFECT)
    key = "?".join(filter(None, (re.sub(r"//.*@", "//", base), "&".join(what))))
    url = "?".join(filter(None, (base, "&".join(engine))))
    return url, Recording(Path(file).expanduser(), key, replay == "only")


class RecordedRetriever:
    """A retriever that answers from a file, and asks an engine for what is not there.

    If several processes record the same search at once, the first wins and all return its hits.
    Several threads may use it if they may use the engine.
    """

    def __init__(self, recording: Recording, open_engine: Callable[[], Retriever]) -> None:
        """Open the file, or make it.

        Args:
            recording: the file and how to use it.
            open_engine: opens the engine, at the first search that is not in the file.

        Raises:
            ConfigurationError: the file cannot be used, is something else, or is missing although
                it is only to be replayed.
        """
        # After a fork the file is opened again, perhaps from another working directory.
        self._recording = replace(recording, file=recording.file.absolute())
        self._open_engine = open_engine
        self._engine: Retriever | None = None
        self._lock = threading.Lock()  # guards the file and the counts
        self._opening = threading.Lock()  # guards the engine: a replay does not wait for it
        self._closed = False
        self._asked = self._replayed = 0
        self._next_log = _LOG_EVERY
        file = self._recording.file
        if recording.replay_only and not file.is_file():
            raise ConfigurationError(
                f"there is no recording {file}; record one without replay=only"
            )
        try:
            self._file: sqlite3.Connection | None = _open(file, recording.replay_only)
        except (sqlite3.Error, OSError) as error:
            raise ConfigurationError(f"{file} cannot be used as a recording: {error}") from error
        _ALIVE.add(self)

    @property
    def hit_rate(self) -> float:
        """The share of the queries so far that was answered from the file; 0 before the first."""
        return self._replayed / max(1, self._asked)

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Raises:
            ConfigurationError: ``top_k`` is below 1.
            RetrievalError: the file cannot be read or written.
        """
        check_top_k(top_k)
        wanted = list(dict.fromkeys(queries))
        found = self._look_up(wanted, top_k)
        missing = [query for query in wanted if query not in found]
        self._count(queries, missing)
        if missing and self._recording.replay_only:
            error = RetrievalError(
                f"not in the recording {self._recording.file}, which is only replayed"
            )
            found.update(dict.fromkeys(missing, error))
        elif missing:
            answers = dict(zip(missing, self._ask(missing, top_k), strict=True))
            good = {q: hits for q, hits in answers.items() if not isinstance(hits, RetrievalError)}
            self._record(good, top_k)
            found |= answers | self._look_up(list(good), top_k)  # another process may have won
        # Copies: a caller may change the list that it gets.
        results = (found[query] for query in queries)
        return [each if isinstance(each, RetrievalError) else list(each) for each in results]

    def close(self) -> None:
        """Close file and engine, and log the hit rate; calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._release()
        if self._asked:
            self._log()
        with self._opening:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _ask(self, queries: list[str], top_k: int) -> list[SearchResult]:
        try:
            with self._opening:
                if self._closed:
                    raise RetrievalError(_CLOSED)
                if self._engine is None:
                    self._engine = self._open_engine()
                engine = self._engine
            return engine.search(queries, top_k)
        except RetrievalError as error:  # fails these queries, and not the recorded ones
            return [error] * len(queries)

    def _look_up(self, queries: list[str], top_k: int) -> dict[str, SearchResult]:
        select = "SELECT CAST(hits AS BLOB) FROM found WHERE engine = ? AND query = ? AND top_k = ?"
        rows: dict[str, SearchResult] = {}
        with self._lock:
            for query in queries:
                try:
                    row = self._open_file().execute(select, self._key(query, top_k)).fetchone()
                    if row is not None:
                        rows[query] = _hits(row[0], top_k)
                except (ValueError, sqlite3.DataError) as error:
                    rows[query] = RetrievalError(
                        f"{self._recording.file} holds no hits for {query[:200]!r}, but a row that "
                        f"cannot be read ({error}); remove the row or record into a new file"
                    )
                except sqlite3.Error as error:
                    raise RetrievalError(self._unusable(error)) from error
        return rows

    def _record(self, found: dict[str, list[Hit]], top_k: int) -> None:
        rows = [
            (
                *self._key(query, top_k),
                json.dumps(
                    [[h.passage.id, h.passage.title, h.passage.text, h.score] for h in hits]
                ),
            )
            for query, hits in found.items()
        ]
        with self._lock:
            try:
                with self._open_file() as transaction:
                    transaction.executemany("INSERT OR IGNORE INTO found VALUES (?, ?, ?, ?)", rows)
            except sqlite3.Error as error:
                raise RetrievalError(self._unusable(error)) from error

    def _key(self, query: str, top_k: int) -> tuple[str, bytes, int]:
        return self._recording.engine, query.encode("utf-8", "surrogatepass"), min(top_k, 2**63 - 1)

    def _open_file(self) -> sqlite3.Connection:
        if self._closed:
            raise RetrievalError(_CLOSED)
        if self._file is None:  # closed before a fork
            self._file = _open(self._recording.file, self._recording.replay_only)
        return self._file

    def _release(self) -> None:
        """Close the file, which the next search opens again; the lock is held."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _unusable(self, error: Exception) -> str:
        return f"the recording {self._recording.file} cannot be used: {error}"

    def _count(self, queries: Sequence[str], missing: list[str]) -> None:
        absent = set(missing)
        with self._lock:
            self._asked += len(queries)
            self._replayed += sum(query not in absent for query in queries)
            due = self._asked >= self._next_log
            self._next_log += _LOG_EVERY if due else 0
        if due:
            self._log()

    def _log(self) -> None:
        log.info(
            "%s: %d of %d queries replayed (%.1f %%)",
            self._recording.file,
            self._replayed,
            self._asked,
            100 * self.hit_rate,
        )


def _hits(row: bytes, top_k: int) -> list[Hit]:
    """Decode a row.

    Raises:
        ValueError: it is not a list of at most ``top_k`` hits.
    """
    try:
        found = msgspec.convert(read_json(row), list[tuple[str, str, str, float]])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if len(found) > top_k:
        raise ValueError(f"{len(found)} hits for top_k {top_k}")
    if any(math.isnan(score) for *_, score in found):
        raise ValueError("a score that is no number")
    return [Hit(Passage(id_, title, text), score) for id_, title, text, score in found]


def _open(file: Path, only_read: bool) -> sqlite3.Connection:
    for path in (file, *(Path(f"{file}{end}") for end in ("-wal", "-shm", "-journal"))):
        with suppress(FileNotFoundError):  # others make and remove the last three meanwhile
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(f"{path} is no regular file")
    deadline = Deadline.after(_TIMEOUT)
    while True:
        connection = sqlite3.connect(
            _address(file) if only_read else file,
            timeout=_TIMEOUT,
            check_same_thread=False,
            uri=only_read,
        )
        try:
            _prepare(connection, only_read)
        except sqlite3.OperationalError as error:
            connection.close()
            # The change to WAL does not wait for another process that makes the file; this does.
            if "locked" not in str(error) or deadline.left() == 0:
                raise
            time.sleep(0.02)
        except UnicodeDecodeError as error:  # the message of an error quotes a damaged schema
            connection.close()
            raise sqlite3.DatabaseError(f"it is damaged ({error})") from error
        except BaseException:
            connection.close()
            raise
        else:
            return connection


def _address(file: Path) -> str:
    """The file, an absolute path, as a URI that SQLite opens for reading only."""
    # SQLite makes another file beside a database that it reads, unless told that nobody writes.
    written = os.access(file.parent, os.W_OK) or Path(f"{file}-wal").exists()
    return f"file:{quote(bytes(file))}?mode=ro" + ("" if written else "&immutable=1")


def _prepare(connection: sqlite3.Connection, only_read: bool) -> None:
    """Make the table in a new file; check everything in an older one."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
    connection.execute("PRAGMA trusted_schema = OFF")  # before the schema is read
    connection.execute("PRAGMA cell_size_check = ON")
    one_look = "SELECT (SELECT user_version FROM pragma_user_version), count(*) FROM sqlite_master"
    version, tables = connection.execute(one_look).fetchone()
    if version != _FORMAT:
        if only_read or (version, tables) != (0, 0):
            raise sqlite3.DatabaseError("it is another database, or of another version")
        connection.execute("PRAGMA journal_mode = WAL")  # readers and a writer at the same time
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        connection.execute("COMMIT")
    if _schema(connection) != _own_schema():
        raise sqlite3.DatabaseError("its tables are not those of a recording")
    if only_read:
        return
    connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last writes


def _schema(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    columns = "type, name, tbl_name, sql"
    return connection.execute(f"SELECT {columns} FROM sqlite_master ORDER BY name").fetchall()


@cache
def _own_schema() -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(_TABLE)
        return _schema(connection)


# SQLite must not be carried through a fork, not even to be closed in the child ("How To Corrupt An
# SQLite Database File", 2.6): the child would believe that it holds the locks. So files are closed
# before a fork.

_ALIVE: WeakSet[RecordedRetriever] = WeakSet()
_held: list[RecordedRetriever] = []
_forking = threading.Lock()  # one fork at a time


def _before_fork() -> None:
    _forking.acquire()
    for each in list(_ALIVE):
        each._lock.acquire()  # until after the fork, or another thread might open it again
        _held.append(each)  # Ctrl-C leaves out the others: Python forks all the same
        each._release()


def _after_fork(child: bool) -> None:
    for each in _held:
        each._lock.release()
        if child:
            each._opening = threading.Lock()  # a thread that held it is not here
    _held.clear()
    _forking.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(child=False),
    after_in_child=lambda: _after_fork(child=True),
)
