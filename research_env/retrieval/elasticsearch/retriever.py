"""Search in Elasticsearch: ``elasticsearch://HOST:PORT/INDEX?mode=bm25&deadline=60``.

The index is one that ``research-env index --to elasticsearch://...`` made. Options:

- ``mode``: ``bm25`` (default: title and text as one field, the scores of the embedded engine),
  ``title`` (BM25F over title and text, Elasticsearch's ``combined_fields``), ``dense`` (nearest
  neighbours of an embedding), ``hybrid`` (``bm25`` and ``dense``, fused by reciprocal rank).
- ``deadline``: seconds within which a batch is answered, tries and pauses included (default 60).
- ``embed``: the model by whose vectors ``dense`` and ``hybrid`` search, where it is not the bundled
  one: that with which the index was made. What an index says is not enough to run a model.
- ``text``, and with it or not ``title``: names of fields of an index of your own, which is then
  searched in mode ``bm25`` (only ``text``) or ``title`` (both).

``elasticsearch+https://`` is the same over TLS. For credentials see
:mod:`research_env.retrieval.elasticsearch.client`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from research_env.errors import (
    ConfigurationError,
    ResearchEnvError,
    RetrievalError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.bm25.analyzer import first_words
from research_env.retrieval.elasticsearch.client import (
    MAPPING,
    META,
    Again,
    Caller,
    parse,
)
from research_env.retrieval.elasticsearch.responses import Answer, Fields, below, read_answers
from research_env.retrieval.retry import Deadline, Retry
from research_env.retrieval.url import number, words_only

if TYPE_CHECKING:
    from research_env.retrieval.embedding import Embedding

MODES = ("bm25", "title", "dense", "hybrid")
PER_REQUEST = 256  # searches in one _msearch at most
RRF_K = 60  # of reciprocal rank fusion, and how many ranks of either list it looks at
RRF_WINDOW = 50
MOST_HITS = 10_000  # that a server gives, and that it takes as num_candidates

Body = dict[str, Any]

_TEXT = "\0"  # stands for a text that is searched for
_CLOSED = "the Elasticsearch retriever has been closed; open it again"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What opening found out about an index.

    Attributes:
        many_shards: whether it has more than one.
        embedding: the model of its vectors, None where it has none.
        fields: with ``?text=FIELD``, where in the documents its texts stand, and the titles.
        fingerprint: of the corpus, where research-env made the index.
    """

    many_shards: bool
    embedding: str | None = None
    fields: Fields | None = None
    fingerprint: str | None = None


