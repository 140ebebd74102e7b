"""Index a corpus into Elasticsearch: streamed, resumable, and visible only when complete.

``elasticsearch://HOST:PORT/INDEX`` is an alias. The passages go into an index of their own, whose
name holds fingerprints of the corpus and of the mapping. Once it is complete and checked, the alias
is moved to it, so that readers never see half an index. The former index stays.

A document's id is its row in the corpus, and documents are only created, never overwritten. So a
run continues where an interrupted one stopped, and a repeated run changes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from zlib import crc32

from research_env.errors import ConfigurationError, DataError, RetrievalError
from research_env.retrieval.base import Passage
from research_env.retrieval.elasticsearch.client import (
    MAPPING_VERSION,
    META_KEY,
    Body,
    IndexAddress,
    RetryableError,
    SyncClient,
    parse_address,
)
from research_env.retrieval.elasticsearch.documents import readable_fields
from research_env.retrieval.json_text import replace_surrogates
from research_env.retrieval.retry import RETRYABLE_STATUSES, Deadline, Retry, log_retry

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch

    from research_env.datasets.base import Corpus
    from research_env.retrieval.embedding import Embedding

PASSAGES_PER_REQUEST = 500
"""Passages in one ``_bulk`` request, fewer if they are long."""
MAX_REQUEST_CHARS = 5_000_000
"""Characters in one ``_bulk`` request. Elasticsearch accepts 100 MB, and recommends far less."""
MAX_IN_FLIGHT = 3
"""Batches that are sent at the same time, fewer if their passages are long."""
MAX_IN_FLIGHT_CHARS = 4 * MAX_REQUEST_CHARS
"""Characters that are sent at the same time."""
RETRY = Retry(deadline=300.0, first=0.2, longest=15.0)
"""Time limit and pauses of each request."""
_OUR_SETTINGS = {
    "number_of_shards": "give --shards",
    "number_of_replicas": "give --replicas",
    "auto_expand_replicas": "give --replicas",
    "refresh_interval": "an index is not refreshed while it is filled",
}
_READABLE = 2  # version of what reading documents needs
_BUCKETS_PER_PAGE = 10_000  # page size of an aggregation

Batch = list[tuple[int, Passage]]  # rows and passages


@dataclass(frozen=True, slots=True)
class Indexed:
    """What an indexing run did.

    Attributes:
        passages: Number of passages in the index.
        sent: How many of them are new; the others were there when this run began.
        index: Name of the index behind the alias.
        former: Indices to which the alias pointed before; they may be deleted.
    """

    passages: int
    sent: int
    index: str
    former: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Settings of an index.

    Attributes:
        analyzer: Analyzer of titles and texts; ``english`` gives the scores of the embedded engine.
        shards: Number of shards; more than one pays off above some ten million passages. Scores
            stay the same.
        replicas: Copies of each shard; None means one if there is a second node for it.
        embed: Model of the vectors (see :mod:`research_env.retrieval.embedding`); None for none.
        body: Additions to the request that creates the index, in Elasticsearch's own words:
            ``settings`` (an analyzer or a similarity of your own, say) and ``mappings`` (parameters
            of the fields ``title``, ``text`` and ``contents``). They override ours, but for the
            number of shards and replicas and the refresh interval, which are refused.
    """

    analyzer: str = "english"
    shards: int = 1
    replicas: int | None = None
    embed: str | None = None
    body: Body = field(default_factory=dict)


def index_elasticsearch(
    corpus: Corpus,
    url: str,
    layout: Layout | None = None,
    progress: Callable[[int], None] | None = None,
) -> Indexed:
    """Index a corpus, unless it is indexed already, and point an alias to the index.

    Args:
        corpus: The passages; they are read once, as a stream.
        url: ``elasticsearch://HOST:PORT/ALIAS``.
        layout: Shards, replicas, analyzer and embedding; None for the defaults.
        progress: Called now and then with the number of passages that are in the index.

    Returns:
        What was done.

    Raises:
        ConfigurationError: The URL or the layout cannot be used, or the name is taken by something
            else.
        DataError: The corpus cannot be read, is empty, or changed meanwhile; Elasticsearch refuses
            a passage; or the index does not hold what was sent.
        RetrievalError: The server does not answer, or refuses. It keeps what it has: repeat the
            call to continue.
    """
    address = parse_address(url, ())
    layout = layout or Layout()
    if layout.shards < 1 or (layout.replicas is not None and layout.replicas < 0):
        raise ConfigurationError(
            f"shards must be at least 1 and replicas at least 0, not {layout.shards} and "
            f"{layout.replicas}"
        )
    embedding = None
    if layout.embed is not None:
        from research_env.retrieval.embedding import load_embedding  # noqa: PLC0415  (heavy)

        embedding = load_embedding(layout.embed)
    client = SyncClient(address)
    try:
        writer = _Writer(client, address, corpus, layout, embedding)
        return client.run(writer.index(progress or (lambda _: None)))
    finally:
        client.close()


