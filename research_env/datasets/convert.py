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
    make_questions,
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
        queries = list(read_beir_questions(source))
        questions = make_questions(query for query in queries if has_answers(query[1]))
        left_out = len(queries) - len(questions)
    elif _holds_questions(source):
        questions, has_passages = read_questions(source), False
    parts: dict[str, Iterable[Mapping[str, Any]]] = {}
    if questions:
        parts["questions.jsonl"] = map(question_record, questions)
    if has_passages:
        parts["corpus.jsonl"] = map(structs.asdict, FileCorpus(source.name, source))
    counts = _write(output, parts)
    passages = counts.get("corpus.jsonl", 0)
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


def _write(output: Path, parts: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, int]:
    """Write all files or none; return the number of records in each."""
    output.mkdir(parents=True, exist_ok=True)
    for file in map(output.joinpath, parts):
        if file.exists():
            raise ConfigurationError(f"{file} is there already; name another folder or remove it")
    counts = dict.fromkeys(parts, 0)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for name, records in parts.items():
            with (Path(folder) / name).open("w", encoding="utf-8") as lines:
                for record in records:
                    counts[name] += 1
                    lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        for name in parts:
            (Path(folder) / name).replace(output / name)
    return counts
