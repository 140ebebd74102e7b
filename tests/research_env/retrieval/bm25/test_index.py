"""The index of impacts: its numbers, its files, and its two ways to search."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.retrieval.bm25 import index as index_module
from research_env.retrieval.bm25 import maxscore
from research_env.retrieval.bm25.index import IndexReader, IndexWriter, hash_text, rounded_lengths

Found = list[list[tuple[int, float]]]


def write(folder: Path, passages: Sequence[Sequence[str]]) -> IndexReader:
    folder.mkdir(parents=True)
    writer = IndexWriter(folder)
    for terms in passages:
        writer.add(terms)
    writer.finish()
    return IndexReader(folder, len(passages))


def by_scoring_all(index: IndexReader, queries: Sequence[Sequence[str]], top_k: int) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_SMALL", 10**9)
        return index.best(queries, top_k)


def by_maxscore(
    index: IndexReader, queries: Sequence[Sequence[str]], top_k: int, threads: int = 1
) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_SMALL", 0)
        return index.best(queries, top_k, threads)


WAYS = pytest.mark.parametrize("best", [by_scoring_all, by_maxscore])


def zipf(rng: np.random.Generator, count: int, vocabulary: int) -> list[str]:
    return [f"w{rank}" for rank in np.minimum(rng.zipf(1.2, count), vocabulary).tolist()]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> IndexReader:
    """Four windows of MaxScore and some more, in which common words are in most passages."""
    rng = np.random.default_rng(0)
    passages = [zipf(rng, int(rng.integers(1, 60)), 4_000) for _ in range(17_000)]
    return write(tmp_path_factory.mktemp("large") / "i", passages)


# --- numbers --------------------------------------------------------------------------------------


def test_rounded_lengths_are_lucenes() -> None:
    # SmallFloat.byte4ToInt of all bytes: exact to 40, and the greatest as Lucene has it
    lengths = rounded_lengths()
    assert len(lengths) == 256
    assert lengths[:41].tolist() == list(range(41))
    assert lengths[41:46].tolist() == [42, 44, 46, 48, 50]
    assert lengths[255] == 2_013_265_944


def test_an_impact_is_lucenes_to_the_last_bit(tmp_path: Path) -> None:
    passages = [["red", "red", "apple"], ["green", "apple"], ["pear"], ["apple"] * 57]
    index = write(tmp_path / "i", passages)
    f = np.float32
    k1, b, mean = f(1.2), f(0.75), f(63 / 4)
    expected = {}
    for row, (times, length) in {0: (1, 3), 1: (1, 2), 3: (57, 56)}.items():  # 57 is told as 56
        weight = f(2.2) * f(math.log(1 + (4 - 3 + 0.5) / (3 + 0.5)))
        inverse = f(1) / (k1 * ((f(1) - b) + b * f(length) / mean))
        expected[row] = float(weight - weight / (f(1) + f(times) * inverse))
    assert dict(index.best([["apple"]], 5)[0]) == expected


def test_a_hash_does_not_depend_on_the_process() -> None:
    assert hash_text("apple") == 0x960E_B5A0_47F5_AEDF  # BLAKE2b, as b2sum -l 64 prints it


# --- files ----------------------------------------------------------------------------------------

WORDS = st.sampled_from([f"t{i}" for i in range(12)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=9), min_size=1, max_size=30))
def test_an_index_of_many_runs_is_that_of_one(
    tmp_path_factory: pytest.TempPathFactory, passages: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "one", passages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_RUN", 7)
        write(folder / "many", passages)
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert names == ["impacts.bin", "maxima.bin", "rows.bin", "starts.bin", "terms.bin"]
    assert names == sorted(path.name for path in (folder / "many").iterdir())
    for name in names:
        assert (folder / "one" / name).read_bytes() == (folder / "many" / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux lists open files there")
def test_an_index_of_many_runs_opens_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole Wikipedia has some 700 runs, and a process may open 1,024 files by default."""
    opened = []
    merge = index_module._merge

    def count_first(*args: Any) -> Any:
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
        return merge(*args)

    monkeypatch.setattr(index_module, "_merge", count_first)
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(index_module, "_RUN", 7)
    write(tmp_path / "many", [[f"t{i % 12}"] * 7 for i in range(100)])
    assert max(opened) < before + 10


# --- search ---------------------------------------------------------------------------------------


@WAYS
def test_equal_scores_come_in_the_order_of_rows(best: Callable[..., Found], tmp_path: Path) -> None:
    index = write(tmp_path / "i", [["same", "words"], ["other"]] * 6_000)
    for top_k in (1, 7, 100):
        [found] = best(index, [["words", "same"]], top_k)
        assert [row for row, _ in found] == list(range(0, 2 * top_k, 2))
        assert len({score for _, score in found}) == 1


