"""The verdict of a judge, the log of a run's verdicts, and the cache that runs share."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from research_env.errors import ConfigurationError, DataError, ResearchEnvError
from research_env.judge.predictions import EpisodeKey
from research_env.system.locks import exclusive_lock

_CACHE_VERSION = 1  # user_version of the database
_TABLE = (
    "verdicts (digest TEXT PRIMARY KEY, verdict INTEGER NOT NULL, raw TEXT NOT NULL) WITHOUT ROWID"
)
_BEGINNING = b'{"header"'  # what a verdict log begins with
_LONGEST_REPLY = 64 << 20  # bytes of a row
_MALFORMED = (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError)


class JudgeError(ResearchEnvError):
    """The judge cannot continue: wrong key, address or model, or an endpoint that is gone."""


class NoReplyError(ResearchEnvError):
    """One question got no reply.

    Args:
        kind: a few words, the same for all failures of a kind.
        detail: what the server said, or what went wrong on the way.
        refused: whether the server answered, and would refuse the same question again.
    """

    def __init__(self, kind: str, detail: str = "", *, refused: bool = False) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.refused = refused


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """One answer of the judge.

    Attributes:
        text: what the model wrote.
        tokens: numbers of tokens of prompt and answer; None if the server did not count them.
    """

    text: str
    tokens: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said about one prediction.

    Attributes:
        correct: None if the verdict is missing.
        raw: the model's last text, if there is one.
        problem: why the verdict is missing; None if it is not.
        replies: all answers of the model, the repaired one included.
    """

    correct: bool | None
    raw: str | None = None
    problem: NoReplyError | None = None
    replies: tuple[JudgeReply, ...] = ()


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _LogLine(msgspec.Struct):
    """The part of a line of ``judged.jsonl`` that a later run reads."""

    correct: bool | None
    digest: str | None
    replies: _Count
    replies_without_usage: _Count
    tokens_in: _Count
    tokens_out: _Count
    sample: int
    question_id: str | None = None
    episode: int | None = None


class VerdictLog:
    """``judged.jsonl``: a header, then a line per verdict; an episode's last line counts.

    Attributes:
        totals: replies, replies_without_usage, tokens_in and tokens_out of all lines.
    """

    def __init__(self, path: Path, file: BinaryIO, header: Mapping[str, str]) -> None:
        """Read the existing lines, and cut off the incomplete line that a killed run left.

        Args:
            path: for messages.
            file: open for reading and appending.
            header: what the verdicts depend on.

        Raises:
            DataError: the file is no verdict log; the message names the line.
            ConfigurationError: it holds verdicts of another judge or prediction file.
        """
        self._file = file
        self._verdicts: dict[EpisodeKey, tuple[str | None, bool | None]] = {}
        self.totals = Counter(replies=0, replies_without_usage=0, tokens_in=0, tokens_out=0)
        file.seek(0)
        whole, newline, rest = file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        former = self._read(path, lines)
        # A run may have been killed while it wrote the first bytes of the header.
        if former is None and not _BEGINNING.startswith(rest[: len(_BEGINNING)]):
            raise _not_a_log(f"{path}:1", "it does not begin with a header")
        if former is not None and former != header:
            raise ConfigurationError(
                f"{path} holds other verdicts ({former}); give --output another folder, or move it "
                "away"
            )
        if rest:
            file.truncate(len(whole) + len(newline))
        if former is None:
            self._append({"header": dict(header)})

    def verdict(self, key: EpisodeKey, digest: str | None) -> bool | None:
        """Return the verdict of an episode for this prompt; None if it is missing.

        Args:
            key: identifies the episode.
            digest: identifies model and prompt; None if nobody is asked.
        """
        found, correct = self._verdicts.get(key, (None, None))
        return correct if found == digest else None

    def write(self, key: EpisodeKey, digest: str | None, verdict: Verdict) -> None:
        """Append an episode's verdict.

        Args:
            key: identifies the episode.
            digest: identifies model and prompt; None if nobody was asked.
            verdict: the verdict, or why it is missing.
        """
        counted = [reply.tokens for reply in verdict.replies if reply.tokens]
        record: dict[str, Any] = {
            "question_id" if isinstance(key[0], str) else "episode": key[0],
            "sample": key[1],
            "correct": verdict.correct,
            "asked": digest is not None,
            "raw": verdict.raw,
            "problem": str(verdict.problem) if verdict.problem else None,
            "digest": digest,
            "replies": len(verdict.replies),
            "replies_without_usage": len(verdict.replies) - len(counted),
            "tokens_in": sum(tokens[0] for tokens in counted),
            "tokens_out": sum(tokens[1] for tokens in counted),
        }
        self._append(record)
        self._remember(msgspec.convert(record, _LogLine))

    def _read(self, path: Path, lines: list[bytes]) -> Any:
        """Remember the verdicts of the lines; return the header, None if there is no line."""
        header = None
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    header = msgspec.convert(record["header"], dict[str, str])
                else:
                    self._remember(msgspec.convert(record, _LogLine))
            except _MALFORMED as error:
                raise _not_a_log(f"{path}:{number}", str(error)) from None
        return header

    def _remember(self, line: _LogLine) -> None:
        key = line.episode if line.question_id is None else line.question_id
        if key is None:
            raise ValueError("it names neither a question nor an episode")
        self._verdicts[key, line.sample] = line.digest, line.correct
        for name in self.totals:
            self.totals[name] += getattr(line, name)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()


