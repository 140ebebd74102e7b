from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from email.message import Message
from pathlib import Path
from typing import Any

import httpx
import pytest

from research_env import cli
from research_env.errors import RetrievalError
from research_env.retrieval import Hit, Passage, open_retriever
from research_env.retrieval.http import HttpRetriever
from research_env.retrieval.retry import Retry
from research_env.retrieval.serve import RetrievalServer
from research_env.retrieval.serve_guard import Limits
from tests.research_env.fakes import TIMEOUT, Engine, Gate
from tests.research_env.retrieval.retriever_contract import (
    CLAUSES,
    WORDS,
    Clause,
    contract_index,
    environments_travel,
    fails_in_place,
)

QUICK = Retry(deadline=2.0, first=0.001, longest=0.01)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def url(index: Path) -> Iterator[str]:
    """Address of a server over the embedded engine."""
    engine = open_retriever(f"embedded:{index}?corpus=any", None)
    server = RetrievalServer(engine)
    yield server.url
    server.stop()
    engine.close()


class Served:
    """A fake engine and its server."""

    def __init__(self, engine: Any = None, **limits: Any) -> None:
        self.engine = engine or Engine()
        arguments = {name: limits.pop(name) for name in ("key", "allowed_hosts") if name in limits}
        limits = {"refusal_seconds": 0.0} | limits
        self.server = RetrievalServer(self.engine, limits=Limits(**limits), **arguments)
        self.address = ("127.0.0.1", int(self.server.url.split(":")[2].split("/")[0]))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(patience=TIMEOUT)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Message, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        answer = response.status, response.headers, response.read()
        connection.close()
        return answer

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(self.address, TIMEOUT, source_address=(source, 0))

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines)[f"research_env_{name}"])

    def post(self, value: object, **headers: str) -> tuple[int, Any]:
        status, _, body = self.ask("POST", "/retrieve", json.dumps(value).encode(), **headers)
        return status, json.loads(body)


