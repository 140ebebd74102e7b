"""Search engines, named by strings such as ``embedded:DIR``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from research_env.errors import (
    ConfigurationError,
    ResearchEnvError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.retrieval.base import Hit, Passage, Retriever
from research_env.system.paths import cache_folder
from research_env.system.progress import progress
from research_env.system.redaction import redact_url

if TYPE_CHECKING:
    from research_env.datasets.base import Corpus

__all__ = ["SCHEMES", "Hit", "Passage", "Retriever", "index_corpus", "open_retriever"]


def open_retriever(url: str | None, corpus: Corpus | None) -> Retriever:
    """Open the search engine that a string names.

    - None: the embedded engine over ``corpus``. Its index is in the cache folder (see
      :func:`research_env.system.paths.cache_folder`), and is made where there is no good one.
    - ``embedded:DIR``: the index in that folder, which must be made from ``corpus``; it is made if
      there is no such folder. ``embedded:DIR?corpus=any``: the index whatever its corpus, for
      example a whole Wikipedia instead of the data set's own passages.
    - ``elasticsearch://HOST:PORT/INDEX``, ``elasticsearch+https://...``: an index of Elasticsearch;
      see :mod:`research_env.retrieval.elasticsearch.retriever`.
    - ``http://HOST:PORT/retrieve``, ``https://...``: a retrieval server of Search-R1's format; see
      :mod:`research_env.retrieval.http`.
    - ``web:serper``, ``web:brave``, ``web:tavily``, ``web:searxng?url=...``: the web; see
      :mod:`research_env.retrieval.web`.
    - ``?cache=FILE`` on any of them records and replays, ``?cache=FILE&replay=only`` replays; see
      :mod:`research_env.retrieval.replay`.

    Args:
        url: names the engine, as above.
        corpus: the corpus of the data set; None if it has none.

    Raises:
        UnknownNameError: no such kind of engine; the message lists those that exist.
        ConfigurationError: there is nothing to search in.
        StaleIndexError: the index is truncated, of another version, or for another corpus.
        DataError: the corpus cannot be read.
    """
    if url is None:
        if corpus is None:
            raise ConfigurationError(
                "this data set has no corpus of its own; give corpus=PATH, or a retriever such as "
                "'embedded:DIR?corpus=any'"
            )
        return _open_cached(corpus)
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES:
        hint = f"For the index in that folder write 'embedded:{url}'" if Path(url).is_dir() else ""
        raise UnknownNameError(
            "retriever", redact_url(url), [f"{known}:..." for known in SCHEMES], hint
        )
    if "?" in url:
        from research_env.retrieval.replay import (  # noqa: PLC0415  (loads SQLite)
            RecordedRetriever,
            recording,
        )

        url, record = recording(url)
        if record is not None:
            return RecordedRetriever(record, partial(SCHEMES[scheme], url, corpus))
    return SCHEMES[scheme](url, corpus)


def default_index(corpus: Corpus) -> Path:
    """The folder in the cache for the index of a corpus."""
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in corpus.name)[:60]
    return cache_folder() / "indexes" / f"{name}-{corpus.fingerprint()[:16]}"


def index_corpus(corpus: Corpus, folder: str | Path) -> int:
    """Make sure that a folder holds the index of a corpus, with a progress bar in a terminal.

    Returns:
        The number of passages.

    Raises:
        ConfigurationError: the folder cannot be written, or holds something else than an index.
        DataError: the corpus cannot be read, holds no words, or changed meanwhile.
    """
    from research_env.retrieval.bm25.retriever import build_index  # noqa: PLC0415 (loads the engine)

    try:
        with report_progress(corpus) as report:
            return build_index(corpus, folder, report)
    except ResearchEnvError:
        raise
    except OSError as error:
        raise ConfigurationError(
            f"the index {folder} cannot be written: {error}. Make room there or name another "
            "folder; RESEARCH_CACHE names that of the indexes that no name was given for"
        ) from error


def _open_cached(corpus: Corpus) -> Retriever:
    """Open the index in the cache; make it if it is missing, damaged or of another version."""
    from research_env.retrieval.bm25.retriever import EmbeddedRetriever  # noqa: PLC0415

    folder = default_index(corpus)
    with suppress(StaleIndexError):
        return EmbeddedRetriever(folder, corpus)
    index_corpus(corpus, folder)
    return EmbeddedRetriever(folder, corpus)


def _open_embedded(url: str, corpus: Corpus | None) -> Retriever:
    from research_env.retrieval.bm25.retriever import EmbeddedRetriever  # noqa: PLC0415

    name, mark, option = url.partition(":")[2].partition("?")
    if mark and option != "corpus=any":
        raise UnknownNameError("option of embedded", option, ["corpus=any"])
    if not name:
        raise ConfigurationError("'embedded:' needs a folder, as in 'embedded:indexes/wiki18'")
    folder = Path(name).expanduser()
    if mark:
        return EmbeddedRetriever(folder)
    # A stale index that the user named is not made again unasked.
    if corpus is not None and not folder.exists():
        index_corpus(corpus, folder)
    return EmbeddedRetriever(folder, corpus)


def _open_http(url: str, corpus: Corpus | None) -> Retriever:
    from research_env.retrieval.http import open_http  # noqa: PLC0415  (loads the client)

    return open_http(url)


def _open_web(url: str, corpus: Corpus | None) -> Retriever:
    from research_env.retrieval.web import open_web  # noqa: PLC0415

    return open_web(url)


def _open_elasticsearch(url: str, corpus: Corpus | None) -> Retriever:
    from research_env.retrieval.elasticsearch.retriever import ElasticsearchRetriever  # noqa: PLC0415

    return ElasticsearchRetriever(url)


SCHEMES: dict[str, Callable[[str, Corpus | None], Retriever]] = {
    "embedded": _open_embedded,
    "elasticsearch": _open_elasticsearch,
    "elasticsearch+https": _open_elasticsearch,
    "http": _open_http,
    "https": _open_http,
    "web": _open_web,
}
"""Each scheme of a retriever's URL, and what opens it from the URL and the data set's corpus."""


@contextmanager
def report_progress(corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """Show how many passages are indexed, at what rate and until when, in a terminal."""
    start = time.perf_counter()
    total = len(corpus) if isinstance(corpus, Sized) else None
    with progress(f"indexing {corpus.name}", total) as show:

        def report(count: int) -> None:
            rate = count / (time.perf_counter() - start)
            show(count, f"{rate:,.0f} passages/s")

        yield report
