"""Serve any retriever over HTTP, in the wire format of Search-R1's retrieval server.

Other trainers can search through this server. :mod:`research_env.retrieval.http` describes the
format; documents hold ``id``, ``title``, ``text`` and ``contents``. Routes:

- ``POST /retrieve`` answers 200 and the result. Errors are ``{"error": "..."}`` with 400 (bad
  request), 401 (no key), 403 (foreign ``Host`` or ``Origin``), 411 (no length), 413 (the request or
  its answer is too large: ask for less at once), 502 (a query failed), or 503 with
  ``Retry-After`` (the engine failed, or the server is busy). The format has no place for the
  failure of one query of several, so one failure fails the request: nobody may read "no answer" as
  "no passage". A client that sends ``Prefer: handling=lenient`` gets ``{"error": "..."}`` in the
  place of that query instead.
- ``GET /health`` answers 200 while the server takes requests. It does not search. If the
  engine knows the fingerprint of its corpus, the answer holds it as ``index``: two servers with the
  same fingerprint have the same passages.
- ``GET /metrics`` exports counters in Prometheus' text format.

The application is FastAPI, the server is uvicorn with h11, which refuses malformed requests.
:mod:`research_env.retrieval.serve_guard` adds the limits that both leave to a reverse proxy.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import msgspec
import prometheus_client
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit, Retriever, SearchResult
from research_env.retrieval.json_text import write_json
from research_env.retrieval.serve_guard import (
    Connection,
    Limits,
    Load,
    client_address,
    error_response,
    guard,
    json_response,
)

log = logging.getLogger(__name__)


class _Body(msgspec.Struct):
    """The body of a request; unknown fields are ignored."""

    queries: list[str] | msgspec.UnsetType = msgspec.UNSET
    query: str | msgspec.UnsetType = msgspec.UNSET  # SkyRL's search tool sends one
    topk: int | None = None
    return_scores: bool = False


class SearchRequest(msgspec.Struct, frozen=True):
    """A request that has been checked."""

    queries: list[str]
    topk: int
    return_scores: bool


class BadRequestError(ValueError):
    """A request that is not in the format or asks for too much; the message says why."""


class LargeAnswerError(ValueError):
    """An answer with more bytes than the server sends; the message says what to do."""


def parse_request(body: bytes | bytearray, default_top_k: int, limits: Limits) -> SearchRequest:
    """Parse and check the body of a request.

    The decoder is typed: unlike a general JSON parser it builds no object that the format does not
    have, so a small body cannot take much memory.

    Args:
        body: the bytes of the body.
        default_top_k: passages per query, if the request does not say.
        limits: how much a request may ask for.

    Returns:
        The request, with each query cut at ``MAX_QUERY_CHARACTERS`` and ``topk`` filled in.

    Raises:
        BadRequestError: the body is not in the format, or asks for too much.
    """
    try:
        asked = msgspec.json.decode(body, type=_Body)
        if asked.queries is not msgspec.UNSET:
            given = asked.queries
        elif asked.query is not msgspec.UNSET:
            given = [asked.query]
        else:
            raise msgspec.ValidationError("Object missing required field `queries`")
    except msgspec.ValidationError as error:
        raise BadRequestError(f'{error}; send {{"queries": ["..."], "topk": 5}}') from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    top_k = default_top_k if asked.topk is None else asked.topk
    if len(given) > limits.queries:
        raise BadRequestError(f"{len(given)} queries; a request has at most {limits.queries}")
    if not 1 <= top_k <= limits.top_k:
        raise BadRequestError(f"'topk' must be a whole number from 1 to {limits.top_k}")
    if len(given) * top_k > limits.hits:
        raise BadRequestError(
            f"{len(given)} queries times topk {top_k} is more than {limits.hits}; split the request"
        )
    queries = [query[:MAX_QUERY_CHARACTERS] for query in given]
    return SearchRequest(queries, top_k, asked.return_scores)


def encode_answer(results: Sequence[SearchResult], scores: bool, limit: int) -> bytes:
    """Encode the body of an answer, with an error in the place of each query that failed.

    Args:
        results: one entry per query.
        scores: whether to add its score to each document.
        limit: the most bytes of the answer.

    Raises:
        LargeAnswerError: the answer would be larger; encoding stops where the limit is reached.
    """
    size = 0

    def encode(value: object) -> bytes:
        nonlocal size
        encoded = write_json(value)
        size += len(encoded) + 2
        if size > limit:
            raise LargeAnswerError(
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
            key: clients must send ``Authorization: Bearer KEY``, except to ``/health``; empty: they
                need none.
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
        self._load = Load(limits)
        self._pool = ThreadPoolExecutor(limits.searches, thread_name_prefix="serve")
        app = _make_app(retriever, top_k, self._load, self._pool)
        names = frozenset({"localhost", host.lower(), *map(str.lower, allowed_hosts)})
        connections: Counter[str] = Counter()
        config = uvicorn.Config(
            guard(app, self._load, key, names),
            loop="asyncio",
            http=cast(type[asyncio.Protocol], partial(Connection, limits, connections)),
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

    A second signal ends the process. For the arguments see :class:`RetrievalServer`.

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
        for number in signals:  # threads that wait for a hung engine would delay any other end
            signal.signal(number, lambda signum, _: os._exit(128 + signum))
        server.stop()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _make_app(retriever: Retriever, top_k: int, load: Load, pool: ThreadPoolExecutor) -> FastAPI:
    app = FastAPI(title="research-env serve", openapi_url=None)

    # The route reads the body itself: FastAPI would keep it as general objects until the answer,
    # which take many times its memory.
    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        address = client_address(request.scope)
        with load.hold(address) as hold:
            body = bytearray()
            async for part in request.stream():
                hold(len(part))
                if not load.has_room(address):
                    return error_response(503, "too many requests wait")
                body += part
            try:
                asked = parse_request(body, top_k, load.limits)
            except BadRequestError as error:
                return error_response(400, str(error))
            del body
            if not load.has_room(address):
                return error_response(503, "too many requests wait")
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
                    return error_response(503, "too many answers wait for their clients")
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
    def health() -> Response:  # in a thread: the fingerprint may have to come from another server
        index = getattr(retriever, "fingerprint", None)
        return json_response(200, {"status": "ok", **({"index": index} if index else {})})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(load.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> Response:
        routes = "there are POST /retrieve, GET /health and GET /metrics"
        return error_response(error.status_code, f"{error.detail}: {routes}", error.headers)

    return app


def _search(retriever: Retriever, asked: SearchRequest, lenient: bool, load: Load) -> Response:
    """Search and build the answer, in a thread: the limit on searches bounds both."""
    try:
        found = retriever.search(asked.queries, asked.topk)
    except RetrievalError as error:
        load.failed_queries.inc(len(asked.queries))
        return error_response(503, str(error))
    except Exception:
        log.exception("the retriever raised something other than RetrievalError")
        load.failed_queries.inc(len(asked.queries))
        return error_response(500, "an error in the server; its log tells more")
    errors = [hits for hits in found if isinstance(hits, RetrievalError)]
    load.failed_queries.inc(len(errors))
    if errors and not lenient:
        return error_response(502, f"{len(errors)} of {len(found)} queries failed: {errors[0]}")
    try:
        body = encode_answer(found, asked.return_scores, load.limits.answer)
    except LargeAnswerError as error:
        return error_response(413, str(error))
    return Response(body, media_type="application/json")


def _document(hit: Hit) -> dict[str, str]:
    passage = hit.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": f'"{passage.title}"\n{passage.text}',
    }
