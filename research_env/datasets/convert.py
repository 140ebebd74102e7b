"""Convert files of other formats to ``questions.jsonl`` and ``corpus.jsonl``."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from research_env.datasets.files import (
    FileCorpus,
    has_answers,
    is_beir,
    make_question,
    question_record,
    read_beir_questions,
    read_questions,
)
from research_env.datasets.formats import read_records
from research_env.errors import ConfigurationError, DataError


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        questions: number of questions per split; "" stands for questions without a split.
        passages: number of passages.
        left_out: queries of a BEIR folder that have no answers.
    """

    questions: dict[str, int]
    passages: int
    left_out: int = 0


def convert(source: Path, output: Path) -> Converted:
    """Convert a question file, a corpus or a BEIR folder to JSON Lines.

    Queries of a BEIR folder that have no answers are left out, since nothing could be rewarded.

    Args:
        source: any file or folder that :mod:`research_env.datasets.files` reads.
        output: the folder that gets ``questions.jsonl``, ``corpus.jsonl`` or both.

    Raises:
        DataNotFoundError: no such source.
        DataError: the source holds neither questions nor passages, or a record is malformed.
        ConfigurationError: a file in ``output`` is there already.
    """
    left_out = 0
    questions, has_passages = [], True
    if is_beir(source):
        for where, record in read_beir_questions(source):
            if has_answers(record):
                questions.append(make_question(record, where))
            else:
                left_out += 1
    elif _holds_questions(source):
        questions, has_passages = read_questions(source), False
    output.mkdir(parents=True, exist_ok=True)
    passages = 0
    if questions:
        _write(output / "questions.jsonl", map(question_record, questions))
    if has_passages:
        corpus = FileCorpus(source.name, source)
        passages = _write(output / "corpus.jsonl", map(structs.asdict, corpus))
    return Converted(dict(Counter(q.split or "" for q in questions)), passages, left_out)


def _holds_questions(file: Path) -> bool:
    for where, record in read_records(file):
        if "question" in record:
            return True
        if "text" in record or "contents" in record:
            return False
        raise DataError(
            f"{where}: neither a question (no field 'question') nor a passage (no field 'text' or "
            f"'contents'); its fields are {', '.join(map(str, record))[:200]}. Rename them"
        )
    raise DataError(f"{file}: the file holds no record")


def _write(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write all records or no file at all; return the number of records."""
    if file.exists():
        raise ConfigurationError(f"{file} is there already; name another folder or remove it")
    count = 0
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        with unfinished.open("w", encoding="utf-8") as lines:
            for record in records:
                count += 1
                lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        unfinished.replace(file)
    return count
