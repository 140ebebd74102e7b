"""Files of questions and passages: what is read, and errors that name the bad line."""

from __future__ import annotations

import bz2
import contextlib
import copy
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.cli import main
from research_env.datasets import FileCorpus, Hop, Question, formats, load_dataset, read_questions
from research_env.datasets.convert import Converted, convert
from research_env.datasets.files import question_record
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
)
from research_env.retrieval import Passage
from research_env.system import paths
from tests.research_env.datasets.records import PASSAGE, QUESTION, question, write


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "_SETTLED", 0)  # a file that was written just now is settled too
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
    (b"\n{}", "empty; remove it"),
    (b'{"id": "q2", "question"', """not a JSON object.*'{"id": "q2", "question"'"""),
    (b"[" * 100_000, r"not a JSON object \(it is nested too deeply\)"),
    (b'{"id": ' + b"9" * 5_000 + b"}", "not a JSON object.*digits"),
    (b'["q2"]', "not list"),
    (b'{"id": "q\xff"}', "invalid UTF-8 at byte 9"),
    (b'{"id": "q2", "question": "\\ud800?", "answers": ["a"]}', "half of a surrogate pair"),
    (b'{"id": "q1", "question": "?", "answers": ["a"]}', "'q1' is that of line 1"),
    (b'{"question": "?", "answers": ["a"]}', "'id' must be a text"),
    (b'{"id": 7.5, "question": "?", "answers": ["a"]}', "'id' must be a text.*7.5"),
    (b'{"id": true, "question": "?", "answers": ["a"]}', "'id' must be a text.*True"),
    (b'{"id": ["q2"], "question": "?", "answers": ["a"]}', r"'id' must be a text.*\['q2'\]"),
    (b'{"id": "q2", "answers": ["a"]}', "'question' must be a text.*missing"),
    (b'{"id": "q2", "question": " ", "answers": ["a"]}', "'question' must be a text"),
    (b'{"id": "q2", "question": "?"}', "'answers' must be a list.*is missing.*golden_answers"),
    (b'{"id": "q2", "question": "?", "answers": []}', r"'answers' must be a list.*\[\]"),
    (b'{"id": "q2", "question": "?", "answers": {"a": 1}}', "'answers' must be.*{'a': 1}"),
    (b'{"id": "q2", "question": "?", "answers": ["a", ""]}', r"'answers' must be.*\['a', ''\]"),
    (b'{"id": "q2", "question": "?", "answers": ["a", null]}', "'answers' must be a list.*None"),
    (b'{"id": "q2", "question": "?", "answer": true}', "'answer' must be a list.*True"),
    (b'{"id": "q2", "question": "?", "answer": NaN}', "'answer' must be a list.*nan"),
    (b'{"id": "q2", "question": "?", "answer": 1e999}', "'answer' must be a list.*inf"),
    (b'{"id": "q2", "question": "?", "golden_answers": [[1]]}', "'golden_answers' must be"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "supporting": [{}]}', "'supporting'.*{}"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "hops": "2"}', "'hops'.*'2'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "hops": 0}', "'hops'.*not 0"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "hops": 1e999}', "'hops'.*inf"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "split": 1}', "'split'"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "decomposition": ["x"]}', "'decompos"),
    (b'{"id": "q2", "question": "?", "answers": ["a"], "decomposition": [{}]}', "'question'"),
]
PASSAGE_FAULTS: list[tuple[bytes, str]] = [
    (b"\n{}", "empty; remove it"),
    (b'{"id": "p2", "contents": 7}', "'contents' must be a text.*7"),
    (b'{"id": "p2", "contents": "\\"T\\"\\n "}', "'text' must be a text"),
    (b'{"title": "", "text": "x"}', "'id' must be a text"),
    (b'{"id": "p2", "title": 7, "text": "x"}', "'title' must be a text.*7"),
    (b'{"id": "p2", "title": "T"}', "'text' must be a text.*missing.*remove the line"),
    (b'{"id": "p2", "title": "T", "text": " "}', "'text' must be a text"),
    (b'{"id": "p1", "title": "T", "text": "x"}', "'p1' is that of line 1"),
]


