"""Search in Elasticsearch: ``elasticsearch://HOST:PORT/INDEX?mode=bm25&deadline=60``.

The index is one that ``research-env index --to elasticsearch://...`` made, or your own. Options:

- ``mode``: ``bm25`` (default: title and text as one field, with the scores of the embedded engine),
  ``title`` (BM25F over title and text, Elasticsearch's ``combined_fields``), ``dense`` (nearest
  neighbors of an embedding), ``hybrid`` (``bm25`` and ``dense``, fused by reciprocal rank).
- ``deadline``: seconds within which a batch is answered, attempts and pauses included (default 60).
- ``embed``: the model whose vectors ``dense`` and ``hybrid`` search, if it is not the bundled one.
  It must be the one with which the index was made; what an index says is not enough to run a model.
- ``text``, and optionally ``title``: names of fields of your own index. The text field must be
  analyzed text; a title that is not (a ``keyword``, say) is shown and not searched. Titles and
  texts that Elasticsearch cannot search as one field are searched by ``multi_match``. INDEX may
  then be an alias over several indices that have these fields in the same places.

``elasticsearch+https://`` is the same over TLS, and ``HOST:PORT/PREFIX/INDEX`` goes through a
reverse proxy with a path prefix. For credentials see
:mod:`research_env.retrieval.elasticsearch.client`.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from research_env.errors import (
    ConfigurationError,
    ResearchEnvError,
    RetrievalError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.retrieval.base import Hit, Passage, SearchResult
from research_env.retrieval.bm25.analyzer import first_words
from research_env.retrieval.elasticsearch.client import (
    MAPPING_VERSION,
    META_KEY,
    Body,
    RetryableError,
    SyncClient,
    parse_address,
)
from research_env.retrieval.elasticsearch.documents import (
    ReadPlan,
    plan_reading,
    read_documents,
)
from research_env.retrieval.elasticsearch.fields import SearchPlan, plan_search
from research_env.retrieval.elasticsearch.responses import parse_answers
from research_env.retrieval.json_text import read_json, replace_surrogates
from research_env.retrieval.retry import Deadline, Retry, log_retry
from research_env.retrieval.url import number

if TYPE_CHECKING:
    from research_env.retrieval.documents import Document
    from research_env.retrieval.embedding import Embedding

MODES = ("bm25", "title", "dense", "hybrid")
SEARCHES_PER_REQUEST = 256
"""Most searches in one ``_msearch``."""
RRF_K = 60
"""The constant of reciprocal rank fusion."""
RRF_WINDOW = 50
"""How many hits of either list reciprocal rank fusion looks at."""
MAX_HITS = 10_000
"""Most hits that a server returns, and most it takes as ``num_candidates``."""

_PLACEHOLDER = "\0"  # stands for the text of a query in a template of its body
_CLOSED = "the Elasticsearch retriever has been closed; open it again"


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What opening found out about an index.

    Attributes:
        many_shards: Whether it has more than one shard.
        embedding: Model of its vectors; None if it has none.
        plan: How its fields are searched, with ``?text=FIELD``.
        fingerprint: Fingerprint of the corpus, if research-env made the index.
        mappings: Mapping of each index behind the name.
    """

    many_shards: bool
    embedding: str | None = None
    plan: SearchPlan | None = None
    fingerprint: str | None = None
    mappings: tuple[Body, ...] = field(default=(), repr=False)


