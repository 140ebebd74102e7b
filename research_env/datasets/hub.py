"""The published data sets on the Hugging Face hub, turned into this package's own files.

Each ``from_...`` function takes one record in the format of its data set, as its authors publish
it or as the hub holds it, and gives the question and all of its passages in the fields that
:mod:`research_env.datasets.files` reads. A passage's id is made of its content, so that the same
passage in two records is one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from research_env.errors import DataError, DataNotFoundError

Record = Mapping[str, Any]
Converted = tuple[dict[str, Any], list[dict[str, str]]]  # a question and its passages


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where a data set is on the hub, and how its records are read."""

    repository: str
    configuration: str | None
    splits: Mapping[str, str]  # our name of a split: the hub's
    convert: Callable[[Record], Converted]
    has_passages: bool = True


def from_musique(record: Record) -> Converted:
    """Read a record of MuSiQue (Trivedi et al. 2022).

    Fields: ``id, paragraphs [{idx, title, paragraph_text, is_supporting}], question,
    question_decomposition [{question, answer, paragraph_support_idx}], answer, answer_aliases``.
    """
    passages = {p["idx"]: _passage("mq", p["title"], p["paragraph_text"])
                for p in record["paragraphs"]}  # fmt: skip
    steps = record["question_decomposition"]
    question = {
        "id": record["id"],
        "question": _clean(record["question"]),
        "answers": _unique(map(_clean, [record["answer"], *record["answer_aliases"]])),
        "supporting": _unique(
            passages[p["idx"]]["id"] for p in record["paragraphs"] if p["is_supporting"]
        ),
        "hops": len(steps),
        "decomposition": [
            {
                "question": _clean(step["question"]),
                "answer": _clean(step["answer"]),
                "support": passages[step["paragraph_support_idx"]]["id"]
                if step["paragraph_support_idx"] is not None
                else None,
            }
            for step in steps
        ],
    }
    return question, list(passages.values())


def from_hotpotqa(record: Record, prefix: str = "hp") -> Converted:
    """Read a record of HotpotQA (Yang et al. 2018).

    Fields of the authors' file: ``_id, question, answer, type, supporting_facts [[title,
    sentence]], context [[title, [sentence, ...]]]``. On the hub it is ``id``, and the two lists
    are ``supporting_facts {title: [...], sent_id: [...]}, context {title: [...], sentences:
    [[...]]}``.
    """
    context, facts = _decoded(record["context"]), _decoded(record["supporting_facts"])
    if isinstance(context, Mapping):
        context = list(zip(context["title"], context["sentences"], strict=True))
    titles = facts["title"] if isinstance(facts, Mapping) else [fact[0] for fact in facts]
    passages = {title: _passage(prefix, title, " ".join(parts)) for title, parts in context}
    question = {
        "id": record["_id"] if "_id" in record else record["id"],
        "question": _clean(record["question"]),
        "answers": [_clean(record["answer"])],
        "supporting": [passages[title]["id"] for title in _unique(titles) if title in passages],
        "hops": 2,
        "type": record["type"],
    }
    return question, list(passages.values())


def from_2wiki(record: Record) -> Converted:
    """Read a record of 2WikiMultiHopQA (Ho et al. 2020).

    Fields: those of HotpotQA, and ``evidences [[subject, relation, object]]``; one repository on
    the hub has ``{fact: [...], relation: [...], entity: [...]}``, another JSON in text fields.
    """
    question, passages = from_hotpotqa(record, prefix="2w")
    evidences = _decoded(record["evidences"])
    if isinstance(evidences, Mapping):
        columns = (evidences["fact"], evidences["relation"], evidences["entity"])
        evidences = list(zip(*columns, strict=True))
    question["evidences"] = [list(triple) for triple in evidences]
    question["hops"] = 4 if record["type"] == "bridge_comparison" else 2
    return question, passages


