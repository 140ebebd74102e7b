from __future__ import annotations

import logging
import multiprocessing
import os
import sqlite3
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, RetrievalError, UnknownNameError
from research_env.retrieval import Hit, Passage, open_retriever
from research_env.retrieval.base import Retriever
from research_env.retrieval.replay import RecordedRetriever, Recording, recording
from tests.research_env.fakes import DATASET, Engine, answer, search
from tests.research_env.retrieval.retriever_contract import (
    CLAUSES,
    HOSTILE,
    WORDS,
    Clause,
    contract_index,
    environments_travel,
    fails_in_place,
)
from tests.research_env.servers import as_json, serving


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("recorded"))


def never() -> Retriever:
    raise AssertionError("the engine was opened")


def opened(file: Path, engine: Retriever, replay_only: bool = False) -> RecordedRetriever:
    return RecordedRetriever(Recording(file, "fake:", replay_only), lambda: engine)


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract(clause: Clause, index: Path, tmp_path: Path) -> None:
    url = f"embedded:{index}?corpus=any&cache={tmp_path / 'record.sqlite'}"
    clause(lambda: open_retriever(url, None))  # records
    clause(lambda: open_retriever(url, None))  # replays


def test_environments_travel(index: Path, tmp_path: Path) -> None:
    environments_travel(f"embedded:{index}?corpus=any&cache={tmp_path / 'record.sqlite'}")


def test_later_runs_replay_with_the_engine_switched_off(index: Path, tmp_path: Path) -> None:
    queries = [*WORDS, *HOSTILE]
    first = open_retriever(f"embedded:{index}?cache={tmp_path / 'r'}&corpus=any", None)
    found = first.search(queries, 5)
    first.close()
    index.rename(index.with_name("gone"))
    try:
        for options in (
            f"cache={tmp_path / 'r'}&corpus=any",
            f"corpus=any&replay=only&cache={tmp_path / 'r'}",
        ):
            again = open_retriever(f"embedded:{index}?{options}", None)
            replayed = again.search(queries, 5)
            assert replayed == found
            assert repr(replayed) == repr(found)  # to the last bit of each score
            again.close()
    finally:
        index.with_name("gone").rename(index)


def test_the_engine_is_asked_once_for_each_query_and_top_k(tmp_path: Path) -> None:
    engine = Engine()
    first = opened(tmp_path / "r", engine)
    assert first.search(["1", "2", "1"], 3) == Engine().search(["1", "2", "1"], 3)
    assert first.search(["2", "3"], 3) == Engine().search(["2", "3"], 3)
    assert first.search(["1"], 1) == Engine().search(["1"], 1)
    assert engine.batches == [("1", "2"), ("3",), ("1",)]
    first.close()
    assert engine.closed == 1
    second = RecordedRetriever(Recording(tmp_path / "r", "fake:"), never)
    assert second.search(["3", "1"], 3) == Engine().search(["3", "1"], 3)
    second.close()


def test_engines_do_not_share_what_they_found(tmp_path: Path) -> None:
    engine = Engine()
    for name in ("a:", "b:"):
        each = RecordedRetriever(Recording(tmp_path / "r", name), lambda: engine)
        each.search(["1"], 3)
        each.close()
    assert len(engine.batches) == 2


def test_a_miss_in_a_replay_fails_in_its_place(tmp_path: Path) -> None:
    first = opened(tmp_path / "r", Engine())
    first.search(["1"], 3)
    first.close()
    replay = RecordedRetriever(Recording(tmp_path / "r", "fake:", replay_only=True), never)
    known, missing, again = replay.search(["1", "2", "1"], 3)
    assert known == again == Engine().search(["1"], 3)[0]
    assert isinstance(missing, RetrievalError)
    assert "not in the recording" in str(missing)
    fails_in_place(replay, ["2", "3"])
    replay.close()


