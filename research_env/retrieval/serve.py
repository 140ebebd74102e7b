"""Serve any retriever over HTTP, in the wire format of Search-R1's retrieval server.

Other trainers can search through this server. :mod:`research_env.retrieval.http` describes the
format; documents hold ``id``, ``title``, ``text`` and ``contents``. Routes:

- ``POST /retrieve`` answers 200 and the result. Errors are ``{"error": "..."}`` with 400 (bad
  request), 401 (no key), 403 (foreign ``Host`` or ``Origin``), 411 (no length), 413 (the request or
  its answer is too large: ask for less at once), 502 (a query failed), or 503 with
  ``Retry-After`` (the engine failed, or the server is busy). The format cannot express that one
  query of several failed. One failure therefore fails the request, so that nobody reads "no answer"
  as "no passage". A client that sends ``Prefer: handling=lenient`` gets ``{"error": "..."}`` in the
  place of that query instead.
- ``GET /health`` answers 200 while the server takes requests. It does not ask the engine. If the
  engine knows the fingerprint of its corpus, that is ``index`` in the answer: clients tell by it
  that two servers have the same passages.
- ``GET /metrics`` exports counters in Prometheus' text format.

The application is FastAPI, the server is uvicorn with h11, which refuses malformed requests. This
module adds what both leave to a reverse proxy: limits on memory, time and connections.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import h11
import msgspec
import prometheus_client
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit, Retriever
from research_env.retrieval.http import MAX_REQUEST_HITS
from research_env.retrieval.reading import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the server accepts."""

    body: int = 16 << 20
    """Bytes of a request body."""
    queries: int = 1024
    """Queries per request."""
    top_k: int = 1000
    """Passages per query."""
    hits: int = MAX_REQUEST_HITS
    """Queries times passages per query."""
    answer: int = 16 << 20
    """Bytes of an answer; a larger one is not built to its end."""
    searches: int = 8
    """Requests that the engine answers at the same time."""
    waiting: int = 64
    """Requests that wait for the engine; the server refuses further ones."""
    memory: int = 256 << 20
    """Bytes of all bodies that wait and all answers that are being sent. Above it the server
    refuses requests, and already at half of it those of the address that holds this half."""
    connections: int = 512
    """Open connections, at most half of them from one address."""
    request_seconds: float = 20.0
    """Seconds from the first byte of a request (or the start of the connection) to its last."""
    answer_seconds: float = 60.0
    """Seconds in which a client must have read an answer."""
    idle_seconds: int = 60
    """Seconds after which the server closes a connection between two requests."""
    refusal_seconds: float = 0.5
    """Seconds that a busy server waits before it refuses, which slows down clients that retry at
    once."""


