"""Hostile requests to ``research-env serve``: the section ``serve`` of :mod:`benchmarks.hostile`.

Server and clients share one process, whose peak of memory is measured. Clients share the bytes that
they send and keep none of what they receive, so the peak is the server's.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from benchmarks.hostile_trials import MUTATIONS, Case, GeneratedPassages, mutated
from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit
from research_env.retrieval.bm25 import retriever as bm25
from research_env.retrieval.serve import RetrievalServer
from research_env.retrieval.serve_guard import Limits

_TIMEOUT = 40.0  # seconds for an answer
_LIMITS = Limits(request_seconds=2.0, answer_seconds=2.0, refusal_seconds=0.0)
_BODY = 16 << 20  # bytes; the most that the server takes
_REFUSALS = (400, 401, 403, 404, 405, 408, 411, 413, 414, 431, 503)


class _Gate:
    """An engine that can be held, so that requests wait for it."""

    def __init__(self, folder: Path) -> None:
        self.engine = bm25.EmbeddedRetriever(folder)
        self.open = threading.Event()
        self.open.set()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        if not self.open.wait(_TIMEOUT):
            raise RetrievalError("held too long")
        return self.engine.search(queries, top_k)

    def close(self) -> None:
        self.engine.close()


def serve_cases(folder: Path) -> Iterator[Case]:
    """Requests that cost much, come slowly, hide others, or come from foreign pages."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # clients that left
    if not (folder / "index").exists():
        bm25.build_index(GeneratedPassages(), folder / "index")
    gate = _Gate(folder / "index")
    server = RetrievalServer(gate, limits=_LIMITS)
    port = int(server.url.split(":")[2].split("/")[0])
    _refused(_ask(port, _post(["w1"], 5)))  # compiled before memory is measured
    try:
        yield from _expensive(port)
        yield Case("60 requests of 16 MB wait", partial(_wait, port, gate, server))
        yield Case("60 clients read no answer", partial(_read_nothing, port))
        yield from _slow(port)
        for what, request in _FRAMING.items():
            yield Case(f"framing: {what}", partial(_hide, port, request))
        for line in _FOREIGN:
            yield Case(f"foreign: {line!r}", partial(_foreign, port, line))
        good = _post(["w1 w2", "w3"], 5)
        for seed in range(MUTATIONS):
            yield Case(f"changed ({seed})", partial(_mutate, port, good, seed))
    finally:
        server.stop()
        gate.close()


def _head(request: str, *lines: str) -> bytes:
    every = [f"{request} HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""]
    return "\r\n".join(every).encode("latin-1")


def _post(queries: Sequence[str], top_k: int) -> bytes:
    body = json.dumps({"queries": queries, "topk": top_k}).encode()
    return _head("POST /retrieve", f"Content-Length: {len(body)}") + body


def _ask(port: int, *parts: bytes, source: str = "127.0.0.1") -> int:
    """Send bytes and read what comes until the server closes.

    Returns:
        The status of the only answer; 0 if the server closed without one.

    Raises:
        RuntimeError: there was more than one answer.
        TimeoutError: the server neither answers nor closes.
    """
    with socket.create_connection(("127.0.0.1", port), _TIMEOUT, (source, 0)) as connection:
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        first = b""
        with suppress(ConnectionError):
            while received := connection.recv(1 << 16):
                first += received[: 20_000 - len(first)]
    if first.count(b"HTTP/1.1 ") > 1:
        raise RuntimeError("two answers to one request")
    return int(first.split(b" ", 2)[1]) if first else 0


def _refused(*statuses: int) -> bool:
    """Whether all requests, or else none of them, were refused as they should be.

    Raises:
        RuntimeError: the server failed, or did not answer.
    """
    for status in statuses:
        if status != 200 and status not in _REFUSALS:
            raise RuntimeError(f"status {status}")
    return all(status != 200 for status in statuses)


# --- cost -----------------------------------------------------------------------------------------


def _expensive(port: int) -> Iterator[Case]:
    words = {
        "8 kB: 1,024 words, topk 1000": _post(["w1"] * 1024, 1000),
        "1,025 queries": _post(["w1"] * 1025, 1),
        "topk 10**9": _post(["w1"], 10**9),
        "the most hits allowed": _post(["w1"] * 20, 1000),
        "a query of 15 MB": _post(["w1 " * (5 << 20)], 5),
        "nested 100,000 deep": _head("POST /retrieve", "Content-Length: 100000") + b"[" * 100_000,
        "100,000 empty queries": _post([""] * 100_000, 1),
        "17 MB": _head("POST /retrieve", f"Content-Length: {17 << 20}") + b" " * (17 << 20),
    }
    for what, request in words.items():
        yield Case(what, partial(_at_once, port, request, 1))
        yield Case(f"{what}, 32 at once", partial(_at_once, port, request, 32))


def _at_once(port: int, request: bytes, count: int, place: Path) -> bool:
    with ThreadPoolExecutor(count) as pool:
        return _refused(*pool.map(lambda _: _ask(port, request), range(count)))


def _wait(port: int, gate: _Gate, server: RetrievalServer, place: Path) -> bool:
    """Hold the engine until no more requests can wait, then let it answer."""
    query = json.dumps({"queries": ["w1"], "topk": 5}).encode()
    length = _head("POST /retrieve", f"Content-Length: {_BODY}")
    padding = b" " * (_BODY - len(query))
    gate.open.clear()
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(_ask, port, length, query, padding) for _ in range(60)]
        while sum(each.done() for each in asked) + server.waiting < 60 - _LIMITS.searches:
            time.sleep(0.05)
        gate.open.set()
        statuses = [each.result() for each in asked]
    if 200 not in statuses:
        raise RuntimeError("nobody was answered")
    return _refused(*(status for status in statuses if status != 200))


