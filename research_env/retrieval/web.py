"""Search the web, as R1-Searcher does at test time (Song et al. 2025): ``web:PROVIDER``.

``web:serper``, ``web:brave`` and ``web:tavily`` take their key from ``SERPER_API_KEY``,
``BRAVE_API_KEY`` and ``TAVILY_API_KEY``. ``web:searxng?url=http://HOST:PORT`` asks your own
SearXNG, whose settings must allow the format json; if a proxy before it wants a token, set
``SEARXNG_TOKEN``, which is sent as a bearer token. Options: ``budget=1000``, how many requests a
process may send (default: any number); ``rate=5``, how many it sends per second (default 5);
``deadline=60``, seconds per batch. The id of a passage is the result's address, its text the
snippet, its score 1/rank.

Each process has its own budget and rate. All its retrievers of the same address, budget and rate
share them; closing one gives nothing back.

The formats are those that the providers document. The tests use a local server that answers in
these formats, not the services themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from research_env.errors import ConfigurationError, RetrievalError, UnknownNameError
from research_env.retrieval.base import Hit, Passage, SearchResult, check_top_k
from research_env.retrieval.http import ForkSafeClient, request_json
from research_env.retrieval.retry import Deadline, Retry
from research_env.retrieval.url import (
    check_address,
    check_options,
    number,
    secret_of,
    split_options,
)
from research_env.system.redaction import one_line

if TYPE_CHECKING:
    import httpx

_MAX_IN_FLIGHT = 8  # requests at the same time
_MAX_CHARACTERS = 400  # limit of Brave and Tavily for a query
_MAX_WORDS = 50  # limit of Brave for a query


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The request for a query: ``json`` by POST, or ``params`` by GET."""

    url: str
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)  # holds the key
    json: Mapping[str, Any] | None = None
    params: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """A search service: how to ask it, and how to read its answers.

    Attributes:
        url: its address; empty: the user gives one.
        key: the environment variable that holds the key.
        needs_key: whether it refuses requests without a key.
        max_results: the most results per request.
        request: makes the request from (url, key, query, count).
        passages: reads passages from the JSON of an answer, best first; raises if the answer
            reports a failure.
    """

    url: str
    key: str
    needs_key: bool
    max_results: int
    request: Callable[[str, str, str, int], HttpRequest]
    passages: Callable[[Any], list[Passage]]


def _serper_request(url: str, key: str, query: str, count: int) -> HttpRequest:
    return HttpRequest(url, {"X-API-KEY": key}, json={"q": query, "num": count})


def _serper_passages(answer: Any) -> list[Passage]:
    if "searchParameters" not in answer:
        raise RetrievalError("the answer holds no search results")
    return [_passage(r, "link", "snippet") for r in answer.get("organic", [])]


def _brave_request(url: str, key: str, query: str, count: int) -> HttpRequest:
    headers = {"X-Subscription-Token": key, "Accept": "application/json"}
    params = {"q": query, "count": str(count), "text_decorations": "false"}
    return HttpRequest(url, headers, params=params)


def _brave_passages(answer: Any) -> list[Passage]:
    if answer["type"] != "search":
        raise RetrievalError("the answer holds no search results")
    return [_passage(r, "url", "description") for r in (answer.get("web") or {}).get("results", [])]


def _tavily_request(url: str, key: str, query: str, count: int) -> HttpRequest:
    headers = {"Authorization": f"Bearer {key}"}
    return HttpRequest(url, headers, json={"query": query, "max_results": count})


def _tavily_passages(answer: Any) -> list[Passage]:
    return [_passage(r, "url", "content") for r in answer["results"]]


def _searxng_request(url: str, key: str, query: str, count: int) -> HttpRequest:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    params = {"q": query, "format": "json"}
    return HttpRequest(f"{url.rstrip('/')}/search", headers, params=params)


def _searxng_passages(answer: Any) -> list[Passage]:
    silent = answer.get("unresponsive_engines")
    if silent and not answer["results"]:  # "no answer" must not be read as "no passage"
        raise RetrievalError(f"the engines behind it did not answer: {one_line(str(silent))}")
    return [_passage(r, "url", "content") for r in answer["results"]]


PROVIDERS: dict[str, Provider] = {
    "serper": Provider(
        "https://google.serper.dev/search",
        "SERPER_API_KEY",
        True,
        100,
        _serper_request,
        _serper_passages,
    ),
    "brave": Provider(
        "https://api.search.brave.com/res/v1/web/search",
        "BRAVE_API_KEY",
        True,
        20,
        _brave_request,
        _brave_passages,
    ),
    "tavily": Provider(
        "https://api.tavily.com/search",
        "TAVILY_API_KEY",
        True,
        20,
        _tavily_request,
        _tavily_passages,
    ),
    "searxng": Provider("", "SEARXNG_TOKEN", False, 1_000, _searxng_request, _searxng_passages),
}