class ElasticsearchRetriever:
    """Passages of an Elasticsearch index.

    All searches of a batch go as few ``_msearch`` requests; each response is judged alone and only
    failed ones are asked again, with growing, random waits, until the batch's time is spent. What
    is then unanswered is a :class:`RetrievalError` in its place.

    It may be pickled and may cross a fork: a process makes its own connections when it first
    searches. Searches may come from several threads.
    """

    in_flight = 4

    def __init__(self, url: str) -> None:
        """Look at the index and check that it can be searched so.

        Raises:
            ConfigurationError: the URL cannot be read, the mode needs an embedding that the index
                has not or that the URL does not name, or the index has not the fields named.
            RetrievalError: the server does not answer, or there is no such index.
            StaleIndexError: the index is not one of this version.
        """
        self._url = url
        self._prepare()
        caller = self._caller()
        try:
            try:
                self._seen = self._check(*self._look(caller))
            except ResearchEnvError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RetrievalError(f"{self._place} is not one index of Elasticsearch") from error
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"ElasticsearchRetriever({self._url!r})"

    @property
    def fingerprint(self) -> str | None:
        """Of the corpus as it was indexed; None for an index that research-env did not make."""
        return self._seen.fingerprint

    def __reduce__(self) -> tuple[Callable[[str, _Seen], Any], tuple[Any, ...]]:
        return _restored, (self._url, self._seen)

    def search(self, queries: Sequence[str], top_k: int) -> list[Answer]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        A text is searched as words, of which the first ``MAX_QUERY_WORDS`` count (see
        :mod:`research_env.retrieval.bm25.analyzer`); one of blanks finds nothing, in every mode.
        Hits with equal scores come in the order of the corpus, except with ``?text=FIELD``, where
        their order is the server's.

        Raises:
            ConfigurationError: ``top_k`` below 1 or above 10,000, the most that a server gives.
            RetrievalError: it has been closed.
        """
        if not 1 <= top_k <= MOST_HITS:
            raise ConfigurationError(f"top_k={top_k!r} must be from 1 to 10,000")
        if self._closed:
            raise RetrievalError(_CLOSED)
        texts = [words_only(first_words(query)) for query in queries]
        asked = [text for text in texts if text.strip()]  # a vector of blanks would find anything
        found = iter(self._ask(asked, top_k) if asked else ())
        return [next(found) if text.strip() else [] for text in texts]

    def _ask(self, texts: Sequence[str], top_k: int) -> list[Answer]:
        """Answer texts that say something."""
        size = max(top_k, RRF_WINDOW) if self._mode == "hybrid" else top_k
        lines: list[str] = []  # as JSON: the client would take five times as long for that
        if self._mode in ("bm25", "title", "hybrid"):
            # The bodies differ in the text alone, and most of the time would go into the rest.
            before, after = json.dumps(self._lexical(_TEXT, size)).split(json.dumps(_TEXT))
            lines += [before + json.dumps(text) + after for text in texts]
        if self._mode in ("dense", "hybrid"):
            vectors = self._embed().queries(texts)
            lines += [json.dumps(self._dense(vector.tolist(), size)) for vector in vectors]
        answers = self._answer(lines)
        if self._mode == "hybrid":
            half = len(texts)
            pairs = zip(answers[:half], answers[half:], strict=True)
            return [_fuse(lexical, dense, top_k) for lexical, dense in pairs]
        return answers

    def close(self) -> None:
        """Close the connections; searches that wait end. Calling it twice is harmless."""
        self._closed = True
        caller = self._callers.pop(os.getpid(), None)
        if caller is not None:
            caller.close()

    def _prepare(self) -> None:
        """Read the URL; no connection is made."""
        self._place = parse(self._url, ("mode", "deadline", "embed", "text", "title"))
        options = self._place.options
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
        self._seen = _Seen(many_shards=False)
        self._embedding: Embedding | None = None
        self._closed = False
        self._callers: dict[int, Caller] = {}  # by process

    def _caller(self) -> Caller:
        """That of this process; one that came through a fork is left alone.

        Raises:
            RetrievalError: the retriever has been closed.
        """
        caller = self._callers.get(os.getpid())
        if caller is None:
            made = Caller(self._place)
            caller = self._callers.setdefault(os.getpid(), made)
            if caller is not made:  # another thread was faster
                made.close()
        if self._closed:  # perhaps while this one was made, so that nobody else closes it
            self.close()
            raise RetrievalError(_CLOSED)
        return caller

    def _look(self, caller: Caller) -> tuple[Body, Body]:
        """Mapping and settings of the index."""
        deadline = Deadline.after(self._retry.deadline)
        for attempt in itertools.count():
            try:
                found = caller.ask(
                    lambda client: client.indices.get(index=self._place.index, flat_settings=True),
                    min(deadline.left(), self._attempt),
                )
                [each] = found.values()
                return each["mappings"], each["settings"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RetrievalError(f"{self._place} is not one index of Elasticsearch") from error
            except Again as error:
                pause = self._retry.pause(attempt, deadline.left(), error.wait)
                if pause is None:
                    raise RetrievalError(self._silence(str(error))) from error
            caller.closing.wait(pause)
        raise AssertionError("unreachable")

    def _check(self, mapping: Body, settings: Body) -> _Seen:
        many_shards = int(settings["index.number_of_shards"]) > 1
        if self._text:
            title = self._stands_at(mapping, self._title) if self._title else None
            text = self._stands_at(mapping, self._text)
            return _Seen(many_shards, fields=Fields(self._text, text, title))
        meta = mapping.get("_meta", {}).get(META)
        cure = "make it again: research-env index --corpus FILE --to elasticsearch://..."
        if not isinstance(meta, dict):
            raise StaleIndexError(
                f"the index {self._place} was not made by research-env; {cure}, or name its "
                "fields: ?text=FIELD&title=FIELD"
            )
        if meta.get("mapping") != MAPPING:
            raise StaleIndexError(
                f"the index {self._place} has mapping version {meta.get('mapping')}, this version "
                f"reads {MAPPING}; {cure}"
            )
        embedding = meta.get("embedding")
        if self._mode in ("dense", "hybrid"):
            self._check_embedding(embedding)
        return _Seen(many_shards, embedding, fingerprint=meta.get("fingerprint"))

    def _stands_at(self, mapping: Body, field: str) -> str:
        place = _stands_at(mapping, field)
        if place is None:
            raise ConfigurationError(f"the index {self._place} has no field {field!r} of texts")
        return place

    def _check_embedding(self, embedding: Any) -> None:
        """A model may be code that runs here: who may write the index must not choose it."""
        from research_env.retrieval.embedding import BUNDLED  # noqa: PLC0415  (heavy)

        if not embedding:
            raise ConfigurationError(
                f"mode={self._mode} needs an embedding, and the index {self._place} has none; "
                "make it with --embed MODEL"
            )
        if self._embed_option and self._embed_option != embedding:
            raise ConfigurationError(
                f"the vectors of the index {self._place} are those of {embedding!r:.100}, not of "
                f"embed={self._embed_option}"
            )
        if not self._embed_option and embedding != BUNDLED:
            raise ConfigurationError(
                f"the vectors of the index {self._place} are those of {embedding!r:.100}, which "
                f"is loaded only where the URL names it, too: ?mode={self._mode}&embed=MODEL"
            )

    def _embed(self) -> Embedding:
        from research_env.retrieval.embedding import load_embedding  # noqa: PLC0415  (heavy)

        if self._embedding is None:
            self._embedding = load_embedding(self._seen.embedding or "")
        return self._embedding

    def _lexical(self, text: str, size: int) -> Body:
        if self._mode == "title":
            fields = [self._title or "title", self._text or "text"]
            query: Body = {"combined_fields": {"query": text, "fields": fields}}
        else:
            query = {"match": {self._text or "contents": {"query": text}}}
        return self._body(size) | {"query": query}

    def _dense(self, vector: list[float], size: int) -> Body:
        candidates = min(max(100, 2 * size), MOST_HITS)
        near = {"field": "vector", "query_vector": vector, "k": size}
        return self._body(size) | {"knn": near | {"num_candidates": candidates}}

    def _body(self, size: int) -> Body:
        body: Body = {"size": size, "track_total_hits": False}
        body["timeout"] = f"{self._attempt * 1000:.0f}ms"
        if self._seen.fields:
            places = (self._seen.fields.title, self._seen.fields.text)
            return body | {"_source": [place for place in places if place]}
        return body | {"_source": ["id", "title", "text"], "sort": ["_score", "row"]}

    @property
    def _attempt(self) -> float:
        """Seconds after which one request is given up: the batch's time is enough for three."""
        return self._retry.deadline / 3

    def _answer(self, bodies: Sequence[str]) -> list[Answer]:
        """Ask for all, and again for those that failed, until the time is spent; in order.

        Raises:
            RetrievalError: the retriever was closed meanwhile.
        """
        caller = self._caller()  # which may load the client: not within the time of the batch
        deadline = Deadline.after(self._retry.deadline)
        answers: list[Answer] = [[]] * len(bodies)
        waiting = list(range(len(bodies)))
        for attempt in itertools.count():
            asks: list[float] = []
            failed = []
            for at in range(0, len(waiting), PER_REQUEST):
                part = waiting[at : at + PER_REQUEST]
                judged = self._judged(caller, [bodies[i] for i in part], deadline.left())
                if self._closed:
                    raise RetrievalError(_CLOSED)
                for i, verdict in zip(part, judged, strict=True):
                    if isinstance(verdict, Again):
                        answers[i] = RetrievalError(self._silence(str(verdict)))
                        asks += [] if verdict.wait is None else [verdict.wait]
                        failed.append(i)
                    else:
                        answers[i] = verdict
            pause = self._retry.pause(attempt, deadline.left(), max(asks, default=None))
            if not failed or pause is None:
                return answers
            waiting = failed
            caller.closing.wait(pause)
        return answers

    def _judged(
        self, caller: Caller, bodies: Sequence[str], left: float
    ) -> Sequence[Answer | Again]:
        """What became of some searches, also where none was answered."""
        if left == 0:
            return [Again("the time was spent before its turn")] * len(bodies)
        try:
            return self._msearch(caller, bodies, left)
        except (RetrievalError, Again) as error:
            return [error] * len(bodies)

    def _msearch(self, caller: Caller, bodies: Sequence[str], left: float) -> list[Answer | Again]:
        """One request; what became of each of its searches."""
        header = json.dumps(
            {"search_type": "dfs_query_then_fetch"} if self._seen.many_shards else {}
        )
        searches: Any = "".join(f"{header}\n{body}\n" for body in bodies).encode()
        judged: list[Answer | Again] = caller.ask(
            lambda client: client.msearch(index=self._place.index, searches=[searches]),
            min(left, self._attempt),
            partial(read_answers, place=self._place, fields=self._seen.fields),
        )
        if len(judged) != len(bodies):
            raise Again("an answer that is not that of these searches")
        return judged

    def _silence(self, why: str) -> str:
        seconds = f"{self._retry.deadline:g} s"
        return f"Elasticsearch at {self._place} gave no answer within {seconds}: {why}"


def _restored(url: str, seen: _Seen) -> ElasticsearchRetriever:
    """A retriever that was checked in another process; it connects when it first searches."""
    retriever = ElasticsearchRetriever.__new__(ElasticsearchRetriever)
    retriever._url = url
    retriever._prepare()
    retriever._seen = seen
    return retriever


def _fuse(lexical: Answer, dense: Answer, top_k: int) -> Answer:
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


def _stands_at(mapping: Body, field: str) -> str | None:
    """Where in the documents the texts of a field stand; None: the mapping has no such field.

    A multi-field (``body.english``) is another index of the texts of its parent (``body``).
    """
    for name, rest, each in below(mapping.get("properties", {}), field):
        if not rest:
            return None if "properties" in each else name
        if rest in each.get("fields", {}):
            return name
        deeper = _stands_at(each, rest)
        if deeper is not None:
            return f"{name}.{deeper}"
    return None
