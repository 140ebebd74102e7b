"""The published data sets, on records in exactly their formats (shortened, invented text)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from research_env.datasets import load_dataset
from research_env.datasets.catalog import (
    HUB_SOURCES,
    from_2wiki,
    from_bamboogle,
    from_flashrag,
    from_hotpotqa,
    from_musique,
    from_wiki18,
)
from research_env.datasets.hub import convert
from research_env.errors import DataError

MUSIQUE = {
    "id": "2hop__482757_12019",
    "paragraphs": [
        {"idx": 0, "title": "Green", "paragraph_text": "Green is\nan album.",
         "is_supporting": True},
        {"idx": 1, "title": "Other", "paragraph_text": "Something else.", "is_supporting": False},
        {"idx": 2, "title": "Steve", "paragraph_text": "Steve wed Ann.", "is_supporting": True},
    ],
    "question": "Who is the spouse of the Green performer?",
    "question_decomposition": [
        {"id": 482757, "question": "Green >> performer", "answer": "Steve",
         "paragraph_support_idx": 0},
        {"id": 12019, "question": "#1 >> spouse", "answer": "Ann", "paragraph_support_idx": 2},
    ],
    "answer": "Ann",
    "answer_aliases": ["Annie", "Ann"],
    "answerable": True,
}  # fmt: skip

HOTPOTQA_FILE = {
    "_id": "5a8b57f25542995d1e6f1371",
    "answer": "yes",
    "question": "Were Scott and Ed of the same nationality?",
    "supporting_facts": [["Scott", 0], ["Ed", 0], ["Ed", 1], ["Not there", 0]],
    "context": [
        ["Ed", ["Ed was American.", " He made films."]],
        ["Nobody", [""]],
        ["Scott", ["Scott is American."]],
    ],
    "type": "comparison",
    "level": "hard",
}
HOTPOTQA_HUB = {
    "id": HOTPOTQA_FILE["_id"],
    "question": HOTPOTQA_FILE["question"],
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": {"title": ["Scott", "Ed", "Ed", "Not there"], "sent_id": [0, 0, 1, 0]},
    "context": {
        "title": ["Ed", "Nobody", "Scott"],
        "sentences": [["Ed was American.", " He made films."], [""], ["Scott is American."]],
    },
}

TWO_WIKI_FILE = {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "type": "compositional",
    "question": "Who is the mother of the director of film X?",
    "context": [["X", ["X is a film by Y."]], ["Y", ["Y is a son of Z."]]],
    "entity_ids": "Q1_Q2",
    "supporting_facts": [["X", 0], ["Y", 0]],
    "evidences": [["X", "director", "Y"], ["Y", "mother", "Z"]],
    "answer": "Z",
    "evidences_id": [["Q1", "director", "Q2"], ["Q2", "mother", "Q3"]],
    "answer_id": "Q3",
}
TWO_WIKI_HUB = {
    "id": TWO_WIKI_FILE["_id"],
    "type": "compositional",
    "question": TWO_WIKI_FILE["question"],
    "context": {"title": ["X", "Y"], "sentences": [["X is a film by Y."], ["Y is a son of Z."]]},
    "supporting_facts": {"title": ["X", "Y"], "sent_id": [0, 0]},
    "evidences": {"fact": ["X", "Y"], "relation": ["director", "mother"], "entity": ["Y", "Z"]},
    "answer": "Z",
}
TWO_WIKI_JSON = TWO_WIKI_FILE | {
    key: json.dumps(TWO_WIKI_FILE[key]) for key in ("context", "supporting_facts", "evidences")
}

BAMBOOGLE = {
    "Question": "Who was president of the United States in the year that Citibank was founded?",
    "Answer": "james madison",
}

# FlashRAG, examples/quick_start/dataset/nq/test.jsonl, word for word
NQ = {
    "id": "test_0",
    "question": "who got the first nobel prize in physics",
    "golden_answers": ["Wilhelm Conrad Röntgen"],
}
POPQA = {
    "id": "test_0",
    "question": "What is X's occupation?",
    "golden_answers": ["politician", "political leader", "politician"],
    "metadata": {"prop": "occupation", "s_pop": 142},
}


def test_musique() -> None:
    question, passages = from_musique(MUSIQUE)
    # ids: the first twelve digits of sha1(title + newline + text)
    assert passages[0] == {"id": "mq_da9acdeeab0e", "title": "Green", "text": "Green is an album."}
    first, other, last = (passage["id"] for passage in passages)
    assert len({first, other, last}) == 3
    assert question == {
        "id": "2hop__482757_12019",
        "question": "Who is the spouse of the Green performer?",
        "answers": ["Ann", "Annie"],
        "supporting": [first, last],
        "hops": 2,
        "decomposition": [
            {"question": "Green >> performer", "answer": "Steve", "support": first},
            {"question": "#1 >> spouse", "answer": "Ann", "support": last},
        ],
    }


@pytest.mark.parametrize("record", [HOTPOTQA_FILE, HOTPOTQA_HUB], ids=["file", "hub"])
def test_hotpotqa(record: dict[str, Any]) -> None:
    question, passages = from_hotpotqa(record)
    ed, _, scott = passages
    assert (ed["title"], ed["text"]) == ("Ed", "Ed was American. He made films.")
    assert question == {
        "id": "5a8b57f25542995d1e6f1371",
        "question": "Were Scott and Ed of the same nationality?",
        "answers": ["yes"],
        "supporting": [scott["id"], ed["id"]],
        "hops": 2,
        "type": "comparison",
    }


@pytest.mark.parametrize(
    "record", [TWO_WIKI_FILE, TWO_WIKI_HUB, TWO_WIKI_JSON], ids=["file", "hub", "json in text"]
)
def test_2wiki(record: dict[str, Any]) -> None:
    question, passages = from_2wiki(record)
    assert question == {
        "id": "8813f87c0bdd11eba7f7acde48001122",
        "question": "Who is the mother of the director of film X?",
        "answers": ["Z"],
        "supporting": [passage["id"] for passage in passages],
        "hops": 2,
        "type": "compositional",
        "evidences": [["X", "director", "Y"], ["Y", "mother", "Z"]],
    }
    assert from_2wiki(record | {"type": "bridge_comparison"})[0]["hops"] == 4


def test_bamboogle() -> None:
    question, passages = from_bamboogle(BAMBOOGLE)
    assert question["answers"] == ["james madison"]
    assert question["question"] == BAMBOOGLE["Question"]
    assert passages == []


def test_passage_ids_are_those_of_the_local_folder(research_data: Path) -> None:
    with gzip.open(research_data / "hotpotqa/corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        known = json.loads(next(file))
    record = HOTPOTQA_FILE | {"context": [[known["title"], [known["text"]]]]}
    assert from_hotpotqa(record)[1] == [known]


def test_converted_sets_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    monkeypatch.delenv("RESEARCH_DATA", raising=False)
    unanswerable = MUSIQUE | {"id": "no", "answerable": False}
    rows = {"train": [MUSIQUE | {"id": "t"}, unanswerable], "dev": [MUSIQUE]}
    for name in ("musique", "bamboogle"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    counts = convert(HUB_SOURCES["musique"], rows, tmp_path / "datasets/musique")
    assert counts == ({"train": 1, "dev": 1}, 3)
    convert(HUB_SOURCES["bamboogle"], {"test": [BAMBOOGLE]}, tmp_path / "datasets/bamboogle")
    data = load_dataset("musique", split="train")
    assert [question.id for question in data.questions] == ["t"]
    assert data.questions[0].decomposition[1].question == "#1 >> spouse"
    assert data.corpus is not None
    assert [p.title for p in data.corpus] == ["Green", "Other", "Steve"]  # each once
    assert load_dataset("bamboogle", split="test").corpus is None


def test_flashrag() -> None:
    assert from_flashrag(NQ, "nq") == (
        {
            "id": "nq_test_0",
            "question": "who got the first nobel prize in physics",
            "answers": ["Wilhelm Conrad Röntgen"],
        },
        [],
    )
    question, _ = from_flashrag(POPQA, "popqa")
    assert question["answers"] == ["politician", "political leader"]
    with pytest.raises(ValueError, match="no answer"):
        from_flashrag(NQ | {"golden_answers": [" "]}, "nq")


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        (
            '"Evan Morris"\nEvan Morris was a lobbyist.',
            "Evan Morris",
            "Evan Morris was a lobbyist.",
        ),
        ('""Heroes" (album)"\nAn album.\nOf 1977.', '"Heroes" (album)', "An album.\nOf 1977."),
        ("Plain\nText.", "Plain", "Text."),
        ("\nText.", "", "Text."),
        ('"\nText.', '"', "Text."),
        ("one line", "one line", ""),  # left out: it has no text
    ],
)
def test_wiki18(contents: str, title: str, text: str) -> None:
    assert from_wiki18({"id": 7, "contents": contents}) == (
        None,
        [{"id": "7", "title": title, "text": text}],
    )


@pytest.mark.parametrize(
    "record",
    [{}, MUSIQUE | {"paragraphs": None}, MUSIQUE | {"question_decomposition": [{}]}],
    ids=["empty", "no paragraphs", "bad step"],
)
def test_a_record_in_another_format_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="MuSiQue, split dev, record 2: not in the known format"):
        convert(HUB_SOURCES["musique"], {"dev": [MUSIQUE, record]}, tmp_path)