class ElasticsearchRetriever:
    """Search the passages of an Elasticsearch index.

    The searches of a batch go out in few ``_msearch`` requests. Each response is judged on its own,
    and only failed searches are repeated, with growing random pauses, until the batch's deadline. A
    query without an answer by then gets a :class:`RetrievalError` in its place.

    A retriever can be pickled and can cross a fork: each process makes its own connections at its
    first search. Several threads may search at the same time.
    """

    in_flight = 4

    def __init__(self, url: str, info: IndexInfo | None = None) -> None:
        """Open an index, and check that it can be searched as the URL says.

        Args:
            url: ``elasticsearch://HOST:PORT/INDEX?KEY=VALUE``; see the module's description.
            info: What another process found out about the index; None: ask the server now.

        Raises:
            ConfigurationError: The URL cannot be parsed, the mode needs an embedding that the index
                does not have or that the URL does not name, or a field that the URL names does not
                exist or cannot be searched.
            RetrievalError: The server does not answer, is not Elasticsearch, or has no such index.
            StaleIndexError: The index was made by another version, or not by research-env.
        """
        self._url = url
        self._read_options()
        self._embedding: Embedding | None = None  # loaded when it is needed
        self._read_plan: ReadPlan | None = None  # made when it is needed
        self._closed = False
        self._clients: dict[int, SyncClient] = {}  # by process id
        try:
            self._info = info or self._inspect()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"ElasticsearchRetriever({self._url!r})"

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the indexed corpus; None for an index that research-env did not make."""
        return self._info.fingerprint

    def __reduce__(self) -> tuple[type[ElasticsearchRetriever], tuple[str, IndexInfo]]:
        return ElasticsearchRetriever, (self._url, self._info)

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Args:
            queries: Searched as words, of which the first ``MAX_QUERY_WORDS`` count (see
                :mod:`research_env.retrieval.bm25.analyzer`). A blank query finds nothing, in every
                mode.
            top_k: Most hits per query, 1 to 10,000. Hits with equal scores come in the order of the
                corpus; with ``?text=FIELD`` their order is the server's.

        Returns:
            Per query its hits, or the error that befell it alone.

        Raises:
            ConfigurationError: ``top_k`` is below 1 or above 10,000.
            RetrievalError: The retriever has been closed.
        """
        if not 1 <= top_k <= MAX_HITS:
            raise ConfigurationError(f"top_k={top_k!r} must be from 1 to 10,000")
        if self._closed:
            raise RetrievalError(_CLOSED)
        texts = [replace_surrogates(first_words(query)) for query in queries]
        asked = [text for text in texts if text.strip()]  # a blank vector would find anything
        found = iter(self._search_texts(asked, top_k) if asked else ())
        return [next(found) if text.strip() else [] for text in texts]

    def _search_texts(self, texts: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer queries that are not blank."""
        size = max(top_k, RRF_WINDOW) if self._mode == "hybrid" else top_k
        bodies: list[str] = []  # JSON made here: the client would take five times as long
        if self._mode in ("bm25", "title", "hybrid"):
            # The bodies differ only in the text, so the rest is encoded once.
            template = json.dumps(self._lexical_body(_PLACEHOLDER, size))
            before, after = template.split(json.dumps(_PLACEHOLDER))
            bodies += [before + json.dumps(text) + after for text in texts]
        if self._mode in ("dense", "hybrid"):
            vectors = self._embed().queries(texts)
            bodies += [json.dumps(self._dense_body(vector.tolist(), size)) for vector in vectors]
        answers = self._answer(bodies)
        if self._mode == "hybrid":
            half = len(texts)
            pairs = zip(answers[:half], answers[half:], strict=True)
            return [_fuse(lexical, dense, top_k) for lexical, dense in pairs]
        return answers

    def close(self) -> None:
        """Close the connections; running searches end. Closing twice is harmless."""
        self._closed = True
        client = self._clients.pop(os.getpid(), None)
        if client is not None:
            client.close()

    def _read_options(self) -> None:
        """Parse the URL; no connection is made."""
        self._address = parse_address(self._url, ("mode", "deadline", "embed", "text", "title"))
        options = self._address.options
        self._text, self._title = options.get("text"), options.get("title")
        if self._title and not self._text:
            raise ConfigurationError("title=FIELD names a field beside text=FIELD; give both")
        self._mode = options.get("mode", "title" if self._title else "bm25")
        if self._mode not in MODES:
            raise UnknownNameError("mode of elasticsearch", self._mode, MODES)
        if self._text and self._mode != ("title" if self._title else "bm25"):
            raise ConfigurationError(
                f"mode={self._mode} does not go with text=FIELD, which searches that field, nor "
                "with title=FIELD, which searches both; leave mode out"
            )
        self._embed_option = options.get("embed")
        if self._embed_option and self._mode not in ("dense", "hybrid"):
            raise ConfigurationError(
                f"embed=MODEL is for mode=dense and mode=hybrid, not for mode={self._mode}"
            )
        self._retry = Retry(deadline=number(options, "deadline", 60.0, 0.001))

    def prepare_reading(self) -> None:
        """Decide how documents are found; see ``research_env.retrieval.documents.DocumentReader``.

        With ``?text=FIELD`` a document is found by its ``_id``, and by its title if that field, or
        its part ``keyword``, is a ``keyword``.

        Raises:
            ConfigurationError: An older version of research-env made the index.
        """
        self._read_plan = plan_reading(
            self._info.mappings, self._title, self._address, own=self._info.plan is None
        )

    def read(self, names: Sequence[str]) -> list[Document | RetrievalError | None]:
        """Read whole documents by id or title, in two requests for all of them.

        Raises:
            ConfigurationError: As in ``prepare_reading``.
            RetrievalError: The retriever has been closed.
        """
        if self._closed:
            raise RetrievalError(_CLOSED)
        if self._read_plan is None:
            self.prepare_reading()
        assert self._read_plan is not None
        wanted = [replace_surrogates(name) for name in names]
        return read_documents(wanted, self._read_plan, self._find_all)

    def _find_all(self, searches: Sequence[Body]) -> list[SearchResult]:
        """What searches find, in the order of the corpus; there the score of a hit is its row."""
        order = {} if self._info.plan else {"sort": ["row"]}
        bodies = [self._common_body(0) | order | search for search in searches]
        return self._answer([json.dumps(body) for body in bodies])

    def _own_client(self) -> SyncClient:
        """Return the client of this process, and leave one alone that came through a fork.

        Raises:
            RetrievalError: The retriever has been closed.
        """
        client = self._clients.get(os.getpid())
        if client is None:
            made = SyncClient(self._address)
            weakref.finalize(self, made.close)  # if nobody closes the retriever
            client = self._clients.setdefault(os.getpid(), made)
            if client is not made:  # another thread was faster
                made.close()
        if self._closed:  # perhaps while the client was made, in which case nobody else closes it
            self.close()
            raise RetrievalError(_CLOSED)
        return client

    def _inspect(self) -> IndexInfo:
        """Ask the server about the index, and check that it can be searched."""
        indices = self._describe()
        try:
            mappings = tuple(each["mappings"] for each in indices.values())
            return replace(self._check(indices), mappings=mappings)
        except ResearchEnvError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RetrievalError(
                f"the answer about {self._address} does not describe an index"
            ) from error

    def _describe(self) -> Body:
        """Mappings and settings of the indices behind the name, by index."""
        client = self._own_client()
        deadline = Deadline.after(self._retry.deadline)
        for attempt in itertools.count():
            try:
                found: Body = client.ask(
                    lambda client: client.indices.get(
                        index=self._address.index, flat_settings=True
                    ),
                    min(deadline.left(), self._attempt_limit),
                    read_json,
                )
                return found
            except RetryableError as error:
                pause = self._retry.pause(attempt, deadline.left(), error.wait)
                if pause is None:
                    raise RetrievalError(self._no_answer(str(error))) from error
                log_retry(self._address, error, deadline.left())
            client.closing.wait(pause)
        raise AssertionError("unreachable")

    def _check(self, indices: Body) -> IndexInfo:
        """Check that what is behind the name can be searched.

        Args:
            indices: Mappings and settings by index; several if the name is an alias over them.

        Raises:
            ConfigurationError: The fields or the mode of the URL do not fit the index.
            StaleIndexError: Another version made the index, or not research-env.
        """
        shards = [int(each["settings"]["index.number_of_shards"]) for each in indices.values()]
        many_shards = sum(shards) > 1
        if self._text:
            plans = {
                name: plan_search(self._address, each["mappings"], self._text, self._title)
                for name, each in indices.items()
            }
            first, *others = plans.values()
            if any(plan.fields != first.fields for plan in others):
                raise ConfigurationError(
                    f"the indices behind {self._address} ({_some_names(plans)}) keep the fields in "
                    "different places; name one of them"
                )
            queries = {plan.query for plan in plans.values()}
            if len(queries) > 1:  # a title that one index cannot search is searched in none
                first = replace(first, query="match" if "match" in queries else "multi_match")
            return IndexInfo(many_shards, plan=first)
        if len(indices) > 1:
            raise ConfigurationError(
                f"{self._address} is an alias over {len(indices)} indices "
                f"({_some_names(indices)}); name one of them, or name fields that all of them "
                "have: ?text=FIELD&title=FIELD"
            )
        [index] = indices.values()
        mapping = index["mappings"]
        meta = mapping.get("_meta", {}).get(META_KEY)
        advice = "make it again: research-env index --corpus FILE --to elasticsearch://..."
        if not isinstance(meta, dict):
            raise StaleIndexError(
                f"the index {self._address} was not made by research-env; {advice}, or name its "
                "fields: ?text=FIELD&title=FIELD"
            )
        if meta.get("mapping") != MAPPING_VERSION:
            raise StaleIndexError(
                f"the index {self._address} has mapping version {meta.get('mapping')}, this "
                f"version reads {MAPPING_VERSION}; {advice}"
            )
        embedding = meta.get("embedding")
        if self._mode in ("dense", "hybrid"):
            self._check_embedding(embedding)
        return IndexInfo(many_shards, embedding, fingerprint=meta.get("fingerprint"))

    def _check_embedding(self, embedding: Any) -> None:
        """Check the embedding: a model may be code, so the index alone must not choose it."""
        from research_env.retrieval.embedding import BUNDLED  # noqa: PLC0415  (heavy)

        if not embedding:
            raise ConfigurationError(
                f"mode={self._mode} needs an embedding, and the index {self._address} has none; "
                "make it with --embed MODEL"
            )
        if self._embed_option and self._embed_option != embedding:
            raise ConfigurationError(
                f"the vectors of the index {self._address} are those of {embedding!r:.100}, not of "
                f"embed={self._embed_option}"
            )
        if not self._embed_option and embedding != BUNDLED:
            raise ConfigurationError(
                f"the vectors of the index {self._address} are those of {embedding!r:.100}, which "
                f"is loaded only where the URL names it, too: ?mode={self._mode}&embed=MODEL"
            )

    def _embed(self) -> Embedding:
        from research_env.retrieval.embedding import load_embedding  # noqa: PLC0415  (heavy)

        if self._embedding is None:
            self._embedding = load_embedding(self._info.embedding or "")
        return self._embedding

    def _lexical_body(self, text: str, size: int) -> Body:
        """A search of words."""
        fields = [self._title or "title", self._text or "text"]
        plan = self._info.plan
        kind = plan.query if plan else "combined_fields" if self._mode == "title" else "match"
        if kind == "match":
            query: Body = {"match": {self._text or "contents": {"query": text}}}
        elif kind == "combined_fields":
            query = {"combined_fields": {"query": text, "fields": fields}}
        else:  # the sum of the fields' scores, as near to combined_fields as it gets
            query = {"multi_match": {"query": text, "fields": fields, "type": "most_fields"}}
        return self._common_body(size) | {"query": query}

    def _dense_body(self, vector: list[float], size: int) -> Body:
        """A search of the nearest neighbors of a vector."""
        candidates = min(max(100, 2 * size), MAX_HITS)
        near = {"field": "vector", "query_vector": vector, "k": size}
        return self._common_body(size) | {"knn": near | {"num_candidates": candidates}}

    def _common_body(self, size: int) -> Body:
        body: Body = {"size": size, "track_total_hits": False}
        body["timeout"] = f"{self._attempt_limit * 1000:.0f}ms"
        if self._info.plan:
            fields = self._info.plan.fields
            return body | {"_source": [path for path in (fields.title, fields.text) if path]}
        return body | {"_source": ["id", "title", "text"], "sort": ["_score", "row"]}

    @property
    def _attempt_limit(self) -> float:
        """Seconds after which one request is given up: the deadline leaves room for three."""
        return self._retry.deadline / 3

    def _answer(self, bodies: Sequence[str]) -> list[SearchResult]:
        """Send all searches, and those that failed again, until the deadline.

        Raises:
            RetrievalError: The retriever was closed meanwhile.
        """
        client = self._own_client()  # before the clock starts: it may import the library
        deadline = Deadline.after(self._retry.deadline)
        answers: list[SearchResult] = [[]] * len(bodies)
        waiting = list(range(len(bodies)))
        for attempt in itertools.count():
            waits: list[float] = []
            failed = []
            for start in range(0, len(waiting), SEARCHES_PER_REQUEST):
                part = waiting[start : start + SEARCHES_PER_REQUEST]
                outcomes = self._outcomes(client, [bodies[i] for i in part], deadline.left())
                if self._closed:
                    raise RetrievalError(_CLOSED)
                for i, outcome in zip(part, outcomes, strict=True):
                    if isinstance(outcome, RetryableError):
                        answers[i] = RetrievalError(self._no_answer(str(outcome)))
                        waits += [] if outcome.wait is None else [outcome.wait]
                        failed.append(i)
                    else:
                        answers[i] = outcome
            pause = self._retry.pause(attempt, deadline.left(), max(waits, default=None))
            if not failed or pause is None:
                return answers
            waiting = failed
            client.closing.wait(pause)
        return answers

    def _outcomes(
        self, client: SyncClient, bodies: Sequence[str], left: float
    ) -> Sequence[SearchResult | RetryableError]:
        """The outcome of each search of a request, also if the whole request failed."""
        if left == 0:
            return [RetryableError("the time was spent before its turn")] * len(bodies)
        try:
            return self._msearch(client, bodies, left)
        except (RetrievalError, RetryableError) as error:
            return [error] * len(bodies)

    def _msearch(
        self, client: SyncClient, bodies: Sequence[str], left: float
    ) -> list[SearchResult | RetryableError]:
        """Send one request; return the outcome of each of its searches."""
        header = json.dumps(
            {"search_type": "dfs_query_then_fetch"} if self._info.many_shards else {}
        )
        searches: Any = "".join(f"{header}\n{body}\n" for body in bodies).encode()
        fields = self._info.plan.fields if self._info.plan else None
        outcomes = client.ask(
            lambda client: client.msearch(index=self._address.index, searches=[searches]),
            min(left, self._attempt_limit),
            partial(parse_answers, address=self._address, fields=fields),
        )
        if len(outcomes) != len(bodies):
            raise RetryableError("an answer that is not that of these searches")
        return outcomes

    def _no_answer(self, reason: str) -> str:
        seconds = f"{self._retry.deadline:g} s"
        return f"Elasticsearch at {self._address} gave no answer within {seconds}: {reason}"


def _some_names(indices: Body) -> str:
    """The first few names of indices, for a message."""
    names = sorted(indices)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _fuse(lexical: SearchResult, dense: SearchResult, top_k: int) -> SearchResult:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009): the sum of 1 / (60 + rank)."""
    scores: dict[str, float] = {}
    passages: dict[str, Passage] = {}
    for answer in (lexical, dense):
        if isinstance(answer, RetrievalError):
            return answer
        for rank, hit in enumerate(answer, start=1):
            passages[hit.passage.id] = hit.passage
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (RRF_K + rank)
    best = sorted(scores, key=lambda id_: -scores[id_])[:top_k]  # stable: BM25's order in ties
    return [Hit(passages[id_], scores[id_]) for id_ in best]