class SearchRequest(msgspec.Struct, frozen=True):
    """The body of a request; unknown fields are ignored."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class BadRequestError(ValueError):
    """A request that the server does not understand; the message says why."""


class TooLargeError(ValueError):
    """An answer that would have too many bytes; the message says what to do."""


def parse_request(body: bytes | bytearray, default_top_k: int, limits: Limits) -> SearchRequest:
    """Parse and check the body of a request.

    The decoder is typed: unlike a general JSON parser, it never builds objects that the format does
    not have, so that a small body cannot take much memory.

    Args:
        body: JSON, as it came.
        default_top_k: passages per query if the request does not say.
        limits: how much a request may ask for.

    Returns:
        The request, with each query cut at ``MAX_QUERY_CHARACTERS`` and ``topk`` filled in.

    Raises:
        BadRequestError: the body is not in the format, or asks for too much.
    """
    try:
        asked = msgspec.json.decode(body, type=SearchRequest)
    except msgspec.ValidationError as error:
        raise BadRequestError(f'{error}; send {{"queries": ["..."], "topk": 5}}') from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    top_k = default_top_k if asked.topk is None else asked.topk
    if len(asked.queries) > limits.queries:
        raise BadRequestError(
            f"{len(asked.queries)} queries; a request has at most {limits.queries}"
        )
    if not 1 <= top_k <= limits.top_k:
        raise BadRequestError(f"'topk' must be a whole number from 1 to {limits.top_k}")
    if len(asked.queries) * top_k > limits.hits:
        raise BadRequestError(
            f"{len(asked.queries)} queries times topk {top_k} is more than {limits.hits}; "
            "split the request"
        )
    queries = [query[:MAX_QUERY_CHARACTERS] for query in asked.queries]
    return SearchRequest(queries, top_k, asked.return_scores)


def encode_answer(results: Sequence[list[Hit] | RetrievalError], scores: bool, limit: int) -> bytes:
    """Encode the body of an answer, with an error in the place of each query that failed.

    Args:
        results: one entry per query.
        scores: whether each document comes with its score.
        limit: the most bytes of the answer.

    Raises:
        TooLargeError: the answer would be larger. Encoding stops there.
    """
    size = 0

    def encode(value: object) -> bytes:
        nonlocal size
        encoded = write_json(value)
        size += len(encoded) + 2
        if size > limit:
            raise TooLargeError(
                f"the answer has more than {limit} bytes; ask for fewer queries or a smaller topk"
            )
        return encoded

    entries = []
    for hits in results:
        if isinstance(hits, RetrievalError):
            entries.append(encode({"error": str(hits)}))
            continue
        documents = (
            {"document": _document(hit), "score": hit.score} if scores else _document(hit)
            for hit in hits
        )
        entries.append(b"[" + b",".join(map(encode, documents)) + b"]")
    return b'{"result":[' + b",".join(entries) + b"]}"


class RetrievalServer:
    """A retriever behind a port, from construction to :meth:`stop`."""

    def __init__(
        self,
        retriever: Retriever,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        top_k: int = 5,
        key: str = "",
        allowed_hosts: Collection[str] = (),
        limits: Limits | None = None,
    ) -> None:
        """Open the port and answer in a background thread.

        Args:
            retriever: answers the queries. It must allow several threads if ``limits.searches`` is
                more than 1. The caller closes it.
            host: address to listen on.
            port: 0 takes a free port; see ``url``.
            top_k: passages per query if a request does not say.
            key: clients must send ``Authorization: Bearer KEY``, except to ``/health``; empty: no
                key is needed.
            allowed_hosts: names in ``Host`` to answer to, besides ``localhost``, ``host``, and the
                address that the client connected to.
            limits: how much the server accepts.

        Raises:
            OSError: the port is in use or not allowed.
            OverflowError: the port is out of range.
        """
        limits = limits or Limits()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        # asyncio does not set this on a socket that it did not make; connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{listener.getsockname()[1]}/retrieve"
        self._load = _Load(limits)
        self._pool = ThreadPoolExecutor(limits.searches, thread_name_prefix="serve")
        app = _make_app(retriever, top_k, self._load, self._pool)
        names = frozenset({"localhost", host.lower(), *map(str.lower, allowed_hosts)})
        connections: Counter[str] = Counter()
        config = uvicorn.Config(
            _guard(app, self._load, key, names),
            loop="asyncio",
            http=cast(type[asyncio.Protocol], partial(_Connection, limits, connections)),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="serve", daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for the engine now."""
        return self._load.waiting

    def stop(self, patience: float = 30.0) -> None:
        """Take no more requests, finish those in flight, and close. Calling it twice is harmless.

        Args:
            patience: seconds after which unfinished requests are dropped (rounded up).
        """
        self._server.config.timeout_graceful_shutdown = math.ceil(patience)
        self._load.stopping = True
        self._server.should_exit = True
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)


