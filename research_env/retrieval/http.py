r"""Search engines behind HTTP, in the wire format of Search-R1's retrieval server.

The format (Jin et al. 2025, ``search_r1/search/retrieval_server.py``; its retrievers and documents
are those of FlashRAG, Jin et al. 2024): ``POST {"queries": [...], "topk": k, "return_scores":
true}`` is answered by ``{"result": [[{"document": {"id": ..., "contents": "\"title\"\ntext"},
"score": ...}, ...], ...]}``, one list a query.
:mod:`research_env.retrieval.serve` offers any of our retrievers in it.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from research_env.errors import ConfigurationError, RetrievalError
from research_env.redaction import redact_known
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.reading import read_json
from research_env.retrieval.retry import AGAIN, Deadline, Retry, retry_after
from research_env.retrieval.url import (
    check_address,
    check_options,
    number,
    split_options,
    words_only,
)

if TYPE_CHECKING:
    import ssl

    import httpx

PARTIAL = {"Prefer": "handling=lenient"}
"""The header by which we ask our own server to fail some queries of a request only (RFC 7240)."""

_LARGEST_REQUEST = 8 << 20  # characters of the queries of a request
_LARGEST_ANSWER = 64 << 20  # bytes of a response


class HttpRetriever:
    """Ask a retrieval server; it may be used by several threads.

    Queries go in requests of bounded size, one after the other. A request that fails in a way that
    may pass (no connection, a broken answer, a status of
    :data:`research_env.retrieval.retry.AGAIN`) is sent again after a pause, until the deadline of
    the whole batch; its queries then fail, each in its place. (Only a server that sends its headers
    byte by byte is waited for longer: each byte renews the wait.) A query of blanks finds nothing
    and is not sent. Lone surrogates are sent as U+FFFD. After a fork each process has connections
    of its own.
    """

    in_flight = 4

    def __init__(self, url: str, batch: int = 256, retry: Retry | None = None) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: such as ``http://localhost:8000/retrieve``.
            batch: the most queries of a request.
            retry: deadline of a batch and pauses between attempts; None: 60 s and the usual ones.

        Raises:
            ConfigurationError: the address cannot be used, or holds a password.
        """
        check_address(url)
        if batch < 1:
            raise ConfigurationError(f"batch={batch!r} must be 1 or more")
        self._url = url
        self._batch = batch
        self._retry = retry or Retry(deadline=60.0)
        self._client = Client(PARTIAL)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Hits come in the order of the server. Where it gives no scores they are 1/rank, where it
        gives no ids they are a digest of title and text.

        Raises:
            ConfigurationError: ``top_k`` below 1.
            RetrievalError: the retriever has been closed.
        """
        if top_k < 1:
            raise ConfigurationError(f"top_k={top_k!r} must be 1 or more")
        client = self._client.own()
        found: list[list[Hit] | RetrievalError] = [[] for _ in queries]
        deadline = Deadline.after(self._retry.deadline)
        for places in self._requests(queries):
            asked = [words_only(queries[place]) for place in places]
            answers = self._ask(client, asked, top_k, deadline)
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer
        return found

    def close(self) -> None:
        """Close the connections; calling it twice is harmless."""
        self._client.close()

    def _requests(self, queries: Sequence[str]) -> Iterator[list[int]]:
        """Which queries go together."""
        places: list[int] = []
        size = 0
        for place, query in enumerate(queries):
            if not query.strip():
                continue
            full = len(places) == self._batch or size + len(query) > _LARGEST_REQUEST
            if places and full:
                yield places
                places, size = [], 0
            places.append(place)
            size += len(query)
        if places:
            yield places

    def _ask(
        self, client: httpx.Client, queries: list[str], top_k: int, deadline: Deadline
    ) -> Sequence[list[Hit] | RetrievalError]:
        payload = {"queries": queries, "topk": top_k, "return_scores": True}
        request = client.build_request("POST", self._url, json=payload)
        try:
            answer = ask_json(client, request, self._retry, deadline)
            result = answer.get("result") if isinstance(answer, dict) else None
            if not isinstance(result, list) or len(result) != len(queries):
                raise RetrievalError(
                    f"{self._url} did not answer with a 'result' of {len(queries)} entries; "
                    "is it a server of Search-R1's format?"
                )
        except RetrievalError as error:
            return [error] * len(queries)
        return [self._read(entry, top_k) for entry in result]

    def _read(self, entry: Any, top_k: int) -> list[Hit] | RetrievalError:
        if isinstance(entry, dict) and "error" in entry:
            return RetrievalError(f"{self._url} failed the query: {one_line(str(entry['error']))}")
        try:
            return [_hit(each, rank) for rank, each in enumerate(entry[:top_k], start=1)]
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            return RetrievalError(f"{self._url} sent what is no list of documents: {error!r:.120}")


def open_http(scheme: str, rest: str) -> HttpRetriever:
    """The retriever of ``http://...`` or ``https://...``, with ``?deadline=SECONDS&batch=N``."""
    url, options = split_options(f"{scheme}:{rest}")
    check_options(scheme, options, ("deadline", "batch"))
    return HttpRetriever(
        url,
        batch=int(number(options, "batch", 256, 1)),
        retry=Retry(deadline=number(options, "deadline", 60.0, 0)),
    )