class _Writer:
    def __init__(
        self,
        client: SyncClient,
        address: IndexAddress,
        corpus: Corpus,
        layout: Layout,
        embedding: Embedding | None,
    ) -> None:
        self._client = client
        self._alias = address.index
        self._corpus = corpus
        self._embedding = embedding
        # One batch at a time: a model takes all cores and much memory.
        self._embedding_lock = asyncio.Lock()
        self._fingerprint = corpus.fingerprint()
        self._meta = {
            "mapping": MAPPING_VERSION,
            "corpus": corpus.name,
            "fingerprint": self._fingerprint,
            "analyzer": layout.analyzer,
            "embedding": layout.embed,
        }
        body = _check_body(layout.body)
        self._fields = _merge(
            _mapping(self._meta, layout.analyzer, embedding), body.get("mappings", {})
        )
        self._settings: Body = body.get("settings", {})
        self._replicas = (
            {"auto_expand_replicas": "0-1"}
            if layout.replicas is None
            else {"auto_expand_replicas": False, "number_of_replicas": layout.replicas}
        )
        self._shards = layout.shards
        versions = MAPPING_VERSION, _READABLE
        fixed = [*versions, layout.analyzer, layout.embed, layout.shards, *body.values()]
        kind = sha256(json.dumps(fixed).encode()).hexdigest()[:6]
        self._name = f"{self._alias}-{self._fingerprint[:12]}-{kind}"

    async def index(self, progress: Callable[[int], None]) -> Indexed:
        former = await self._indices_of_alias()
        await self._create()
        present = await self._count_by_batch()
        count, checksum = await self._send_missing(present, progress)
        if not count:
            raise DataError(f"corpus {self._corpus.name!r} holds no passage to index")
        if self._corpus.fingerprint() != self._fingerprint:
            raise DataError(f"corpus {self._corpus.name!r} changed meanwhile; index it again")
        await self._refresh()
        found = await self._count_and_checksum()
        if found != (count, checksum):
            raise DataError(
                f"the index {self._name} does not hold the corpus: {found[0]:,} passages with "
                f"checksum {found[1]}, not {count:,} with {checksum}. Delete it and index again"
            )
        await self._publish(former)
        others = tuple(name for name in former if name != self._name)
        return Indexed(count, count - sum(present), self._name, others)

    async def _request(self, request: Callable[[AsyncElasticsearch], Awaitable[Any]]) -> Any:
        """Send a request, again if its failure may pass, until its deadline."""
        deadline = Deadline.after(RETRY.deadline)
        for attempt in itertools.count():
            try:
                return await self._client.ask_async(request, deadline.left())
            except RetryableError as error:
                await self._pause(error, attempt, deadline)
        raise AssertionError("unreachable")

    async def _pause(self, error: RetryableError, attempt: int, deadline: Deadline) -> None:
        pause = RETRY.pause(attempt, deadline.left(), error.wait)
        if pause is None:
            raise RetrievalError(
                f"{self._client.address} has accepted nothing for {RETRY.deadline:g} s ({error}); "
                "it keeps what it has: run the command again to continue"
            ) from error
        log_retry(self._client.address, error, deadline.left())
        await asyncio.sleep(pause)

    async def _indices_of_alias(self) -> tuple[str, ...]:
        """The indices to which the alias points.

        Raises:
            ConfigurationError: The name is an index, or an alias that somebody else made.
        """
        name = self._alias
        if not await self._exists(name):
            return ()
        found = await self._request(lambda client: client.indices.get(index=name))
        if name in found:
            raise ConfigurationError(f"{name!r} is an index, not an alias; choose another name")
        for index, each in found.items():
            if META_KEY not in each["mappings"].get("_meta", {}):
                raise ConfigurationError(
                    f"the alias {name!r} points to {index!r}, which research-env did not make; "
                    "choose another name"
                )
        return tuple(found)

    async def _exists(self, name: str) -> bool:
        # Not indices.exists: an answer to HEAD has no body that says what was wrong.
        found = await self._request(
            lambda client: client.indices.get(index=name, ignore_unavailable=True)
        )
        return bool(found)

    async def _create(self) -> None:
        if await self._exists(self._name):
            return
        settings = self._settings | {"number_of_shards": self._shards, "refresh_interval": "-1"}
        settings |= self._replicas
        try:
            await self._request(
                lambda client: client.indices.create(
                    index=self._name, mappings=self._fields, settings=settings
                )
            )
        except RetrievalError:
            # If it exists, another run made it, or the answer was lost.
            if not await self._exists(self._name):
                raise

    async def _refresh(self) -> None:
        await self._request(lambda client: client.indices.refresh(index=self._name))

    async def _count_by_batch(self) -> list[int]:
        """How many documents of each batch of ``PASSAGES_PER_REQUEST`` rows exist already."""
        await self._refresh()
        present: list[int] = []
        while True:
            first = len(present) * PASSAGES_PER_REQUEST
            page = {"gte": first, "lt": first + _BUCKETS_PER_PAGE * PASSAGES_PER_REQUEST}
            rows = {"field": "row", "interval": PASSAGES_PER_REQUEST, "min_doc_count": 1}
            found = await self._search({"range": {"row": page}}, {"rows": {"histogram": rows}})
            buckets = found["aggregations"]["rows"]["buckets"]
            if not buckets:
                return present
            present += [0] * _BUCKETS_PER_PAGE
            for bucket in buckets:
                present[int(bucket["key"]) // PASSAGES_PER_REQUEST] = bucket["doc_count"]

    async def _count_and_checksum(self) -> tuple[int, int]:
        """Number of documents, and the sum of their checksums."""
        found = await self._search({"match_all": {}}, {"sum": {"sum": {"field": "checksum"}}})
        return found["hits"]["total"]["value"], int(found["aggregations"]["sum"]["value"])

    async def _search(self, query: Body, aggregations: Body) -> Any:
        return await self._request(
            lambda client: client.search(
                index=self._name,
                size=0,
                query=query,
                aggregations=aggregations,
                track_total_hits=True,
                allow_partial_search_results=False,
            )
        )

    async def _send_missing(
        self, present: Sequence[int], progress: Callable[[int], None]
    ) -> tuple[int, int]:
        """Send the batches that are not complete.

        Besides the batches in flight, one more is in memory: the one just read, with
        ``PASSAGES_PER_REQUEST`` passages, however long they are.

        Args:
            present: Number of documents that exist, by batch.
            progress: Called with the number of passages read.

        Returns:
            Number of passages of the corpus, and the sum of their checksums.
        """
        count = checksum = 0
        in_flight: dict[asyncio.Task[None], int] = {}  # with their characters
        try:
            for number, batch in enumerate(_batches(self._corpus)):
                checksum += sum(_checksum(passage) for _, passage in batch)
                count += len(batch)
                if number >= len(present) or present[number] != len(batch):
                    size = sum(len(passage.title) + len(passage.text) for _, passage in batch)
                    while in_flight and (  # no more of the corpus is read meanwhile
                        len(in_flight) >= MAX_IN_FLIGHT
                        or sum(in_flight.values()) + size > MAX_IN_FLIGHT_CHARS
                    ):
                        await _wait_for_some(in_flight)
                    in_flight[asyncio.create_task(self._send_batch(batch))] = size
                    await asyncio.sleep(0)  # lets it start before the next batch is read
                progress(count)
            while in_flight:
                await _wait_for_some(in_flight)
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        return count, checksum

    async def _send_batch(self, batch: Batch) -> None:
        """Create the documents of a batch; existing ones stay as they are."""
        vectors: list[Any] = [None] * len(batch)
        if self._embedding is not None:
            texts = [f"{passage.title}\n{passage.text}" for _, passage in batch]
            async with self._embedding_lock:
                vectors = (await asyncio.to_thread(self._embedding.passages, texts)).tolist()
        waiting = [
            ({"create": {"_id": str(row)}}, _document(row, passage, vector))
            for (row, passage), vector in zip(batch, vectors, strict=True)
        ]
        deadline = Deadline.after(RETRY.deadline)
        for attempt in itertools.count():
            try:
                failed = []
                for part in _split(waiting):
                    failed += await self._bulk(part, deadline)
                waiting = failed
                if not waiting:
                    return
                raise RetryableError(f"{len(waiting)} documents were rejected")
            except RetryableError as error:  # reading the corpus waits, too
                await self._pause(error, attempt, deadline)

    async def _bulk(
        self, waiting: list[tuple[Body, Body]], deadline: Deadline
    ) -> list[tuple[Body, Body]]:
        """Send one request; return the documents that must be sent again."""
        operations = [part for pair in waiting for part in pair]
        found = await self._client.ask_async(
            lambda client: client.bulk(index=self._name, operations=operations), deadline.left()
        )
        try:
            results = [item["create"] for item in found["items"]]
            failed = []
            for pair, result in zip(waiting, results, strict=True):
                if result["status"] in RETRYABLE_STATUSES:
                    failed.append(pair)
                elif result["status"] not in (200, 201, 409):  # 409: it exists
                    reason = result["error"].get("reason", "")
                    raise DataError(
                        f"Elasticsearch refuses the passage {pair[1]['id']!r}: {reason:.200}"
                    )
            return failed
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RetryableError("an answer that is not that of these documents") from error

    async def _publish(self, former: Sequence[str]) -> None:
        """Make the index visible: set what readers need, then move the alias in one step.

        The settings are set even if the alias points to the index already, as the number of
        replicas may have changed.
        """
        await self._request(
            lambda client: client.indices.put_settings(
                index=self._name, settings={"refresh_interval": None} | self._replicas
            )
        )
        if tuple(former) == (self._name,):
            return
        actions: list[Body] = [
            {"remove": {"index": name, "alias": self._alias, "must_exist": False}}
            for name in former
            if name != self._name
        ]
        actions.append({"add": {"index": self._name, "alias": self._alias}})
        await self._request(lambda client: client.indices.update_aliases(actions=actions))


def _mapping(meta: Body, analyzer: str, embedding: Embedding | None) -> Body:
    text = {"type": "text", "analyzer": analyzer}
    # Title and text in one field, with the terms and the length of "title\ntext".
    searched = text | {"copy_to": "contents"}
    readable = readable_fields()
    fields: Body = {
        "id": readable["id"],
        "title": searched | readable["title"],
        "text": searched,
        "contents": text,
        "row": {"type": "long"},
        "checksum": {"type": "long", "index": False},
    }
    mapping: Body = {"dynamic": "strict", "_meta": {META_KEY: meta}, "properties": fields}
    if embedding is not None:
        fields["vector"] = {
            "type": "dense_vector",
            "dims": embedding.dimensions,
            "similarity": "dot_product",
            "index_options": {"type": "int8_hnsw"},  # releases from 9.1 on take fewer bits
        }
        mapping["_source"] = {"excludes": ["vector"]}  # can be computed again
    return mapping


def _check_body(body: Body) -> Body:
    """Check the user's part of the request that creates an index.

    Raises:
        ConfigurationError: It holds what this package must decide itself.
    """
    mappings = body.get("mappings", {})
    fields = mappings.get("properties", {}) if isinstance(mappings, dict) else None
    if (
        not body.keys() <= {"settings", "mappings"}
        or not isinstance(body.get("settings", {}), dict)
        or not isinstance(fields, dict)
        or not mappings.keys() <= {"properties"}
        or not fields.keys() <= {"title", "text", "contents"}
    ):
        raise ConfigurationError(
            '--mapping takes {"settings": {...}, "mappings": {"properties": {...}}}, with the '
            "properties title, text and contents, each with parameters of a text field; not "
            f"{json.dumps(body):.200}"
        )
    settings = body.get("settings", {})
    nested = settings.get("index")
    names = {*settings, *(nested if isinstance(nested, dict) else ())}
    if ours := {name.removeprefix("index.") for name in names} & _OUR_SETTINGS.keys():
        name = min(ours)
        raise ConfigurationError(f"--mapping sets {name}: {_OUR_SETTINGS[name]}")
    return body


def _merge(ours: Body, theirs: Body) -> Body:
    """Merge nested objects; where both have another value, ``theirs`` counts."""
    both = ours | theirs
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            both[key] = _merge(ours[key], theirs[key])
    return both


def _document(row: int, passage: Passage, vector: list[float] | None) -> Body:
    document: Body = {
        "id": replace_surrogates(passage.id),
        "title": replace_surrogates(passage.title.strip()),  # whole titles are looked for
        "text": replace_surrogates(passage.text),
        "row": row,
        "checksum": _checksum(passage),
    }
    return document if vector is None else document | {"vector": vector}


def _checksum(passage: Passage) -> int:
    """A checksum of 24 bits, so that sums of 500 million of them are exact in floating point."""
    parts = f"{len(passage.id)} {len(passage.title)} {passage.id}{passage.title}{passage.text}"
    return crc32(parts.encode("utf-8", "surrogatepass")) >> 8


def _batches(corpus: Corpus) -> Iterator[Batch]:
    numbered = enumerate(corpus)
    while batch := list(itertools.islice(numbered, PASSAGES_PER_REQUEST)):
        yield batch


def _split(pairs: Sequence[tuple[Body, Body]]) -> Iterator[list[tuple[Body, Body]]]:
    """Split documents into requests of at most ``MAX_REQUEST_CHARS``."""
    part: list[tuple[Body, Body]] = []
    size = 0
    for pair in pairs:
        length = len(pair[1]["title"]) + len(pair[1]["text"])
        if part and size + length > MAX_REQUEST_CHARS:
            yield part
            part, size = [], 0
        part.append(pair)
        size += length
    yield part


async def _wait_for_some(tasks: dict[asyncio.Task[None], int]) -> None:
    """Wait until at least one task is done, remove the done ones, and raise their errors."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del tasks[task]
    for task in done:
        task.result()