def test_errors_are_not_recorded(tmp_path: Path) -> None:
    engine = Engine()
    first = opened(tmp_path / "r", engine)
    for _ in range(2):
        good, failed = first.search(["1", "fail 2"], 3)
        assert good == Engine().search(["1"], 3)[0]
        assert isinstance(failed, RetrievalError)
    assert engine.batches == [("1", "fail 2"), ("fail 2",)]
    for _ in range(2):
        good, failed = first.search(["1", "down"], 3)
        assert good == Engine().search(["1"], 3)[0]
        assert isinstance(failed, RetrievalError)
    assert first.search(["3"], 3) == Engine().search(["3"], 3)
    first.close()
    with sqlite3.connect(tmp_path / "r") as file:
        assert file.execute("SELECT query FROM found ORDER BY query").fetchall() == [
            (b"1",),
            (b"3",),
        ]
    file.close()


TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # with lone surrogates
HITS = st.lists(
    st.builds(Hit, st.builds(Passage, TEXT, TEXT, TEXT), st.floats(allow_nan=False)), max_size=4
)


@settings(deadline=None, max_examples=50)
@given(found=st.dictionaries(TEXT, HITS, min_size=1, max_size=5))
def test_any_hits_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, list[Hit]]
) -> None:
    class Table(Engine):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
            return [found[query] for query in queries]

    file = tmp_path_factory.mktemp("any") / "r"
    for engine in (Table(), Engine()):
        each = opened(file, engine)
        assert repr(each.search(list(found), 4)) == repr(list(found.values()))
        each.close()


def test_the_first_to_record_wins_and_all_get_its_hits(tmp_path: Path) -> None:
    other = opened(tmp_path / "r", Engine())

    class Slow(Engine):
        """While it searches, another process records the same query, with other hits."""

        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
            other.search(queries, top_k)
            return [[Hit(Passage("mine", "", ""), 1.0)] for _ in queries]

    slow = opened(tmp_path / "r", Slow())
    assert slow.search(["1"], 3) == other.search(["1"], 3) == Engine().search(["1"], 3)
    slow.close()
    other.close()


def test_callers_may_change_their_lists(tmp_path: Path) -> None:
    engine = opened(tmp_path / "r", Engine())
    first, second = engine.search(["1", "1"], 3)
    assert isinstance(first, list)
    first.clear()
    assert second == Engine().search(["1"], 3)[0]
    engine.close()


def test_an_engine_that_cannot_be_opened_fails_only_what_is_not_recorded(tmp_path: Path) -> None:
    first = opened(tmp_path / "r", Engine())
    first.search(["1"], 3)
    first.close()

    def dead() -> Retriever:
        raise RetrievalError("nobody there")

    second = RecordedRetriever(Recording(tmp_path / "r", "fake:"), dead)
    known, new = second.search(["1", "2"], 3)
    assert known == Engine().search(["1"], 3)[0]
    assert str(new) == "nobody there"
    second.close()


def test_who_replays_does_not_wait_for_the_opening_of_the_engine(tmp_path: Path) -> None:
    first = opened(tmp_path / "r", Engine())
    first.search(["1"], 3)
    first.close()
    opening, go_on = threading.Event(), threading.Event()

    def slow() -> Retriever:
        opening.set()
        assert go_on.wait(60)
        return Engine()

    second = RecordedRetriever(Recording(tmp_path / "r", "fake:"), slow)
    with ThreadPoolExecutor(2) as pool:
        new = pool.submit(second.search, ["2"], 3)
        assert opening.wait(60)
        try:
            known = pool.submit(second.search, ["1"], 3).result(10)
        finally:
            go_on.set()
        assert known == Engine().search(["1"], 3)
        assert new.result(60) == Engine().search(["2"], 3)
    second.close()


# --- several processes ----------------------------------------------------------------------------


class Stamped(Engine):
    """An engine whose hits tell which process asked it, and how often it had."""

    def __init__(self, process: int) -> None:
        super().__init__()
        self.process = process

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.batches.append(tuple(queries))
        stamp = f"{self.process}.{len(self.batches)}"
        return [[Hit(Passage(q, stamp, "x" * 2000), 1.0)] for q in queries]


