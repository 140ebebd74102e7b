"""How fast, how large and how good the search engines are, each figure beside a peer's.

``python -m benchmarks.retrieval [--passages 100000] [--build 1000000] [--elasticsearch URL]``

- The embedded engine against bm25s with its numba backend (``pip install .[benchmarks]``), over a
  generated corpus and over the passages of MuSiQue, HotpotQA and 2WikiMultiHopQA with the queries
  that R1-Searcher wrote. All start at the text of the queries. Ours ends at passages with their
  texts, read from disk; bm25s at passages held in memory, or at their numbers only, which is less.
- ``--build``: time and greatest memory of indexing so many generated passages, each engine in a
  process of its own.
- Recall on the dev questions that have gold passages.
- ``--elasticsearch http://HOST:PORT``: our Elasticsearch retriever against the raw time of the same
  ``_msearch`` bodies, and one ``_msearch`` per step against one request per search; with
  ``--embed`` recall of dense and hybrid search, too. What indexing into it takes is measured by
  :mod:`benchmarks.elasticsearch_index`.

The competitors take turns, and the medians of the rounds are shown: read the ratios.
"""

from __future__ import annotations

import json as json_format
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

import tyro

from benchmarks.corpora import GeneratedCorpus, model_queries, real_corpus
from benchmarks.tables import print_table
from research_env.datasets import load_dataset
from research_env.datasets.base import Corpus, Question
from research_env.errors import DataNotFoundError, RetrievalError
from research_env.retrieval import Retriever, index_corpus, open_retriever
from research_env.retrieval.bm25.retriever import EmbeddedRetriever
from research_env.retrieval.elasticsearch.indexing import Layout, index_elasticsearch
from research_env.retrieval.elasticsearch.retriever import ElasticsearchRetriever
from research_env.retrieval.embedding import BUNDLED

TOP_K = 5
THREADS = (1, 2)
BATCHES = (1, 16, 256)
RAW_BATCHES = (16, 64, 256)
ENVIRONMENTS = 64
RECALL_AT = (2, 5, 10)
SETS = ("musique", "hotpotqa", "2wiki")

Row = dict[str, Any]
Item = TypeVar("Item")