def head(request: str, *lines: str) -> bytes:
    return "\r\n".join([f"{request} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server for tests that change nothing in it."""
    limits = {"queries": 3, "hits": 1999, "body": 200_000}
    with Served(allowed_hosts=["Search.Example.org"], **limits) as served:
        yield served


# --- our client against our server ---------------------------------------------------------------


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract(clause: Clause, url: str) -> None:
    clause(lambda: open_retriever(url, None))


def test_environments_travel(url: str) -> None:
    environments_travel(url)


def test_what_comes_through_is_what_the_engine_found(url: str, index: Path) -> None:
    engine = open_retriever(f"embedded:{index}?corpus=any", None)
    client = HttpRetriever(url)
    assert client.search(WORDS, 6) == engine.search(WORDS, 6)
    client.close()
    engine.close()


def test_any_passage_comes_through() -> None:
    odd = [
        Hit(Passage("\ud800", 'a "title"\nof two lines', "text\0 \ud83d \U0001f3b8"), 1e-320),
        Hit(Passage("", '"', ""), -0.1 - 0.2),
    ]

    class Odd(Engine):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
            return [odd for _ in queries]

    with Served(Odd()) as served:
        client = HttpRetriever(served.server.url)
        assert client.search(["q"], 5) == [odd]
        client.close()


def test_a_query_that_failed_fails_in_its_place_for_us() -> None:
    with Served() as served:
        client = HttpRetriever(served.server.url, retry=QUICK)
        first, broken, last = client.search(["1", "fail 2", "3"], 5)
        assert [first, last] == Engine().search(["1", "3"], 5)
        assert isinstance(broken, RetrievalError)
        assert "no answer for 'fail 2'" in str(broken)
        # The engine's own retries are spent: the client makes no more.
        assert len(served.engine.batches) == 1
        errors = fails_in_place(client, ["1", "down"])
        assert "the engine is down" in str(errors[0])
        client.close()


# --- the format, as others see it ----------------------------------------------------------------


def test_the_format_is_search_r1s() -> None:
    document = {"id": "p1", "title": "Title 1", "text": "About 1 number 1."}
    document["contents"] = '"Title 1"\nAbout 1 number 1.'
    with Served() as served:
        asked = {"queries": ["1", "x"], "topk": 3, "return_scores": True}
        expected = {"result": [[{"document": document, "score": 8.0}], []]}
        assert served.post(asked) == (200, expected)
        assert served.post({"queries": ["1"]}) == (200, {"result": [[document]]})
        assert served.post({"queries": ["1"], "topk": None, "other": 1})[0] == 200
        assert served.post({"queries": []}) == (200, {"result": []})
        _, body = served.post({"queries": ["1 2 3 4 5 6 7"]})
        assert len(body["result"][0]) == 5  # where a request does not say


def test_a_failed_query_fails_the_request_of_others() -> None:
    with Served() as served:
        status, body = served.post({"queries": ["1", "fail 2"]})
        assert status == 502
        assert body == {"error": "1 of 2 queries failed: no answer for 'fail 2'"}
        status, body = served.post({"queries": ["1", "fail 2"]}, Prefer="handling=lenient")
        assert status == 200
        assert body["result"][1] == {"error": "no answer for 'fail 2'"}
        status, headers, body = served.ask("POST", "/retrieve", b'{"queries": ["down"]}')
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body) == {"error": "the engine is down"}


def test_a_bug_of_the_engine_is_not_told_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with Served() as served:
        status, body = served.post({"queries": ["crash"]})
        assert status == 500
        assert "bug" not in body["error"]
        assert "a bug in the retriever" in caplog.text
        assert served.post({"queries": ["1"]})[0] == 200


def test_a_single_query_is_taken_as_skyrl_sends_it(shared: Served) -> None:
    assert shared.post({"query": "1"}) == shared.post({"queries": ["1"]})
    assert shared.post({"query": ["1"]})[0] == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"queries=1", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"x": ' + b"[" * 100_000, "not JSON"),
        (b'{"queries": ["\xed\xa0\x80"]}', "not JSON"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `queries`"),
        (b'{"queries": "one"}', "Expected `array`, got `str` - at `$.queries`"),
        (b'{"queries": ["one", 2]}', "Expected `str`, got `int` - at `$.queries[1]`"),
        (b'{"queries": ["1","2","3","4"]}', "4 queries; a request has at most 3"),
        (b'{"queries": ["1"], "topk": 0}', "'topk' must be a whole number from 1 to 1000"),
        (b'{"queries": ["1"], "topk": 1001}', "'topk' must be"),
        (b'{"queries": ["1"], "topk": 99999999999999999999}', "'topk' must be"),
        (b'{"queries": ["1"], "topk": 2.0}', "got `float` - at `$.topk`"),
        (b'{"queries": ["1"], "topk": true}', "got `bool` - at `$.topk`"),
        (b'{"queries": ["1"], "return_scores": "yes"}', "got `str` - at `$.return_scores`"),
        (b'{"queries": ["1", "2"], "topk": 1000}', "2 queries times topk 1000 is more than 1999"),
    ],
)
def test_bad_requests_are_refused_and_told_why(body: bytes, message: str, shared: Served) -> None:
    searched = len(shared.engine.batches)
    status, headers, answer = shared.ask("POST", "/retrieve", body)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    assert message in json.loads(answer)["error"]
    assert len(shared.engine.batches) == searched


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/retrieve", 405),
        ("GET", "/", 404),
        ("POST", "/search", 404),
        ("POST", "/health", 405),
        ("PUT", "/retrieve", 405),
        ("DELETE", "/retrieve", 405),
    ],
)
def test_other_requests_are_refused(method: str, path: str, status: int, shared: Served) -> None:
    code, headers, body = shared.ask(method, path, b"{}" if method == "POST" else None)
    assert (code, headers["Content-Type"]) == (status, "application/json")
    assert "there are POST /retrieve, GET /health and GET /metrics" in json.loads(body)["error"]


def test_large_answers_are_refused_and_nothing_else_with_them() -> None:
    with Served(answer=2_000) as served:
        few, many = {"queries": ["1"]}, {"queries": ["1"] * 20}
        assert served.post(few)[0] == 200
        status, body = served.post(many)
        assert status == 413
        assert "the answer has more than 2000 bytes" in body["error"]
        assert served.post(few)[0] == 200
        client = HttpRetriever(served.server.url)  # splits what is too large
        assert client.search(["1"] * 20, 5) == Engine().search(["1"] * 20, 5)
        client.close()


