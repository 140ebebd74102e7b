"""Index a corpus into Elasticsearch: streamed, continued after an interruption, shown when whole.

``elasticsearch://HOST:PORT/INDEX`` is an alias. The passages go to an index of their own, whose
name holds the corpus's fingerprint and that of the mapping; once it is complete and checked the
alias is moved to it, so that readers never see half an index. The former one stays.

A document's id is its row in the corpus, and it is only ever created, never written twice. So an
interrupted run leaves what the next one need not send, and a repeated one changes nothing.
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
    MAPPING,
    META,
    Again,
    Connection,
    Place,
    parse,
)
from research_env.retrieval.retry import AGAIN, Deadline, Retry
from research_env.retrieval.url import words_only

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch

    from research_env.datasets.base import Corpus
    from research_env.retrieval.embedding import Embedding

PER_REQUEST = 500  # passages in one _bulk, or fewer where they are long:
LARGEST = 5_000_000  # characters; Elasticsearch takes 100 MB, but not gladly
IN_FLIGHT = 3  # chunks under way at the same time, or fewer where they are long:
MOST_IN_FLIGHT = 4 * LARGEST  # characters
PATIENCE = Retry(deadline=300.0, first=0.2, longest=15.0)  # for each request
_PAGE = 10_000  # buckets of an aggregation

Body = dict[str, Any]
Chunk = list[tuple[int, Passage]]  # rows and passages


@dataclass(frozen=True, slots=True)
class Indexed:
    """What an indexing run did.

    Attributes:
        passages: how many there are in the index.
        sent: how many of them are new: the rest was there when this run began.
        index: the index behind the alias.
        former: indexes to which the alias pointed before; they may be deleted.
    """

    passages: int
    sent: int
    index: str
    former: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How an index is laid out.

    Attributes:
        analyzer: of titles and texts; with ``english`` scores are those of the embedded engine.
        shards: more than one pay above some ten million passages; scores stay the same.
        replicas: copies of each shard; None: one where there is a second node for it.
        embed: model of the vectors (see :mod:`research_env.retrieval.embedding`); None: none.
        body: what else creates the index, in Elasticsearch's own words: ``settings`` (say, an
            analyzer or a similarity of your own) and ``mappings`` (parameters of the fields
            ``title``, ``text`` and ``contents``), laid over ours.
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
    """Make sure that an alias of an Elasticsearch server names the index of a corpus.

    Args:
        corpus: the passages; they are read once, as a stream.
        url: ``elasticsearch://HOST:PORT/ALIAS``.
        layout: shards, replicas, analyzer and embedding.
        progress: called now and then with the number of passages that are in the index.

    Raises:
        ConfigurationError: the URL or the layout cannot be used, or the name is taken by something
            else.
        DataError: the corpus cannot be read, is empty, or changed meanwhile; or the index does not
            hold what was sent.
        RetrievalError: the server does not answer, or refuses. What it has, it keeps: do it again.
    """
    place = parse(url, ())
    layout = layout or Layout()
    if layout.shards < 1 or (layout.replicas is not None and layout.replicas < 0):
        raise ConfigurationError(f"shards from 1 and replicas from 0 on are needed, not {layout}")
    embedding = None
    if layout.embed is not None:
        from research_env.retrieval.embedding import load_embedding  # noqa: PLC0415  (heavy)

        embedding = load_embedding(layout.embed)
    connection = Connection(place)
    try:
        writer = _Writer(connection, place, corpus, layout, embedding)
        return connection.run(writer.index(progress or (lambda _: None)))
    finally:
        connection.close()


class _Writer:
    def __init__(
        self,
        connection: Connection,
        place: Place,
        corpus: Corpus,
        layout: Layout,
        embedding: Embedding | None,
    ) -> None:
        self._connection = connection
        self._alias = place.index
        self._corpus = corpus
        self._embedding = embedding
        # Vectors of a chunk at a time: a model takes all cores and much memory.
        self._embed_one = asyncio.Lock()
        self._fingerprint = corpus.fingerprint()
        self._meta = {
            "mapping": MAPPING,
            "corpus": corpus.name,
            "fingerprint": self._fingerprint,
            "analyzer": layout.analyzer,
            "embedding": layout.embed,
        }
        own = _own(layout.body)
        self._fields = _laid_over(
            _mapping(self._meta, layout.analyzer, embedding), own.get("mappings", {})
        )
        self._settings: Body = own.get("settings", {})
        self._replicas = (
            {"auto_expand_replicas": "0-1"}
            if layout.replicas is None
            else {"auto_expand_replicas": False, "number_of_replicas": layout.replicas}
        )
        self._shards = layout.shards
        fixed = json.dumps([MAPPING, layout.analyzer, layout.embed, layout.shards, *own.values()])
        kind = sha256(fixed.encode()).hexdigest()[:6]
        self._name = f"{self._alias}-{self._fingerprint[:12]}-{kind}"

    async def index(self, progress: Callable[[int], None]) -> Indexed:
        behind = await self._behind_alias()
        await self._create()
        present = await self._present()
        count, checksum = await self._fill(present, progress)
        if not count:
            raise DataError(f"corpus {self._corpus.name!r} holds no passage to index")
        if self._corpus.fingerprint() != self._fingerprint:
            raise DataError(f"corpus {self._corpus.name!r} changed meanwhile; index it again")
        await self._refresh()
        found = await self._stored()
        if found != (count, checksum):
            raise DataError(
                f"the index {self._name} does not hold the corpus: {found[0]:,} passages with "
                f"checksum {found[1]}, not {count:,} with {checksum}. Delete it and index again"
            )
        former = tuple(name for name in behind if name != self._name)
        await self._show(behind)
        return Indexed(count, count - sum(present), self._name, former)

    async def _ask(self, request: Callable[[AsyncElasticsearch], Awaitable[Any]]) -> Any:
        """A request that is tried until its patience ends."""
        deadline = Deadline.after(PATIENCE.deadline)
        for attempt in itertools.count():
            try:
                return await self._connection.ask(request, deadline.left())
            except Again as error:
                await self._pause(error, attempt, deadline)
        raise AssertionError("unreachable")

    async def _pause(self, error: Again, attempt: int, deadline: Deadline) -> None:
        pause = PATIENCE.pause(attempt, deadline.left(), error.wait)
        if pause is None:
            raise RetrievalError(
                f"{self._connection.place} takes no more ({error}) since {PATIENCE.deadline:g} s; "
                "what it has it keeps: do it again"
            ) from error
        await asyncio.sleep(pause)

    async def _behind_alias(self) -> tuple[str, ...]:
        """The indexes to which the alias points; that of someone else is left alone."""
        name = self._alias
        if not await self._exists(name):
            return ()
        found = await self._ask(lambda client: client.indices.get(index=name))
        if name in found:
            raise ConfigurationError(f"{name!r} is an index, not an alias; choose another name")
        for index, each in found.items():
            if META not in each["mappings"].get("_meta", {}):
                raise ConfigurationError(
                    f"the alias {name!r} points to {index!r}, which research-env has not made; "
                    "choose another name"
                )
        return tuple(found)

    async def _exists(self, name: str) -> bool:
        # not indices.exists: the answer to HEAD has no body that says what was wrong
        found = await self._ask(
            lambda client: client.indices.get(index=name, ignore_unavailable=True)
        )
        return bool(found)

    async def _create(self) -> None:
        if await self._exists(self._name):
            return
        settings = self._settings | {"number_of_shards": self._shards, "refresh_interval": "-1"}
        settings |= self._replicas
        try:
            await self._ask(
                lambda client: client.indices.create(
                    index=self._name, mappings=self._fields, settings=settings
                )
            )
        except RetrievalError:
            if not await self._exists(self._name):  # else another run, or an answer that was lost
                raise

    async def _refresh(self) -> None:
        await self._ask(lambda client: client.indices.refresh(index=self._name))

    async def _present(self) -> list[int]:
        """How many documents each chunk of ``PER_REQUEST`` rows has already."""
        await self._refresh()
        present: list[int] = []
        while True:
            first = len(present) * PER_REQUEST
            page = {"gte": first, "lt": first + _PAGE * PER_REQUEST}
            rows = {"field": "row", "interval": PER_REQUEST, "min_doc_count": 1}
            found = await self._search({"range": {"row": page}}, {"rows": {"histogram": rows}})
            buckets = found["aggregations"]["rows"]["buckets"]
            if not buckets:
                return present
            present += [0] * _PAGE
            for bucket in buckets:
                present[int(bucket["key"]) // PER_REQUEST] = bucket["doc_count"]

    async def _stored(self) -> tuple[int, int]:
        """Number of documents, and the sum of their checksums."""
        found = await self._search({"match_all": {}}, {"sum": {"sum": {"field": "checksum"}}})
        return found["hits"]["total"]["value"], int(found["aggregations"]["sum"]["value"])

    async def _search(self, query: Body, aggregations: Body) -> Any:
        return await self._ask(
            lambda client: client.search(
                index=self._name,
                size=0,
                query=query,
                aggregations=aggregations,
                track_total_hits=True,
                allow_partial_search_results=False,
            )
        )

    async def _fill(
        self, present: Sequence[int], progress: Callable[[int], None]
    ) -> tuple[int, int]:
        """Send what is missing.

        Besides what is under way one more chunk is held, the one just read: ``PER_REQUEST``
        passages, however long they are.

        Returns:
            Number of passages of the corpus, the sum of their checksums.
        """
        count = checksum = 0
        under_way: dict[asyncio.Task[None], int] = {}  # and how many characters each sends
        try:
            for number, chunk in enumerate(_chunks(self._corpus)):
                checksum += sum(_checksum(passage) for _, passage in chunk)
                count += len(chunk)
                if number >= len(present) or present[number] != len(chunk):
                    size = sum(len(passage.title) + len(passage.text) for _, passage in chunk)
                    while under_way and (  # the corpus is read no faster
                        len(under_way) >= IN_FLIGHT
                        or sum(under_way.values()) + size > MOST_IN_FLIGHT
                    ):
                        await _some_done(under_way)
                    under_way[asyncio.create_task(self._send(chunk))] = size
                    await asyncio.sleep(0)  # let it start before the next chunk is read
                progress(count)
            while under_way:
                await _some_done(under_way)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        return count, checksum

    async def _send(self, chunk: Chunk) -> None:
        """Create the documents of a chunk; those that are there already stay as they are."""
        vectors: list[Any] = [None] * len(chunk)
        if self._embedding is not None:
            texts = [f"{passage.title}\n{passage.text}" for _, passage in chunk]
            async with self._embed_one:
                vectors = (await asyncio.to_thread(self._embedding.passages, texts)).tolist()
        waiting = [
            ({"create": {"_id": str(row)}}, _document(row, passage, vector))
            for (row, passage), vector in zip(chunk, vectors, strict=True)
        ]
        deadline = Deadline.after(PATIENCE.deadline)
        for attempt in itertools.count():
            try:
                failed = []
                for part in _parts(waiting):
                    failed += await self._bulk(part, deadline)
                waiting = failed
                if not waiting:
                    return
                raise Again(f"{len(waiting)} documents were turned away")
            except Again as error:  # this task waits, and with it the reader of the corpus
                await self._pause(error, attempt, deadline)

    async def _bulk(
        self, waiting: list[tuple[Body, Body]], deadline: Deadline
    ) -> list[tuple[Body, Body]]:
        """One request; which documents must be sent again."""
        operations = [part for pair in waiting for part in pair]
        found = await self._connection.ask(
            lambda client: client.bulk(index=self._name, operations=operations), deadline.left()
        )
        try:
            results = [item["create"] for item in found["items"]]
            failed = []
            for pair, result in zip(waiting, results, strict=True):
                if result["status"] in AGAIN:
                    failed.append(pair)
                elif result["status"] not in (200, 201, 409):  # 409: it is there
                    reason = result["error"].get("reason", "")
                    raise DataError(
                        f"Elasticsearch refuses the passage {pair[1]['id']!r}: {reason:.200}"
                    )
            return failed
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Again("an answer that is not that of these documents") from error

    async def _show(self, behind: Sequence[str]) -> None:
        """Let readers have it: settings for reading, then the alias, in one step.

        The settings of an index that is shown already are set again: replicas may be others now.
        """
        await self._ask(
            lambda client: client.indices.put_settings(
                index=self._name, settings={"refresh_interval": None} | self._replicas
            )
        )
        if tuple(behind) == (self._name,):
            return
        actions: list[Body] = [
            {"remove": {"index": name, "alias": self._alias, "must_exist": False}}
            for name in behind
            if name != self._name
        ]
        actions.append({"add": {"index": self._name, "alias": self._alias}})
        await self._ask(lambda client: client.indices.update_aliases(actions=actions))


def _mapping(meta: Body, analyzer: str, embedding: Embedding | None) -> Body:
    text = {"type": "text", "analyzer": analyzer}
    # title and text in one field: terms and their number are those of title, line break, text
    searched = text | {"copy_to": "contents"}
    stored = {"index": False, "doc_values": False}
    fields: Body = {
        "id": {"type": "keyword"} | stored,
        "title": searched,
        "text": searched,
        "contents": text,
        "row": {"type": "long"},
        "checksum": {"type": "long", "index": False},
    }
    mapping: Body = {"dynamic": "strict", "_meta": {META: meta}, "properties": fields}
    if embedding is not None:
        fields["vector"] = {
            "type": "dense_vector",
            "dims": embedding.dimensions,
            "similarity": "dot_product",
        }
        mapping["_source"] = {"excludes": ["vector"]}  # it can be made again
    return mapping


def _own(body: Body) -> Body:
    """The user's part of the request that creates an index.

    Raises:
        ConfigurationError: it holds what this package must decide itself.
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
            'an own mapping is {"settings": {...}, "mappings": {"properties": {...}}}, with the '
            "properties title, text and contents, each with parameters of a text field; this is "
            f"{json.dumps(body):.200}"
        )
    return body