class Client:
    """A client whose connections are kept, another one in each process; for several threads.

    On a connection that a fork copied, parent and child would read each other's answers.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        """Make that of this process; nothing is sent. ``headers`` go with each request."""
        self._headers = headers
        self._made = os.getpid(), make_client(headers)

    def own(self) -> httpx.Client:
        """That of this process.

        Raises:
            RetrievalError: it has been closed.
        """
        process, client = self._made
        if client.is_closed:
            raise RetrievalError("the retriever has been closed; open it again")
        if process != os.getpid():  # the parent's is left alone: its connections are in use
            client = make_client(self._headers)
            self._made = os.getpid(), client
        return client

    def close(self) -> None:
        """Close the connections of this process; calling it twice is harmless."""
        self._made[1].close()


def make_client(headers: Mapping[str, str] | None = None) -> httpx.Client:
    """A client of httpx, for this process only; TLS certificates are verified."""
    import httpx  # noqa: PLC0415  (loaded only by those who ask a server)

    return httpx.Client(headers=headers, verify=_certificates())


def ask_json(
    client: httpx.Client,
    request: httpx.Request,
    retry: Retry,
    deadline: Deadline,
    *,
    before: Callable[[Deadline], None] = lambda _: None,
    quoting: bool = True,
) -> Any:
    """Send a request, again where its failure may pass, until there is an answer of JSON.

    Args:
        client: sends it.
        request: the same each time.
        retry: the pauses between attempts.
        deadline: after it nothing is sent and nothing is waited for.
        before: called before each attempt; it may wait, or raise to make an end.
        quoting: whether errors may quote what the server said (never where it may hold a secret).

    Raises:
        RetrievalError: the server refused the request, or the deadline has passed.
    """
    where = str(request.url.copy_with(query=None))  # what follows may be a model's words
    problem = "the deadline of the batch had passed"
    for attempt in itertools.count():
        if deadline.left() == 0:
            raise RetrievalError(f"{where}: {problem}")
        before(deadline)
        try:
            return _once(client, request, deadline, quoting)
        except _AttemptError as failure:
            problem = str(failure)
            pause = retry.pause(attempt, deadline.left(), failure.wait) if failure.again else None
        if pause is None:
            raise RetrievalError(f"{where}: {problem} (attempt {attempt + 1})")
        time.sleep(pause)
    raise AssertionError  # count() does not end


def one_line(text: str, most: int = 200) -> str:
    """The beginning of a text, on one line and fit to be printed."""
    cleaned = redact_known(" ".join(text[: 20 * most].split()))  # before it is cut
    return "".join(c if c.isprintable() else "?" for c in cleaned[:most])


class _AttemptError(Exception):
    """``again``: the next attempt may not fail; ``wait``: seconds that the server asks for."""

    def __init__(self, problem: str, again: bool, wait: float | None = None) -> None:
        super().__init__(problem)
        self.again = again
        self.wait = wait


@cache
def _certificates() -> ssl.SSLContext:
    import httpx  # noqa: PLC0415

    return httpx.create_ssl_context()  # reads a file of some hundred certificates: once will do


def _once(client: httpx.Client, request: httpx.Request, deadline: Deadline, quoting: bool) -> Any:
    import httpx  # noqa: PLC0415

    request.extensions["timeout"] = httpx.Timeout(max(deadline.left(), 0.001)).as_dict()
    body = bytearray()
    try:
        response = client.send(request, stream=True)
        try:
            for part in response.iter_bytes():
                body += part
                if len(body) > _LARGEST_ANSWER:
                    raise _AttemptError(
                        f"an answer of over {_LARGEST_ANSWER >> 20} MB", again=False
                    )
                if deadline.left() == 0:  # the time-out is one of each read, not of all of them
                    raise _AttemptError("the answer did not end in time", again=False)
        finally:
            response.close()
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise _AttemptError(f"{type(error).__name__}: {one_line(str(error))}", again=True) from None
    except RuntimeError as error:  # closed by another thread
        raise _AttemptError(one_line(str(error)), again=False) from None
    if response.status_code != 200:
        said = one_line(body.decode("utf-8", "replace")) if quoting else ""
        raise _AttemptError(
            f"status {response.status_code}{': ' if said else ''}{said}",
            again=response.status_code in AGAIN,
            wait=retry_after(response.headers.get("Retry-After")),
        )
    try:
        return read_json(body)
    except ValueError:
        raise _AttemptError("the answer is no JSON", again=True) from None


def _hit(entry: Any, rank: int) -> Hit:
    """A hit from ``{"document": ..., "score": ...}`` or from the document alone."""
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
