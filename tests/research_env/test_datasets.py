from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research_env.datasets import FileCorpus, Hop, Question, load_dataset, read_questions
from research_env.datasets.files import question_record
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
    UnknownNameError,
)
from research_env.retrieval import Passage

QUESTION = {"id": "q1", "question": "Who?", "answers": ["Ann"]}
PASSAGE = {"id": "p1", "title": "Ann", "text": "Ann is a person."}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", refuse)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def question(id_: str, **more: Any) -> dict[str, Any]:
    return QUESTION | {"id": id_} | more


def make_set(folder: Path, name: str, count: int, split: str = "train") -> None:
    rows = [question(f"{name}{i}", split=split, hops=2 + i % 2) for i in range(count)]
    write(folder / "data" / name / "questions.jsonl", *rows)
    write(folder / "data" / name / "corpus.jsonl.gz", PASSAGE | {"id": f"{name}-p"})


# --- reading files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_a_question_with_everything(tmp_path: Path, name: str) -> None:
    record = {
        "id": "2hop__1",
        "question": "Wer?",
        "answers": ["Zoë", "Zoe"],
        "supporting": ["p1", "p2"],
        "hops": 2,
        "split": "dev",
        "type": "bridge",
        "decomposition": [
            {"question": "A?", "answer": "B", "support": "p1"},
            {"question": "#1 >> C", "answer": ["D", "E"]},
        ],
        "difficulty": {"level": "hard", "votes": [3, 1]},
    }
    read = read_questions(write(tmp_path / name, record))
    assert read == [
        Question(
            id="2hop__1",
            question="Wer?",
            answers=("Zoë", "Zoe"),
            supporting=("p1", "p2"),
            hops=2,
            split="dev",
            type="bridge",
            decomposition=(Hop("A?", "B", "p1"), Hop("#1 >> C", "D", None)),
            extra={"difficulty": {"level": "hard", "votes": [3, 1]}},
        )
    ]
    assert read_questions(write(tmp_path / "again.jsonl", question_record(read[0]))) == read


def test_extra_fields_of_a_question_cannot_be_changed(tmp_path: Path) -> None:
    read = read_questions(write(tmp_path / "q.jsonl", question("q1") | {"difficulty": "hard"}))[0]
    assert read.extra["difficulty"] == "hard"
    assert dict(read.extra) == {"difficulty": "hard"}
    with pytest.raises(TypeError):
        read.extra["difficulty"] = "easy"  # type: ignore[index]
    for copied in (pickle.loads(pickle.dumps(read)), copy.deepcopy(read)):
        assert copied == read
        assert hash(copied) == hash(read)
    assert replace(read, extra={}) != read


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_a_corpus_is_streamed_in_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, PASSAGE, PASSAGE | {"id": "p2", "title": "", "text": "\0 ok"})
    corpus = FileCorpus("c", path)
    expected = [Passage("p1", "Ann", "Ann is a person."), Passage("p2", "", "\0 ok")]
    assert list(corpus) == expected
    assert list(corpus) == expected
    assert len(corpus) == 2


QUESTION_FAULTS: list[tuple[bytes, str]] = [
    (b"", "empty; remove it"),
    (b"   ", "empty; remove it"),
    (b'{"id": "q2", "question"', "not a JSON object"),
    (b"[" * 100_000, "not a JSON object"),
    (b'["q2"]', "not list"),
    (b"null", "not NoneType"),
    (b'{"id": "q\xff"}', "invalid UTF-8 at byte 9"),
    (b'{"id": "q2", "question": "\\ud800?", "answers": ["a"]}', "half of a surrogate pair"),
    (b'{"id": "q1", "question": "?", "answers": ["a"]}', "'q1' is that of line 1"),
    (b'{"question": "?", "answers": ["a"]}', "'id' must be a text"),
    (b'{"id": 7, "question": "?", "answers": ["a"]}', "'id' must be a text.*7"),
    (b'{"id": "q2", "answers": ["a"]}', "'question' must be a text.*missing"),
    (b'{"id": "q2", "question": " ", "answers": ["a"]}', "'question' must be a text"),
    (b'{"id": "q2", "question": "?"}', "'answers' must be a list"),
    (b'{"id": "q2", "question": "?", "answers": []}', "'answers' must be a list"),
    (b'{"id": "q2", "question": "?", "answers": "a"}', "'answers' must be a list"),
    (b'{"id": "q2", "question": "?", "answers": ["a", ""]}', "'answers' must be a list"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "supporting": [1]}', "'supporting'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "hops": "2"}', "'hops'.*'2'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "hops": 0}', "'hops'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "split": 1}', "'split'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "decomposition": ["x"]}', "'decompos"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "decomposition": [{}]}', "'question'"),
]
PASSAGE_FAULTS: list[tuple[bytes, str]] = [
    (b"", "empty; remove it"),
    (b"{", "not a JSON object"),
    (b"3", "not int"),
    (b'{"id": "\xc3", "title": "", "text": "x"}', "invalid UTF-8"),
    (b'{"id": "p2", "title": "\\udfff", "text": "x"}', "half of a surrogate pair"),
    (b'{"title": "", "text": "x"}', "'id' must be a text"),
    (b'{"id": "p2", "text": "x"}', "'title' must be a text"),
    (b'{"id": "p2", "title": null, "text": "x"}', "'title' must be a text"),
    (b'{"id": "p2", "title": "T"}', "'text' must be a text.*missing.*remove the line"),
    (b'{"id": "p2", "title": "T", "text": " "}', "'text' must be a text"),
    (b'{"id": "p1", "title": "T", "text": "x"}', "'p1' is that of line 1"),
]