def medians(systems: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each of some calls that take turns; the first turn does not count."""
    spent: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, call in systems.items():
            began = time.perf_counter()
            call()
            if turn:
                spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def calls(call: Callable[[Item], object], items: Sequence[Item]) -> Callable[[], object]:
    """A call for each item, one after the other."""
    return lambda: [call(item) for item in items]


# --- the embedded engine against bm25s ------------------------------------------------------------


class Bm25s:
    """bm25s with numba, as its documentation uses it."""

    def __init__(self, corpus: Corpus, keep_passages: bool = True) -> None:
        """Index a corpus in memory, with or without its passages."""
        import bm25s  # noqa: PLC0415  (of the extra "benchmarks")
        import Stemmer  # noqa: PLC0415

        self._tokenize, self._stemmer = bm25s.tokenize, Stemmer.Stemmer("porter")
        self._engine = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numba")
        texts = [f"{each.title}\n{each.text}" for each in corpus]
        self._passages = [{"contents": text} for text in texts] if keep_passages else None
        self._engine.index(self._tokens(texts), show_progress=False)

    def search(self, queries: Sequence[str], top_k: int, threads: int, texts: bool) -> Any:
        """Scores of the best passages, and their numbers or the passages themselves."""
        corpus = self._passages if texts else None
        return self._engine.retrieve(
            self._tokens(list(queries)),
            corpus=corpus,
            k=top_k,
            n_threads=threads,
            show_progress=False,
        )

    def save(self, folder: str) -> None:
        """Write the index."""
        self._engine.save(folder)

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)


def race(corpus: Corpus, queries: Sequence[str], folder: Path, rounds: int) -> list[Row]:
    """Queries a second of the embedded engine and of bm25s, by threads and size of a batch."""
    index_corpus(corpus, folder)
    ours, peer = EmbeddedRetriever(folder, corpus), Bm25s(corpus)
    rows = []
    for threads in THREADS:
        for batch in BATCHES:
            some = queries if batch > 1 else queries[:200]
            parts = [some[at : at + batch] for at in range(0, len(some), batch)]
            search = partial(peer.search, top_k=TOP_K, threads=threads)
            systems = {
                "ours": calls(partial(ours.search, top_k=TOP_K), parts),
                "bm25s": calls(partial(search, texts=True), parts),
                "bm25s, numbers only": calls(partial(search, texts=False), parts),
            }
            peers = list(systems)[1:]
            with mock.patch("os.cpu_count", return_value=threads):
                seconds = medians(systems, rounds)
            rows.append(
                {
                    "corpus": corpus.name,
                    "threads": threads,
                    "batch": batch,
                }
                | {name: len(some) / seconds[name] for name in systems}
                | {f"ours / {name}": seconds[name] / seconds["ours"] for name in peers}
            )
    ours.close()
    return rows


# --- building -------------------------------------------------------------------------------------


def _build_embedded(corpus: Corpus, folder: str) -> None:
    index_corpus(corpus, folder)


def _build_bm25s(corpus: Corpus, folder: str) -> None:
    Bm25s(corpus, keep_passages=False).save(folder)


def _in_child(build: Callable[[Corpus, str], None], corpus: Corpus, where: str, to: Any) -> None:
    began = time.perf_counter()
    build(corpus, where)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [peak] = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    to.put((time.perf_counter() - began, time.process_time(), int(peak) / 1024))


def builds(count: int, folder: Path) -> list[Row]:
    """Seconds, processor seconds, peak resident memory and disk (MB) of indexing.

    Each engine has a process of its own. Drawing the passages is part of the times.
    """
    rows = []
    context = get_context("spawn")
    for name, build in {"embedded": _build_embedded, "bm25s": _build_bm25s}.items():
        where = str(folder / name)
        told = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(build, GeneratedCorpus(count), where, told))
        child.start()
        child.join()
        if child.exitcode:
            rows.append({"system": name, "passages": count, "failed": child.exitcode})
            continue
        seconds, processor, peak = told.get()
        row = {"system": name, "passages": count, "seconds": seconds, "processor": processor}
        files = [path for path in Path(where).rglob("*") if path.is_file()]
        disk = sum(path.stat().st_size for path in files) / 1e6
        rows.append(row | {"peak_mb": peak, "disk_mb": disk})
    return rows


# --- recall ---------------------------------------------------------------------------------------


def recall(retriever: Retriever, questions: Sequence[Question]) -> Row:
    """Mean share of gold passages in the first k, and share of questions with all their gold.

    Raises:
        RetrievalError: a query was not answered.
    """
    top_k = max(RECALL_AT)
    found = retriever.search([question.question for question in questions], top_k)
    row: Row = {"questions": len(questions)}
    ranked = []
    for hits in found:
        if isinstance(hits, RetrievalError):
            raise hits
        ranked.append([hit.passage.id for hit in hits])
    for k in RECALL_AT:
        shares = [
            len(set(question.supporting) & set(ids[:k])) / len(question.supporting)
            for question, ids in zip(questions, ranked, strict=True)
        ]
        row[f"recall@{k}"] = statistics.fmean(shares)
        row[f"all@{k}"] = statistics.fmean(share == 1 for share in shares)
    return row


def recalls(server: str | None, embed: bool) -> list[Row]:
    """Recall of each set by the embedded engine and by the modes of Elasticsearch."""
    rows = []
    for name in SETS:
        data = load_dataset(name, split="dev")
        assert data.corpus is not None
        urls: dict[str, str | None] = {"embedded BM25": None}
        if server:
            url = _index_url(server, f"recall-{name}")
            index_elasticsearch(data.corpus, url, Layout(embed=BUNDLED if embed else None))
            modes = ("bm25", "title", *(("dense", "hybrid") if embed else ()))
            urls |= {f"Elasticsearch {mode}": f"{url}?mode={mode}" for mode in modes}
        for engine, place in urls.items():
            with _opened(place, data.corpus) as retriever:
                rows.append({"set": name, "engine": engine} | recall(retriever, data.questions))
    return rows


@contextmanager
def _opened(url: str | None, corpus: Corpus) -> Iterator[Retriever]:
    retriever = open_retriever(url, corpus)
    try:
        yield retriever
    finally:
        retriever.close()


# --- Elasticsearch --------------------------------------------------------------------------------


def _index_url(server: str, name: str) -> str:
    scheme, _, host = server.rstrip("/").partition("://")
    kind = "elasticsearch+https" if scheme == "https" else "elasticsearch"
    return f"{kind}://{host}/benchmark-{name}"


class Raw:
    """The server, asked with bodies made beforehand; what it answers is read and left alone."""

    def __init__(self, server: str, index: str) -> None:
        """Keep one connection to a server."""
        import urllib3  # noqa: PLC0415  (comes with the extra "elasticsearch")

        self._http, self._index = urllib3.PoolManager(maxsize=1), f"{server.rstrip('/')}/{index}"

    def msearch(self, body: bytes) -> bytes:
        """One request of several searches."""
        return self._post("_msearch", body, "application/x-ndjson")

    def search(self, body: bytes) -> bytes:
        """One request of one search."""
        return self._post("_search", body, "application/json")

    def _post(self, what: str, body: bytes, kind: str) -> bytes:
        answer = self._http.request(
            "POST", f"{self._index}/{what}", body=body, headers={"Content-Type": kind}
        )
        if answer.status != 200:
            raise RetrievalError(f"{what}: status {answer.status}: {answer.data[:200]!r}")
        return answer.data


def against_raw(server: str, corpus: Corpus, queries: Sequence[str], rounds: int) -> list[Row]:
    """Our Elasticsearch retriever beside the raw time of the same searches, same server."""
    url = _index_url(server, f"speed-{corpus.name}")
    index_elasticsearch(corpus, url)
    ours, raw = ElasticsearchRetriever(url), Raw(server, url.rpartition("/")[2])
    bodies = [json_format.dumps(ours._lexical_body(query, TOP_K)).encode() for query in queries]
    rows = []
    for batch in RAW_BATCHES:
        starts = range(0, len(queries), batch)
        texts = [queries[at : at + batch] for at in starts]
        joined = [
            b"".join(b"{}\n" + body + b"\n" for body in bodies[at : at + batch]) for at in starts
        ]
        systems = {
            "ours": calls(partial(ours.search, top_k=TOP_K), texts),
            "raw": calls(raw.msearch, joined),
        }
        seconds = medians(systems, rounds)
        rows.append(
            {
                "corpus": corpus.name,
                "what": f"retriever / raw _msearch, batches of {batch}",
                "ours": len(queries) / seconds["ours"],
                "peer": len(queries) / seconds["raw"],
                "ratio": seconds["raw"] / seconds["ours"],
            }
        )
    step, one_by_one = queries[:ENVIRONMENTS], bodies[:ENVIRONMENTS]
    systems = {
        "ours": lambda: ours.search(step, TOP_K),
        "raw": calls(raw.search, one_by_one),
    }
    seconds = medians(systems, 3 * rounds)
    rows.append(
        {
            "corpus": corpus.name,
            "what": f"one batch / one request a search, {ENVIRONMENTS} environments",
            "ours": ENVIRONMENTS / seconds["ours"],
            "peer": ENVIRONMENTS / seconds["raw"],
            "ratio": seconds["raw"] / seconds["ours"],
        }
    )
    ours.close()
    return rows


# --- all of it ------------------------------------------------------------------------------------


def main(
    *,
    passages: int = 100_000,
    build: int = 0,
    elasticsearch: str | None = None,
    embed: bool = False,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Measure the search engines.

    Args:
        passages: passages of the generated corpus.
        build: how many generated passages to index for time and memory; 0 for none.
        elasticsearch: address of a server, http://HOST:PORT. Indexes named benchmark-... are made.
        embed: also measure dense and hybrid search there.
        rounds: whose median is taken.
        json: print JSON, not tables.
    """
    generated = GeneratedCorpus(passages)
    queries = generated.queries(1024)
    tables: dict[str, list[Row]] = {}
    with TemporaryDirectory() as folder:
        place = Path(folder)
        if passages:
            tables["queries per second"] = race(generated, queries, place / "generated", rounds)
        try:
            corpus, asked = real_corpus(), model_queries()[:1024]
            tables["queries per second, real"] = race(corpus, asked, place / "real", rounds)
            tables["recall"] = recalls(elasticsearch, embed)
            if elasticsearch:
                title = "Elasticsearch, queries per second"
                tables[title] = against_raw(elasticsearch, corpus, asked[:512], rounds)
                if passages:
                    rows = against_raw(elasticsearch, generated, queries[:512], rounds)
                    tables[title] += rows
        except DataNotFoundError as error:
            print(f"left out: {error}")
        if build:
            tables["build"] = builds(build, place)
    if json:
        print(json_format.dumps(tables, indent=1))
        return
    for title, rows in tables.items():
        show(title, rows)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    print_table(f"{title} ({os.cpu_count()} processors)", names, cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return str(value)


if __name__ == "__main__":
    tyro.cli(main)
