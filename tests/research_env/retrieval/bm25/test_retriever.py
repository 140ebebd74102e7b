from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research_env.datasets import FileCorpus, load_dataset
from research_env.errors import (
    ConfigurationError,
    DataError,
    RetrievalError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.retrieval import Hit, Passage, index_corpus, open_retriever
from research_env.retrieval.bm25 import index as impacts
from research_env.retrieval.bm25 import retriever as embedded
from research_env.retrieval.bm25.analyzer import analyze
from research_env.retrieval.bm25.retriever import EmbeddedRetriever, build_index, check_index
from research_env.system import paths
from tests.research_env.fakes import ListCorpus


def corpus(*texts: str, name: str = "list") -> ListCorpus:
    return ListCorpus(tuple(Passage(f"p{i}", "", text) for i, text in enumerate(texts)), name)


BEATLES = ListCorpus(
    (
        Passage("a", "The Beatles", "The Beatles were an English rock band formed in Liverpool."),
        Passage("b", "Liverpool", "Liverpool is a city in England."),
        Passage("c", "Rock", "A rock is a stone. A rock, a rock!"),
        Passage("d", "", "the of and"),
        Passage("e", "Zürich \ud800", "<b>Zürich</b> is a city\0in Switzerland."),
    )
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache?no=option"  # nothing in a path is an option of a URL
    monkeypatch.setenv("RESEARCH_CACHE", str(folder))
    return folder


def hits(engine: EmbeddedRetriever, query: str, top_k: int = 10) -> list[Hit]:
    found = engine.search([query], top_k)[0]
    assert not isinstance(found, RetrievalError)
    return found


# --- scores ---------------------------------------------------------------------------------------


def one_byte_length(length: int) -> int:
    """Lucene's SmallFloat.byte4ToInt(intToByte4(length)): exact to 24, then four leading bits."""
    if length < 24:
        return length
    rest = length - 24
    drop = max(rest.bit_length() - 4, 0)
    return 24 + (rest >> drop << drop)


def elasticsearch_scores(passages: list[Passage], query: str) -> dict[str, float]:
    """BM25 straight from the formula, over every passage."""
    documents = {p.id: Counter(analyze(f"{p.title}\n{p.text}")) for p in passages}
    documents = {id_: terms for id_, terms in documents.items() if terms}
    average = sum(terms.total() for terms in documents.values()) / len(documents)
    k1, b, scores = 1.2, 0.75, {}
    for id_, terms in documents.items():
        norm = k1 * (1 - b + b * one_byte_length(terms.total()) / average)
        score = 0.0
        for term in analyze(query):
            n = sum(term in other for other in documents.values())
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            score += (k1 + 1) * idf * terms[term] / (terms[term] + norm)
        if score > 0:
            scores[id_] = score
    return scores


def test_one_byte_lengths_are_lucenes() -> None:
    # SmallFloat.byte4ToInt(intToByte4(n)), printed by Lucene 9.12.2
    expected = {0: 0, 23: 23, 24: 24, 39: 39, 40: 40, 41: 40, 57: 56, 100: 96, 1000: 984}
    assert {n: one_byte_length(n) for n in expected} == expected


def test_a_score_worked_by_hand(tmp_path: Path) -> None:
    build_index(corpus("red red apple", "green apple", "pear"), tmp_path / "i")
    found = hits(EmbeddedRetriever(tmp_path / "i"), "red apple")
    # lengths 3, 2, 1, mean 2; idf(red) = ln(1 + 2.5/1.5), idf(apple) = ln(1 + 1.5/2.5)
    # passage 0: norm 1.2 (.25 + .75 * 3/2) = 1.65; passage 1: norm 1.2
    red, apple = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    first = 2.2 * (red * 2 / (2 + 1.65) + apple * 1 / (1 + 1.65))
    assert [hit.passage.id for hit in found] == ["p0", "p1"]
    assert [hit.score for hit in found] == pytest.approx([first, 2.2 * apple / 2.2], rel=1e-6)


WORDS = st.sampled_from(["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "the", "ibis"])
TEXTS = st.lists(WORDS, min_size=0, max_size=60).map(" ".join)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TEXTS, min_size=1, max_size=25), st.lists(WORDS, max_size=8).map(" ".join))
def test_scores_and_order_are_those_of_the_formula(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    made = corpus("one word at least", *texts)
    folder = tmp_path_factory.mktemp("property") / "i"
    build_index(made, folder)
    found = hits(EmbeddedRetriever(folder), query, top_k=7)
    expected = elasticsearch_scores(list(made), query)
    scores = {hit.passage.id: hit.score for hit in found}
    assert scores == pytest.approx({id_: expected[id_] for id_ in scores}, rel=1e-5)
    assert len(found) == min(7, len(expected))
    if len(found) < len(expected):
        best_left = max(score for id_, score in expected.items() if id_ not in scores)
        assert best_left <= found[-1].score * (1 + 1e-5)
    for left, right in pairwise(found):
        earlier = int(left.passage.id[1:]) < int(right.passage.id[1:])
        assert left.score > right.score or (left.score == right.score and earlier)


def test_scores_on_real_passages(
    research_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset("musique", split="dev")
    assert data.corpus is not None
    passages = list(islice(data.corpus, 200))
    build_index(ListCorpus(tuple(passages)), tmp_path / "i")
    engine = EmbeddedRetriever(tmp_path / "i")
    for question in data.questions[:15]:
        expected = elasticsearch_scores(passages, question.question)
        found = {hit.passage.id: hit.score for hit in hits(engine, question.question, 200)}
        assert found == pytest.approx(expected, rel=1e-5)


def test_recall_on_musique_is_elasticsearchs(
    research_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset("musique", split="dev")
    engine = open_retriever(None, data.corpus)
    found = engine.search([question.question for question in data.questions], 5)
    recall = []
    for question, passages in zip(data.questions, found, strict=True):
        assert not isinstance(passages, RetrievalError)
        gold = set(question.supporting)
        recall.append(len(gold & {hit.passage.id for hit in passages}) / len(gold))
    # an Elasticsearch 8.19.7 server: .4517 (match on title + newline + text, analyzer english)
    assert sum(recall) / len(recall) == pytest.approx(0.4517, abs=5e-5)


# --- hits -----------------------------------------------------------------------------------------


def test_hits_carry_title_and_text(tmp_path: Path) -> None:
    build_index(BEATLES, tmp_path / "i")
    engine = EmbeddedRetriever(tmp_path / "i", BEATLES)
    assert engine.num_passages == 5
    assert hits(engine, "Who formed the Beatles?")[0].passage == BEATLES.passages[0]
    assert hits(engine, "zürich")[0].passage == BEATLES.passages[4]
    assert [hit.passage.id for hit in hits(engine, "city")] == ["b", "e"]


@pytest.mark.parametrize(
    "query",
    [
        'AND OR NOT ( [ { "rock" } ] ) ~2 ^3 terms:rock row:1 *:* /rock/ \\',
        "rock\0\x01\x1b[31m\ud800\udfff\uffff",
        "rock " + " ".join(f"w{i}" for i in range(15_000)),
        "r" * 100_000 + " rock",
    ],
    ids=["operators", "control", "many words", "long word"],
)
def test_any_query_is_words(tmp_path: Path, query: str) -> None:
    build_index(BEATLES, tmp_path / "i")
    assert hits(EmbeddedRetriever(tmp_path / "i"), query)[0].passage.id == "c"


def test_a_query_that_matches_nothing_has_no_hits(tmp_path: Path) -> None:
    build_index(BEATLES, tmp_path / "i")
    engine = EmbeddedRetriever(tmp_path / "i")
    for query in ("", "  ", "the of", "?!*", "\0", "\ud800", "unheard"):
        assert hits(engine, query) == []


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec=None), max_size=80))
def test_no_query_is_an_error(tmp_path: Path, query: str) -> None:
    if not (tmp_path / "i").exists():
        build_index(BEATLES, tmp_path / "i")
    engine = EmbeddedRetriever(tmp_path / "i")
    assert isinstance(engine.search([query], 3)[0], list)
    engine.close()


def test_a_batch_over_threads_equals_its_queries_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(BEATLES, tmp_path / "i")
    engine = EmbeddedRetriever(tmp_path / "i")
    queries = ["rock", "city", "the", "liverpool band"] * 25
    alone = [engine.search([query], 3)[0] for query in queries]
    monkeypatch.setattr(embedded, "_THREAD_WORK", 1)
    monkeypatch.setattr(impacts, "_SMALL", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert engine.search(queries, 3) == alone
    assert engine.search([], 3) == []


# --- the folder -----------------------------------------------------------------------------------


def test_an_index_is_made_once(tmp_path: Path) -> None:
    reports: list[int] = []
    assert build_index(BEATLES, tmp_path / "i", reports.append) == 5
    assert build_index(BEATLES, tmp_path / "i", reports.append) == 5
    assert reports == [5]


class Weighed(str):
    """A text that can be seen to be forgotten."""

    __slots__ = ("__weakref__",)


class Stream:
    """A corpus that counts how many of its texts are alive while it is read."""

    name = "stream"
    most = 0

    def __iter__(self) -> Iterator[Passage]:
        alive: WeakSet[Weighed] = WeakSet()
        for i in range(300):
            text = Weighed(f"text {i}")
            alive.add(text)
            yield Passage(str(i), "", text)
            del text
            self.most = max(self.most, len(alive))

    def fingerprint(self) -> str:
        return "f"


def test_a_corpus_is_indexed_as_a_stream_and_its_passages_are_read_from_a_memory_map(
    tmp_path: Path,
) -> None:
    stream = Stream()
    assert build_index(stream, tmp_path / "i") == 300
    assert 1 <= stream.most <= 2
    engine = EmbeddedRetriever(tmp_path / "i")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert f"{tmp_path}/i/passages.bin" in maps.read_text()
    engine.close()
    if maps.exists():
        assert f"{tmp_path}/i/passages.bin" not in maps.read_text()


def test_an_index_of_another_corpus_is_replaced_by_a_build_but_not_opened(tmp_path: Path) -> None:
    other, folder = corpus("other passages"), tmp_path / "indexes" / "i"
    build_index(BEATLES, folder)
    with pytest.raises(StaleIndexError, match=r"another corpus.*research-env index"):
        EmbeddedRetriever(folder, other)
    build_index(other, folder)
    assert hits(EmbeddedRetriever(folder, other), "passages")
    assert sorted(path.name for path in folder.parent.iterdir()) == [".i.lock", "i"]


def test_a_link_to_the_folder_of_an_index_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk" / "index").mkdir(parents=True)
    link = tmp_path / "home" / "index"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "disk" / "index")
    for each in (BEATLES, corpus("other passages")):
        build_index(each, link)
        EmbeddedRetriever(link, each).close()
    assert list(link.parent.iterdir()) == [link]
    assert link.readlink() == tmp_path / "disk" / "index"
    names = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert names == [".index.lock", "index"]


def test_an_index_that_is_there_needs_no_lock(tmp_path: Path) -> None:
    index_corpus(BEATLES, tmp_path / "i")
    (tmp_path / ".i.lock").unlink()
    (tmp_path / ".i.lock").mkdir()  # it cannot be opened, as in a folder that is read-only
    assert index_corpus(BEATLES, tmp_path / "i") == 5
    with pytest.raises(ConfigurationError, match=r"cannot be written.*\.i\.lock"):
        index_corpus(corpus("other passages"), tmp_path / "i")


@pytest.mark.parametrize("name", ["passages.bin", "terms.bin"])
@pytest.mark.parametrize("fault", ["truncate", "remove", "change"])
def test_a_damaged_index_is_not_opened(tmp_path: Path, name: str, fault: str) -> None:
    build_index(BEATLES, tmp_path / "i")
    file = tmp_path / "i" / name
    content = file.read_bytes()
    if fault == "remove":
        file.unlink()
    else:
        cut, flip = content[:-1], bytes([content[0] ^ 1]) + content[1:]
        file.write_bytes(cut if fault == "truncate" else flip)
    with pytest.raises(StaleIndexError, match=f"damaged: .*{file.name}.*research-env index"):
        EmbeddedRetriever(tmp_path / "i")
    build_index(BEATLES, tmp_path / "i")
    assert hits(EmbeddedRetriever(tmp_path / "i", BEATLES), "rock")


KINDS = {"terms": "<u8", "starts": "<i8", "maxima": "<f4", "rows": "<i4", "impacts": "<f4"}
KINDS["offsets"] = "<u8"


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file of an index, and its checksum with it."""
    file = folder / f"{name}.bin"
    change(np.fromfile(file, KINDS[name])).astype(KINDS[name]).tofile(file)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][file.name] = embedded._checksum(file)
    (folder / "meta.json").write_text(json.dumps(meta))


LIES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("starts", lambda a: a + (1 << 40) * (np.arange(len(a)) > 0), "starts.bin says"),
    ("starts", lambda a: -a - 1, "starts.bin says"),
    ("starts", lambda a: np.concatenate([[0], a[1:-1] + (1 << 40), a[-1:]]), "does not ascend"),
    ("starts", lambda a: np.concatenate([[1], a[1:]]), "does not ascend"),
    ("starts", lambda a: a[[0, 2, 1, *range(3, len(a))]], "does not ascend"),
    ("starts", lambda a: a[1:], "different numbers of terms"),
    ("terms", lambda a: a[::-1], "terms.bin is not in ascending order"),
    ("terms", lambda a: a[:-1], "different numbers of terms"),
    ("maxima", lambda a: a * np.inf, "maxima.bin does not hold the greatest"),
    ("maxima", lambda a: a * np.nan, "maxima.bin does not hold the greatest"),
    ("maxima", lambda a: a[::-1], "maxima.bin does not hold the greatest"),
    ("rows", lambda a: a - 2_000_000, "outside 0 to 39"),
    ("rows", lambda a: a + 40 * (a == a.max()), "outside 0 to 39"),
    ("rows", lambda a: a[::-1], "rows.bin is not in ascending order"),
    ("rows", lambda a: a * 0, "rows.bin is not in ascending order"),
    ("rows", lambda a: a[:-1], "starts.bin says"),
    ("impacts", lambda a: a * np.nan, "impacts.bin holds a number"),
    ("impacts", lambda a: a * 0, "impacts.bin holds a number"),
    ("impacts", lambda a: a[1:], "starts.bin says"),
    ("offsets", lambda a: a[::-1], "does not span"),
    ("offsets", lambda a: a[[0, 1, 2, 4, 3, *range(5, len(a))]], "not in ascending order"),
    ("offsets", lambda a: a + (np.arange(len(a)) == len(a) - 1), "does not span"),
    ("offsets", lambda a: a[:-1], "a size that it cannot have"),
]


@pytest.mark.parametrize(("name", "change", "message"), LIES)
def test_what_a_search_indexes_by_is_checked_though_checksums_hold(
    tmp_path: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    texts = [f"ant {'bee ' * (i % 2)} w{i}" for i in range(40)]
    build_index(corpus(*texts), tmp_path / "i")
    rewrite(tmp_path / "i", name, change)
    with pytest.raises(StaleIndexError, match=f"damaged: .*{message}.*research-env index"):
        EmbeddedRetriever(tmp_path / "i")


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    build_index(BEATLES, tmp_path / "i")
    for name in ("passages.bin", "rows.bin", "meta.json"):
        (tmp_path / "i" / name).rename(tmp_path / "kept")
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
            make(tmp_path / "i" / name)
            with pytest.raises(StaleIndexError, match=name):
                EmbeddedRetriever(tmp_path / "i")
            other = tmp_path / "i" / name
            other.rmdir() if other.is_dir() else other.unlink()
        (tmp_path / "kept").rename(tmp_path / "i" / name)
    assert hits(EmbeddedRetriever(tmp_path / "i"), "rock")


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from([*embedded._FILES, "meta.json"]),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.binary(max_size=9)), min_size=1),
    rehash=st.booleans(),
)
def test_a_changed_index_is_a_typed_error_or_searches(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[int, bytes]],
    rehash: bool,
) -> None:
    folder = tmp_path_factory.mktemp("changed") / "i"
    build_index(BEATLES, folder)
    whole = bytearray((folder / name).read_bytes())
    data = bytearray(whole)
    for place, new in changes:
        data[place % len(data) : place % len(data) + len(new)] = new
    (folder / name).write_bytes(data)
    if rehash and name != "meta.json":
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"][name] = embedded._checksum(folder / name)
        (folder / "meta.json").write_text(json.dumps(meta))
    try:
        engine = EmbeddedRetriever(folder)
    except StaleIndexError:
        return
    assert rehash or name == "meta.json" or data == whole
    for found in engine.search(["rock city band", "Liverpool", "stone zürich"], 5):
        assert isinstance(found, list | RetrievalError)
    engine.close()


def test_an_index_is_read_completely_once_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []
    check_all = embedded._check_all

    def counted(folder: Path, *rest: Any) -> None:
        checked.append(folder)
        check_all(folder, *rest)

    monkeypatch.setattr(embedded, "_check_all", counted)
    monkeypatch.setattr(paths, "_SETTLED", 0)
    monkeypatch.setattr(embedded, "_BOOT_ID", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("first\n")
    build_index(BEATLES, tmp_path / "i")
    EmbeddedRetriever(tmp_path / "i").close()  # whoever built it knows it
    assert not checked
    shutil.copytree(tmp_path / "i", tmp_path / "copy")
    for _ in range(2):
        EmbeddedRetriever(tmp_path / "copy").close()
    assert checked == [tmp_path / "copy"]
    (tmp_path / "boot_id").write_text("second\n")
    for _ in range(2):
        EmbeddedRetriever(tmp_path / "i").close()
    assert checked == [tmp_path / "copy", tmp_path / "i"]
    assert check_index(tmp_path / "i") == 5
    assert len(checked) == 3


def test_a_file_that_changes_after_its_check_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_SETTLED", 0)
    build_index(BEATLES, tmp_path / "built")
    folder = tmp_path / "copy"  # which was never checked
    shutil.copytree(tmp_path / "built", folder)
    file = folder / "passages.bin"
    damaged = bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    check_all = embedded._check_all

    def change(*arguments: Any) -> None:
        check_all(*arguments)
        file.write_bytes(damaged)

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "_check_all", change)
        EmbeddedRetriever(folder).close()
    with pytest.raises(StaleIndexError, match=r"passages\.bin has changed"):
        EmbeddedRetriever(folder)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("small", [0, 10**9])
def test_a_disk_that_forgets_is_no_signal_and_a_check_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    def unchanged(
        kind: str, files: list[Path], read: Callable[[], object], again: bool = False
    ) -> object:
        return read() if again else {}

    monkeypatch.setattr(embedded, "cached", unchanged)  # as if no file had changed
    monkeypatch.setattr(impacts, "_SMALL", small)
    build_index(corpus(*[f"ant bee w{i}" for i in range(500)]), tmp_path / "i")
    queries = ["ant", "bee w7", "w8"]
    for name in ("rows", "passages", "offsets", "impacts"):
        shutil.copytree(tmp_path / "i", tmp_path / name)
        data = bytearray((tmp_path / name / f"{name}.bin").read_bytes())
        data[len(data) // 4 :: 3] = b"\xff" * len(data[len(data) // 4 :: 3])
        (tmp_path / name / f"{name}.bin").write_bytes(data)
        engine = EmbeddedRetriever(tmp_path / name)
        try:
            found = engine.search(queries, 400)
        except RetrievalError as error:
            assert "is damaged" in str(error)
        else:
            assert all(isinstance(each, list | RetrievalError) for each in found)
        with pytest.raises(StaleIndexError, match=f"{name}.bin has changed"):
            check_index(tmp_path / name)


def test_an_index_of_an_older_version_is_not_opened(tmp_path: Path) -> None:
    build_index(BEATLES, tmp_path / "i")
    meta = json.loads((tmp_path / "i/meta.json").read_text())
    (tmp_path / "i/meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(StaleIndexError, match=r"format 0.*research-env index"):
        EmbeddedRetriever(tmp_path / "i")


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 3}', "\0"])
def test_what_is_no_index_is_not_opened(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(StaleIndexError, match="is no index"):
        EmbeddedRetriever(tmp_path)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other things"):
        build_index(BEATLES, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("index", [False, True])
def test_a_folder_of_other_things_is_no_index_for_a_meta_json(tmp_path: Path, index: bool) -> None:
    folder = tmp_path / "mine"
    if index:
        build_index(BEATLES, folder)
        (folder / "thesis.tex").write_text("mine")
    else:
        folder.mkdir()
        (folder / "meta.json").write_text("{}")
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigurationError, match=r"holds other things, such as '(thesis|meta)"):
        build_index(corpus("other passages"), folder)
    assert sorted(folder.iterdir()) == before


def test_a_current_index_may_lie_beside_what_a_file_manager_leaves(tmp_path: Path) -> None:
    build_index(BEATLES, tmp_path / "i")
    (tmp_path / "i/.DS_Store").write_text("")
    assert build_index(BEATLES, tmp_path / "i") == 5


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread() -> Iterator[Passage]:
        pytest.fail("the corpus is read")

    monkeypatch.setattr(ListCorpus, "__iter__", lambda _: unread())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigurationError, match=r"is the working directory.*here/index"):
        build_index(BEATLES, ".")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("volume"))
    (tmp_path / "volume").mkdir()
    with pytest.raises(ConfigurationError, match=r"is a mount point.*volume/index"):
        build_index(BEATLES, tmp_path / "volume")


def test_an_interrupt_while_the_new_index_takes_its_place_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(BEATLES, tmp_path / "i")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "i" and not self.name.endswith(".old.building"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(corpus("other passages"), tmp_path / "i")
    assert check_index(tmp_path / "i") == 5
    assert sorted(path.name for path in tmp_path.iterdir() if "building" in path.name) == []


def test_a_corpus_whose_name_is_not_utf_8_is_indexed(tmp_path: Path) -> None:
    odd = corpus("Rome is a city.", name=os.fsdecode(b"bad\xff.jsonl"))
    assert build_index(odd, tmp_path / "i") == 1
    assert len(hits(EmbeddedRetriever(tmp_path / "i", odd), "rome")) == 1


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = corpus("rome", "oslo", name="one"), corpus("bern", "lima oslo", name="other")
    build_index(one, tmp_path / "i")
    checked = embedded._checked

    def slow(*args: Any, **kwargs: Any) -> Any:
        found = checked(*args, **kwargs)
        monkeypatch.setattr(embedded, "_checked", checked)
        build_index(other, tmp_path / "i")
        return found

    monkeypatch.setattr(embedded, "_checked", slow)
    engine = EmbeddedRetriever(tmp_path / "i")
    assert engine.fingerprint == other.fingerprint()
    assert [hit.passage.text for hit in hits(engine, "oslo")] == ["lima oslo"]
    build_index(one, tmp_path / "i")
    monkeypatch.setattr(embedded, "_checked", slow)
    with pytest.raises(StaleIndexError, match="another corpus"):
        EmbeddedRetriever(tmp_path / "i", one)


def test_a_home_folder_is_one_in_urls_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_retriever("embedded:~/beatles", BEATLES).close()
    assert check_index(tmp_path / "beatles") == len(BEATLES.passages)


@pytest.mark.parametrize("texts", [(), ("the", "of and")])
def test_a_corpus_without_words_is_refused(tmp_path: Path, texts: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no passage with a word"):
        build_index(corpus(*texts), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"id": "a", "title": "", "text": "one"}\n')
    made = FileCorpus("c", file)

    def change(_: int) -> None:
        file.write_text('{"id": "a", "title": "", "text": "one and more"}\n')

    with pytest.raises(DataError, match="changed meanwhile"):
        build_index(made, tmp_path / "i", change)
    assert not (tmp_path / "i").exists()


SLOW_BUILD = """
    import sys, time
    from pathlib import Path
    from research_env.retrieval import Passage
    from research_env.retrieval.bm25.retriever import build_index

    class Slow:
        name = "slow"
        def __iter__(self):
            for i in range(2000):
                if i == 1500:
                    print("half", flush=True)
                    time.sleep(float(sys.argv[2]))
                yield Passage(str(i), "", f"passage number {i}")
        def fingerprint(self):
            return "slow"

    print(build_index(Slow(), sys.argv[1]), flush=True)
"""


def slow_build(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_BUILD), str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_leaves_no_index_and_the_next_one_works(tmp_path: Path) -> None:
    with slow_build(tmp_path / "i", 60) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "half\n"
        build.send_signal(signal.SIGKILL)
    assert not (tmp_path / "i").exists()
    assert list(tmp_path.glob(".i.*.building"))
    with slow_build(tmp_path / "i", 0) as build:
        assert build.communicate()[0] == "half\n2000\n"
    assert hits(EmbeddedRetriever(tmp_path / "i"), "1999")
    assert not list(tmp_path.glob(".i.*.building"))


def test_a_build_leaves_those_of_other_indexes_alone(tmp_path: Path) -> None:
    (tmp_path / ".i.x.0a1b2c3d.building").mkdir()  # an index "i.x" that is being made
    (tmp_path / ".i.0a1b2c3d.building").mkdir()
    build_index(BEATLES, tmp_path / "i")
    assert [path.name for path in tmp_path.glob(".i.*building")] == [".i.x.0a1b2c3d.building"]


def test_of_builds_at_the_same_time_one_works_and_all_succeed(tmp_path: Path) -> None:
    builds = [slow_build(tmp_path / "i", 0.3) for _ in range(3)]
    told = sorted(build.communicate()[0] for build in builds)
    assert told == ["2000\n", "2000\n", "half\n2000\n"]
    assert hits(EmbeddedRetriever(tmp_path / "i"), "1999")


# --- by name --------------------------------------------------------------------------------------


def test_the_default_index_is_made_in_the_cache_and_found_again(cache: Path) -> None:
    open_retriever(None, BEATLES).close()
    [folder] = (path for path in (cache / "indexes").iterdir() if path.is_dir())
    made = (folder / "meta.json").stat().st_mtime_ns
    engine = open_retriever(None, BEATLES)
    assert engine.search(["rock"], 1)[0]
    assert (folder / "meta.json").stat().st_mtime_ns == made


def test_a_damaged_index_in_the_cache_is_made_again(cache: Path) -> None:
    open_retriever(None, BEATLES).close()
    [file] = cache.glob("indexes/*/passages.bin")
    file.write_bytes(b"")
    assert open_retriever(None, BEATLES).search(["rock"], 1)[0]


def test_a_changed_corpus_gets_another_index(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"id": "a", "title": "", "text": "one"}\n')
    open_retriever(None, FileCorpus("c", file)).close()
    file.write_text('{"id": "a", "title": "", "text": "two"}\n')
    [found] = open_retriever(None, FileCorpus("c", file)).search(["two"], 1)
    assert isinstance(found, list)
    assert found[0].passage.text == "two"


def test_an_index_of_ones_own(tmp_path: Path) -> None:
    other = corpus("Citibank was founded in 1812", name="wiki")
    url = f"embedded:{tmp_path / 'mine'}"
    assert open_retriever(url, other).search(["Citibank"], 1)[0]  # made where there is none
    assert open_retriever(url, None).search(["Citibank"], 1)[0]
    with pytest.raises(StaleIndexError, match="another corpus"):
        open_retriever(url, BEATLES)
    assert open_retriever(f"{url}?corpus=any", BEATLES).search(["Citibank"], 1)[0]
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(StaleIndexError, match="research-env index"):
        open_retriever(url, None)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UnknownNameError, match=r"retriever 'elastic:x'.*embedded:"):
        open_retriever("elastic:x", BEATLES)
    with pytest.raises(UnknownNameError, match="corpus=any"):
        open_retriever("embedded:x?corpus=none", BEATLES)
    with pytest.raises(ConfigurationError, match="needs a folder"):
        open_retriever("embedded:", BEATLES)
    with pytest.raises(ConfigurationError, match="no corpus of its own"):
        open_retriever(None, None)