def read_corpus(path: Path) -> list[Passage]:
    return list(FileCorpus("c", path))


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
@pytest.mark.parametrize(
    ("read", "line", "message"),
    [(read_questions, *fault) for fault in QUESTION_FAULTS]
    + [(read_corpus, *fault) for fault in PASSAGE_FAULTS],
)
def test_a_bad_line_is_named(
    tmp_path: Path, read: Callable[[Path], object], line: bytes, message: str, name: str
) -> None:
    good = QUESTION if read is read_questions else PASSAGE
    content = json.dumps(good).encode() + b"\n" + line + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}:2: .*{message}"):
        read(tmp_path / name)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "c.jsonl.gz", *(PASSAGE | {"id": f"p{i}"} for i in range(50)))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:\d+: the gzip data are damaged"):
        read_corpus(whole)
    whole.write_text("no archive")
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:1: the gzip data are damaged"):
        read_corpus(whole)


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"no file .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataNotFoundError, match="no file"):
        FileCorpus("c", tmp_path).fingerprint()
    with pytest.raises(DataError, match="holds no question"):
        read_questions(write(tmp_path / "q.jsonl"))


# --- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_passages(tmp_path: Path) -> None:
    plain = FileCorpus("a", write(tmp_path / "a.jsonl", PASSAGE))
    same = FileCorpus("b", write(tmp_path / "b.jsonl.gz", PASSAGE | {"more": 1}))
    assert plain.fingerprint() == same.fingerprint()
    others = [
        FileCorpus("c", write(tmp_path / f"{i}.jsonl", *records)).fingerprint()
        for i, records in enumerate(
            [
                [PASSAGE | {"text": "Ann is a person"}],
                [PASSAGE | {"title": "AnnA", "text": "nn is a person."}],
                [PASSAGE, PASSAGE | {"id": "p2"}],
                [PASSAGE | {"id": "p2"}, PASSAGE],
            ]
        )
    ]
    assert len({plain.fingerprint(), *others}) == 5


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE)
    first = FileCorpus("c", path).fingerprint()
    state = path.stat()
    write(path, PASSAGE | {"text": "Ann is a Person."})  # of the same size and time
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert FileCorpus("c", path).fingerprint() != first


def test_the_fingerprint_of_an_unchanged_file_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE)
    first = FileCorpus("c", path).fingerprint()
    monkeypatch.setattr("research_env.datasets.files._records", None)  # reading would now fail
    assert FileCorpus("c", path).fingerprint() == first
    assert len(FileCorpus("c", path)) == 1


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"file": null}'])
def test_a_damaged_note_of_a_fingerprint_is_ignored(tmp_path: Path, note: str) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE)
    first = FileCorpus("c", path).fingerprint()
    [place] = (tmp_path / "cache/fingerprints").iterdir()
    place.write_text(note)
    assert FileCorpus("c", path).fingerprint() == first