def test_queries_are_cut_where_the_environment_cuts_them() -> None:
    with Served() as served:
        assert served.post({"queries": ["x" * 1_000_000, "\u00e9" * 1_000]})[0] == 200
        assert served.engine.batches == [("x" * 1_000, "\u00e9" * 1_000)]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head("POST /retrieve", "Content-Length: 200001"), 413),
        (head("POST /retrieve", f"Content-Length: {'9' * 20}"), 413),
        (head("POST /retrieve", f"Content-Length: {'9' * 30}"), 400),
        (head("POST /retrieve", "Content-Length: -1"), 400),
        (head("POST /retrieve", "Content-Length: ten"), 400),
        (head("POST /retrieve", "Content-Length: \xb2"), 400),
        (head("POST /retrieve"), 411),
        (head("POST /retrieve", "Transfer-Encoding: chunked"), 411),
        (head("POST /retrieve", "Content-Length: 2", "Transfer-Encoding: chunked"), 411),
        (head("POST /retrieve", "Content-Length: 2", "Content-Length: 3"), 400),
        (head("POST /retrieve", "Content-Length: 2, 3"), 400),
        (head("POST /retrieve", "Content-Length : 2"), 400),
        (head("GET /health", "Content-Length: 35"), 400),
        (head("GET /health", "Transfer-Encoding: chunked"), 400),
        (head("GET /health", "no colon"), 400),
        (head("GET /health", "Host: other"), 400),
        (b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 20_000, 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    ],
)
def test_requests_whose_end_is_unclear_are_refused_unread(
    request_: bytes, status: int, shared: Served
) -> None:
    """A second request is hidden in what follows; no answer to it may come."""
    searched = len(shared.engine.batches)
    hidden = head("POST /retrieve", "Content-Length: 18") + b'{"queries": ["1"]}'
    if b"chunked" in request_:
        hidden = b"0\r\n\r\n" + hidden
    with shared.connect() as connection:
        connection.sendall(request_ + hidden)
        if status == 413:  # the rest of the announced body is discarded
            connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert answer.count(b"HTTP/1.1") == 1
    assert len(shared.engine.batches) == searched


def test_connections_are_kept() -> None:
    with Served() as served:
        connection = http.client.HTTPConnection(*served.address, timeout=TIMEOUT)
        connection.connect()
        kept = connection.sock
        for _ in range(3):
            connection.request("POST", "/retrieve", b'{"queries": ["1"]}')
            assert connection.getresponse().read()
            assert connection.sock is kept
        connection.close()


# --- limits ---------------------------------------------------------------------------------------


def test_searches_at_once_are_bounded_and_the_rest_waits_or_is_sent_away() -> None:
    gate = Gate()
    with Served(gate, searches=2, waiting=2) as served, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.post, {"queries": [str(i)]}) for i in range(4)]
        for _ in range(2):
            assert gate.asked.acquire(timeout=TIMEOUT)
        wait_until(lambda: served.server.waiting == 2)
        status, headers, body = served.ask("POST", "/retrieve", b'{"queries": ["9"]}')
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body) == {"error": "too many requests wait"}
        assert served.ask("GET", "/health")[0] == 200
        gate.opened.set()
        assert [each.result(TIMEOUT)[0] for each in asked] == [200] * 4
        assert gate.most == 2


def test_a_busy_server_refuses_before_it_reads_the_body() -> None:
    gate = Gate()
    with Served(gate, searches=1, waiting=0) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, {"queries": ["1"]})
        assert gate.asked.acquire(timeout=TIMEOUT)
        with served.connect() as late:
            late.sendall(head("POST /retrieve", "Content-Length: 100000"))
            assert late.recv(1000).startswith(b"HTTP/1.1 503 ")
        with served.connect() as late:
            late.sendall(head("POST /retrieve", "Content-Length: 9", "Expect: 100-continue"))
            answer = received(late)  # it closes: the client may or may not send its body now
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in answer.lower()
        gate.opened.set()
        assert asked.result(TIMEOUT)[0] == 200