def serve_until_stopped(
    retriever: Retriever,
    host: str,
    port: int,
    top_k: int,
    *,
    key: str = "",
    allowed_hosts: Collection[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT (Ctrl-C), then finish the requests in flight.

    A second signal has its default effect and ends the process. For the arguments see
    :class:`RetrievalServer`.

    Raises:
        ConfigurationError: the port is out of range, in use, or not allowed.
    """
    asked = threading.Event()
    try:
        server = RetrievalServer(
            retriever, host, port, top_k=top_k, key=key, allowed_hosts=allowed_hosts
        )
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error}; name another --host or --port"
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


class _Load:
    """What the server holds at this moment, and its metrics.

    Only the event loop changes it, except for the metrics, which are safe for threads.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stopping = False
        self.waiting = 0  # requests that wait for the engine
        self.searching = 0  # requests in the engine
        self.memory: Counter[str] = Counter()  # bytes of bodies and answers, per address
        self.slots = asyncio.Semaphore(limits.searches)
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "research_env_requests", "Requests answered, by status.", ["code"], registry=registry
        )
        self.queries = prometheus_client.Counter(
            "research_env_queries", "Queries asked.", registry=registry
        )
        self.failed_queries = prometheus_client.Counter(
            "research_env_failed_queries", "Queries that failed.", registry=registry
        )
        self.seconds = prometheus_client.Summary(
            "research_env_search_seconds", "Seconds of the engine per request.", registry=registry
        )
        for name, text, read in (
            ("searches_in_flight", "Requests in the engine.", lambda: self.searching),
            ("requests_waiting", "Requests that wait for the engine.", lambda: self.waiting),
            ("memory_bytes", "Bytes of waiting bodies and unsent answers.", self.memory.total),
        ):
            gauge = prometheus_client.Gauge(f"research_env_{name}", text, registry=registry)
            gauge.set_function(read)

    def has_room(self, address: str, size: int = 0) -> bool:
        """Whether a request of so many bytes from an address can be taken now."""
        queue_is_full = self.waiting >= self.limits.waiting and self.slots.locked()
        return not queue_is_full and self.has_memory(address, size)

    def has_memory(self, address: str, size: int = 0) -> bool:
        """Whether so many bytes more are allowed, in all and for an address."""
        return (
            self.memory.total() + size <= self.limits.memory
            and self.memory[address] + size <= self.limits.memory // 2
        )

    @contextmanager
    def hold(self, address: str) -> Iterator[Callable[[int], None]]:
        """Count the bytes that the yielded function is told of, until the block ends."""
        held = 0

        def add(size: int) -> None:
            nonlocal held
            held += size
            self.memory[address] += size

        try:
            yield add
        finally:
            self.memory[address] -= held
            if not self.memory[address]:
                del self.memory[address]


def _make_app(retriever: Retriever, top_k: int, load: _Load, pool: ThreadPoolExecutor) -> FastAPI:
    app = FastAPI(title="research-env serve", openapi_url=None)

    # The route reads the body itself. FastAPI would parse it into general objects and keep them
    # until the answer, and they take many times the memory of the body.
    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        address = _address(request.scope)
        with load.hold(address) as hold:
            body = bytearray()
            async for part in request.stream():
                hold(len(part))
                if not load.has_room(address):
                    return _error(503, "too many requests wait")
                body += part
            try:
                asked = parse_request(body, top_k, load.limits)
            except BadRequestError as error:
                return _error(400, str(error))
            del body
            if not load.has_room(address):
                return _error(503, "too many requests wait")
            waits = load.slots.locked()
            load.waiting += 1
            try:
                await load.slots.acquire()
            finally:
                load.waiting -= 1
            load.searching += 1
            try:
                if waits and await request.is_disconnected():
                    raise ClientDisconnect
                if not load.has_memory(address):  # answers before this one are not sent yet
                    return _error(503, "too many answers wait for their clients")
                load.queries.inc(len(asked.queries))
                lenient = "handling=lenient" in request.headers.get("prefer", "")
                with load.seconds.time():
                    return await asyncio.get_running_loop().run_in_executor(
                        pool, _search, retriever, asked, lenient, load
                    )
            finally:
                load.searching -= 1
                load.slots.release()

    @app.get("/health")
    async def health() -> Response:
        index = getattr(retriever, "fingerprint", None)
        return _json(200, {"status": "ok", **({"index": index} if index else {})})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(load.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> Response:
        routes = "there are POST /retrieve, GET /health and GET /metrics"
        return _error(error.status_code, f"{error.detail}: {routes}", error.headers)

    return app


def _search(retriever: Retriever, asked: SearchRequest, lenient: bool, load: _Load) -> Response:
    """Search in a thread. It builds the answer too, so that the limit on searches bounds both."""
    assert asked.topk is not None  # filled in by parse_request
    try:
        found = retriever.search(asked.queries, asked.topk)
    except RetrievalError as error:
        load.failed_queries.inc(len(asked.queries))
        return _error(503, str(error))
    except Exception:
        log.exception("the retriever raised something other than RetrievalError")
        load.failed_queries.inc(len(asked.queries))
        return _error(500, "an error in the server; its log tells more")
    errors = [hits for hits in found if isinstance(hits, RetrievalError)]
    load.failed_queries.inc(len(errors))
    if errors and not lenient:
        return _error(502, f"{len(errors)} of {len(found)} queries failed: {errors[0]}")
    try:
        body = encode_answer(found, asked.return_scores, load.limits.answer)
    except TooLargeError as error:
        return _error(413, str(error))
    return Response(body, media_type="application/json")


def _guard(app: ASGIApp, load: _Load, key: str, allowed_hosts: Collection[str]) -> ASGIApp:
    """Refuse by the headers, before the body is read, and count what is sent."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        started = False

        async def send_counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 503 and not load.stopping:
                    await asyncio.sleep(load.limits.refusal_seconds)
                load.requests.labels(status).inc()
                # A client that waits for "100 Continue" may or may not send its body after an
                # error, so what comes next on its connection could be either.
                if load.stopping or (status >= 400 and "expect" in headers):
                    message["headers"].append((b"connection", b"close"))
                started = True
                await send(message)
                return
            with load.hold(_address(scope)) as hold:
                hold(len(message["body"]))
                await send({**message, "more_body": True})
                # This returns when all of the body has left the process.
                await send({"type": "http.response.body"})

        length = int(headers.get("content-length", 0))
        refusal = (
            check_body(scope, headers, load.limits.body)
            or check_access(scope, headers, key, allowed_hosts)
            or _check_room(scope, length, load)
        )
        try:
            await (refusal or app)(scope, receive, send_counted)
        except (ClientDisconnect, h11.LocalProtocolError):
            log.debug("a client left, or broke the protocol, before its answer")
        except asyncio.CancelledError:  # stop() has no more patience
            if not load.stopping or started:
                raise
            await _error(503, "the server stopped before its engine answered")(
                scope, receive, send_counted
            )

    return guarded


def check_body(scope: Scope, headers: Headers, limit: int) -> Response | None:
    """Refuse bodies that servers and proxies disagree about, or of more bytes than the limit."""
    close, chunked = {"Connection": "close"}, "transfer-encoding" in headers
    method, length = scope["method"], int(headers.get("content-length", 0))
    if method != "POST" and (length or chunked):
        return _error(400, "only a POST may have a body", close)
    if method == "POST" and (chunked or "content-length" not in headers):
        return _error(411, "send the body whole, with its Content-Length", close)
    if length > limit:
        return _error(413, f"a request has at most {limit} bytes")
    return None


def check_access(
    scope: Scope, headers: Headers, key: str, allowed_hosts: Collection[str]
) -> Response | None:
    """Refuse web pages of other sites, and clients without the key.

    A page that resolves its own name to this server's address sends that name in ``Host``. A page
    that asks this server by its name sends its own site in ``Origin``.
    """
    host, origin = headers.get("host"), headers.get("origin")
    if host is not None:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:  # unbalanced brackets
            name = None
        if name not in allowed_hosts and name != scope["server"][0]:
            return _error(403, f"the host {host!r} is not allowed; see --allowed-hosts")
    if origin is not None and origin.partition("://")[2] != host:
        return _error(403, "web pages of other sites may not ask this server")
    if key and scope["path"] != "/health":
        given = headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            return _error(401, "send the key as 'Authorization: Bearer KEY'", challenge)
    return None


def _check_room(scope: Scope, length: int, load: _Load) -> Response | None:
    if scope["path"] == "/retrieve" and not load.has_room(_address(scope), length):
        return _error(503, "too many requests wait")
    return None


class _Connection(asyncio.Protocol):
    """uvicorn's protocol of one connection, with deadlines and a limit on connections.

    uvicorn waits without end for the rest of a request and for a client to read its answer.
    """

    def __init__(self, limits: Limits, connections: Counter[str], **uvicorn_arguments: Any) -> None:
        self._limits = limits
        self._connections = connections  # per address
        self._inner = H11Protocol(**uvicorn_arguments)
        self._counted = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        if self._connections.total() >= self._limits.connections or self._connections[
            self._address
        ] >= max(1, self._limits.connections // 2):
            self._transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                b"Content-Length: 0\r\nConnection: close\r\n\r\n"
            )
            self._transport.close()
            return
        self._connections[self._address] += 1
        self._counted = True
        self._transport.set_write_buffer_limits(high=0)  # any unsent byte starts the deadline
        self._inner.connection_made(self._transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        if not self._counted:
            return
        self._inner.data_received(data)
        connection = self._inner.conn
        if connection.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect_request()
        elif self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if connection.their_state is h11.DONE and connection.trailing_data[0]:
            # The client did not wait for its answer. Nothing would time the next request.
            self._inner.cycle.keep_alive = False

    def _expect_request(self) -> None:
        """Start the deadline of a request, unless it runs already."""
        if self._reading is None:
            seconds = self._limits.request_seconds
            self._reading = self._loop.call_later(seconds, self._transport.abort)

    def pause_writing(self) -> None:
        self._inner.pause_writing()
        seconds = self._limits.answer_seconds
        self._writing = self._loop.call_later(seconds, self._transport.abort)

    def resume_writing(self) -> None:
        self._inner.resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def eof_received(self) -> None:
        if self._counted:
            self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        if self._counted:
            self._connections[self._address] -= 1
            if not self._connections[self._address]:
                del self._connections[self._address]
            self._inner.connection_lost(exc)


def _address(scope: Scope) -> str:
    client = scope["client"]
    return client[0] if client else ""


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    if status == 503:
        headers = {**(headers or {}), "Retry-After": "1"}
    return _json(status, {"error": message}, headers)


def _json(status: int, value: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(write_json(value), status, headers, "application/json")


def _document(hit: Hit) -> dict[str, str]:
    passage = hit.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": f'"{passage.title}"\n{passage.text}',
    }
