from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from research_env.datasets import FileCorpus, Hop, Question, read_questions
from research_env.datasets.files import question_record
from research_env.errors import (
    DataError,
    DataNotFoundError,
)
from research_env.retrieval import Passage
from tests.research_env.datasets.records import PASSAGE, QUESTION, question, write


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    return tmp_path


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