def test_a_client_that_retries_at_once_waits_for_its_refusal() -> None:
    gate = Gate()
    with (
        Served(gate, searches=1, waiting=0, refusal_seconds=1.0) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(served.post, {"queries": ["1"]})
        assert gate.asked.acquire(timeout=TIMEOUT)
        with served.connect() as late:
            late.sendall(head("POST /retrieve", "Content-Length: 2") + b"{}")
            late.settimeout(0.2)
            with pytest.raises(TimeoutError):
                late.recv(1000)
        gate.opened.set()
        assert asked.result(TIMEOUT)[0] == 200


def test_the_bytes_of_waiting_requests_are_bounded() -> None:
    gate = Gate()
    large = json.dumps({"queries": ["1" + " " * 50_000]}).encode()
    with Served(gate, searches=1, memory=240_000) as served, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(served.ask, "POST", "/retrieve", large) for _ in range(2)]
        wait_until(lambda: served.server.waiting == 1)
        assert served.metric("memory_bytes") == 2 * len(large)
        assert served.ask("POST", "/retrieve", large)[0] == 503
        small = pool.submit(served.post, {"queries": ["1"]})
        wait_until(lambda: served.server.waiting == 2)
        gate.opened.set()
        assert [each.result(TIMEOUT)[0] for each in asked] == [200, 200]
        assert small.result(TIMEOUT)[0] == 200
        wait_until(lambda: served.metric("memory_bytes") == 0)


def test_a_body_counts_as_it_comes() -> None:
    """Clients that announce large bodies and send nothing take no room from others."""
    with (
        Served(memory=200_000, body=90_000) as served,
        served.connect() as first,
        served.connect() as second,
    ):
        for connection in (first, second):
            connection.sendall(head("POST /retrieve", "Content-Length: 90000"))
        assert served.post({"queries": ["1"]})[0] == 200
        first.sendall(b" " * 60_000)
        wait_until(lambda: served.metric("memory_bytes") == 60_000)
        second.sendall(b" " * 60_000)
        assert second.recv(1000).startswith(b"HTTP/1.1 503 ")
        first.sendall(b" " * 30_000)
        assert first.recv(1000).startswith(b"HTTP/1.1 400 ")


