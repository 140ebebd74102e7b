"""Strict readers of question files and corpora in JSON Lines, plain or gzipped.

A question is ``id, question, answers`` and, where known, ``supporting, hops, split, type,
decomposition``, and what else a line says is in ``extra``; a passage is ``id, title, text``, and
other fields are ignored. Whatever is wrong is a
:class:`~research_env.errors.DataError` that names file and line, and says what to do.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from research_env.datasets.base import Hop, Question
from research_env.errors import DataError, DataNotFoundError
from research_env.paths import cache_folder
from research_env.retrieval.base import Passage

_FIELDS = tuple(field.name for field in fields(Question) if field.name != "extra")


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file.

    Raises:
        DataNotFoundError: no such file.
        DataError: a line that is not a question, or repeats an id.
    """
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, record in _records(Path(path)):
        where = f"{path}:{number}"
        question = _question(record, where)
        first = lines.setdefault(question.id, number)
        if first != number:
            raise _repeated(where, question.id, first)
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: the file holds no question; give one JSON object a line")
    return questions


def question_record(question: Question) -> dict[str, Any]:
    """The JSON object of a question file: extra fields stand beside the others."""
    known = {name: getattr(question, name) for name in _FIELDS}
    known["decomposition"] = [asdict(hop) for hop in question.decomposition]
    return {**question.extra, **known}


@dataclass(frozen=True, slots=True)
class FileCorpus:
    """A corpus in a file: streamed at each iteration, never held in memory."""

    name: str
    path: Path

    def __iter__(self) -> Iterator[Passage]:
        """Stream the passages in the order of the file.

        Raises:
            DataNotFoundError: no such file.
            DataError: a line that is not a passage, or (told at the end) repeats an id.
        """
        hashes = array("q")  # eight bytes a passage: the ids of a large corpus are not held either
        for number, record in _records(self.path):
            where = f"{self.path}:{number}"
            title = record.get("title")
            if not isinstance(title, str):
                raise DataError(f"{where}: the field 'title' must be a text (it may be empty)")
            passage = Passage(_text(record, "id", where), title, _text(record, "text", where))
            hashes.append(hash(passage.id))
            yield passage
        if len(np.unique(np.array(hashes, np.int64))) < len(hashes):
            self._refuse_repeated()

    def __len__(self) -> int:
        """Number of passages, known once the file has been read."""
        return self._summary()[1]

    def fingerprint(self) -> str:
        """SHA-256 of ids, titles and texts; kept in the cache until the file changes."""
        return self._summary()[0]

    def _summary(self) -> tuple[str, int]:
        try:
            state = self.path.stat()
        except OSError as error:
            raise _missing(self.path) from error
        times = (state.st_mtime_ns, state.st_ctime_ns)
        file = str(self.path.resolve())
        key = [file, state.st_size, state.st_ino, *times]
        place = hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        note = cache_folder() / "fingerprints" / f"{place}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["file"] == key:
                return str(known["fingerprint"]), int(known["passages"])
        digest, count = hashlib.sha256(), 0
        for passage in self:
            count += 1
            lengths = f"{len(passage.id)} {len(passage.title)} {len(passage.text)} "
            digest.update(f"{lengths}{passage.id}{passage.title}{passage.text}".encode())
        with contextlib.suppress(OSError):  # without a cache the file is read again, no more
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished = note.with_suffix(f".{os.getpid()}")
            found = {"file": key, "fingerprint": digest.hexdigest(), "passages": count}
            unfinished.write_text(json.dumps(found), encoding="utf-8")
            unfinished.replace(note)
        return digest.hexdigest(), count

    def _refuse_repeated(self) -> None:
        lines: dict[str, int] = {}
        for number, record in _records(self.path):
            first = lines.setdefault(record["id"], number)
            if first != number:
                raise _repeated(f"{self.path}:{number}", record["id"], first)


def _question(record: Mapping[str, Any], where: str) -> Question:
    answers = record.get("answers")
    if not _is_texts(answers) or not answers:
        raise DataError(f"{where}: the field 'answers' must be a list of texts with one at least")
    supporting = record.get("supporting") or []
    if not _is_texts(supporting):
        raise DataError(f"{where}: the field 'supporting' must be a list of passage ids")
    hops = record.get("hops")
    if hops is not None and (not isinstance(hops, int) or isinstance(hops, bool) or hops < 1):
        raise DataError(f"{where}: the field 'hops' must be a number from 1 on, not {hops!r}")
    steps = record.get("decomposition") or []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise DataError(f"{where}: the field 'decomposition' must be a list of objects")
    return Question(
        id=_text(record, "id", where),
        question=_text(record, "question", where),
        answers=tuple(answers),
        supporting=tuple(supporting),
        hops=hops,
        split=_text(record, "split", where) if record.get("split") is not None else None,
        type=_text(record, "type", where) if record.get("type") is not None else None,
        decomposition=tuple(_hop(step, where) for step in steps),
        extra={key: value for key, value in record.items() if key not in _FIELDS},
    )


def _hop(step: Mapping[str, Any], where: str) -> Hop:
    answer = step.get("answer")
    if isinstance(answer, list) and answer:  # Bamboogle lists them
        step = {**step, "answer": answer[0]}
    support = _text(step, "support", where) if step.get("support") is not None else None
    return Hop(_text(step, "question", where), _text(step, "answer", where), support)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        state = "is missing" if field not in record else f"is {value!r}"
        cure = "remove the line" if field == "text" else "correct the line"
        raise DataError(
            f"{where}: the field {field!r} must be a text that is not empty; it {state}. "
            f"Give it or {cure}"
        )
    return value


def _repeated(where: str, id_: str, first: int) -> DataError:
    return DataError(f"{where}: the id {id_!r} is that of line {first}; every id must be unique")


def _missing(path: Path) -> DataNotFoundError:
    return DataNotFoundError(f"no file {path}; give the path of a .jsonl or .jsonl.gz file")


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON Lines file."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _record(line, f"{path}:{number}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _missing(path) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the gzip data are damaged or cut off ({error}); "
            "get the file again, or name a plain file .jsonl"
        ) from error


def _record(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{where}: the line is empty; remove it")
    try:
        record = json.loads(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:  # JSON can spell half of a surrogate pair
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the line holds half of a surrogate pair, which is no text; remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not a JSON object ({error}); write one object a line, complete on that line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON object is needed, not {type(record).__name__}; "
            'write {"id": ..., ...} on each line'
        )
    return record