def _read_nothing(port: int, place: Path) -> bool:
    """Ask for large answers and read none; afterwards another client must be answered."""
    with _connections(port, 60, _post(["w1"] * 20, 1000)):
        time.sleep(_LIMITS.answer_seconds + 1)
    return _refused(_ask(port, _post(["w1"], 5)))


# --- time -----------------------------------------------------------------------------------------


@contextmanager
def _connections(port: int, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    opened = []
    try:
        for _ in range(count):
            with suppress(OSError):
                opened.append(socket.create_connection(("127.0.0.1", port), _TIMEOUT))
                opened[-1].sendall(sent)
        yield opened
    finally:
        for each in opened:
            each.close()


def _slow(port: int) -> Iterator[Case]:
    begins = {
        "nothing": b"",
        "a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
        "a request line": b"GET /",
        "a body": _head("POST /retrieve", "Content-Length: 100000"),
    }
    for what, begin in begins.items():
        yield Case(f"{what}, a byte at a time", partial(_trickle, port, begin))
    yield Case("512 connections with slow headers", partial(_crowd, port, begins["a header"]))


def _trickle(port: int, begin: bytes, place: Path) -> bool:
    """Whether the server ends a request that would take an hour, at its deadline."""
    with socket.create_connection(("127.0.0.1", port), 0.2) as connection:
        connection.sendall(begin)
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            try:
                if begin:
                    connection.sendall(b"a")
                if not connection.recv(1000):
                    return True
            except TimeoutError:
                continue
            except ConnectionError:
                return True
    raise RuntimeError("the connection stayed open")


def _crowd(port: int, begin: bytes, place: Path) -> bool:
    """One address holds all the connections that it can; another one must be answered."""
    with _connections(port, 512, begin):
        return _refused(_ask(port, _post(["w1"], 5), source="127.0.0.2"))


# --- framing and foreign pages --------------------------------------------------------------------

_FRAMING = {
    "two lengths": _head("POST /retrieve", "Content-Length: 2", "Content-Length: 3"),
    "a list of lengths": _head("POST /retrieve", "Content-Length: 2, 3"),
    "length and chunks": _head("POST /retrieve", "Content-Length: 2", "Transfer-Encoding: chunked"),
    "chunks": _head("POST /retrieve", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "unknown encoding": _head("POST /retrieve", "Transfer-Encoding: identity, chunked"),
    "a negative length": _head("POST /retrieve", "Content-Length: -1"),
    "a long length": _head("POST /retrieve", f"Content-Length: {'9' * 30}"),
    "a hexadecimal length": _head("POST /retrieve", "Content-Length: 0x2"),
    "a signed length": _head("POST /retrieve", "Content-Length: +2"),
    "no length": _head("POST /retrieve"),
    "a blank before the colon": _head("POST /retrieve", "Content-Length : 2"),
    "a folded line": _head("POST /retrieve", "X: a\r\n Content-Length: 2"),
    "a bare newline": _head("GET /health", "X: a\nContent-Length: 35"),
    "a bare return": _head("GET /health", "X: a\rContent-Length: 35"),
    "NUL in a value": _head("GET /health", "X: a\0b"),
    "GET with a body": _head("GET /health", "Content-Length: 35"),
    "GET with chunks": _head("GET /health", "Transfer-Encoding: chunked"),
    "no colon": _head("GET /health", "no colon"),
    "two hosts": _head("GET /health", "Host: other"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nX: " + b"x" * 200_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
_FOREIGN = (
    *("Host: evil.example", "Host: localhost.evil.example", "Host: 127.0.0.2", "Host: [::1"),
    *("Host:", "Origin: https://evil.example", "Origin: http://localhost:1", "Origin: null"),
)


def _hide(port: int, request: bytes, place: Path) -> bool:
    """Send a request whose end is unclear, with a second one hidden in what follows."""
    hidden = _post(["w1"], 5)
    return _refused(_ask(port, request + hidden))


def _foreign(port: int, line: str, place: Path) -> bool:
    request = _post(["w1"], 5)
    if line.startswith("Host"):
        request = request.replace(b"Host: localhost", line.encode(), 1)
    else:
        request = request.replace(b"\r\n", f"\r\n{line}\r\n".encode(), 1)
    return _refused(_ask(port, request))


def _mutate(port: int, good: bytes, seed: int, place: Path) -> bool:
    """A request with random changes; what is cut off is ended by closing our side."""
    request = mutated(good, f"request {seed}")
    with socket.create_connection(("127.0.0.1", port), _TIMEOUT) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):
            while received := connection.recv(1 << 16):
                answer += received
    return not answer or _refused(int(answer.split(b" ", 2)[1]))
