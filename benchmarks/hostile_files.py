"""Hostile indexes, recordings, question files and corpora, for :mod:`benchmarks.hostile`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hostile_trials import MUTATIONS, Case, GeneratedPassages, mutated, sparse
from research_env.datasets import FileCorpus, read_questions
from research_env.errors import ResearchEnvError, RetrievalError
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.bm25 import retriever as bm25
from research_env.retrieval.replay import RecordedRetriever, Recording


def special() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Things that are no regular file."""
    yield "a pipe", os.mkfifo
    yield "/dev/zero", lambda place: place.symlink_to("/dev/zero")
    yield "a folder", Path.mkdir


# --- an index -------------------------------------------------------------------------------------

_TYPES = {"terms": "<u8", "starts": "<i8", "maxima": "<f4", "rows": "<i4", "impacts": "<f4"}
_TYPES["offsets"] = "<u8"
_CHANGES: dict[str, Callable[[Any], Any]] = {
    "far": lambda a: a + 2**30,
    "negative": lambda a: -a - 1,
    "shuffled": lambda a: np.random.default_rng(0).permutation(a),
    "reversed": lambda a: a[::-1],
    "constant": lambda a: np.full_like(a, a[len(a) // 2]),
    "greatest": lambda a: np.full_like(a, np.inf if a.dtype.kind == "f" else np.iinfo(a.dtype).max),
    "not a number": lambda a: a * np.nan if a.dtype.kind == "f" else a * 0,
    "one short": lambda a: a[:-1],
    "twice": lambda a: np.concatenate([a, a]),
}


def index_cases(folder: Path) -> Iterator[Case]:
    """Indexes whose checksums hold though their content is wrong, and indexes by a bad disk."""
    good = folder / "index"
    bm25.build_index(GeneratedPassages(), good)
    _search_index(good)  # compiled before memory is measured

    def lie(change: Callable[[Any], Any], name: str, place: Path) -> bool:
        index = shutil.copytree(good, place / "i")
        file = index / f"{name}.bin"
        change(np.fromfile(file, _TYPES[name])).astype(_TYPES[name]).tofile(file)
        meta = json.loads((index / "meta.json").read_text())
        meta["files"][file.name] = bm25._checksum(file)
        (index / "meta.json").write_text(json.dumps(meta))
        return _search_index(index)

    def flip(name: str, seed: int, place: Path) -> bool:
        index = shutil.copytree(good, place / "i")
        data = (index / name).read_bytes()
        (index / name).write_bytes(mutated(data, f"{name} {seed}"))
        return _search_index(index)

    def instead(name: str, make: Callable[[Path], object], place: Path) -> bool:
        index = shutil.copytree(good, place / "i")
        (index / name).unlink()
        make(index / name)
        return _search_index(index)

    def content(data: bytes, place: Path) -> bool:
        (place / "meta.json").write_bytes(data)
        return _search_index(place)

    for name in _TYPES:
        for what, change in _CHANGES.items():
            yield Case(f"{name}.bin {what}, with its checksum", partial(lie, change, name))
    names = [*(f"{name}.bin" for name in _TYPES), "passages.bin", "meta.json"]
    for seed in range(MUTATIONS):
        name = names[seed % len(names)]
        yield Case(f"{name} changed ({seed})", partial(flip, name, seed))
    for name in names:
        yield Case(f"no {name}", partial(instead, name, lambda place: None))
        for what, make in special():
            yield Case(f"{what} as {name}", partial(instead, name, make))
    for what, data in {
        "deep": b"[" * 200_000,
        "deep objects": b'{"format":' * 200_000,
        "long": b" " * (2 << 20),
        "a list": b"[1]",
        "null": b"null",
        "no UTF-8": b'{"format": "\xff"}',
        "a huge number": b'{"format": 1' + b"0" * 5_000 + b"}",
    }.items():
        yield Case(f"meta.json {what}", partial(content, data))


def _search_index(folder: Path) -> bool:
    engine = bm25.EmbeddedRetriever(folder)
    queries = [f"w{i} w{7 * i % 3_000} w{13 * i % 3_000}" for i in range(50)]
    found = engine.search(queries, 5)
    engine.close()
    return any(isinstance(each, RetrievalError) for each in found)


# --- a recording ----------------------------------------------------------------------------------

_QUERIES = [f"query {i}" for i in range(40)]
_ROWS = {
    "no JSON": "[",
    "deep": "[" * 200_000,
    "an object": "{}",
    "texts": '["x"]',
    "three fields": '[["p", "t", "x"]]',
    "a number as text": '[["p", "t", 7, 1.0]]',
    "a text as score": '[["p", "t", "x", "1"]]',
    "NaN": '[["p", "t", "x", NaN]]',
    "too many hits": "[" + ", ".join(['["p", "t", "x", 1.0]'] * 500) + "]",
    "half of a surrogate pair": '[["\\ud800", "t", "x", 1.0]]',
    "a huge number": '[["p", "t", "x", 1' + "0" * 5_000 + "]]",
}
_STATEMENTS = (
    "CREATE TRIGGER t AFTER INSERT ON found BEGIN DELETE FROM found; END",
    "CREATE VIEW v AS SELECT load_extension('x')",
    "CREATE TABLE more (x)",
    "CREATE INDEX i ON found (hits)",
    "CREATE VIRTUAL TABLE f USING fts5 (x)",
    "ALTER TABLE found ADD COLUMN x AS (length(hits))",
    "DROP TABLE found",
    "PRAGMA user_version = 7",
    "UPDATE found SET hits = zeroblob(100000000) WHERE query = CAST('query 7' AS BLOB)",
    "UPDATE found SET hits = 7",
)


def recording_cases(folder: Path) -> Iterator[Case]:
    """Recordings (``?cache=FILE``) with a schema, rows or pages that are not ours."""
    good = folder / "recording"
    if not good.exists():
        engine = RecordedRetriever(Recording(good, "hostile:"), _Answering)
        engine.search(_QUERIES, 5)
        engine.close()
    _replay(good)

    def change(statement: str, values: tuple[str, ...], place: Path) -> bool:
        file = Path(shutil.copy(good, place / "r"))
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(statement, values)
        return _replay(file)

    def mutate(seed: int, place: Path) -> bool:
        (place / "r").write_bytes(mutated(good.read_bytes(), f"recording {seed}"))
        return _replay(place / "r")

    def instead(suffix: str, make: Callable[[Path], object], place: Path) -> bool:
        if suffix:
            shutil.copy(good, place / "r")
        make(place / f"r{suffix}")
        return _replay(place / "r")

    for statement in _STATEMENTS:
        yield Case(statement, partial(change, statement, ()))
    for what, row in _ROWS.items():
        yield Case(f"row: {what}", partial(change, "UPDATE found SET hits = ?", (row,)))
    for seed in range(2 * MUTATIONS):
        yield Case(f"changed ({seed})", partial(mutate, seed))
    for suffix in ("", "-wal", "-shm", "-journal"):
        for what, make in special():
            yield Case(f"{what} as r{suffix}", partial(instead, suffix, make))


class _Answering:
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        return [[Hit(Passage(q, "title", q * 20), 1.0)] * top_k for q in queries]

    def close(self) -> None:
        """Nothing to release."""


def _replay(file: Path) -> bool:
    engine = RecordedRetriever(Recording(file, "hostile:", replay_only=True), _Answering)
    try:
        found = engine.search(_QUERIES, 5)
    finally:
        engine.close()
    return any(isinstance(each, RetrievalError) for each in found)


# --- questions and passages -----------------------------------------------------------------------

_RECORDS: list[dict[str, Any]] = [
    {
        "id": f"q{i}",
        "question": f"Who is number {i}?",
        "answers": ["Ann", "A."],
        "hops": 2,
        "title": "T",
        "text": f"Text of number {i}.",
    }
    for i in range(20)
]
_VALUES = (
    *("null", "true", "-1", "1e999", "NaN", "9" * 5_000, '""', '" "', '"\\ud800"', "[]", "{}"),
    *("[[1]]", "[null]", '[""]', "[" * 100_000, '{"a":' * 100_000, '"\\u0000"', '"\x1b[31m"'),
)
_FIELDS = (
    "id _id question answers golden_answers answer supporting hops split type decomposition title "
    "text contents"
)


def question_file_cases(folder: Path) -> Iterator[Case]:
    """Question files and corpora in every format that is read."""
    whole = json.dumps(_RECORDS[0])[:-1]
    for field in _FIELDS.split():
        for value in _VALUES:
            line = f'{whole}, "{field}": {value}}}\n'
            yield Case(f"{field}: {value[:20]}", partial(_read, "f.jsonl", line.encode()))
    for what, data in {
        "empty": b"",
        "blank lines": b"\n\n\n",
        "a byte order mark": b"\xef\xbb\xbf",
        "UTF-16": json.dumps(_RECORDS[0]).encode("utf-16"),
        "no UTF-8": b'{"id": "\xff"}\n',
        "NUL": b"\0" * 1_000_000,
    }.items():
        for name in ("f.jsonl", "f.csv", "f.parquet", "f.arrow"):
            yield Case(f"{name}: {what}", partial(_read, name, data))
    part = gzip.compress(b"x" * (1 << 20))
    for name in ("f.jsonl.gz", "f.csv.gz", "f.tsv.gz"):
        yield Case(f"{name}: a line of 3 GiB", partial(_read, name, part * 3_072))
    for name in ("f.jsonl", "f.csv", "f.parquet", "f.arrow"):
        yield Case(f"{name}: 3 GiB of NUL", partial(_read_special, name, sparse))
    for name in ("f.jsonl", "f.jsonl.gz", "f.csv", "f.parquet", "f.arrow"):
        for what, make in special():
            yield Case(f"{name}: {what}", partial(_read_special, name, make))
    for name, data in _files(folder).items():
        for seed in range(MUTATIONS):
            changed = mutated(data, f"{name} {seed}")
            yield Case(f"{name} changed ({seed})", partial(_read, name, changed))


def _files(folder: Path) -> dict[str, bytes]:
    """The same records in each format."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    lines = "".join(json.dumps(record) + "\n" for record in _RECORDS).encode()
    rows = [
        ",".join(json.dumps(v).replace('"', '""').join('""') for v in record.values())
        for record in _RECORDS
    ]
    table = pa.Table.from_pylist(_RECORDS)
    pq.write_table(table, folder / "f.parquet")
    with pa.ipc.new_file(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    return {
        "f.jsonl": lines,
        "f.jsonl.gz": gzip.compress(lines),
        "f.csv": "\n".join([",".join(_RECORDS[0]), *rows]).encode(),
        "f.parquet": (folder / "f.parquet").read_bytes(),
        "f.arrow": (folder / "f.arrow").read_bytes(),
    }


def _read(name: str, data: bytes, place: Path) -> bool:
    (place / name).write_bytes(data)
    return _read_file(place / name)


def _read_special(name: str, make: Callable[[Path], object], place: Path) -> bool:
    make(place / name)
    return _read_file(place / name)


def _read_file(file: Path) -> bool:
    refused = 0
    for read in (read_questions, lambda path: list(FileCorpus("hostile", path))):
        try:
            read(file)
        except ResearchEnvError:
            refused += 1
    return refused == 2  # a record may be a question and no passage