def make_and_record(file: Path, barrier: threading.Barrier, number: int) -> object:
    barrier.wait(60)
    engine = opened(file, Engine())
    found = engine.search([str(number)], 3)
    engine.close()
    return found


def test_many_may_make_the_file_at_once(tmp_path: Path) -> None:
    for attempt in range(10):
        barrier = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            work = [
                pool.submit(make_and_record, tmp_path / str(attempt), barrier, number)
                for number in range(8)
            ]
            for number, each in enumerate(work):
                assert each.result(60) == Engine().search([str(number)], 3)


def record_in_a_process(file: str, process: int, barrier: object) -> list[list[str]]:
    barrier.wait(60)  # type: ignore[attr-defined]
    engine = opened(Path(file), Stamped(process))
    seen = []
    for step in range(10):
        queries = [f"q{(step * 7 + i) % 50}" for i in range(20)]
        found = engine.search(queries, 3)
        seen.append(
            [f"{h[0].passage.id} {h[0].passage.title}" for h in found if isinstance(h, list)]
        )
    engine.close()
    return seen


def test_a_recorder_outlives_a_fork_and_so_does_its_file(tmp_path: Path) -> None:
    engine = opened(tmp_path / "r", Engine())
    engine.search(["1"], 3)
    context = multiprocessing.get_context("fork")

    def record() -> None:
        files = {each.resolve() for each in Path("/proc/self/fd").iterdir()}
        assert (tmp_path / "r").resolve() not in files  # SQLite's locks are not inherited with it
        assert engine.search(["1", "2"], 3) == Engine().search(["1", "2"], 3)
        engine.close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=record)
        child.start()
    engine.search(["3"], 3)
    child.join(60)
    assert child.exitcode == 0
    engine.close()
    replay = opened(tmp_path / "r", Engine(), replay_only=True)
    assert replay.search(["1", "2", "3"], 3) == Engine().search(["1", "2", "3"], 3)
    replay.close()


def test_a_recording_stays_where_it_is_when_the_working_directory_changes(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    engine = open_retriever(f"embedded:{index}?corpus=any&cache=r", None)
    monkeypatch.chdir(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=list)
        child.start()  # closes the file, which the next search opens again
    found = engine.search(WORDS, 3)
    engine.close()
    child.join(60)
    assert list((tmp_path / "b").iterdir()) == []
    again = open_retriever(f"embedded:{index}?corpus=any&replay=only&cache={tmp_path}/a/r", None)
    assert again.search(WORDS, 3) == found
    again.close()


def test_several_processes_record_into_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        work = [(str(tmp_path / "r"), process, barrier) for process in range(3)]
        seen = pool.starmap(record_in_a_process, work)
    assert [[len(step) for step in process] for process in seen] == [[20] * 10] * 3
    told = {line for process in seen for step in process for line in step}
    assert len(told) == 50  # each query has one answer, the same for all
    replay = opened(tmp_path / "r", Engine(), replay_only=True)
    found = replay.search([f"q{i}" for i in range(50)], 3)
    assert {f"{h[0].passage.id} {h[0].passage.title}" for h in found if isinstance(h, list)} == told
    replay.close()


# --- the file and the URL -------------------------------------------------------------------------


def test_the_hit_rate_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = opened(tmp_path / "r", Engine())
    assert engine.hit_rate == 0
    engine.search(["1", "2"], 3)
    engine.search(["1", "3"], 3)
    assert engine.hit_rate == 0.25
    engine.close()
    engine.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'r'}: 1 of 4 queries replayed (25.0 %)"
    ]


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be looked at " * 50)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE birds (name TEXT)")
    other.close()
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 2")
    newer.close()
    for name in ("text", "other", "newer", "folder/r", "."):
        with pytest.raises(ConfigurationError, match="cannot be used as a recording"):
            opened(tmp_path / name, Engine())
    with pytest.raises(ConfigurationError, match="there is no recording"):
        opened(tmp_path / "none", Engine(), replay_only=True)
    assert not (tmp_path / "none").exists()