STREAM = """
import resource, sys
from pathlib import Path
from research_env.datasets import FileCorpus
corpus = FileCorpus("c", Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus.fingerprint()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_corpus_is_not_held_in_memory(tmp_path: Path) -> None:
    long = "word " * 2_000
    path = tmp_path / "c.jsonl"
    with path.open("w") as file:
        for i in range(6_000):
            file.write(json.dumps(PASSAGE | {"id": f"p{i}", "text": long}) + "\n")
    assert path.stat().st_size > 60_000_000
    told = subprocess.run(
        [sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) < 20_000  # kilobytes


# --- data sets by name ----------------------------------------------------------------------------


def test_splits_choose_files_and_labels(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "musique"
    gold = [question("d1", split="dev"), question("t1", split="train")]
    write(folder / "questions.jsonl", *gold)
    write(folder / "qa_train.jsonl.gz", *(question(f"t{i}", split="train") for i in range(3)))
    write(folder / "corpus.jsonl", PASSAGE)

    def ids(split: str) -> list[str]:
        return [q.id for q in load_dataset("musique", split=split).questions]

    assert ids("train") == ["t0", "t1", "t2"]
    assert ids("train-gold") == ["t1"]
    assert ids("dev") == ["d1"]
    assert ids("dev-all") == ["d1"]  # there is no qa_dev
    corpus = load_dataset("musique", split="dev").corpus
    assert corpus is not None
    assert [passage.id for passage in corpus] == ["p1"]


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("musique", "train", 19_938),
        ("musique", "train-gold", 100),
        ("musique", "dev", 459),
        ("musique", "dev-all", 2_417),
        ("hotpotqa", "train", 300),
        ("hotpotqa", "dev", 863),
        ("hotpotqa", "dev-all", 7_403),
        ("2wiki", "train", 500),
        ("2wiki", "dev", 264),
        ("2wikimultihopqa", "dev-all", 12_576),
        ("bamboogle", "test", 125),
    ],
)
def test_the_published_sets(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: str, count: int
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset(name, split=split)
    assert len(data.questions) == count
    assert (data.corpus is None) == (name == "bamboogle")


def test_golds_that_normalize_to_nothing_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        {"id": "a", "question": "Currency?", "answers": ["$", "US dollar"]},
        {"id": "b", "question": "Band?", "answers": ["!!!"]},
        {"id": "c", "question": "City?", "answers": ["Oslo"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_dataset("custom", split="train", questions=path)
    assert [(q.id, q.answers) for q in data.questions] == [("a", ("US dollar",)), ("c", ("Oslo",))]
    assert "dropped 2 gold answers" in caplog.text
    assert "left out 1 questions without another: 'b'" in caplog.text
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(DataError, match="no question is left"):
        load_dataset("custom", split="train", questions=path)


def test_musiques_dollar_signs_are_no_golds(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset("musique", split="train")
    assert not any("$" in question.answers for question in data.questions)
    assert "dropped 69 gold answers" in caplog.text


@pytest.mark.parametrize("name", ["musique", "hotpotqa", "2wiki"])
def test_gold_passages_are_in_the_corpus(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset(name, split="dev")
    assert data.corpus is not None
    known = {passage.id for passage in data.corpus}
    for asked in data.questions:
        assert asked.supporting
        assert set(asked.supporting) <= known


def test_miniworld_goes_through_the_same_door() -> None:
    data = load_dataset("miniworld", split="dev", world_seed=3, hops=2)
    assert data.questions
    assert all(q.hops == 2 for q in data.questions)
    assert data.corpus is not None
    other = load_dataset("miniworld", split="dev", world_seed=4).corpus
    assert other is not None
    assert data.corpus.fingerprint() != other.fingerprint()


def test_hops_filter(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 5)
    for hops, count in [(None, 5), (2, 3), (3, 2), ([2, 3], 5), ((3,), 2)]:
        assert len(load_dataset("musique", split="train", hops=hops).questions) == count
    with pytest.raises(ConfigurationError, match=r"hops=4.*2: 3, 3: 2"):
        load_dataset("musique", split="train", hops=4)


def test_a_users_own_files(tmp_path: Path) -> None:
    rows = [question("a", split="dev"), question("b"), question("c", split="train")]
    questions = write(tmp_path / "q.jsonl", *rows)
    corpus = write(tmp_path / "c.jsonl.gz", PASSAGE)
    data = load_dataset("custom", split="train", questions=questions, corpus=str(corpus))
    assert [q.id for q in data.questions] == ["b", "c"]
    assert data.corpus is not None
    assert [p.id for p in data.corpus] == ["p1"]
    assert load_dataset("custom", split="x", questions=str(questions)).corpus is None
    write(questions, question("a", split="dev"))
    with pytest.raises(UnknownNameError, match="'train'; known: dev"):
        load_dataset("custom", split="train", questions=questions)
    with pytest.raises(ConfigurationError, match="needs questions=PATH"):
        load_dataset("custom", split="train")
    with pytest.raises(DataNotFoundError, match="no corpus file"):
        load_dataset("custom", split="dev", questions=questions, corpus=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="goes with dataset='custom'"):
        load_dataset("miniworld", split="dev", questions=questions)


def test_another_corpus_for_a_published_set(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 2)
    other = write(tmp_path / "wiki.jsonl", PASSAGE | {"id": "w"})
    corpus = load_dataset("musique", split="train", corpus=other).corpus
    assert corpus is not None
    assert [p.id for p in corpus] == ["w"]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("musiqe", "dev", "data set 'musiqe'; known: .*Did you mean 'musique'"),
        ("musique+squad", "dev", "data set 'squad'"),
        ("", "dev", "data set ''"),
        ("musique", "validation", "split of musique 'validation'; known: dev, dev-all, train"),
        ("bamboogle", "train", "split of bamboogle 'train'; known: test"),
        ("miniworld", "test", "'test'; known: dev, train"),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(name: str, split: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_dataset(name, split=split)


@pytest.mark.usefixtures("no_hub")
def test_no_data_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataNotFoundError, match=r"RESEARCH_DATA.*data/musique.*no route to host"):
        load_dataset("musique", split="dev")
    monkeypatch.delenv("RESEARCH_DATA")
    with pytest.raises(DataNotFoundError, match=r"RESEARCH_DATA.*it is not set"):
        load_dataset("2wiki", split="dev")
    assert not (tmp_path / "cache/datasets").exists()


# --- mixtures -------------------------------------------------------------------------------------


def test_a_mixture_without_weights_has_every_question(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 2)
    data = load_dataset("musique+hotpotqa", split="train")
    # positions (j + 1/2)/n: musique .125 .375 .625 .875, hotpotqa .25 .75
    expected = "musique0 hotpotqa0 musique1 musique2 hotpotqa1 musique3"
    assert " ".join(q.id for q in data.questions) == expected
    assert data.corpus is not None
    assert [p.id for p in data.corpus] == ["musique-p", "hotpotqa-p"]


def test_weights_give_the_shares_and_repeat_nothing(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 7)
    make_set(tmp_path, "hotpotqa", 20)
    ids = [q.id for q in load_dataset("musique:2+hotpotqa:1", split="train").questions]
    assert len(set(ids)) == len(ids)
    assert Counter(id_.rstrip("0123456789") for id_ in ids) == {"musique": 6, "hotpotqa": 3}
    assert [id_ for id_ in ids if id_.startswith("h")] == ["hotpotqa0", "hotpotqa6", "hotpotqa13"]
    for start in range(0, 9, 3):  # two to one all along
        assert sum(id_.startswith("m") for id_ in ids[start : start + 3]) == 2


def test_a_mixture_is_filtered_before_it_is_mixed(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 4)
    data = load_dataset("musique:1+hotpotqa:1", split="train", hops=3)
    assert sorted(q.id for q in data.questions) == [
        "hotpotqa1",
        "hotpotqa3",
        "musique1",
        "musique3",
    ]


def test_the_union_has_a_fingerprint_of_its_parts(tmp_path: Path) -> None:
    for name in ("musique", "hotpotqa", "bamboogle"):
        make_set(tmp_path, name, 1)

    def fingerprint(name: str) -> str:
        corpus = load_dataset(name, split="train").corpus
        assert corpus is not None
        return corpus.fingerprint()

    both = fingerprint("musique+hotpotqa")
    assert both == fingerprint("musique:1+hotpotqa:1")
    assert len({both, fingerprint("musique"), fingerprint("hotpotqa+musique")}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("musique+musique", "twice"),
        ("musique:0+hotpotqa:1", "weight in 'musique:0'"),
        ("musique:1.5+hotpotqa:1", "weight in 'musique:1.5'"),
        ("musique:+hotpotqa:1", "weight in 'musique:'"),
        ("musique:9+hotpotqa:1", "needs more questions"),
    ],
)
def test_mixtures_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 4)
    with pytest.raises(ConfigurationError, match=message):
        load_dataset(name, split="train")


def test_parts_that_share_an_id_are_refused(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 1)
    write(tmp_path / "data/hotpotqa/questions.jsonl", question("musique0", split="train"))
    with pytest.raises(DataError, match="share the id 'musique0'"):
        load_dataset("musique+hotpotqa", split="train")