def read_corpus(path: Path) -> list[Passage]:
    return list(FileCorpus("c", path))


@pytest.mark.parametrize(
    ("name", "read", "line", "message"),
    [("f.jsonl", read_questions, *fault) for fault in QUESTION_FAULTS]
    + [("f.jsonl", read_corpus, *fault) for fault in PASSAGE_FAULTS]
    + [("f.jsonl.gz", read_corpus, *PASSAGE_FAULTS[0])],
)
def test_a_bad_line_is_named(
    tmp_path: Path, name: str, read: Callable[[Path], object], line: bytes, message: str
) -> None:
    good = QUESTION if read is read_questions else PASSAGE
    content = json.dumps(good).encode() + b"\n" + line + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}:2: .*{message}"):
        read(tmp_path / name)


# --- as other projects write them -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answers": "Ann"}, ("Ann",)),
        ({"golden_answers": ["Ann", "A."]}, ("Ann", "A.")),
        ({"golden_answers": "Ann"}, ("Ann",)),
        ({"answer": "Ann"}, ("Ann",)),
        ({"answer": 1812}, ("1812",)),
        ({"answer": 2.5}, ("2.5",)),
        ({"answer": 1812.0}, ("1812",)),
        ({"answer": ["Ann", 7]}, ("Ann", "7")),
        ({"answers": ["Ann"], "golden_answers": ["Bob"]}, ("Ann",)),
        ({"answers": None, "answer": "Ann"}, ("Ann",)),
    ],
)
def test_gold_answers_by_other_names(
    tmp_path: Path, fields: dict[str, Any], answers: tuple[str, ...]
) -> None:
    [read] = read_questions(write(tmp_path / "q.jsonl", {"id": "q", "question": "Who?"} | fields))
    assert read.answers == answers
    assert set(read.extra) == set(fields) - {"answers", next(k for k in fields if fields[k])}


def test_ids_by_other_names(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"id": 7}, {"_id": "a"}, {"_id": 0}, {"id": None, "_id": 8}]
    body = {"question": "?", "answers": ["x"], "supporting": [1, "b"]}
    read = read_questions(write(tmp_path / "q.jsonl", *(record | body for record in records)))
    assert [q.id for q in read] == ["7", "a", "0", "8"]
    assert read[0].supporting == ("1", "b")
    with pytest.raises(DataError, match=r"q\.jsonl:2: the id '7' is that of line 1"):
        read_questions(write(tmp_path / "q.jsonl", {"id": 7} | body, {"id": "7"} | body))