@WAYS
def test_what_is_not_there_has_no_hits(best: Callable[..., Found], tmp_path: Path) -> None:
    index = write(tmp_path / "i", [["a"], ["b", "b"], ["a", "c"]])
    assert best(index, [["x"], [], ["x", "y", "x"]], 3) == [[], [], []]
    assert best(index, [], 3) == []
    [none, some] = best(index, [["x"], ["x", "a"]], 10**6)
    assert none == []
    assert [row for row, _ in some] == [0, 2]


@WAYS
def test_a_repeated_term_counts_as_often(best: Callable[..., Found], tmp_path: Path) -> None:
    index = write(tmp_path / "i", [["a", "b"], ["b", "c"], ["c"]])
    [once], [thrice] = best(index, [["a"]], 1), best(index, [["a", "a", "a"]], 1)
    assert thrice[0][1] == pytest.approx(3 * once[0][1], rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 5, 10, 200, 20_000])
def test_maxscore_finds_what_scoring_all_finds_bit_for_bit(large: IndexReader, top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    queries = [zipf(rng, int(rng.integers(1, 12)), 5_000) for _ in range(60)]
    queries += [[f"w{rank}" for rank in rng.integers(1, 4_000, 6).tolist()] for _ in range(60)]
    assert by_maxscore(large, queries, top_k) == by_scoring_all(large, queries, top_k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4_100), min_size=1, max_size=30), st.integers(1, 12))
def test_maxscore_is_exact_for_any_query(large: IndexReader, ranks: list[int], top_k: int) -> None:
    queries = [[f"w{rank}" for rank in ranks]]
    assert by_maxscore(large, queries, top_k) == by_scoring_all(large, queries, top_k)


def test_maxscore_is_exact_where_a_term_stands_in_clusters(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    passages = [
        ["all", *["near"] * (row % 4096 > 4000), *["last"] * (row % 997 == 996), f"w{row % 3}"]
        for row in range(12_500)
    ]
    index = write(tmp_path / "i", passages)
    words = ["all", "near", "last", "w0", "w1", "w2"]
    queries = [list(rng.permutation(words)[: rng.integers(1, 7)]) for _ in range(40)]
    assert by_maxscore(index, queries, 5) == by_scoring_all(index, queries, 5)


def test_threads_share_the_queries(large: IndexReader) -> None:
    rng = np.random.default_rng(7)
    queries = [zipf(rng, 6, 4_000) for _ in range(25)]
    alone = by_maxscore(large, queries, 5)
    assert by_maxscore(large, queries, 5, threads=3) == alone
    assert by_maxscore(large, queries[:2], 5, threads=4) == alone[:2]


def test_maxscore_works_where_its_code_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import njit

    def no_place(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(maxscore, "njit", no_place)

    def twice(number: int) -> int:
        return 2 * number

    assert maxscore._compiled(twice)(4) == 8


GARBAGE = """
    import numpy as np
    from research_env.retrieval.bm25.maxscore import search

    rng = np.random.default_rng(0)
    num_rows, lengths = 30_000, np.array([7, 900, 40, 5_000, 20_000, 3, 9_000])
    ends = lengths.cumsum()
    starts, size = ends - lengths, int(ends[-1])
    whole = np.concatenate([np.sort(rng.choice(num_rows, n, False)) for n in lengths])
    rows = {
        "shuffled": rng.permutation(whole),
        "far": np.full(size, 2**31 - 1),
        "negative": np.full(size, -(2**31)),
        "any": rng.integers(-(2**31), 2**31, size),
        "all the same": np.full(size, 4095),
        "beyond": whole + num_rows - 5,
        "whole": whole,
    }
    impacts = {
        "zero": np.zeros(size), "NaN": np.full(size, np.nan), "inf": np.full(size, -np.inf),
        "negative": -rng.random(size), "whole": rng.random(size),
    }
    times, offsets = np.ones(7), np.array([0, 3, 7])
    for some_rows in rows.values():
        for some_impacts in impacts.values():
            for bounds in (np.full(7, np.inf), np.full(7, np.nan), np.zeros(7), np.arange(7.0)):
                for top_k in (1, 9, 5_000):
                    search(
                        some_rows.astype(np.int32), some_impacts.astype(np.float32),
                        starts, ends, times, bounds, offsets, num_rows,
                        np.empty((2, top_k), np.int32), np.empty((2, top_k), np.float32),
                    )
    print("ended")
"""


@pytest.mark.slow
def test_no_rows_or_impacts_lead_outside_of_an_array(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GARBAGE)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert (done.stdout, done.returncode) == ("ended\n", 0), done.stderr


def test_a_small_index_needs_no_compiler(tmp_path: Path) -> None:
    write(tmp_path / "i", [["a"], ["a", "b"]])
    code = f"""
        import sys
        from pathlib import Path
        from research_env.retrieval.bm25.index import IndexReader
        assert IndexReader(Path({str(tmp_path / "i")!r}), 2).best([["b"]], 1)[0][0][0] == 1
        print("numba" in sys.modules)
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
