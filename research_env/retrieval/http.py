r"""Ask search engines over HTTP, in the wire format of Search-R1's retrieval server.

The format (Jin et al. 2025, ``search_r1/search/retrieval_server.py``; its retrievers and documents
come from FlashRAG, Jin et al. 2024): the answer to ``POST {"queries": [...], "topk": k,
"return_scores": true}`` is ``{"result": [[{"document": {"id": ..., "contents":
"\"title\"\ntext"}, "score": ...}, ...], ...]}`` with one list per query.
:mod:`research_env.retrieval.serve` serves any of our retrievers in this format.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import (
    MAX_QUERY_CHARACTERS,
    Hit,
    Passage,
    SearchResult,
    check_top_k,
)
from research_env.retrieval.json_text import read_json, replace_surrogates
from research_env.retrieval.retry import (
    RETRYABLE_STATUSES,
    Deadline,
    Retry,
    log_retry,
    retry_after,
)
from research_env.retrieval.url import (
    check_address,
    check_options,
    number,
    secret_of,
    split_options,
)
from research_env.system.redaction import one_line

if TYPE_CHECKING:
    import ssl

    import httpx

KEY_VARIABLE = "RETRIEVER_API_KEY"
"""The environment variable with the key of a retrieval server, for the server and its clients."""

MAX_REQUEST_HITS = 8_192
"""The most queries times passages per query of a request."""

_LENIENT = {"Prefer": "handling=lenient"}  # RFC 7240: lets our server fail single queries
_MAX_ANSWER = 64 << 20  # bytes of an answer, decoded
_HEALTH_SECONDS = 5.0


class HttpRetriever:
    """Ask a retrieval server. Several threads may use it.

    Queries go in requests of bounded size, one after the other. A request that might succeed later
    (no connection, a broken answer, a status in ``RETRYABLE_STATUSES``) is sent again after a
    pause, until the deadline of the whole batch; then its queries fail, each in its place. A
    request that is too large, or has too large an answer, is split in two. A blank query finds
    nothing and is not sent. Queries are cut at ``MAX_QUERY_CHARACTERS``, as the environment cuts
    them. Lone surrogates are sent as U+FFFD. After a fork each process opens its own connections.

    A server that sends its headers byte by byte can extend the deadline: each byte renews the wait.
    """

    in_flight = 4

    def __init__(
        self, url: str, batch: int = 256, retry: Retry | None = None, key: str = ""
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: for example ``http://localhost:8000/retrieve``.
            batch: the most queries per request; a large ``top_k`` lowers it, so that a request asks
                for at most ``MAX_REQUEST_HITS`` passages.
            retry: deadline of a batch and pauses between attempts; None: 60 s and the default
                pauses.
            key: sent as ``Authorization: Bearer KEY``; empty: no key is sent.

        Raises:
            ConfigurationError: the address cannot be used, or holds a password.
        """
        check_address(url)
        if batch < 1:
            raise ConfigurationError(f"batch={batch!r} must be 1 or more")
        self._url = url
        self._batch = batch
        self._retry = retry or Retry(deadline=60.0)
        self._quote_errors = not key  # a server might repeat the key
        self._fingerprint: str | None = None
        self._client = ForkSafeClient(
            _LENIENT | ({"Authorization": f"Bearer {key}"} if key else {})
        )

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Hits keep the order of the server. If it sends no scores they are 1/rank; if it sends no ids
        they are a digest of title and text.

        Raises:
            ConfigurationError: ``top_k`` is below 1.
            RetrievalError: the retriever has been closed.
        """
        check_top_k(top_k)
        client = self._client.get()
        found: list[SearchResult] = [[] for _ in queries]
        deadline = Deadline.after(self._retry.deadline)
        asked = [index for index, query in enumerate(queries) if query.strip()]
        size = min(self._batch, max(1, MAX_REQUEST_HITS // top_k))
        for start in range(0, len(asked), size):
            indices = asked[start : start + size]
            texts = [replace_surrogates(queries[index][:MAX_QUERY_CHARACTERS]) for index in indices]
            answers = self._request(client, texts, top_k, deadline)
            for index, answer in zip(indices, answers, strict=True):
                found[index] = answer
        return found

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the server's corpus; None if ``/health`` does not say one.

        Our own server says it. Nothing is retried: a server that is away has no fingerprint.
        """
        if self._fingerprint is None:
            client = self._client.get()
            address = urljoin(self._url, "health")
            deadline = Deadline.after(min(self._retry.deadline, _HEALTH_SECONDS))
            try:
                answer = _send_once(
                    client, client.build_request("GET", address), deadline, quote_errors=False
                )
            except _AttemptError:
                return None
            index = answer.get("index") if isinstance(answer, dict) else None
            self._fingerprint = index[:128] if isinstance(index, str) else None
        return self._fingerprint

    def close(self) -> None:
        """Close the connections; calling it twice is harmless."""
        self._client.close()

    def _request(
        self, client: httpx.Client, queries: list[str], top_k: int, deadline: Deadline
    ) -> Sequence[SearchResult]:
        payload = {"queries": queries, "topk": top_k, "return_scores": True}
        request = client.build_request("POST", self._url, json=payload)
        try:
            answer = request_json(
                client, request, self._retry, deadline, quote_errors=self._quote_errors
            )
            result = answer.get("result") if isinstance(answer, dict) else None
            if not isinstance(result, list) or len(result) != len(queries):
                raise RetrievalError(
                    f"{self._url} did not answer with a 'result' of {len(queries)} entries; "
                    "is it a server of Search-R1's format?"
                )
        except TooLargeError as error:
            if len(queries) == 1:
                return [error]
            half = len(queries) // 2
            return [
                *self._request(client, queries[:half], top_k, deadline),
                *self._request(client, queries[half:], top_k, deadline),
            ]
        except RetrievalError as error:
            return [error] * len(queries)
        return [self._read(entry, top_k) for entry in result]

    def _read(self, entry: Any, top_k: int) -> SearchResult:
        if isinstance(entry, dict) and "error" in entry:
            said = f": {one_line(str(entry['error']))}" if self._quote_errors else ""
            return RetrievalError(f"{self._url} failed the query{said}")
        try:
            return [_hit(each, rank) for rank, each in enumerate(entry[:top_k], start=1)]
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            shown = f"{error!r:.120}" if self._quote_errors else type(error).__name__
            return RetrievalError(f"{self._url} did not send a list of documents: {shown}")


