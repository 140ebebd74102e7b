"""Offer any retriever over HTTP, in the wire format of Search-R1's retrieval server.

So that the trainers of others can search through us. The format is told in
:mod:`research_env.retrieval.http`; documents hold ``id, title, text, contents``. The server is that
of the standard library, a thread a connection: a request costs it a fraction of a search, and no
dependency comes with it.

- ``POST /retrieve``: 200 and the result; 400 a bad request, 411 no length, 413 too large, 502 a
  query failed, 503 the engine failed or too many searches wait (with ``Retry-After``). Errors are
  ``{"error": "..."}``. The format has no word for one query that failed among others: it fails the
  request, lest "no answer" be read as "no passage". To a client that sends ``Prefer:
  handling=lenient`` the result has ``{"error": "..."}`` in the place of that query instead.
- ``GET /health``: 200 while requests are taken (the engine is not asked).
- ``GET /metrics``: counters in Prometheus' text format.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import Hit, Retriever
from research_env.retrieval.retry import Deadline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes at most."""

    body: int = 16 << 20
    """Bytes of a request."""
    queries: int = 1024
    """Queries of a request."""
    top_k: int = 1000
    """Passages for a query."""
    searches: int = 8
    """Requests that the engine answers at the same time."""
    waiting: int = 64
    """Requests that wait for it; a further one is told to come back."""
    connections: int = 512
    """Open connections."""
    idle: float = 60.0
    """Seconds that a connection may say nothing."""
    reading: float = 60.0
    """Seconds that a body may take to come."""
    large: int = 1 << 20
    """Bytes of a body that counts as large."""
    larges: int = 16
    """Large bodies that are read at the same time; a further one waits ``reading`` at most."""


@dataclass(frozen=True, slots=True)
class Request:
    """A body that was understood."""

    queries: tuple[str, ...]
    top_k: int
    scores: bool


class BadRequestError(ValueError):
    """A body that is no request; the message says why."""


def read_request(body: bytes, default_top_k: int, limits: Limits) -> Request:
    """Understand the body of a request.

    Raises:
        BadRequestError: it is not of the format, or asks for too much.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is no JSON") from None
    if not isinstance(given, dict):
        raise BadRequestError('the body must be an object, as {"queries": ["..."], "topk": 5}')
    queries, top_k = given.get("queries"), given.get("topk")
    scores = given.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise BadRequestError("'queries' must be a list of strings")
    if len(queries) > limits.queries:
        raise BadRequestError(f"{len(queries)} queries; a request has at most {limits.queries}")
    top_k = default_top_k if top_k is None else top_k
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= limits.top_k:
        raise BadRequestError(f"'topk' must be a whole number from 1 to {limits.top_k}")
    if not isinstance(scores, bool):
        raise BadRequestError("'return_scores' must be true or false")
    return Request(tuple(queries), top_k, scores)


def write_result(found: Sequence[list[Hit] | RetrievalError], scores: bool) -> dict[str, Any]:
    """The body of an answer, with an error in the place of each query that failed."""
    return {
        "result": [
            {"error": str(hits)}
            if isinstance(hits, RetrievalError)
            else [
                {"document": _document(hit), "score": hit.score} if scores else _document(hit)
                for hit in hits
            ]
            for hits in found
        ]
    }


class RetrievalServer:
    """A retriever behind a port, from construction to :meth:`stop`."""

    def __init__(
        self,
        retriever: Retriever,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        top_k: int = 5,
        limits: Limits | None = None,
    ) -> None:
        """Open the port and answer in the background.

        Args:
            retriever: what is offered; it must allow several threads where ``limits.searches``
                is more than 1. It stays its owner's to close.
            host: address to listen at.
            port: 0 takes a free one; see ``url``.
            top_k: passages for a query where a request does not say.
            limits: what is taken at most.

        Raises:
            OSError: the port is in use or not allowed.
        """
        self._server = _Server((host, port), retriever, top_k, limits or Limits())
        self.url = f"http://{host}:{self._server.server_address[1]}/retrieve"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for the engine now."""
        return self._server.metrics.waiting

    def stop(self, patience: float = 30.0) -> None:
        """Take no more requests, finish those in flight, close; twice is harmless.

        Args:
            patience: seconds after which requests that are not finished are dropped.
        """
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.finish(patience)