def change(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as other:
        for statement in statements:
            other.execute(statement)
    other.close()


@pytest.mark.parametrize("replay_only", [False, True])
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON found BEGIN DELETE FROM found; END",
        "CREATE VIEW v AS SELECT load_extension('/tmp/x')",
        "CREATE TABLE more (x)",
        "CREATE INDEX i ON found (hits)",
        "ALTER TABLE found ADD COLUMN x AS (length(hits))",
        "ALTER TABLE found RENAME COLUMN hits TO h",
        "DROP TABLE found",
    ],
)
def test_a_recording_has_our_schema_and_nothing_else(
    tmp_path: Path, statement: str, replay_only: bool
) -> None:
    first = opened(tmp_path / "r", Engine())
    first.search(["1"], 3)
    first.close()
    change(tmp_path / "r", statement)
    with pytest.raises(ConfigurationError, match="its tables are not those of a recording"):
        opened(tmp_path / "r", Engine(), replay_only)


ROWS = {
    "no JSON": "'['",
    "deep": "'" + "[" * 100_000 + "'",
    "an object": "'{}'",
    "three fields": """'[["p", "t", "x"]]'""",
    "a number as id": """'[[1, "t", "x", 1.0]]'""",
    "true as score": """'[["p", "t", "x", true]]'""",
    "NaN": """'[["p", "t", "x", NaN]]'""",
    "too many": """'[["p", "t", "x", 1], ["p", "t", "x", 1], ["p", "t", "x", 1]]'""",
    "a number": "7",
    "no UTF-8": "x'5b5b22ff225d5d'",
    "too long": "zeroblob(70000000)",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_that_is_no_list_of_hits_makes_its_query_void(tmp_path: Path, row: str) -> None:
    first = opened(tmp_path / "r", Engine())
    recorded = first.search(["1", "2"], 2)
    first.close()
    change(tmp_path / "r", f"UPDATE found SET hits = {row} WHERE query = CAST('2' AS BLOB)")
    for replay_only in (False, True):
        again = opened(tmp_path / "r", Engine(), replay_only)
        good, bad = again.search(["1", "2"], 2)
        assert good == recorded[0]
        assert isinstance(bad, RetrievalError)
        assert "cannot be read" in str(bad)
        again.close()
    env = SearchQAEnv(dataset=DATASET, retriever=opened(tmp_path / "r", Engine()), top_k=2)
    env.reset(seed=1)
    seen, earned, terminated, truncated, info = env.step(search("2"))
    assert (seen, earned, terminated, truncated, info["void"]) == ("", 0.0, False, True, True)


@settings(deadline=None, max_examples=60)
@example(cuts=[(4053, b"\x80")])  # an error of SQLite whose message is not UTF-8
@given(cuts=st.lists(st.tuples(st.integers(0, 2**20), st.binary(max_size=3)), max_size=8))
def test_a_damaged_recording_is_a_typed_error_or_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, bytes]]
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "r"
    first = opened(file, Engine())
    queries = [str(number) for number in range(40)]
    first.search(queries, 3)
    first.close()
    data = bytearray(file.read_bytes())
    for place, new in cuts:
        start = place % len(data)
        data[start : start + len(new)] = new
    file.write_bytes(data)
    try:
        replay = opened(file, Engine(), replay_only=True)
        found = replay.search(queries, 3)
    except (ConfigurationError, RetrievalError):
        return
    assert all(isinstance(each, list | RetrievalError) for each in found)
    replay.close()


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    opened(tmp_path / "r", Engine()).close()
    os.mkfifo(tmp_path / "r-wal")
    for name in ("pipe", "device", "r"):
        for replay_only in (False, True):
            with pytest.raises(ConfigurationError, match=r"no regular file|no recording"):
                opened(tmp_path / name, Engine(), replay_only)