def _laid_over(ours: Body, theirs: Body) -> Body:
    """Nested values of two bodies; where both have one that is no object, theirs."""
    both = ours | theirs
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            both[key] = _laid_over(ours[key], theirs[key])
    return both


def _document(row: int, passage: Passage, vector: list[float] | None) -> Body:
    document: Body = {
        "id": words_only(passage.id),
        "title": words_only(passage.title),
        "text": words_only(passage.text),
        "row": row,
        "checksum": _checksum(passage),
    }
    return document if vector is None else document | {"vector": vector}


def _checksum(passage: Passage) -> int:
    """24 bits, so that the sums of half a milliard of them are exact in floating point."""
    parts = f"{len(passage.id)} {len(passage.title)} {passage.id}{passage.title}{passage.text}"
    return crc32(parts.encode("utf-8", "surrogatepass")) >> 8


def _chunks(corpus: Corpus) -> Iterator[Chunk]:
    numbered = enumerate(corpus)
    while chunk := list(itertools.islice(numbered, PER_REQUEST)):
        yield chunk


def _parts(pairs: Sequence[tuple[Body, Body]]) -> Iterator[list[tuple[Body, Body]]]:
    """Documents by requests of bounded size."""
    part: list[tuple[Body, Body]] = []
    size = 0
    for pair in pairs:
        length = len(pair[1]["title"]) + len(pair[1]["text"])
        if part and size + length > LARGEST:
            yield part
            part, size = [], 0
        part.append(pair)
        size += length
    yield part


async def _some_done(tasks: dict[asyncio.Task[None], int]) -> None:
    """Wait for one of them at least, and take it out; an error of one is raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del tasks[task]
    for task in done:
        task.result()