def serve_until_stopped(retriever: Retriever, host: str, port: int, top_k: int) -> None:
    """Serve until SIGTERM or SIGINT (Ctrl-C), then finish what is in flight.

    A second signal does what it does by default: it ends the process.

    Raises:
        ConfigurationError: the port is none, is in use, or is not allowed.
    """
    asked = threading.Event()
    try:
        server = RetrievalServer(retriever, host, port, top_k=top_k)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"cannot listen at {host}:{port}: {error}; name another --host or --port"
        ) from error
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: asked.set()) for number in signals]
    try:
        print(f"serving {server.url}; Ctrl-C stops", flush=True)
        asked.wait()
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # stop() waits for them itself, and not for ever
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], retriever: Retriever, top_k: int, limits: Limits
    ) -> None:
        self.retriever = retriever
        self.top_k = top_k
        self.limits = limits
        self.metrics = _Metrics()
        self.stopping = False
        self._room = threading.BoundedSemaphore(limits.searches + limits.waiting)
        self._searching = threading.BoundedSemaphore(limits.searches)
        self._larges = threading.BoundedSemaphore(limits.larges)
        self._changed = threading.Condition()
        self._busy: dict[socket.socket, bool] = {}  # connection -> whether it is within a request
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            full = len(self._busy) >= self.limits.connections
            if not full:
                self._busy[request] = False
        if full:
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                                b"Content-Length: 0\r\nConnection: close\r\n\r\n")  # fmt: skip
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._busy.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection broke", exc_info=True)

    def begin(self, connection: socket.socket) -> None:
        """A request has begun on a connection."""
        with self._changed:
            self._busy[connection] = True

    def end(self, connection: socket.socket) -> bool:
        """The request has ended; whether there may be another."""
        with self._changed:
            self._busy[connection] = False
            return not self.stopping

    def finish(self, patience: float) -> None:
        """Close connections: those at rest now, the others after their request."""
        with self._changed:
            self.stopping = True
            for connection, busy in self._busy.items():
                if not busy:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RD)  # its thread reads the end, and ends
            if not self._changed.wait_for(lambda: not self._busy, patience):
                log.warning("%d requests were dropped at the stop", len(self._busy))

    @contextmanager
    def reading(self, length: int) -> Iterator[bool]:
        """Wait for a turn to read a body of so many bytes; False: too many large ones come in."""
        large = length > self.limits.large
        granted = not large or self._larges.acquire(timeout=self.limits.reading)
        try:
            yield granted
        finally:
            if large and granted:
                self._larges.release()

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Wait for a turn to search; False: too many wait already."""
        if not self._room.acquire(blocking=False):
            yield False
            return
        try:
            with self.metrics.wait():
                self._searching.acquire()
            try:
                yield True
            finally:
                self._searching.release()
        finally:
            self._room.release()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    server_version = "research-env"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def setup(self) -> None:
        self._server = cast(_Server, self.server)
        super().setup()
        self.connection.settimeout(self._server.limits.idle)

    def parse_request(self) -> bool:
        self._server.begin(self.connection)
        return super().parse_request()

    def handle_expect_100(self) -> bool:
        go_on = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it with its body, as curl does
        return go_on

    def handle_one_request(self) -> None:
        super().handle_one_request()
        if not self._server.end(self.connection):
            self.close_connection = True

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/health":
                self._send(200, {"status": "ok"})
            case "/metrics":
                text = self._server.metrics.text()
                self._send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
            case "/retrieve":
                self._fail(405, "send a POST", Allow="POST")
            case _:
                self._fail(404, "there are POST /retrieve, GET /health and GET /metrics")

    def do_POST(self) -> None:
        limits = self._server.limits
        length = self.headers.get("Content-Length", "")
        if self.path.partition("?")[0] != "/retrieve":
            self.close_connection = True  # the body has not been read
            self._fail(404, "there are POST /retrieve, GET /health and GET /metrics")
        elif not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._fail(411, "send the body whole, with its Content-Length")
        elif len(length) > 18 or int(length) > limits.body:
            self.close_connection = True
            self._fail(413, f"a request has at most {limits.body} bytes")
        else:
            with self._server.reading(int(length)) as granted:
                body = self._read_body(int(length)) if granted else None
            if not granted:
                self.close_connection = True
                self._fail(503, "too many large requests come in", **{"Retry-After": "1"})
                return
            if body is None:
                self.close_connection = True
                return
            try:
                self._retrieve(read_request(body, self._server.top_k, limits))
            except BadRequestError as error:
                self._fail(400, str(error))

    def _read_body(self, length: int) -> bytes | None:
        """The body; None: the client left, or took too long over it."""
        idle = self._server.limits.idle
        body = bytearray()
        deadline = Deadline.after(self._server.limits.reading)
        try:
            while len(body) < length:
                self.connection.settimeout(max(min(idle, deadline.left()), 0.001))
                part = self.rfile.read1(min(length - len(body), 1 << 16))
                if not part or deadline.left() == 0:
                    return None
                body += part
        except TimeoutError:
            return None
        self.connection.settimeout(idle)
        return bytes(body)

    def _retrieve(self, request: Request) -> None:
        with self._server.turn() as granted:
            if not granted:
                self._fail(503, "too many searches wait", **{"Retry-After": "1"})
                return
            try:
                with self._server.metrics.search(len(request.queries)):
                    found = self._server.retriever.search(request.queries, request.top_k)
            except RetrievalError as error:
                self._server.metrics.failed(len(request.queries))
                self._fail(503, str(error), **{"Retry-After": "1"})
                return
            except Exception:
                log.exception("the retriever raised what is no RetrievalError")
                self._server.metrics.failed(len(request.queries))
                self._fail(500, "an error in the server; its log tells more")
                return
        errors = [hits for hits in found if isinstance(hits, RetrievalError)]
        self._server.metrics.failed(len(errors))
        if errors and "handling=lenient" not in self.headers.get("Prefer", ""):
            self._fail(502, f"{len(errors)} of {len(found)} queries failed: {errors[0]}")
            return
        self._send(200, write_result(found, request.scores))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, such as another method."""
        self.close_connection = True
        self._fail(code, message or HTTPStatus(code).phrase)

    def _fail(self, code: int, message: str, **headers: str) -> None:
        self._send(code, {"error": message}, **headers)

    def _send(self, code: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._server.metrics.answered(code)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection or self._server.stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s " + format, self.address_string(), *args)


class _Metrics:
    """Counters, and their text in Prometheus' format."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: Counter[int] = Counter()
        self._queries = self._failed = self._searches = self._in_flight = 0
        self._seconds = 0.0
        self.waiting = 0

    @contextmanager
    def wait(self) -> Iterator[None]:
        with self._lock:
            self.waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self.waiting -= 1

    @contextmanager
    def search(self, queries: int) -> Iterator[None]:
        start = time.perf_counter()
        with self._lock:
            self._queries += queries
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._searches += 1
                self._seconds += time.perf_counter() - start

    def failed(self, queries: int) -> None:
        with self._lock:
            self._failed += queries

    def answered(self, code: int) -> None:
        with self._lock:
            self._codes[code] += 1

    def text(self) -> str:
        with self._lock:
            codes = [(f'{{code="{code}"}}', n) for code, n in sorted(self._codes.items())]
            rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
                ("requests_total", "counter", "Requests answered, by status.", [*codes]),
                ("queries_total", "counter", "Queries asked.", [("", self._queries)]),
                ("failed_queries_total", "counter", "Queries that failed.", [("", self._failed)]),
                ("searches_in_flight", "gauge", "Requests in the engine.", [("", self._in_flight)]),
                ("requests_waiting", "gauge", "Requests that wait for it.", [("", self.waiting)]),
                (
                    "search_seconds",
                    "summary",
                    "Seconds of the engine for a request.",
                    [("_sum", self._seconds), ("_count", self._searches)],
                ),
            ]
        lines = []
        for name, kind, help_, values in rows:
            full = f"research_env_{name}"
            lines += [f"# HELP {full} {help_}", f"# TYPE {full} {kind}"]
            lines += [f"{full}{suffix} {value}" for suffix, value in values]
        return "\n".join(lines) + "\n"


def _document(hit: Hit) -> dict[str, str]:
    passage = hit.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": f'"{passage.title}"\n{passage.text}',
    }
