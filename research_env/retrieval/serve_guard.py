"""Guard a search server: limits on memory, time and connections, and on who may ask.

A reverse proxy usually does this; :mod:`research_env.retrieval.serve` must work without one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import h11
import prometheus_client
from fastapi import Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from research_env.retrieval.http import MAX_REQUEST_HITS
from research_env.retrieval.json_text import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the server accepts."""

    body: int = 16 << 20
    """Bytes of a request body."""
    queries: int = 8192
    """Queries per request; Search-R1 sends all of a step in one."""
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
    refuses requests. An address that holds half of it is refused already."""
    connections: int = 512
    """Open connections, at most half of them from one address."""
    request_seconds: float = 20.0
    """Seconds from the first byte of a request (or the start of the connection) to its last."""
    answer_seconds: float = 60.0
    """Seconds in which a client must have read an answer."""
    idle_seconds: int = 60
    """Seconds after which the server closes a connection between two requests."""
    refusal_seconds: float = 0.5
    """Seconds that a busy server waits before it refuses, to slow down clients that retry at once.
    """


class Load:
    """What the server holds at this moment, and its metrics.

    Only the event loop changes it. The metrics are safe for threads.
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
        """Return whether a request of ``size`` bytes from an address can be taken now."""
        queue_is_full = self.waiting >= self.limits.waiting and self.slots.locked()
        return not queue_is_full and self.has_memory(address, size)

    def has_memory(self, address: str, size: int = 0) -> bool:
        """Return whether ``size`` more bytes are allowed, in all and for an address."""
        return (
            self.memory.total() + size <= self.limits.memory
            and self.memory[address] + size <= self.limits.memory // 2
        )

    @contextmanager
    def hold(self, address: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes as held by an address, until the block ends."""
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


def guard(app: ASGIApp, load: Load, key: str, allowed_hosts: Collection[str]) -> ASGIApp:
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
                # After an error, a client that waits for "100 Continue" may send its body or a new
                # request: what comes next on its connection could be either.
                if load.stopping or (status >= 400 and "expect" in headers):
                    message["headers"].append((b"connection", b"close"))
                started = True
                await send(message)
                return
            with load.hold(client_address(scope)) as hold:
                hold(len(message["body"]))
                await send({**message, "more_body": True})
                # This returns when all of the body has left the process.
                await send({"type": "http.response.body"})

        refusal = check_body(scope, headers, load.limits.body) or check_access(
            scope, headers, key, allowed_hosts
        )
        if refusal is None and scope["path"] == "/retrieve":
            length = int(headers.get("content-length", 0))
            if not load.has_room(client_address(scope), length):
                refusal = error_response(503, "too many requests wait")
        try:
            await (refusal or app)(scope, receive, send_counted)
        except (ClientDisconnect, h11.LocalProtocolError):
            log.debug("a client left, or broke the protocol, before its answer")
        except asyncio.CancelledError:  # stop() has no more patience
            if not load.stopping or started:
                raise
            await error_response(503, "the server stopped before its engine answered")(
                scope, receive, send_counted
            )

    return guarded


def check_body(scope: Scope, headers: Headers, limit: int) -> Response | None:
    """Refuse a body that is too long, or whose length servers and proxies may read differently."""
    close, chunked = {"Connection": "close"}, "transfer-encoding" in headers
    method, length = scope["method"], int(headers.get("content-length", 0))
    if method != "POST" and (length or chunked):
        return error_response(400, "only a POST may have a body", close)
    if method == "POST" and (chunked or "content-length" not in headers):
        return error_response(411, "send the body whole, with its Content-Length", close)
    if length > limit:
        return error_response(413, f"a request has at most {limit} bytes")
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
            return error_response(403, f"the host {host!r} is not allowed; see --allowed-hosts")
    if origin is not None and origin.partition("://")[2] != host:
        return error_response(403, "web pages of other sites may not ask this server")
    if key and scope["path"] != "/health":
        given = headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            return error_response(401, "send the key as 'Authorization: Bearer KEY'", challenge)
    return None


class Connection(asyncio.Protocol):
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
        """Count the connection, or refuse it."""
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
        """Pass on what arrives, and time the rest of the request."""
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
        """Time the client, which must read its answer."""
        self._inner.pause_writing()
        seconds = self._limits.answer_seconds
        self._writing = self._loop.call_later(seconds, self._transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock: the client has read."""
        self._inner.resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def eof_received(self) -> None:
        """Pass on that the client sends no more."""
        if self._counted:
            self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and count the connection no longer."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        if self._counted:
            self._connections[self._address] -= 1
            if not self._connections[self._address]:
                del self._connections[self._address]
            self._inner.connection_lost(exc)


def client_address(scope: Scope) -> str:
    """Return the address of the client, empty if unknown."""
    client = scope["client"]
    return client[0] if client else ""


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make ``{"error": message}``; clients of a busy server may retry after a second."""
    if status == 503:
        headers = {**(headers or {}), "Retry-After": "1"}
    return json_response(status, {"error": message}, headers)


def json_response(status: int, value: object, headers: Mapping[str, str] | None = None) -> Response:
    """Make a response of JSON."""
    return Response(write_json(value), status, headers, "application/json")