def test_a_replay_only_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigurationError, match="another database"):
        opened(tmp_path / "empty", Engine(), replay_only=True)
    assert (tmp_path / "empty").read_bytes() == b""
    folder = tmp_path / "a #?%41 folder"
    folder.mkdir()
    first = opened(folder / "r", Engine())
    first.search(["1"], 3)
    first.close()
    before = (folder / "r").read_bytes()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write wherever it wants
    replay = opened(folder / "r", Engine(), replay_only=True)
    assert replay.search(["1"], 3) == Engine().search(["1"], 3)
    assert [path.name for path in folder.iterdir()] == ["r"]  # SQLite keeps nothing beside it
    fails_in_place(replay, ["2"])
    replay.close()
    assert (folder / "r").read_bytes() == before


def test_a_file_that_breaks_under_a_run_fails_the_batch(tmp_path: Path) -> None:
    engine = opened(tmp_path / "r", Engine())
    engine.search(["1"], 3)
    with sqlite3.connect(tmp_path / "r") as other:
        other.execute("DROP TABLE found")
    other.close()
    assert "cannot be used" in str(fails_in_place(engine, ["1", "2"])[0])
    engine.close()


@pytest.mark.parametrize(
    ("url", "engine", "key", "file", "replay"),
    [
        ("embedded:d?cache=f", "embedded:d", "embedded:d", "f", False),
        (
            "embedded:d?corpus=any&cache=f",
            "embedded:d?corpus=any",
            "embedded:d?corpus=any",
            "f",
            False,
        ),
        ("x:d?b=2^%20&cache=a%26b&a=1", "x:d?b=2^%20&a=1", "x:d?a=1&b=2^%20", "a&b", False),
        (
            "web:serper?budget=9&rate=2&cache=f&replay=only",
            "web:serper?budget=9&rate=2",
            "web:serper",
            "f",
            True,
        ),
        (
            "http://u:p@h/r?cache=f&deadline=3",
            "http://u:p@h/r?deadline=3",
            "http://h/r",
            "f",
            False,
        ),
    ],
)
def test_the_url_is_taken_apart(url: str, engine: str, key: str, file: str, replay: bool) -> None:
    assert recording(url) == (engine, Recording(Path(file), key, replay))


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("embedded:d?cache=", ConfigurationError, "needs a file"),
        ("embedded:d?replay=only", ConfigurationError, "needs a file"),
        ("embedded:d?cache=f&replay=yes", UnknownNameError, "unknown replay 'yes'; known: only"),
        ("embedded:d?cache=f&cache=g", ConfigurationError, "each once"),
        ("unknown:d?cache=f", UnknownNameError, "unknown retriever"),
    ],
)
def test_bad_urls_are_refused(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_retriever(url, None)


def test_what_the_engine_refuses_is_told_at_the_first_miss(tmp_path: Path) -> None:
    engine = open_retriever(
        f"embedded:{tmp_path / 'none'}?corpus=some&cache={tmp_path / 'r'}", None
    )
    with pytest.raises(UnknownNameError, match="option of embedded"):
        engine.search(["1"], 3)
    engine.close()


def test_an_environment_plays_from_a_recording_of_a_server_that_is_gone(tmp_path: Path) -> None:
    document = {"id": "p1", "contents": '"T"\nx'}
    episodes = []
    with serving(lambda _: as_json({"result": [[{"document": document, "score": 1.0}]]})) as server:
        url = f"{server.url}/retrieve?deadline=5&cache={tmp_path / 'r'}"
        episodes.append(play(url))
    episodes.append(play(url))
    episodes.append(play(url.replace("deadline=5", "replay=only")))
    assert episodes[0] == episodes[1] == episodes[2]
    assert "x" in episodes[0][1]


def play(url: str) -> list[str]:
    env = SearchQAEnv(dataset=DATASET, retriever=url)
    seen = [env.reset(seed=1)[0], env.step(search("who"))[0], env.step(answer("Founder 1"))[0]]
    env.close()
    return seen
