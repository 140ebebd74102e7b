"""Strict readers of question files and corpora, in any format of :mod:`.formats`.

A question is ``id, question, answers`` and, where known, ``supporting, hops, split, type,
decomposition``; what else a record says is in ``extra``. A passage is ``id, title, text``; other
fields are ignored. The names that other projects use are understood too:

- ``_id`` for ``id``; an id may be a number;
- ``golden_answers`` (FlashRAG) or ``answer`` for ``answers``: a text, a number, or a list of them;
- ``contents`` (FlashRAG) for title and text: ``"title"``, a line break, the text; a passage without
  a title has an empty one;
- a BEIR folder (``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``) for questions and for a
  corpus; a query's answers are in its ``metadata``.

Whatever is wrong is a :class:`~research_env.errors.DataError` that names file and line, shows the
value, and says what to do.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from research_env.datasets.base import Hop, Question
from research_env.datasets.formats import Records, missing, read_records
from research_env.errors import DataError
from research_env.retrieval.base import Passage
from research_env.system.paths import cached

_FIELDS = tuple(field.name for field in fields(Question) if field.name != "extra")
_ANSWERS = ("answers", "golden_answers", "answer")
_IDS = ("id", "_id")
_QRELS = ("query-id", "corpus-id", "score")


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file, or the queries of a BEIR folder.

    Raises:
        DataNotFoundError: no such file.
        DataError: a record is not a question, or repeats an id; or there is no record.
    """
    path = Path(path)
    questions = make_questions(read_beir_questions(path) if is_beir(path) else read_records(path))
    if not questions:
        raise DataError(f"{path}: the file holds no question; give one JSON object per line")
    return questions


def make_questions(records: Records) -> list[Question]:
    """The questions of records.

    Raises:
        DataError: a record is not a question, or repeats an id.
    """
    questions: list[Question] = []
    first: dict[str, str] = {}
    for where, record in records:
        question = make_question(record, where)
        if first.setdefault(question.id, where) != where:
            raise _repeated(where, question.id, first[question.id])
        questions.append(question)
    return questions


def question_record(question: Question) -> dict[str, Any]:
    """The question as a line of a question file: extra fields stand beside the others."""
    known = {name: getattr(question, name) for name in _FIELDS}
    known["decomposition"] = [asdict(hop) for hop in question.decomposition]
    return {**question.extra, **known}


def is_beir(path: Path) -> bool:
    """Whether this is a folder in BEIR's layout."""
    return (path / "queries.jsonl").is_file() or (path / "queries.jsonl.gz").is_file()


def read_beir_questions(folder: Path) -> Records:
    """The queries of a BEIR folder that a file of ``qrels`` judges, as records of questions.

    Without ``qrels`` all queries are read.

    Raises:
        DataError: a line of ``qrels`` or of ``queries.jsonl`` is malformed, or a query is judged
            in two splits.
    """
    supporting: dict[str, dict[str, None]] = {}  # passages, each once, in order
    split: dict[str, str] = {}
    for qrels in sorted((folder / "qrels").glob("*.tsv")):
        for where, row in read_records(qrels):
            query, passage, score = (_column(row, name, where) for name in _QRELS)
            if split.setdefault(query, qrels.stem) != qrels.stem:
                raise DataError(
                    f"{where}: the query {query!r:.80} is in the split {split[query]!r} too; a "
                    "question has one, so leave it out of a file of qrels"
                )
            try:
                relevant = float(score) > 0
            except ValueError:
                raise DataError(
                    f"{where}: the column 'score' must be a number, not {score!r:.80}"
                ) from None
            if relevant:
                supporting.setdefault(query, {})[passage] = None
    replaced = ("metadata", "text")
    for where, record in read_records(_beir_file(folder, "queries")):
        id_ = _id(record, where)
        if not split or id_ in split:
            metadata = record.get("metadata")
            yield (
                where,
                {
                    **(metadata if isinstance(metadata, dict) else {}),
                    **{key: value for key, value in record.items() if key not in replaced},
                    "id": id_,
                    "question": record.get("question", record.get("text")),
                    "supporting": list(supporting.get(id_, ())),
                    "split": split.get(id_),
                },
            )


@dataclass(frozen=True, slots=True)
class FileCorpus:
    """A corpus in a file or a BEIR folder: streamed at each iteration, never held in memory."""

    name: str
    path: Path

    def __iter__(self) -> Iterator[Passage]:
        """Stream the passages in the order of the file.

        Raises:
            DataNotFoundError: no such file.
            DataError: a record is not a passage, or repeats an id (found after the last passage).
        """
        hashes = array("q")  # 8 bytes per passage; the ids of a large corpus would fill the memory
        for where, record in read_records(self._file()):
            passage = make_passage(record, where)
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

    def _file(self) -> Path:
        if is_beir(self.path):
            return _beir_file(self.path, "corpus")
        return self.path

    def _summary(self) -> tuple[str, int]:
        try:
            found = cached("fingerprints", [self._file()], self._read)
        except OSError as error:
            raise missing(self.path) from error
        return found["fingerprint"], found["passages"]

    def _read(self) -> dict[str, Any]:
        digest, count = hashlib.sha256(), 0
        for passage in self:
            count += 1
            lengths = f"{len(passage.id)} {len(passage.title)} {len(passage.text)} "
            digest.update(f"{lengths}{passage.id}{passage.title}{passage.text}".encode())
        return {"fingerprint": digest.hexdigest(), "passages": count}

    def _refuse_repeated(self) -> None:
        first: dict[str, str] = {}
        for where, record in read_records(self._file()):
            id_ = make_passage(record, where).id
            if first.setdefault(id_, where) != where:
                raise _repeated(where, id_, first[id_])