@contextmanager
def open_verdict_log(path: Path, header: Mapping[str, str]) -> Iterator[VerdictLog]:
    """Open a verdict log for this process only.

    Raises:
        ConfigurationError: another process writes it, or see :class:`VerdictLog`.
        DataError: see :class:`VerdictLog`.
    """
    with exclusive_lock(path, wait=False) as file:
        if file is None:
            raise ConfigurationError(f"another run is writing {path}; wait for it")
        yield VerdictLog(path, file, header)


class VerdictCache:
    """Verdicts by the digest of model and prompt, in a SQLite database that runs may share."""

    def __init__(self, path: Path) -> None:
        """Open or make the database.

        Raises:
            JudgeError: it cannot be used; the methods raise the same.
        """
        self._path = path
        if path.exists() and not path.is_file():
            raise JudgeError(f"the cache {path} is no regular file; move it away")
        with self._errors_translated():
            self._database = sqlite3.connect(path, timeout=60.0)
        self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_REPLY)
        try:
            with self._errors_translated():
                self._database.execute("PRAGMA trusted_schema = OFF")  # before it is read
                self._database.execute("PRAGMA synchronous = NORMAL")
                with self._database as transaction:
                    transaction.execute("BEGIN IMMEDIATE")  # another run may be making it
                    (version,) = transaction.execute("PRAGMA user_version").fetchone()
                    (tables,) = transaction.execute("SELECT count(*) FROM sqlite_master").fetchone()
                    if version != _CACHE_VERSION and (version, tables) != (0, 0):
                        raise sqlite3.DatabaseError("it is another database, or of another version")
                    transaction.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
                    transaction.execute(f"PRAGMA user_version = {_CACHE_VERSION}")
                schema = self._database.execute("SELECT sql FROM sqlite_master").fetchall()
                if schema != [(f"CREATE TABLE {_TABLE}",)]:  # a trigger could change verdicts
                    raise sqlite3.DatabaseError("its tables are not those of a cache")
        except BaseException:
            self._database.close()
            raise

    def get(self, digest: str) -> Verdict | None:
        """Return the verdict of a digest, if it is known."""
        with self._errors_translated():
            select = "SELECT verdict, raw FROM verdicts WHERE digest = ?"
            row = self._database.execute(select, (digest,)).fetchone()
            if row and not (row[0] in (0, 1) and isinstance(row[1], str)):
                raise sqlite3.DatabaseError(f"the verdict of {digest} is neither 0 nor 1 with text")
        return Verdict(bool(row[0]), row[1]) if row else None

    def put(self, digest: str, verdict: Verdict) -> None:
        """Keep a verdict that is not missing."""
        with self._errors_translated(), self._database as transaction:
            insert = "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)"
            transaction.execute(insert, (digest, verdict.correct, verdict.raw))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise JudgeError(
                f"the cache {self._path} cannot be used ({error}); move it away, or copy the "
                "predictions to a folder that can be written"
            ) from error


def _not_a_log(where: str, problem: str) -> DataError:
    return DataError(f"{where}: no line of a judge's log ({problem}); move the file away")