class TooLargeError(RetrievalError):
    """A request or its answer is too large; asking for less at once might succeed."""


def open_http(url: str) -> HttpRetriever:
    """Open ``http://...`` or ``https://...`` with ``?deadline=SECONDS&batch=N``.

    The key comes from the environment variable ``RETRIEVER_API_KEY``, if it is set.
    """
    address, options = split_options(url)
    check_options(url.partition(":")[0], options, ("deadline", "batch"))
    return HttpRetriever(
        address,
        batch=int(number(options, "batch", 256, 1)),
        retry=Retry(deadline=number(options, "deadline", 60.0, 0)),
        key=secret_of(KEY_VARIABLE),
    )


class ForkSafeClient:
    """An httpx client that keeps its connections, a new one per process. Threads may share it.

    On a connection that a fork copied, parent and child would read each other's answers.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        """Make the client of this process; nothing is sent. ``headers`` go with each request."""
        self._headers = {"Accept-Encoding": "gzip", **(headers or {})}
        self._made = os.getpid(), self._make()

    def get(self) -> httpx.Client:
        """Return the client of this process.

        Raises:
            RetrievalError: it has been closed.
        """
        process, client = self._made
        if client.is_closed:
            raise RetrievalError("the retriever has been closed; open it again")
        if process != os.getpid():  # the parent still uses the connections of the old client
            client = self._make()
            self._made = os.getpid(), client
        return client

    def close(self) -> None:
        """Close the connections of this process; calling it twice is harmless."""
        self._made[1].close()

    def _make(self) -> httpx.Client:
        import httpx  # noqa: PLC0415  (loaded only by those who ask a server)

        try:
            return httpx.Client(headers=self._headers, verify=_certificates())
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigurationError(
                f"the proxies that the environment names cannot be used ({error}); correct "
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY"
            ) from error


def request_json(
    client: httpx.Client,
    request: httpx.Request,
    retry: Retry,
    deadline: Deadline,
    *,
    before_attempt: Callable[[Deadline], None] = lambda _: None,
    quote_errors: bool = True,
) -> Any:
    """Send a request, and retry it until it is answered with JSON or the deadline passes.

    Args:
        client: sends it.
        request: the same in each attempt.
        retry: the pauses between attempts.
        deadline: nothing is sent or waited for after it.
        before_attempt: called before each attempt. It may wait, or raise to give up.
        quote_errors: whether errors may quote the server (never if it may hold a secret).

    Returns:
        The parsed answer, at most 64 MB of JSON.

    Raises:
        TooLargeError: the server answered 413, or with more than 64 MB.
        RetrievalError: the server refused the request, or the deadline has passed.
    """
    where = str(request.url.copy_with(query=None))  # the query may hold what a model wrote
    problem = "the deadline of the batch had passed"
    for attempt in itertools.count():
        if deadline.left() == 0:
            raise RetrievalError(f"{where}: {problem}")
        before_attempt(deadline)
        try:
            return _send_once(client, request, deadline, quote_errors=quote_errors)
        except _AttemptError as failure:
            problem, pause = failure.problem, None
            if failure.retryable:
                pause = retry.pause(attempt, deadline.left(), failure.retry_after)
            if pause is None:
                kind = TooLargeError if failure.too_large else RetrievalError
                raise kind(f"{where}: {problem} (attempt {attempt + 1})") from None
        log_retry(where, problem, deadline.left())
        time.sleep(pause)
    raise AssertionError("unreachable")


@dataclass(eq=False)
class _AttemptError(Exception):
    """An attempt that failed.

    Attributes:
        problem: what went wrong.
        retryable: whether the next attempt might succeed.
        retry_after: seconds that the server asks to wait; None if it does not say.
        too_large: whether a smaller request might succeed.
    """

    problem: str
    retryable: bool = False
    retry_after: float | None = None
    too_large: bool = False


@cache
def _certificates() -> ssl.SSLContext:
    import httpx  # noqa: PLC0415

    return httpx.create_ssl_context()  # parses hundreds of certificates: once is enough


def _send_once(
    client: httpx.Client, request: httpx.Request, deadline: Deadline, *, quote_errors: bool
) -> Any:
    """Send a request once; return the parsed answer.

    Raises:
        _AttemptError: there is no good answer.
    """
    import httpx  # noqa: PLC0415

    request.extensions["timeout"] = httpx.Timeout(max(deadline.left(), 0.001)).as_dict()
    try:
        response = client.send(request, stream=True)
        try:
            body = _read_body(response, deadline)
        finally:
            response.close()
    except (httpx.HTTPError, httpx.StreamError) as error:
        problem = f"{type(error).__name__}: {one_line(str(error))}"
        raise _AttemptError(problem, retryable=True) from None
    except RuntimeError as error:  # another thread closed the client
        raise _AttemptError(one_line(str(error))) from None
    if response.status_code != 200:
        said = one_line(body.decode("utf-8", "replace")) if quote_errors else ""
        raise _AttemptError(
            f"status {response.status_code}{': ' if said else ''}{said}",
            response.status_code in RETRYABLE_STATUSES,
            retry_after(response.headers.get("Retry-After")),
            too_large=response.status_code == 413,
        )
    try:
        return read_json(body)
    except ValueError:
        raise _AttemptError("the answer is not JSON", retryable=True) from None


def _read_body(response: httpx.Response, deadline: Deadline) -> bytearray:
    """Read and decode the body of an answer.

    httpx alone decodes as often as a server says, without a limit: a few hundred bytes that are
    compressed twice become gigabytes.

    Raises:
        _AttemptError: the body is too large, too slow, cut, or not encoded as we asked.
    """
    encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise _AttemptError(f"an answer with Content-Encoding {encoding[:40]!r}, not gzip or none")
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding == "gzip" else None
    body = bytearray()
    for part in response.iter_raw():
        # One byte more than the limit is enough to see that there is more.
        try:
            if decoder is None:
                body += part
            left = part
            while decoder and left and len(body) <= _MAX_ANSWER:
                if decoder.eof:  # a gzip file may have several members
                    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
                body += decoder.decompress(left, _MAX_ANSWER + 1 - len(body))
                left = decoder.unused_data.lstrip(b"\0")
        except zlib.error as error:
            raise _AttemptError(f"the answer is not gzip: {error}", retryable=True) from None
        if len(body) > _MAX_ANSWER:
            raise _AttemptError(f"an answer of more than {_MAX_ANSWER} bytes", too_large=True)
        if deadline.left() == 0:  # httpx limits each read, not all of them together
            raise _AttemptError("the answer did not end in time")
    if decoder is not None and not decoder.eof:
        raise _AttemptError("the compressed answer is cut", retryable=True)
    return body


def _hit(entry: Any, rank: int) -> Hit:
    """Read ``{"document": {...}, "score": ...}``, or the document alone.

    Raises:
        TypeError, ValueError, KeyError, AttributeError, OverflowError: it is neither.
    """
    document = entry.get("document", entry)
    score = entry.get("score")
    score = 1.0 / rank if score is None else float(score)
    if not math.isfinite(score):
        raise ValueError(f"score {score}")
    title, text = document.get("title"), document.get("text")
    if not (isinstance(title, str) and isinstance(text, str)):
        title, _, text = document["contents"].partition("\n")
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
    id_ = document.get("id")
    if id_ is None:
        id_ = blake2b(
            f"{title}\n{text}".encode("utf-8", "surrogatepass"), digest_size=8
        ).hexdigest()
    return Hit(Passage(str(id_), title, text), score)