def make_passage(record: Mapping[str, Any], where: str) -> Passage:
    """The passage of a record.

    Args:
        record: its fields.
        where: file and line, for errors.

    Raises:
        DataError: a field is missing, or has a value of another type.
    """
    title = record.get("title")
    if title is not None and not isinstance(title, str):
        raise DataError(f"{where}: the field 'title' must be a text, not {title!r:.80}")
    if record.get("text") is None and record.get("contents") is not None:
        head, line_break, text = _text(record, "contents", where).partition("\n")
        if line_break and title is None:
            quoted = len(head) > 1 and head[0] == head[-1] == '"'
            title = head[1:-1] if quoted else head
        record = {"text": text if line_break else head, **_without_nulls(record)}
    return Passage(_id(record, where), title or "", _text(record, "text", where))


def has_answers(record: Mapping[str, Any]) -> bool:
    """Whether a record has a field of gold answers, valid or not."""
    return any(record.get(name) is not None for name in _ANSWERS)


def make_question(record: Mapping[str, Any], where: str) -> Question:
    """The question of a record; arguments and errors are those of :func:`make_passage`."""
    record = _without_nulls(record)
    given = next((name for name in _ANSWERS if name in record), None)
    if given is None:
        raise DataError(
            f"{where}: the field 'answers' must be a list of texts; it is missing, and so are "
            "'golden_answers' and 'answer'. Give the gold answers or remove the line"
        )
    supporting = _texts(record.get("supporting", []), "supporting", where)
    hops = record.get("hops")
    if isinstance(hops, float) and hops.is_integer():
        hops = int(hops)
    if hops is not None and (not isinstance(hops, int) or isinstance(hops, bool) or hops < 1):
        raise DataError(f"{where}: the field 'hops' must be a number from 1 on, not {hops!r:.80}")
    steps = record.get("decomposition", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise DataError(
            f"{where}: the field 'decomposition' must be a list of objects, not {steps!r:.80}"
        )
    answers = _texts(record[given], given, where)
    if not answers:
        raise DataError(
            f"{where}: the field {given!r} must be a list of texts with at least one; it is "
            f"{record[given]!r:.80}"
        )
    read = {*_FIELDS, given, *_IDS}
    return Question(
        id=_id(record, where),
        question=_text(record, "question", where),
        answers=answers,
        supporting=supporting,
        hops=hops,
        split=_text(record, "split", where) if "split" in record else None,
        type=_text(record, "type", where) if "type" in record else None,
        decomposition=tuple(_hop(step, where) for step in steps),
        extra={key: value for key, value in record.items() if key not in read},
    )


def _hop(step: Mapping[str, Any], where: str) -> Hop:
    answer = step.get("answer")
    if isinstance(answer, list) and answer:  # some decompositions list several
        step = {**step, "answer": answer[0]}
    support = _text(step, "support", where) if step.get("support") is not None else None
    return Hop(_text(step, "question", where), _text(step, "answer", where), support)


def _id(record: Mapping[str, Any], where: str) -> str:
    for name in _IDS:
        value = record.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            return _text(record, name, where)
    return _text(record, "id", where)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        state = "is missing" if field not in record else f"is {value!r:.80}"
        suggestion = "remove the line" if field == "text" else "correct the line"
        raise DataError(
            f"{where}: the field {field!r} must be a text that is not empty; it {state}. "
            f"Give it or {suggestion}"
        )
    return value


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: nothing in the column {name!r}; the first line of qrels must be "
            f"{' '.join(_QRELS)} (with tabs), and every line must have all three"
        )
    return value


def _texts(value: object, field: str, where: str) -> tuple[str, ...]:
    """A text or number, or a list of them, as texts."""
    texts = tuple(_as_text(each) for each in (value if isinstance(value, list) else [value]))
    if not all(text.strip() for text in texts):
        raise DataError(
            f"{where}: the field {field!r} must be a list of texts or numbers that are not empty; "
            f"it is {value!r:.80}"
        )
    return texts


def _as_text(value: object) -> str:
    """A text or number as text, a whole number without a point; "" for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def _without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _repeated(where: str, id_: str, first: str) -> DataError:
    place = first.rpartition(":")[2].strip()
    place = place if place.startswith("row") else f"line {place}"
    return DataError(f"{where}: the id {id_!r:.80} is that of {place}; every id must be unique")


def _beir_file(folder: Path, stem: str) -> Path:
    plain = folder / f"{stem}.jsonl"
    return plain if plain.is_file() else folder / f"{stem}.jsonl.gz"
