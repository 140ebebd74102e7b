"""The command ``research-env search``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import structs
from tyro.conf import Positional, arg

from research_env.commands.shared import first_retry_shown, named_corpus, print_table
from research_env.errors import ConfigurationError, ResearchEnvError
from research_env.system.terminal import show_json


@dataclass(frozen=True)
class Search:
    """Search as an environment does, and show the passages that a policy would get.

    A query is plain words, without operators. The corpus is indexed first if necessary.

    For example:
      research-env search "capital of the county of Van Hook Township" --dataset musique
      research-env search "Citibank founded" --corpus passages.jsonl --top-k 3
      research-env search "Citibank founded" --retriever embedded:indexes/mine --json
    """

    query: Positional[Annotated[tuple[str, ...], arg(metavar="QUERY ...")]]
    """One or more queries, each in quotes."""
    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """A data set whose passages are searched: miniworld, musique, hotpotqa, 2wiki."""
    corpus: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of passages instead."""
    retriever: Annotated[str | None, arg(metavar="URL")] = None
    """A search engine instead, for example embedded:DIR."""
    top_k: int = 5
    """The most passages for a query."""
    json: bool = False
    """Print JSON, a line for each query."""

    @first_retry_shown()
    def run(self) -> None:
        """Carry the command out."""
        from research_env.retrieval import open_retriever  # noqa: PLC0415

        if not self.query:
            raise ConfigurationError('give a query: research-env search "who founded Citibank"')
        given = self.dataset is not None or self.corpus is not None
        corpus = (
            named_corpus(self.dataset, self.corpus) if given or self.retriever is None else None
        )
        engine = open_retriever(self.retriever, corpus)
        try:
            results = engine.search(self.query, self.top_k)
        finally:
            engine.close()
        for query, hits in zip(self.query, results, strict=True):
            if isinstance(hits, ResearchEnvError):
                raise hits
            if self.json:
                found = [{"score": hit.score, **structs.asdict(hit.passage)} for hit in hits]
                show_json({"query": query, "hits": found})
            else:
                print_table(
                    f"{query}\n{len(hits)} hits" if hits else f"{query}\nno hit",
                    ("score", "id", "title", "text"),
                    [
                        (f"{hit.score:.4f}", hit.passage.id, hit.passage.title, hit.passage.text)
                        for hit in hits
                    ],
                )
