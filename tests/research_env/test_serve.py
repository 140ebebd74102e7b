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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from research_env import cli
from research_env.errors import RetrievalError
from research_env.retrieval import Hit, Passage, open_retriever
from research_env.retrieval.http import HttpRetriever
from research_env.retrieval.retry import Retry
from research_env.retrieval.serve import Limits, RetrievalServer
from tests.research_env.fakes import Engine
from tests.research_env.retriever_contract import (
    CLAUSES,
    WORDS,
    Clause,
    contract_index,
    environments_travel,
    fails_in_place,
)

PATIENCE = 20.0  # seconds after which a test that hangs fails
QUICK = Retry(deadline=2.0, first=0.001, longest=0.01)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def url(index: Path) -> Iterator[str]:
    """Of a server over the embedded engine."""
    engine = open_retriever(f"embedded:{index}?corpus=any", None)
    server = RetrievalServer(engine)
    yield server.url
    server.stop()
    engine.close()


class Served:
    """A fake engine and its server."""

    def __init__(self, engine: Any = None, **limits: Any) -> None:
        self.engine = engine or Engine()
        self.server = RetrievalServer(self.engine, limits=Limits(**limits))
        self.address = ("127.0.0.1", int(self.server.url.split(":")[2].split("/")[0]))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(patience=PATIENCE)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        answer = response.status, dict(response.headers), response.read()
        connection.close()
        return answer

    def post(self, value: object, **headers: str) -> tuple[int, Any]:
        status, _, body = self.ask("POST", "/retrieve", json.dumps(value).encode(), **headers)
        return status, json.loads(body)


