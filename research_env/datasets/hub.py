"""The published data sets and corpora on the Hugging Face hub, as this package's own records.

Each ``from_...`` function takes one record in the format of its data set, as its authors publish
it or as the hub holds it, and gives the question and all of its passages in the fields that
:mod:`research_env.datasets.files` reads. A passage's id is made of its content, so that the same
passage in two records is one. :mod:`research_env.datasets.prepare` fetches the files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from research_env.errors import DataError

Record = Mapping[str, Any]
Passages = list[dict[str, str]]
Converted = tuple[dict[str, Any], Passages]  # a question and its passages


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where a data set is on the hub, and how its records are read.

    Attributes:
        repository: its name among the hub's data sets.
        files: by our name of a split, which files hold it (``*`` is any text).
        convert: makes a record ours.
        sha256: of files whose content is known.
        repeats: whether a passage may come with several records.
    """

    repository: str
    files: Mapping[str, str]
    convert: Callable[[Record], Converted | tuple[None, Passages]]
    sha256: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = True


class Counts(NamedTuple):
    """How many questions each split has, and how many passages the corpus."""

    questions: dict[str, int]
    passages: int


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


def from_flashrag(record: Record, name: str) -> Converted:
    """Read a record of a question set in FlashRAG's format (Jin et al. 2024, arXiv:2405.13576).

    Fields: ``id, question, golden_answers``, and ``metadata`` in some sets. Ids such as ``train_0``
    are in all of them, so the set's name is put before.
    """
    question = {
        "id": f"{name}_{record['id']}",
        "question": _clean(record["question"]),
        "answers": _unique(map(_clean, record["golden_answers"])),
    }
    if not question["answers"]:
        raise ValueError("no answer in golden_answers")
    return question, []


def from_wiki18(record: Record) -> tuple[None, Passages]:
    r"""Read a passage of Wikipedia of December 2018 in pieces of 100 words (Karpukhin et al. 2020).

    Fields: ``id, contents``, where the first line of the contents is the title in quotes: that is
    FlashRAG's file, and Search-R1's, whose README defines it.
    """
    title, _, text = record["contents"].partition("\n")
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return None, [{"id": str(record["id"]), "title": title.strip(), "text": text.strip()}]


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_WIKI18 = "retrieval-corpus/wiki18_100w.zip"


def _flashrag(name: str, *splits: str) -> HubSource:
    files = {split: f"{name}/{split}.jsonl" for split in splits}
    return HubSource(_FLASHRAG, files, partial(from_flashrag, name=name))


HUB_SOURCES = {
    "musique": HubSource(
        "dgslibisey/MuSiQue",
        {"train": "musique_ans_v1.0_train.jsonl", "dev": "musique_ans_v1.0_dev.jsonl"},
        from_musique,
    ),
    "hotpotqa": HubSource(
        "hotpotqa/hotpot_qa",
        {"train": "distractor/train-*.parquet", "dev": "distractor/validation-*.parquet"},
        from_hotpotqa,
    ),
    "2wiki": HubSource(
        "framolfese/2WikiMultihopQA",
        {"train": "*train*.parquet", "dev": "*validation*.parquet"},
        from_2wiki,
    ),
    "bamboogle": HubSource("chiayewken/bamboogle", {"test": "data/test-*.parquet"}, from_bamboogle),
    "nq": _flashrag("nq", "train", "dev", "test"),
    "triviaqa": _flashrag("triviaqa", "train", "dev", "test"),
    "popqa": _flashrag("popqa", "test"),
    "wiki18": HubSource(
        _FLASHRAG,
        {"corpus": _WIKI18},
        from_wiki18,
        {_WIKI18: "e5b987a0ce4f6c5fff788162f50c70d41f10fb7762daba507a96a3ad7bb956db"},
        repeats=False,
    ),
    "wiki18-search-r1": HubSource(
        "PeterJinGo/wiki-18-corpus", {"corpus": "wiki-18.jsonl.gz"}, from_wiki18, repeats=False
    ),
}


def convert(source: HubSource, rows: Mapping[str, Iterable[Record]], folder: Path) -> Counts:
    """Write the records of each split to a folder in this package's format, as a stream.

    The same records give the same bytes.

    Args:
        source: tells the format and the name for messages.
        rows: the records by our names of the splits; those that say ``answerable: false``, and
            passages without text, are left out.
        folder: gets ``questions.jsonl.gz`` and ``corpus.jsonl.gz``, each where it is not empty.

    Raises:
        DataError: a record is not in the data set's format.
    """
    counts: Counter[str] = Counter()
    passages = 0
    seen: set[str] = set()
    paths = (folder / "questions.jsonl.gz", folder / "corpus.jsonl.gz")
    with _written(paths[0]) as questions, _written(paths[1]) as corpus:
        for split, records in rows.items():
            for number, record in enumerate(records, start=1):
                if not record.get("answerable", True):
                    continue
                try:
                    question, found = source.convert(record)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(
                        f"{source.repository}, split {split}, record {number}: not in the "
                        f"format known ({type(error).__name__}: {error}); put the data set "
                        "into a folder and name it by RESEARCH_DATA instead"
                    ) from error
                if question is not None:
                    counts[split] += 1
                    _write(questions, question | {"split": split})
                for passage in found:
                    if passage["text"] and passage["id"] not in seen:
                        passages += 1
                        _write(corpus, passage)
                        if source.repeats:
                            seen.add(passage["id"])
    for path, count in zip(paths, (counts.total(), passages), strict=True):
        if not count:
            path.unlink()
    return Counts(dict(counts), passages)


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A gzipped text whose bytes depend on the text alone: no name, no time."""
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        yield text


def _write(file: TextIO, record: Record) -> None:
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