class WebRetriever:
    """Ask a search service, one request per query. Several threads may use it.

    A query is sent as one line of at most 50 words and 400 characters. A blank query finds nothing
    and is not sent. Requests that might succeed later are retried until the deadline of the batch.
    A query that has no answer by then, or exceeds the budget, fails in its place. After a fork each
    process has its own connections and budget.
    """

    def __init__(
        self,
        provider: Provider,
        key: str = "",
        *,
        url: str = "",
        budget: int | None = None,
        rate: float = 5.0,
        retry: Retry | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            provider: the service.
            key: its key, sent in a header and nowhere else.
            url: its address; empty: the provider's own.
            budget: how many requests all retrievers of this address, budget and rate may send in
                this process, including failed attempts (they may be billed); None: any number.
            rate: how many requests they send per second.
            retry: deadline of a batch and pauses between attempts; None: 60 s and the default
                pauses.

        Raises:
            ConfigurationError: the address cannot be used.
        """
        self._provider = provider
        self._url = url or provider.url
        check_address(self._url)
        self._key = key
        self._retry = retry or Retry(deadline=60.0)
        self._limit = _shared_limit(self._url, budget, rate)
        self._client = ForkSafeClient()

    def __repr__(self) -> str:
        return f"WebRetriever({self._url!r})"

    def search(self, queries: Sequence[str], top_k: int) -> list[SearchResult]:
        """Answer every query of a batch; see :class:`research_env.retrieval.base.Retriever`.

        Raises:
            ConfigurationError: ``top_k`` is below 1.
            RetrievalError: the retriever has been closed.
        """
        check_top_k(top_k)
        client = self._client.get()
        deadline = Deadline.after(self._retry.deadline)
        with ThreadPoolExecutor(_MAX_IN_FLIGHT) as pool:
            return list(pool.map(lambda each: self._answer(client, each, top_k, deadline), queries))

    def close(self) -> None:
        """Close the connections; calling it twice is harmless."""
        self._client.close()

    def _answer(
        self, client: httpx.Client, query: str, top_k: int, deadline: Deadline
    ) -> SearchResult:
        query = _shortened(query)
        if not query:
            return []
        made = self._provider.request(
            self._url, self._key, query, min(top_k, self._provider.max_results)
        )
        request = client.build_request(
            "GET" if made.json is None else "POST",
            made.url,
            headers=made.headers,
            json=made.json,
            params=made.params,
        )
        try:
            answer = request_json(
                client,
                request,
                self._retry,
                deadline,
                before_attempt=self._limit.take,
                quote_errors=False,
            )
            passages = self._provider.passages(answer)[:top_k]
        except RetrievalError as error:
            return error
        except (TypeError, KeyError, AttributeError) as error:
            return RetrievalError(f"{self._url} answered in an unknown format: {error!r:.120}")
        return [Hit(passage, 1.0 / rank) for rank, passage in enumerate(passages, start=1)]


def open_web(url: str) -> WebRetriever:
    """Open ``web:PROVIDER?budget=...&rate=...&deadline=...&url=...``.

    Raises:
        UnknownNameError: no such provider or option.
        ConfigurationError: its key is not in the environment, or a value cannot be used.
    """
    name, options = split_options(url.partition(":")[2])
    if name not in PROVIDERS:
        raise UnknownNameError("provider of web search", name, PROVIDERS)
    provider = PROVIDERS[name]
    check_options("web", options, ("budget", "deadline", "rate", "url"))
    key = secret_of(provider.key)
    if provider.needs_key and not key:
        raise ConfigurationError(f"web:{name} needs its key in the environment: {provider.key}")
    if not (provider.url or options.get("url")):
        raise ConfigurationError(f"web:{name} needs its address: 'web:{name}?url=http://HOST:PORT'")
    if any(mark in options.get("url", "") for mark in "?#"):
        raise ConfigurationError(
            f"the address of web:{name} must end before its '?': an address is shown in errors and "
            f"recorded with results, so a token goes into {provider.key}"
        )
    budget = int(number(options, "budget", 0, 1)) if "budget" in options else None
    return WebRetriever(
        provider,
        key,
        url=options.get("url", ""),
        budget=budget,
        rate=number(options, "rate", 5.0, 0.001),
        retry=Retry(deadline=number(options, "deadline", 60.0, 0)),
    )


class _Limit:
    """Counts how many requests may still be sent, and when the next one may go."""

    def __init__(self, budget: int | None, rate: float) -> None:
        self._budget = budget
        self._left = budget
        self._gap = 1.0 / rate
        self._free_at = 0.0  # monotonic seconds
        self._lock = threading.Lock()

    def take(self, deadline: Deadline) -> None:
        """Wait until a request may be sent.

        Raises:
            RetrievalError: the budget is spent, or the request would go after the deadline.
        """
        with self._lock:
            if self._left == 0:
                raise RetrievalError(f"the budget of {self._budget} web requests is spent")
            now = time.monotonic()
            wait = max(0.0, self._free_at - now)
            if wait >= deadline.left():
                raise RetrievalError("too many web searches for the rate and the deadline")
            self._free_at = now + wait + self._gap
            if self._left is not None:
                self._left -= 1
        time.sleep(wait)


@cache
def _shared_limit(url: str, budget: int | None, rate: float) -> _Limit:
    """Return the limit that all retrievers of this process with these settings share."""
    return _Limit(budget, rate)


def _shortened(query: str) -> str:
    """Cut a query to one line of a length that every service takes."""
    words = "".join(c if c.isprintable() else " " for c in query[: 20 * _MAX_CHARACTERS]).split()
    return " ".join(words[:_MAX_WORDS])[:_MAX_CHARACTERS]


def _passage(result: Any, address: str, snippet: str) -> Passage:
    """Return a result as a passage, with an empty text if it has no snippet."""
    return Passage(
        str(result[address]), str(result.get("title") or ""), str(result.get(snippet) or "")
    )
