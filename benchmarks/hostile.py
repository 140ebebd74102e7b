"""What becomes of hostile input: files by strangers and disks that forget, tried for real.

``python -m benchmarks.hostile [--json] [--only WORDS]``

Each section makes inputs and tries them in a process of its own, so that a signal, a hang and the
peak of memory are seen. An input is right when it is refused by an error of ours, or read as data
without harm. A raw exception, a signal and a hang are wrong.

To add a section, write a function that yields :class:`Case` values and name it in ``SECTIONS``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from research_agent.errors import ResearchAgentError
from research_env.datasets import FileCorpus, read_questions
from research_env.errors import ResearchEnvError, RetrievalError
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.bm25 import retriever as bm25
from research_env.retrieval.replay import RecordedRetriever, Recording

TIMEOUT = 60.0  # seconds for one input
START_TIMEOUT = 600.0  # seconds for a process to start, and to make what its inputs share
MUTATIONS = 100  # random changes per kind of file
PASSAGES = 25_000  # size of the index; large enough for the compiled search


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: what it is.
        try_it: makes and uses the input in an empty folder. It returns whether the input was
            refused by an error in the answer; any exception is looked at too.
    """

    name: str
    try_it: Callable[[Path], bool]


@dataclass(frozen=True)
class Row:
    """What became of the inputs of one section.

    Attributes:
        section: its name.
        tried: inputs.
        refused: inputs that were not read.
        typed: refused inputs whose error is one of this package's.
        harmless: inputs that were read as data.
        killed: inputs that ended the process by a signal, or never ended.
        peak_mb: the most memory that an input took, in MB, above what the process had before.
        wrong: names of the inputs that were refused by a raw exception or killed the process.
    """

    section: str
    tried: int
    refused: int
    typed: int
    harmless: int
    killed: int
    peak_mb: float
    wrong: tuple[str, ...] = ()


def run_section(name: str, cases: Callable[[Path], Iterator[Case]]) -> Row:
    """Try all cases of a section.

    Args:
        name: of the section.
        cases: yields them, the same ones each time, given a folder for what they share; it must be
            importable by name.
    """
    row = Row(name, 0, 0, 0, 0, 0, 0.0)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        while True:
            here, there = context.Pipe(duplex=False)
            work = context.Process(target=_try_all, args=(cases, Path(folder), row.tried, there))
            work.start()
            there.close()
            at, ended = "", False
            try:
                while here.poll(TIMEOUT if at else START_TIMEOUT):
                    told = here.recv()
                    if told is None:
                        ended = True
                        break
                    at, outcome, peak = told
                    if outcome:
                        row = _counted(row, at, outcome, peak)
            except EOFError:  # the process is dead
                pass
            work.kill()
            work.join()
            if ended:
                return row
            row = _counted(row, at, "killed", 0.0)


def _counted(row: Row, name: str, outcome: str, peak: float) -> Row:
    typed, raw = outcome == "typed", outcome.startswith("raw")
    wrong = (f"{name}: {outcome}",) if raw or outcome == "killed" else ()
    return replace(
        row,
        tried=row.tried + 1,
        refused=row.refused + (typed or raw),
        typed=row.typed + typed,
        harmless=row.harmless + (outcome == "harmless"),
        killed=row.killed + (outcome == "killed"),
        peak_mb=max(row.peak_mb, round(peak, 1)),
        wrong=row.wrong + wrong,
    )


def _try_all(
    cases: Callable[[Path], Iterator[Case]], folder: Path, skip: int, told: Connection
) -> None:
    os.environ["RESEARCH_CACHE"] = str(folder / "cache")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # what libraries say of each input
    before = 0.0
    for number, case in enumerate(cases(folder)):
        if number < skip:
            continue
        before = before or _peak()
        told.send((case.name, "", 0.0))
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            outcome = "typed" if case.try_it(place) else "harmless"
        except (ResearchEnvError, ResearchAgentError):
            outcome = "typed"
        except Exception as error:
            outcome = f"raw {type(error).__name__}: {error}"[:300]
        shutil.rmtree(place, ignore_errors=True)
        told.send((case.name, outcome, _peak() - before))
    told.send(None)


def _peak() -> float:
    """The most memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the parent's memory
        line = next(each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mutated(data: bytes, seed: str) -> bytes:
    """Some bytes changed, dropped, doubled or cut off."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) or 1), rng.choice((1, 1, 4, 300))
        part = changed[place : place + length]
        new = rng.choice((rng.randbytes(len(part)), b"", bytes(part) * 2, b"\xff" * len(part)))
        changed[place : place + length] = new
    return bytes(changed[: len(changed) - rng.choice((0, 0, 1, 1000))])


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


class GeneratedPassages:
    """A corpus of random words."""

    name = "generated"

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages."""
        rng = random.Random(0)
        for i in range(PASSAGES):
            yield Passage(str(i), f"t{i}", " ".join(f"w{rng.randrange(3_000)}" for _ in range(12)))

    def fingerprint(self) -> str:
        """Say which corpus this is."""
        return "generated"


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
        yield Case(f"{name}: 3 GiB of NUL", partial(_read_special, name, _sparse))
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


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


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


# --- all of them ----------------------------------------------------------------------------------


def hostile_files() -> list[Row]:
    """Indexes, recordings, question files and corpora."""
    return [
        run_section("indexes", index_cases),
        run_section("recordings", recording_cases),
        run_section("questions and passages", question_file_cases),
    ]


def hostile_requests() -> list[Row]:
    """Requests to ``research-env serve``."""
    from benchmarks.hostile_requests import serve_cases  # noqa: PLC0415  (it imports this module)

    return [run_section("serve", serve_cases)]


def hostile_models() -> list[Row]:
    """Weight files of models and adapters."""
    from benchmarks.hostile_models import model_cases  # noqa: PLC0415  (it imports this module)

    return [run_section("models", model_cases)]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "files": hostile_files,
    "serve": hostile_requests,
    "models": hostile_models,
}


def report(only: str = "", as_json: bool = False) -> bool:
    """Run the sections and print a table.

    Args:
        only: run the sections whose name holds this.
        as_json: print one line of JSON per row instead.

    Returns:
        Whether every input was right.
    """
    line = "| {:<24} | {:>5} | {:>7} | {:>12} | {:>8} | {:>6} | {:>14} |"
    if not as_json:
        titles = ("hostile input", "tried", "refused", "typed errors", "harmless", "killed")
        print(line.format(*titles, "peak memory"), line.format(*["---"] * 7), sep="\n")
    safe = True
    for name, section in SECTIONS.items():
        for row in section() if only in name else []:
            safe &= not row.wrong
            values = asdict(row)
            if as_json:
                print(json.dumps(values), flush=True)
                continue
            wrong = values.pop("wrong")
            values["peak_mb"] = f"{row.peak_mb:,.0f} MB more"
            print(line.format(*values.values()), flush=True)
            for each in wrong:
                print(f"wrong: {each}")
    return safe


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exits with 1 where an input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row")
    parser.add_argument("--only", default="", help="only sections whose name holds this")
    chosen = parser.parse_args(arguments)
    raise SystemExit(0 if report(chosen.only, chosen.json) else 1)


if __name__ == "__main__":
    main()