@pytest.mark.parametrize(
    ("fields", "title", "text"),
    [
        ({"text": "x"}, "", "x"),
        ({"title": None, "text": "x"}, "", "x"),
        ({"contents": '"T"\nx\ny'}, "T", "x\ny"),
        ({"contents": "T\nx"}, "T", "x"),
        ({"contents": "only text"}, "", "only text"),
        ({"title": "U", "contents": '"T"\nx'}, "U", "x"),
        ({"title": "U", "text": "x", "contents": '"T"\ny'}, "U", "x"),
    ],
)
def test_passages_by_other_names(
    tmp_path: Path, fields: dict[str, Any], title: str, text: str
) -> None:
    path = write(tmp_path / "c.jsonl", {"id": 1} | fields)
    assert read_corpus(path) == [Passage("1", title, text)]


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_a_byte_order_mark_and_blank_last_lines_are_skipped(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(QUESTION).encode() + b"\r\n\n  \n\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [q.id for q in read_questions(tmp_path / name)] == ["q1"]


TABLE: list[dict[str, Any]] = [
    {
        "id": "q1",
        "question": 'Who, "he"?\n\nNow.',
        "answers": ["Ann", "A."],
        "hops": 2,
        "level": "3",
    },
    {"id": "7", "question": "Zoë?", "answer": "[sic", "split": "dev"},
]
EXPECTED = [
    Question("q1", 'Who, "he"?\n\nNow.', ("Ann", "A."), hops=2, extra={"level": "3"}),
    Question("7", "Zoë?", ("[sic",), split="dev"),
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows with the library of record for the format."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix in (".parquet", ".arrow", ".feather"):
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        if path.suffix == ".parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
            return path
        make = pa.ipc.new_stream if path.stem.startswith("stream") else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        return path
    file = io.StringIO()
    table = csv.DictWriter(file, names, delimiter="\t" if ".tsv" in path.name else ",")
    table.writeheader()
    for row in rows:
        table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    content = file.getvalue().encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name",
    ["q.csv", "q.tsv", "q.CSV.gz", "q.parquet", "q.arrow", "stream.arrow", "q.feather"],
)
def test_tables_of_questions_and_passages(tmp_path: Path, name: str) -> None:
    assert read_questions(write_table(tmp_path / name, TABLE)) == EXPECTED
    passages = [{"id": "1", "title": "T", "text": "x, y"}, {"id": "2", "text": "z"}]
    expected = [Passage("1", "T", "x, y"), Passage("2", "", "z")]
    corpus = FileCorpus("c", write_table(tmp_path / name, passages))
    assert list(corpus) == expected
    assert (
        corpus.fingerprint()
        == FileCorpus("d", write(tmp_path / "d.jsonl", *passages)).fingerprint()
    )


@pytest.mark.parametrize("kind", ["string", "string_view"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_text_that_rows_share_is_not_held_once_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str
) -> None:
    monkeypatch.setattr(formats, "_HELD", 4 << 20)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text, ids = "x" * (1 << 20), [str(i) for i in range(100)]
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([text]))
    table = pa.table({"id": ids, "title": ids, "text": shared})
    if kind == "string_view" and suffix == "arrow":
        table = table.set_column(2, "text", pa.array([text] * 100, pa.string_view()))
    file = tmp_path / f"c.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    tracemalloc.start()
    try:
        read = sum(len(passage.text) for passage in FileCorpus("c", file))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert read == 100 << 20


def test_a_small_table_that_takes_much_memory_is_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    large = pa.table({"id": ["1"], "text": ["x" * (17 << 20)]})
    pq.write_table(large, tmp_path / "c.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "c.parquet").stat().st_size < 10_000
    with pytest.raises(DataError, match=r"c\.parquet: row 1: .*values of text over 16 MiB"):
        list(FileCorpus("c", tmp_path / "c.parquet"))
    answers = pa.array([["y" * 1_000_000] * 300])
    pq.write_table(pa.table({"id": ["1"], "answers": answers}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="a row may have 300000"):
        read_questions(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b'id,question,answers\nq1,"?",x,y\n', r"q\.csv:2: 4 cells.*3 columns"),
        (
            "q.csv",
            b"id,question,question,answers\nq1,a,b,x\n",
            r"q\.csv:1: two columns.*'question'",
        ),
        ("q.csv", b'id,question,answers\nq1,"?"x,y\n', r"q\.csv:2: not a row of a table"),
        ("q.csv", b'id,question,answers\nq1,?,x\nq2,"?,y\n', r"q\.csv:3: not a row of a table"),
        ("q.csv", b"id,question,answers\nq1,\xff,x\n", r"q\.csv:2: invalid UTF-8 at byte 3"),
        ("q.csv", b"id,question,answers\nq1,?,\n", r"q\.csv:2: the field 'answers'.*is missing"),
        (
            "q.csv",
            b"id,question,answers\nq1,?,\"['Ann', 'A.']\"\n",  # by csv.writer or pandas
            r"q\.csv:2: the cell 'answers' .*\['Ann', 'A\.'\].*write it with json\.dumps",
        ),
        (
            "q.csv",
            b"id,question,answer\nq1,?,['Ann' 'A.'] \n",  # an array of NumPy
            r"q\.csv:2: the cell 'answer' .*\['Ann' 'A\.'\].*write it with json\.dumps",
        ),
        (
            "q.tsv",
            b"id\tquestion\tanswers\tsupporting\nq1\t?\tx\t{'p1'}\n",
            r"q\.tsv:2: the cell 'supporting' .*{'p1'}.*write it with json\.dumps",
        ),
        ("q.tsv", b"id,question,answers\nq1,?,x\n", r"q\.tsv:2: the field 'answers'.*missing"),
        ("q.csv.gz", b"no archive", r"q\.csv\.gz:1: the gzip data"),
        ("q.parquet", b"PAR1 no table PAR1", r"q\.parquet: row 1: not a readable Parquet file"),
        ("q.parquet", b"", r"not a readable Parquet file"),
        ("q.arrow", b"ARROW1 no table", r"q\.arrow: row 1: not a readable Arrow file"),
        ("q.arrow", b"", r"not a readable Arrow file|holds no question"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / name)


def test_a_cell_of_over_16_mib_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(b'id,question\nq1,"' + (b"x" * 999_999 + b"\n") * 17)
    with pytest.raises(DataError, match=r"q\.csv:2: not a row.*field limit \(16777216\)"):
        read_questions(tmp_path / "q.csv")


def test_numbers_of_hops_in_a_table_may_have_a_point(tmp_path: Path) -> None:
    """As pandas writes a column of integers with gaps."""
    rows = "q1,?,x,2.0\nq2,?,x,\nq3,?,x,3\n"
    (tmp_path / "q.csv").write_text(f"id,question,answers,hops\n{rows}")
    assert [q.hops for q in read_questions(tmp_path / "q.csv")] == [2, None, 3]
    (tmp_path / "q.csv").write_text("id,question,answers,hops\nq1,?,x,2.5\n")
    with pytest.raises(DataError, match=r"q\.csv:2: the field 'hops'.*not 2\.5"):
        read_questions(tmp_path / "q.csv")


@pytest.mark.parametrize("name", ["c.csv", "c.tsv"])
def test_a_long_text_is_read_from_a_table_as_from_json_lines(tmp_path: Path, name: str) -> None:
    passages = [{"id": "1", "title": "T", "text": "word " * 200_000}]
    assert read_corpus(write_table(tmp_path / name, passages)) == read_corpus(
        write(tmp_path / "c.jsonl", *passages)
    )


@pytest.mark.parametrize("name", ["Q.JSONL.GZ", "q.jsonl.Gz", "Q.CSV.GZ"])
def test_the_case_of_a_name_does_not_matter(tmp_path: Path, name: str) -> None:
    rows = b"id,question,answers\nq1,Who?,Ann\n" if "CSV" in name else json.dumps(QUESTION).encode()
    (tmp_path / name).write_bytes(gzip.compress(rows))
    assert read_questions(tmp_path / name) == [Question("q1", "Who?", ("Ann",))]


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("q.jsonl", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "compress", "kind"),
    [
        ("q.jsonl.bz2", bz2.compress, "bzip2"),
        ("q.jsonl.xz", lzma.compress, "xz"),
        ("q.jsonl.zip", zipped, "zip"),
        ("q.jsonl", gzip.compress, "gzip"),
        ("q.csv", bz2.compress, "bzip2"),
        ("q.jsonl.zst", lambda content: b"\x28\xb5\x2f\xfd" + content, "zstd"),
    ],
)
def test_a_compression_that_is_not_read_is_named(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], kind: str
) -> None:
    (tmp_path / name).write_bytes(compress(json.dumps(QUESTION).encode()))
    with pytest.raises(DataError, match=rf"{name}: compressed with {kind}; decompress it"):
        read_questions(tmp_path / name)


def beir(folder: Path, *queries: dict[str, Any], qrels: str | None) -> Path:
    write(folder / "queries.jsonl", *queries)
    write(folder / "corpus.jsonl", {"_id": "d1", "title": "T", "text": "x", "metadata": {}})
    if qrels is not None:
        (folder / "qrels").mkdir()
        (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_a_beir_folder(tmp_path: Path) -> None:
    folder = beir(
        tmp_path / "b",
        {"_id": "1", "text": "Who?", "metadata": {"answer": "Ann", "level": "hard"}},
        {"_id": "2", "text": "Where?", "metadata": {"answer": "Oslo"}},
        {"_id": "3", "text": "Why?", "metadata": {}},
        qrels="1\td1\t1\n1\td2\t0\n1\td3\t2\n3\td1\t1\n",
    )
    with pytest.raises(DataError, match=r"queries\.jsonl:3: the field 'answers'.*is missing"):
        read_questions(folder)
    assert convert(folder, tmp_path / "out") == Converted({"dev": 1}, 1, left_out=1)
    assert read_questions(tmp_path / "out/questions.jsonl") == [
        Question("1", "Who?", ("Ann",), ("d1", "d3"), split="dev", extra={"level": "hard"})
    ]
    assert read_corpus(tmp_path / "out/corpus.jsonl") == [Passage("d1", "T", "x")]
    assert read_corpus(folder) == [Passage("d1", "T", "x")]
    data = load_dataset(
        "custom", split="dev", questions=tmp_path / "out/questions.jsonl", corpus=folder
    )
    assert data.corpus is not None
    assert data.corpus.fingerprint() == FileCorpus("c", folder / "corpus.jsonl").fingerprint()


def test_a_bad_beir_folder_is_named(tmp_path: Path) -> None:
    query = {"_id": "1", "text": "Who?", "metadata": {"answer": "Ann"}}
    for number, (line, message) in enumerate(
        [("1\td1\tmany\n", "'score' must be"), ("1\td1\n", "2 cells"), ("\td1\t1\n", "'query-id'")]
    ):
        with pytest.raises(DataError, match=rf"dev\.tsv:2: .*{message}"):
            read_questions(beir(tmp_path / str(number), query, qrels=line))
    assert [q.split for q in read_questions(beir(tmp_path / "none", query, qrels=None))] == [None]
    (tmp_path / "0/qrels/dev.tsv").write_text("1\td1\t1\n1\td2\t1\n")
    with pytest.raises(
        DataError, match=r"dev\.tsv:2: .*the first line of qrels must be query-id corpus-id score"
    ):
        read_questions(tmp_path / "0")


def test_a_query_of_a_beir_folder_has_one_split_and_one_id(tmp_path: Path) -> None:
    query = {"_id": "1", "text": "Who?", "metadata": {"answer": "Ann", "id": 7, "_id": "8"}}
    folder = beir(tmp_path / "b", query, qrels="1\td1\t1\n1\td1\t2\n")
    assert read_questions(folder) == [Question("1", "Who?", ("Ann",), ("d1",), split="dev")]
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:2: the query '1' is in the split 'dev' too"):
        read_questions(folder)


def test_scores_of_a_beir_folder_are_numbers_of_any_form(tmp_path: Path) -> None:
    query = {"_id": "1", "text": "Who?", "metadata": {"answer": "Ann"}}
    qrels = "1\td1\t1.0\n1\td2\t0.0\n1\td3\t-1\n1\td4\t+2\n"
    [read] = read_questions(beir(tmp_path / "b", query, qrels=qrels))
    assert read.supporting == ("d1", "d4")


def test_nothing_is_converted_unless_everything_can_be(tmp_path: Path) -> None:
    query = {"_id": "1", "text": "Who?", "metadata": {"answer": "Ann"}}
    folder = beir(tmp_path / "b", query, query | {"text": "Where?"}, qrels=None)
    with pytest.raises(DataError, match=r"queries\.jsonl:2: the id '1' is that of line 1"):
        convert(folder, tmp_path / "out")
    write(folder / "queries.jsonl", query)
    write(folder / "corpus.jsonl", PASSAGE, PASSAGE)
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: the id 'p1' is that of line 1"):
        convert(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write(folder / "corpus.jsonl", PASSAGE)
    assert convert(folder, tmp_path / "out") == Converted({"": 1}, 1)
    assert len(read_questions(tmp_path / "out/questions.jsonl")) == 1


def test_convert_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "q.csv", TABLE)
    write(tmp_path / "c.jsonl", {"_id": 1, "contents": '"T"\nx'})
    out = tmp_path / "out"
    sources = [str(tmp_path / "q.csv"), str(tmp_path / "c.jsonl")]
    main(["datasets", "convert", *sources, "--output", str(out)])
    assert capsys.readouterr().out == (
        f"1 questions in {out}/questions.jsonl\n"
        f"1 questions of split dev in {out}/questions.jsonl\n"
        f"1 passages in {out}/corpus.jsonl\n"
    )
    assert read_questions(out / "questions.jsonl") == EXPECTED
    assert read_corpus(out / "corpus.jsonl") == [Passage("1", "T", "x")]
    with pytest.raises(ConfigurationError, match=r"questions\.jsonl is there already"):
        convert(tmp_path / "q.csv", out)
    write(tmp_path / "odd.jsonl", {"id": 1, "query": "?"})
    with pytest.raises(DataError, match=r"odd\.jsonl:1: neither a question.*id, query"):
        convert(tmp_path / "odd.jsonl", out)
    assert sorted(path.name for path in out.iterdir()) == ["corpus.jsonl", "questions.jsonl"]


# --- hostile files --------------------------------------------------------------------------------

BOMB = """
import resource, sys
from pathlib import Path
from research_env.datasets import FileCorpus, read_questions
from research_env.errors import DataError
path = Path(sys.argv[1])
list(FileCorpus("c", path.with_name("warm.jsonl")))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (read_questions, lambda path: list(FileCorpus("c", path))):
    try:
        read(path)
    except DataError as error:
        assert "longer than 16 MiB" in str(error), error
    else:
        raise AssertionError("it was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.csv.gz"])
def test_a_line_of_gigabytes_takes_no_memory(tmp_path: Path, name: str) -> None:
    part = gzip.compress(b"x" * (64 << 20))
    (tmp_path / name).write_bytes(part * 48)  # 3 GiB in 3 MB
    write(tmp_path / "warm.jsonl", PASSAGE)
    told = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(told.stdout) < 120_000  # kilobytes


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrow"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in (f"pipe{suffix}", f"zero{suffix}"):
        for read in (read_questions, read_corpus, lambda path: FileCorpus("c", path).fingerprint()):
            with pytest.raises(DataError, match=rf"{name}: no regular file"):
                read(tmp_path / name)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    "id _id question answers golden_answers answer supporting hops split type decomposition title "
    "text contents metadata"
)
FIELD = st.sampled_from(FIELDS.split())


@settings(max_examples=300)
@given(good=st.booleans(), fields=st.dictionaries(FIELD, JSON, max_size=5))
def test_any_record_is_read_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, good: bool, fields: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "f.jsonl"
    path.write_text(json.dumps((QUESTION | PASSAGE if good else {}) | fields) + "\n")
    for read in (read_questions, read_corpus):
        try:
            found = read(path)
        except DataError as error:
            assert "f.jsonl:1: " in str(error)
            assert len(str(error)) < 700
        else:
            json.dumps([str(each) for each in found], ensure_ascii=False).encode()  # it is text


@settings(max_examples=200)
@given(
    name=st.sampled_from(["q.jsonl", "q.jsonl.gz", "q.csv", "q.tsv", "q.parquet", "q.arrow"]),
    changes=st.lists(
        st.tuples(st.integers(0, 2**20), st.binary(max_size=5)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 40),
)
def test_a_damaged_file_is_read_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[int, bytes]],
    cut: int,
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    if ".jsonl" in name:
        write(path, QUESTION, question("q2"))
    else:
        write_table(path, TABLE)
    data = bytearray(path.read_bytes())
    for place, new in changes:
        data[place % len(data) : place % len(data) + len(new)] = new
    path.write_bytes(data[: len(data) - cut])
    for read in (read_questions, read_corpus):
        with contextlib.suppress(DataError):
            read(path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "c.jsonl.gz", *(PASSAGE | {"id": f"p{i}"} for i in range(50)))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:\d+: the gzip data are damaged"):
        read_corpus(whole)


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"no file .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataNotFoundError, match="no file"):
        FileCorpus("c", tmp_path).fingerprint()
    with pytest.raises(DataError, match="holds no question"):
        read_questions(write(tmp_path / "q.jsonl"))


# --- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_the_passages_alone(tmp_path: Path) -> None:
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
    write(path, PASSAGE | {"text": "Ann is a Person."})  # same size and time
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert FileCorpus("c", path).fingerprint() != first


def test_the_fingerprint_of_an_unchanged_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE)
    first = FileCorpus("c", path).fingerprint()
    monkeypatch.setattr("research_env.datasets.files.read_records", None)  # reading would now fail
    assert FileCorpus("c", path).fingerprint() == first
    assert len(FileCorpus("c", path)) == 1


def test_the_fingerprint_of_a_file_that_is_replaced_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE, PASSAGE | {"id": "p2"})
    new = write(tmp_path / "new.jsonl", PASSAGE)
    expected = FileCorpus("n", new).fingerprint()

    def replaced(file: Path) -> formats.Records:
        for number, record in enumerate(formats.read_records(file)):
            if number == 0:
                new.replace(path)
            yield record

    with monkeypatch.context() as patched:
        patched.setattr("research_env.datasets.files.read_records", replaced)
        assert FileCorpus("c", path).fingerprint() != expected
    assert FileCorpus("c", path).fingerprint() == expected
    assert len(FileCorpus("c", path)) == 1


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"files": null}', "[" * 100_000, "\xff"])
def test_a_damaged_note_of_a_fingerprint_is_ignored(tmp_path: Path, note: str) -> None:
    path = write(tmp_path / "c.jsonl", PASSAGE)
    first = FileCorpus("c", path).fingerprint()
    [place] = (tmp_path / "cache/fingerprints").iterdir()
    place.write_text(note)
    assert FileCorpus("c", path).fingerprint() == first


STREAM = """
import resource, sys
from pathlib import Path
from research_env.system import paths
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


def test_a_cell_of_text_is_text_even_if_it_is_json_too(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('id,question,answers,note\n[1],[2],"[""x""]",[3]\n')
    (found,) = read_questions(tmp_path / "q.csv")
    assert (found.id, found.question, found.answers) == ("[1]", "[2]", ("x",))
    assert found.extra["note"] == [3]


@pytest.mark.parametrize("answers", ["Paris", (1812,), (None,), (["Paris"],)])
def test_a_question_whose_answers_are_no_texts_is_refused(answers: Any) -> None:
    with pytest.raises(DataError, match=r"question 'q': answers is .*give a tuple of texts"):
        Question("q", "Where?", answers)


def test_a_list_in_a_cell_may_have_space_around_it(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    path.write_text('id\tquestion\tanswers\nq\tWho?\t" [""Ann"", ""A.""] "\n')
    assert read_questions(path) == [Question("q", "Who?", ("Ann", "A."))]