class Large(Engine):
    """An engine with answers of 16 MB."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.batches.append(tuple(queries))
        return [[Hit(Passage("p", "", "x" * (8 << 20)), 1.0)] for _ in queries]


def asks_and_reads_nothing(served: Served) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(TIMEOUT)
    client.connect(served.address)
    client.sendall(head("POST /retrieve", "Content-Length: 18") + b'{"queries": ["1"]}')
    return client


def reads_nothing(served: Served) -> socket.socket:
    """A client for whom an answer of 16 MB waits."""
    client = asks_and_reads_nothing(served)
    wait_until(lambda: served.metric("memory_bytes") > 16 << 20)
    return client


def test_answers_that_are_not_read_count_and_are_dropped_at_their_deadline() -> None:
    ask = head("POST /retrieve", "Content-Length: 18") + b'{"queries": ["1"]}'
    with (
        Served(Large(), memory=24 << 20, answer=17 << 20) as served,
        reads_nothing(served) as client,
    ):
        assert served.post({"queries": ["1"]})[0] == 503  # the address holds more than half
        with served.connect("127.0.0.2") as other:
            other.sendall(ask)
            assert other.recv(1000).startswith(b"HTTP/1.1 200 ")
        answer = b""
        while len(answer) < 16 << 20:
            answer += client.recv(1 << 20)
        wait_until(lambda: served.metric("memory_bytes") == 0)
        assert served.post({"queries": ["1"]})[0] == 200
    with Served(Large(), answer=17 << 20, answer_seconds=0.2) as served, reads_nothing(served):
        wait_until(lambda: served.metric("memory_bytes") == 0)


def test_requests_that_waited_are_refused_while_answers_are_not_read() -> None:
    """They were taken when there was room, and each would add an answer."""
    gate = Gate(engine=Large())
    with Served(gate, searches=1, memory=24 << 20, answer=17 << 20) as served:
        clients = [asks_and_reads_nothing(served) for _ in range(3)]
        wait_until(lambda: served.server.waiting == 2)
        gate.opened.set()
        for client in clients[1:]:
            assert client.recv(1000).startswith(b"HTTP/1.1 503 ")
        for client in clients:
            client.close()
        assert len(gate.batches) == 1


def test_a_client_that_left_while_it_waited_costs_no_search() -> None:
    gate = Gate()
    with Served(gate, searches=1) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, {"queries": ["1"]})
        assert gate.asked.acquire(timeout=TIMEOUT)
        with served.connect() as impatient:
            impatient.sendall(head("POST /retrieve", "Content-Length: 18") + b'{"queries": ["2"]}')
            wait_until(lambda: served.server.waiting == 1)
        assert served.ask("GET", "/health")[0] == 200  # the server has seen the client leave
        gate.opened.set()
        assert asked.result(TIMEOUT)[0] == 200
        assert served.post({"queries": ["3"]})[0] == 200
        assert gate.batches == [("1",), ("3",)]


def test_connections_are_bounded() -> None:
    with Served(connections=1) as served:
        with served.connect() as first:
            first.sendall(head("GET /health"))
            assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
            with served.connect() as second:
                assert second.recv(1000).startswith(b"HTTP/1.1 503 ")
        wait_until(lambda: served.ask("GET", "/health")[0] == 200)  # it noticed that the first left


def test_an_address_has_a_share_of_the_connections() -> None:
    with Served(connections=5) as served, served.connect(), served.connect():
        with served.connect() as third:
            assert third.recv(1000).startswith(b"HTTP/1.1 503 ")
        with served.connect("127.0.0.2") as other:
            other.sendall(head("GET /health"))
            assert other.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: localh",
        head("POST /retrieve", "Content-Length: 10") + b"123",
        head("POST /retrieve", "Content-Length: 10", "Expect: 100-continue"),
        head("POST /retrieve", "Content-Length: 99999999999") + b"123",  # refused, body discarded
        head("GET /health") + b"GET /health HTTP/1.1\r\n",
        head("POST /retrieve", "Content-Length: 2") + b"{}" + head("POST /retrieve") * 2,
    ],
    ids=["nothing", "header", "body", "expect", "refused", "pipelined", "pipelined bodies"],
)
def test_a_client_that_stops_within_a_request_is_dropped(sent: bytes) -> None:
    with Served(request_seconds=0.2, idle_seconds=100) as served, served.connect() as silent:
        silent.sendall(sent)
        received(silent)  # ends when the server closes


@pytest.mark.parametrize(
    "begin",
    [b"GET /health HTTP/1.1\r\nHost: ", head("POST /retrieve", "Content-Length: 100000")],
    ids=["header", "body"],
)
def test_a_request_has_one_deadline_from_its_first_byte_to_its_last(begin: bytes) -> None:
    with (
        Served(request_seconds=0.3) as served,
        served.connect() as slow,
        suppress(ConnectionError),  # the server closed while the client was still sending
    ):
        slow.sendall(begin)
        slow.settimeout(0.05)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            slow.sendall(b"a")
            with suppress(TimeoutError):
                assert slow.recv(1000) == b""
                break
        else:
            pytest.fail("the server still reads")


def test_an_idle_connection_is_closed() -> None:
    with Served(idle_seconds=0, request_seconds=100) as served, served.connect() as idle:
        idle.sendall(head("GET /health"))
        assert received(idle).startswith(b"HTTP/1.1 200 ")


# --- who may ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:8000"}, 200),
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "search.example.org"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.2"}, 403),
        ({"Host": "evil.example:80@localhost"}, 200),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": ""}, 403),
    ],
)
def test_web_pages_of_other_sites_cannot_search(
    headers: dict[str, str], status: int, shared: Served
) -> None:
    searched = len(shared.engine.batches)
    assert shared.post({"queries": ["1"]}, **headers)[0] == status
    assert len(shared.engine.batches) == searched + (status == 200)


def test_a_server_on_all_addresses_answers_to_the_one_that_was_asked() -> None:
    server = RetrievalServer(Engine(), "0.0.0.0")
    port = int(server.url.split(":")[2].split("/")[0])
    try:
        for address, status in (("127.0.0.1", 200), ("127.0.0.3", 200), ("rebound.example", 403)):
            to = "127.0.0.1" if address == "rebound.example" else address
            connection = http.client.HTTPConnection(to, port, timeout=TIMEOUT)
            connection.request("GET", "/health", headers={"Host": f"{address}:{port}"})
            assert connection.getresponse().status == status
            connection.close()
    finally:
        server.stop()


def test_a_key_guards_everything_but_the_health() -> None:
    with Served(key="s3cret") as served:
        assert served.ask("GET", "/health")[0] == 200
        for wrong in (
            "",
            "Bearer s3cre",
            "Bearer s3cret2",
            "s3cret",
            "Basic s3cret",
            "Bearer \xe9",
        ):
            for method, path in (("GET", "/metrics"), ("POST", "/retrieve"), ("GET", "/other")):
                body = b'{"queries": ["1"]}' if method == "POST" else None
                status, headers, answer = served.ask(method, path, body, Authorization=wrong)
                assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
                assert b"s3cret" not in answer
        assert served.engine.batches == []
        right = {"Authorization": "Bearer s3cret"}
        assert served.post({"queries": ["1"]}, **right)[0] == 200
        assert served.ask("GET", "/metrics", Authorization="Bearer s3cret")[0] == 200


def test_our_client_sends_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with Served(key="s3cret") as served:
        with closing(open_retriever(served.server.url, None)) as client:
            (error,) = fails_in_place(client, ["1"])
            assert "status 401: " in str(error)
        monkeypatch.setenv("RETRIEVER_API_KEY", "s3cret")
        with closing(open_retriever(served.server.url, None)) as client:
            assert client.search(["1"], 5) == Engine().search(["1"], 5)
        monkeypatch.setenv("RETRIEVER_API_KEY", "wrong")
        with closing(open_retriever(served.server.url, None)) as client:
            (error,) = fails_in_place(client, ["1"])
            assert "wrong" not in str(error)


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_count() -> None:
    with Served() as served:
        served.post({"queries": ["1", "2"]})
        served.post({"queries": ["1", "fail 2"]}, Prefer="handling=lenient")
        served.post({"queries": ["down"]})
        served.post({"queries": 5})
        status, headers, body = served.ask("GET", "/metrics")
        assert (status, headers.get_content_type()) == (200, "text/plain")
        lines = body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values.pop("research_env_search_seconds_sum")) > 0
        values = {name: value for name, value in values.items() if "_created" not in name}
        assert values == {
            'research_env_requests_total{code="200"}': "2.0",
            'research_env_requests_total{code="400"}': "1.0",
            'research_env_requests_total{code="503"}': "1.0",
            "research_env_queries_total": "5.0",
            "research_env_failed_queries_total": "2.0",
            "research_env_searches_in_flight": "0.0",
            "research_env_requests_waiting": "0.0",
            "research_env_memory_bytes": "0.0",
            "research_env_search_seconds_count": "3.0",
        }
        assert lines.count("# TYPE research_env_requests_total counter") == 1


# --- stop -----------------------------------------------------------------------------------------


def test_a_stop_finishes_what_is_in_flight_and_takes_no_more() -> None:
    gate = Gate()
    served = Served(gate)
    idle = socket.create_connection(served.address, TIMEOUT)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(served.ask, "POST", "/retrieve", b'{"queries": ["1"]}')
        assert gate.asked.acquire(timeout=TIMEOUT)
        stopping = pool.submit(served.server.stop, TIMEOUT)
        assert idle.recv(10) == b""  # one that asks nothing is closed at once
        with pytest.raises(OSError):
            socket.create_connection(served.address, 1.0).close()
        assert not stopping.done()
        gate.opened.set()
        status, headers, body = asked.result(TIMEOUT)
        assert (status, headers["Connection"]) == (200, "close")
        assert json.loads(body)["result"][0][0]["id"] == "p1"
        stopping.result(TIMEOUT)
    idle.close()
    served.server.stop()  # twice is harmless


def test_a_stop_finishes_a_request_whose_body_is_still_coming() -> None:
    served = Served()
    body = b'{"queries": ["1"]}'
    with (
        socket.create_connection(served.address, TIMEOUT) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        length = f"Content-Length: {len(body)}"
        client.sendall(head("POST /retrieve", length, "Expect: 100-continue"))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        stopping = pool.submit(served.server.stop, TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while True:
            assert time.monotonic() < deadline
            try:
                socket.create_connection(served.address, 1.0).close()
            except OSError:
                break
        time.sleep(0.1)  # for connections at rest to be closed; this one is not
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        stopping.result(TIMEOUT)
    assert served.engine.batches == [("1",)]


def test_a_stop_does_not_wait_forever() -> None:
    gate = Gate()
    served = Served(gate)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, {"queries": ["1"]})
        assert gate.asked.acquire(timeout=TIMEOUT)
        served.server.stop(patience=0.05)
        gate.opened.set()
        assert asked.result(TIMEOUT)[0] == 503


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("signal_", "key"), [(signal.SIGTERM, ""), (signal.SIGINT, "s3cret")])
def test_the_command_serves_until_it_is_told_to_stop(
    tmp_path: Path, signal_: int, key: str
) -> None:
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text('{"id": "p1", "title": "Ada", "text": "Ada founded Nordwind."}\n')
    command = [sys.executable, "-m", "research_env.cli", "serve", "--corpus", str(corpus)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--allowed-hosts", "one.example", "two.example"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RESEARCH_CACHE": str(tmp_path / "cache"), "RETRIEVER_API_KEY": key},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].rstrip(";")
        for host, status in (("two.example", 200), ("three.example", 403)):
            health = httpx.get(url.replace("/retrieve", "/health"), headers={"Host": host})
            assert health.status_code == status
        assert httpx.post(url, json={"queries": []}).status_code == (401 if key else 200)
        client = HttpRetriever(url, key=key)
        (found,) = client.search(["who founded Nordwind"], 1)
        assert isinstance(found, list)
        assert found[0].passage == Passage("p1", "Ada", "Ada founded Nordwind.")
        process.send_signal(signal_)
        _, errors = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, errors) == (0, "")
        client.close()
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_the_command_though_its_engine_hangs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = f"http://127.0.0.1:{silent.getsockname()[1]}/retrieve?deadline=600"
        command = [sys.executable, "-m", "research_env.cli", "serve", "--retriever", engine]
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[1].rstrip(";")
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(httpx.post, url, json={"queries": ["1"]}, timeout=TIMEOUT)
                silent.settimeout(TIMEOUT)
                connection, _ = silent.accept()
                process.send_signal(signal.SIGTERM)
                while _takes_requests(url):
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
                assert asked.exception(TIMEOUT) is not None
                connection.close()
        finally:
            process.kill()
            process.communicate()


def _takes_requests(url: str) -> bool:
    try:
        return httpx.get(url.replace("/retrieve", "/metrics")).status_code == 200
    except httpx.TransportError:
        return False


def test_the_command_refuses_what_it_cannot_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text('{"id": "p1", "title": "Ada", "text": "Ada founded Nordwind."}\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["serve"], "give --retriever URL, --dataset NAME or --corpus FILE"),
            (["serve", "--dataset", "miniworld", "--port", port], "cannot listen on 127.0.0.1"),
            (["serve", "--corpus", str(corpus), "--port", port], "cannot listen on 127.0.0.1"),
            (["serve", "--corpus", str(corpus), "--port", "70000"], "cannot listen on"),
        ):
            with pytest.raises(SystemExit) as exit_:
                cli.main(arguments)
            assert exit_.value.code == 2
            assert message in capsys.readouterr().err


def test_the_command_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    words = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "0.0.0.0 lets other machines in, without any authentication unless" in words
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "research_env.retrieval.serve")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--dataset", "miniworld"])
    assert exit_.value.code == 2
    assert "needs fastapi: pip install 'research-env[serve]'" in capsys.readouterr().err


def test_a_fingerprint_that_takes_long_holds_up_no_search() -> None:
    """As if the engine asked another server for it."""
    asked, known = threading.Event(), threading.Event()

    class Slow(Engine):
        @property
        def fingerprint(self) -> str:
            asked.set()
            known.wait(TIMEOUT)
            return "f"

    with Served(Slow()) as served, ThreadPoolExecutor(1) as pool:
        health = pool.submit(served.ask, "GET", "/health")
        assert asked.wait(TIMEOUT)
        assert served.post({"queries": ["1"]})[0] == 200
        assert not health.done()
        known.set()
        assert health.result(TIMEOUT)[0] == 200


def test_two_servers_of_one_index_have_one_fingerprint() -> None:
    engine, other = Engine(), Engine()
    engine.fingerprint = "f" * 64  # type: ignore[attr-defined]
    with Served(engine) as first, Served(engine) as second, Served(other) as unknown:
        clients = [open_retriever(each.server.url, None) for each in (first, second, unknown)]
        said = [client.fingerprint for client in clients]  # type: ignore[attr-defined]
        assert said == ["f" * 64, "f" * 64, None]
        first.server.stop(patience=TIMEOUT)
        assert clients[0].fingerprint == "f" * 64  # type: ignore[attr-defined]
        for client in clients:
            client.close()