class Gate(Engine):
    """An engine that answers no batch before it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.opened = threading.Event()
        self.at_once = self.most_at_once = 0

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        self.asked.release()
        assert self.opened.wait(PATIENCE)
        self.at_once -= 1
        return super().search(queries, top_k)


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
        assert (
            len(served.engine.batches) == 1
        )  # the engine's own retries are spent: no more of them
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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"queries=1", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "must be an object"),
        (b"{}", "'queries' must be a list of strings"),
        (b'{"queries": "one"}', "'queries' must be a list of strings"),
        (b'{"queries": ["one", 2]}', "'queries' must be a list of strings"),
        (b'{"queries": ["1","2","3","4"]}', "4 queries; a request has at most 3"),
        (b'{"queries": ["1"], "topk": 0}', "'topk' must be a whole number from 1 to 1000"),
        (b'{"queries": ["1"], "topk": 1001}', "'topk' must be"),
        (b'{"queries": ["1"], "topk": 2.0}', "'topk' must be"),
        (b'{"queries": ["1"], "topk": true}', "'topk' must be"),
        (b'{"queries": ["1"], "return_scores": "yes"}', "'return_scores' must be"),
    ],
)
def test_bad_requests_are_refused_and_told_why(body: bytes, message: str) -> None:
    with Served(queries=3) as served:
        status, headers, answer = served.ask("POST", "/retrieve", body)
        assert (status, headers["Content-Type"]) == (400, "application/json")
        assert message in json.loads(answer)["error"]
        assert served.engine.batches == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/retrieve", 405),
        ("GET", "/", 404),
        ("POST", "/search", 404),
        ("POST", "/health", 404),
        ("PUT", "/retrieve", 501),
        ("DELETE", "/retrieve", 501),
    ],
)
def test_other_requests_are_refused(method: str, path: str, status: int) -> None:
    with Served() as served:
        code, headers, body = served.ask(method, path, b"{}" if method == "POST" else None)
        assert (code, headers["Content-Type"]) == (status, "application/json")
        assert json.loads(body)["error"]


def test_bodies_without_a_length_or_too_long_are_not_read() -> None:
    with Served(body=100) as served:
        status, headers, _ = served.ask("POST", "/retrieve", b"x" * 101)
        assert (status, headers["Connection"]) == (413, "close")
        assert served.ask("POST", "/retrieve", None, Content_Length="9" * 30)[0] == 413
        for length in ("-1", "ten", "²"):
            raw = f"POST /retrieve HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
            with socket.create_connection(served.address, PATIENCE) as connection:
                connection.sendall(raw.encode("latin-1"))
                assert connection.recv(1000).startswith(b"HTTP/1.1 411 ")
        with socket.create_connection(served.address, PATIENCE) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 411 ")
        with socket.create_connection(served.address, PATIENCE) as connection:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")  # TLS to a port without
            assert b"Bad request" in connection.recv(1000)
        assert served.engine.batches == []


def test_connections_are_kept() -> None:
    with Served() as served:
        connection = http.client.HTTPConnection(*served.address, timeout=PATIENCE)
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
            assert gate.asked.acquire(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while served.server.waiting < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status, headers, body = served.ask("POST", "/retrieve", b'{"queries": ["9"]}')
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body) == {"error": "too many searches wait"}
        assert served.ask("GET", "/health")[0] == 200
        gate.opened.set()
        assert [each.result(PATIENCE)[0] for each in asked] == [200] * 4
        assert gate.most_at_once == 2


def test_connections_are_bounded() -> None:
    with Served(connections=1) as served:
        with socket.create_connection(served.address, PATIENCE) as first:
            first.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
            with socket.create_connection(served.address, PATIENCE) as second:
                assert second.recv(1000).startswith(b"HTTP/1.1 503 ")
        deadline = time.monotonic() + PATIENCE
        while served.ask("GET", "/health")[0] != 200:  # once it has noticed that the first left
            assert time.monotonic() < deadline


def test_a_silent_connection_is_closed() -> None:
    with Served(idle=0.1) as served, socket.create_connection(served.address, PATIENCE) as silent:
        silent.sendall(b"POST /retrieve HTTP/1.1\r\nContent-Length: 10\r\n\r\n123")
        assert silent.recv(1000) == b""


def test_a_body_that_drips_is_not_waited_for() -> None:
    with (
        Served(reading=0.3) as served,
        socket.create_connection(served.address, PATIENCE) as slow,
        suppress(ConnectionError),  # it closed while we were still sending
    ):
        slow.sendall(b"POST /retrieve HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
        slow.settimeout(0.05)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            slow.sendall(b" ")
            with suppress(TimeoutError):
                assert slow.recv(1000) == b""
                break
        else:
            pytest.fail("it is still reading")


def test_large_bodies_are_read_a_few_at_a_time_and_small_ones_pass_by() -> None:
    body = json.dumps({"queries": ["1" + " " * 200]}).encode()
    with (
        Served(large=100, larges=1) as served,
        socket.create_connection(served.address, PATIENCE) as slow,
        ThreadPoolExecutor(1) as pool,
    ):
        slow.sendall(
            f"POST /retrieve HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert slow.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        time.sleep(0.1)  # for its turn to be taken
        second = pool.submit(served.ask, "POST", "/retrieve", body)
        assert served.post({"queries": ["1"]})[0] == 200
        with pytest.raises(TimeoutError):
            second.result(0.3)
        slow.sendall(body)
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert second.result(PATIENCE)[0] == 200


def test_a_large_body_that_gets_no_turn_is_sent_away() -> None:
    with (
        Served(large=10, larges=1, reading=0.3) as served,
        socket.create_connection(served.address, PATIENCE) as slow,
        socket.create_connection(served.address, PATIENCE) as late,
    ):
        head = b"POST /retrieve HTTP/1.1\r\nContent-Length: 100\r\n\r\n"
        served.server._server._larges.acquire()  # as a client does that takes its time
        slow.sendall(head)
        late.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert late.recv(1000).startswith(b"HTTP/1.1 503 ")
        served.server._server._larges.release()


def test_metrics_count() -> None:
    with Served() as served:
        served.post({"queries": ["1", "2"]})
        served.post({"queries": ["1", "fail 2"]}, Prefer="handling=lenient")
        served.post({"queries": ["down"]})
        served.post({"queries": 5})
        status, headers, body = served.ask("GET", "/metrics")
        assert (status, headers["Content-Type"]) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        lines = body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values.pop("research_env_search_seconds_sum")) > 0
        assert values == {
            'research_env_requests_total{code="200"}': "2",
            'research_env_requests_total{code="400"}': "1",
            'research_env_requests_total{code="503"}': "1",
            "research_env_queries_total": "5",
            "research_env_failed_queries_total": "2",
            "research_env_searches_in_flight": "0",
            "research_env_requests_waiting": "0",
            "research_env_search_seconds_count": "3",
        }
        assert lines.count("# TYPE research_env_requests_total counter") == 1


# --- stop -----------------------------------------------------------------------------------------


def test_a_stop_finishes_what_is_in_flight_and_takes_no_more() -> None:
    gate = Gate()
    served = Served(gate)
    idle = socket.create_connection(served.address, PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(served.ask, "POST", "/retrieve", b'{"queries": ["1"]}')
        assert gate.asked.acquire(timeout=PATIENCE)
        stopping = pool.submit(served.server.stop, PATIENCE)
        assert idle.recv(10) == b""  # one that asks nothing is closed at once
        with pytest.raises(OSError):
            socket.create_connection(served.address, 1.0).close()
        assert not stopping.done()
        gate.opened.set()
        status, headers, body = asked.result(PATIENCE)
        assert (status, headers["Connection"]) == (200, "close")
        assert json.loads(body)["result"][0][0]["id"] == "p1"
        stopping.result(PATIENCE)
    idle.close()
    served.server.stop()  # twice is harmless


def test_a_stop_finishes_a_request_whose_body_is_still_coming() -> None:
    served = Served()
    body = b'{"queries": ["1"]}'
    with (
        socket.create_connection(served.address, PATIENCE) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        head = f"POST /retrieve HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        stopping = pool.submit(served.server.stop, PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline
            try:
                socket.create_connection(served.address, 1.0).close()
            except OSError:
                break
        time.sleep(0.1)  # for connections at rest to be closed; this one is not
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        stopping.result(PATIENCE)
    assert served.engine.batches == [("1",)]


def test_a_stop_does_not_wait_for_ever() -> None:
    gate = Gate()
    served = Served(gate)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, {"queries": ["1"]})
        assert gate.asked.acquire(timeout=PATIENCE)
        served.server.stop(patience=0.05)
        gate.opened.set()
        asked.result(PATIENCE)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, signal_: int) -> None:
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text('{"id": "p1", "title": "Ada", "text": "Ada founded Nordwind."}\n')
    command = [sys.executable, "-m", "research_env.cli", "serve", "--corpus", str(corpus)]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RESEARCH_CACHE": str(tmp_path / "cache")},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].rstrip(";")
        client = HttpRetriever(url)
        (found,) = client.search(["who founded Nordwind"], 1)
        assert isinstance(found, list)
        assert found[0].passage == Passage("p1", "Ada", "Ada founded Nordwind.")
        process.send_signal(signal_)
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")
        client.close()
    finally:
        process.kill()
        process.communicate()


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
            (["serve", "--dataset", "miniworld", "--port", port], "cannot listen at 127.0.0.1"),
            (["serve", "--corpus", str(corpus), "--port", port], "cannot listen at 127.0.0.1"),
            (["serve", "--corpus", str(corpus), "--port", "70000"], "cannot listen at"),
        ):
            with pytest.raises(SystemExit) as exit_:
                cli.main(arguments)
            assert exit_.value.code == 2
            assert message in capsys.readouterr().err