def from_bamboogle(record: Record) -> Converted:
    """Read a record of Bamboogle (Press et al. 2023): ``Question, Answer``; it has no passages."""
    text = _clean(record["Question"])
    id_ = "bamboogle_" + hashlib.sha1(text.encode()).hexdigest()[:12]
    return {"id": id_, "question": text, "answers": [_clean(record["Answer"])], "hops": 2}, []


_BOTH = {"train": "train", "dev": "validation"}
HUB_SOURCES = {
    "musique": HubSource("dgslibisey/MuSiQue", None, _BOTH, from_musique),
    "hotpotqa": HubSource("hotpotqa/hotpot_qa", "distractor", _BOTH, from_hotpotqa),
    "2wiki": HubSource("framolfese/2WikiMultihopQA", None, _BOTH, from_2wiki),
    "bamboogle": HubSource(
        "chiayewken/bamboogle", None, {"test": "test"}, from_bamboogle, has_passages=False
    ),
}


def fetch(name: str, folder: Path) -> None:
    """Get a data set from the hub and write it to a folder, all of it or nothing.

    Args:
        name: a key of :data:`HUB_SOURCES`.
        folder: gets ``questions.jsonl.gz`` and, where the set has passages, ``corpus.jsonl.gz``.

    Raises:
        DataNotFoundError: the packages for the hub are missing, or it does not answer.
        DataError: a record is not in the data set's format.
    """
    source = HUB_SOURCES[name]
    try:
        from datasets import load_dataset  # noqa: PLC0415  (an extra, and slow to load)
        from huggingface_hub import HfApi  # noqa: PLC0415
    except ImportError as error:
        raise DataNotFoundError(
            "the hub needs further packages: pip install 'research-env[hub]'"
        ) from error
    try:
        HfApi().dataset_info(source.repository, timeout=10)  # fails at once where load_dataset
        rows = {  # would try again for half a minute
            split: load_dataset(source.repository, source.configuration, split=theirs)
            for split, theirs in source.splits.items()
        }
    except Exception as error:  # whatever the network and the hub's client come up with
        raise DataNotFoundError(
            f"the hub did not give {source.repository!r}: {type(error).__name__}: {error}"
        ) from error
    convert(source, rows, folder)


def convert(source: HubSource, rows: Mapping[str, Iterable[Record]], folder: Path) -> None:
    """Write the records of each split to a folder in this package's format.

    Args:
        source: tells the format and the name for messages.
        rows: the records by our names of the splits; those that say ``answerable: false``, and
            passages without text, are left out.
        folder: as for :func:`fetch`.

    Raises:
        DataError: a record is not in the data set's format.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        seen: set[str] = set()
        with (
            gzip.open(unfinished / "questions.jsonl.gz", "wt", encoding="utf-8") as questions,
            gzip.open(unfinished / "corpus.jsonl.gz", "wt", encoding="utf-8") as corpus,
        ):
            for split, records in rows.items():
                for number, record in enumerate(records, start=1):
                    if not record.get("answerable", True):
                        continue
                    try:
                        question, passages = source.convert(record)
                    except (KeyError, TypeError, ValueError, AttributeError) as error:
                        raise DataError(
                            f"{source.repository}, split {split}, record {number}: not in the "
                            f"format known ({type(error).__name__}: {error}); put the data set "
                            "into a folder and name it by RESEARCH_DATA instead"
                        ) from error
                    _write(questions, question | {"split": split})
                    for passage in passages:
                        if passage["text"] and passage["id"] not in seen:
                            seen.add(passage["id"])
                            _write(corpus, passage)
        if not source.has_passages:
            (unfinished / "corpus.jsonl.gz").unlink()
        unfinished.rename(folder)
    except OSError:
        if not (folder / "questions.jsonl.gz").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(file: IO[str], record: Record) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _passage(prefix: str, title: str, text: str) -> dict[str, str]:
    title, text = _clean(title), _clean(text)
    digest = hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:12]
    return {"id": f"{prefix}_{digest}", "title": title, "text": text}


def _clean(text: str) -> str:
    return " ".join(text.split())


def _unique(items: Iterable[str]) -> list[str]:
    return [item for item in dict.fromkeys(items) if item]


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
