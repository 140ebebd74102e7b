"""The published data sets and corpora: their splits, their files on the hub, their formats.

Each ``from_...`` function takes one record in its data set's format, as the authors publish it or
as the hub holds it, and returns the question and all of its passages with the fields that
:mod:`research_env.datasets.files` reads. A passage's id is a digest of its content, so that the
same passage in two records is one. :mod:`research_env.datasets.hub` fetches the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Record = Mapping[str, Any]
Passages = list[dict[str, str]]
QuestionAndPassages = tuple[dict[str, Any], Passages]


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where a data set is on the hub, and how to read its records.

    Attributes:
        repository: the hub's name of the data set.
        files: per split, a pattern of the names of its files (``*`` matches any text).
        convert: turns a record into a question (or None) and its passages.
        sha256: the digest of each file whose content is known.
        repeats: whether several records may hold the same passage.
    """

    repository: str
    files: Mapping[str, str]
    convert: Callable[[Record], QuestionAndPassages | tuple[None, Passages]]
    sha256: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = True


@dataclass(frozen=True, slots=True)
class Published:
    """A published data set: where the questions of its splits are.

    Attributes:
        folder: name of its folder.
        splits: per split, names of files without their suffix, and a label. The first of these
            files that exists is read, and the questions whose field ``split`` is the label are
            taken from it.
    """

    folder: str
    splits: Mapping[str, tuple[tuple[str, ...], str]]


def from_musique(record: Record) -> QuestionAndPassages:
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


def from_hotpotqa(record: Record, prefix: str = "hp") -> QuestionAndPassages:
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


def from_2wiki(record: Record) -> QuestionAndPassages:
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


def from_bamboogle(record: Record) -> QuestionAndPassages:
    """Read a record of Bamboogle (Press et al. 2023): ``Question, Answer``; it has no passages."""
    text = _clean(record["Question"])
    id_ = "bamboogle_" + hashlib.sha1(text.encode()).hexdigest()[:12]
    return {"id": id_, "question": text, "answers": [_clean(record["Answer"])], "hops": 2}, []


def from_flashrag(record: Record, name: str) -> QuestionAndPassages:
    """Read a record of a question set in FlashRAG's format (Jin et al. 2024, arXiv:2405.13576).

    Fields: ``id, question, golden_answers``, and ``metadata`` in some sets. All sets
    have ids such as ``train_0``, so the set's name becomes a prefix.
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

    Fields: ``id, contents``, where the first line of the contents is the title in quotes, as in
    the files of FlashRAG and of Search-R1 (whose README defines the format).
    """
    title, _, text = record["contents"].partition("\n")
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return None, [{"id": str(record["id"]), "title": title.strip(), "text": text.strip()}]


_WITH_PASSAGES, _ALL_TRAIN, _ALL_DEV = "questions", "qa_train", "qa_dev"
_SPLITS = {
    "train": ((_ALL_TRAIN, _WITH_PASSAGES), "train"),
    "train-gold": ((_WITH_PASSAGES,), "train"),
    "dev": ((_WITH_PASSAGES,), "dev"),
    "dev-all": ((_ALL_DEV, _WITH_PASSAGES), "dev"),
}
_AS_LABELED = {split: ((_WITH_PASSAGES,), split) for split in ("train", "dev", "test")}
PUBLISHED = {
    "musique": Published("musique", _SPLITS),
    "hotpotqa": Published("hotpotqa", _SPLITS),
    "2wiki": Published("2wikimultihopqa", _SPLITS),
    "bamboogle": Published("bamboogle", {"test": ((_WITH_PASSAGES,), "test")}),
    "nq": Published("nq", _AS_LABELED),
    "triviaqa": Published("triviaqa", _AS_LABELED),
    "popqa": Published("popqa", {"test": ((_WITH_PASSAGES,), "test")}),
    "r1-searcher": Published(
        "r1searcher_train",
        {f"stage-{number}": ((f"stage_{number}",), "train") for number in (1, 2)},
    ),
}

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
        # the file of the hub's commit f2de0bd8, which has 5,130,719,280 bytes
        {_WIKI18: "e5b987a0ce4f6c5fff788162f50c70d41f10fb7762daba507a96a3ad7bb956db"},
        repeats=False,
    ),
    "wiki18-search-r1": HubSource(
        "PeterJinGo/wiki-18-corpus", {"corpus": "wiki-18.jsonl.gz"}, from_wiki18, repeats=False
    ),
}


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
