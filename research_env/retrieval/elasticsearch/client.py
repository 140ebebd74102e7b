"""What search and index share: an Elasticsearch URL, its credentials, and one request at a time.

Searches run in the thread that asks (:class:`Caller`). Indexing has several requests under way, so
its client is asynchronous (:class:`Connection`).

Credentials come from the environment and stay inside the client object: ``ELASTICSEARCH_API_KEY``,
or ``ELASTICSEARCH_USERNAME`` and ``ELASTICSEARCH_PASSWORD``; ``ELASTICSEARCH_CA_CERTS`` names the
file of an own certificate authority. TLS certificates are always verified.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import certifi

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.reading import read_json
from research_env.retrieval.retry import AGAIN, retry_after
from research_env.retrieval.url import check_options, secret_of, split_options

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch, Elasticsearch
    from elasticsearch.serializer import JsonSerializer

Result = TypeVar("Result")

MAPPING = 1  # of the fields and what is stored in them: raise it when any of them changes
META = "research_env"  # our key in the ``_meta`` of an index
SCHEMES = {"elasticsearch": "http", "elasticsearch+https": "https"}

_INDEX_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,199}")  # neither pattern nor list of indexes
# What a server says it sends to this client, and what a proxy may say instead.
_ANSWERS = ("application/vnd.elasticsearch+json", "application/json")


class Again(Exception):  # noqa: N818  (not an error yet)
    """A request that failed in a way that may pass.

    ``wait`` is what the server asks for: seconds until the next try, None where it says nothing.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Place:
    """An index of a server: what ``elasticsearch://HOST:PORT/INDEX?...`` names."""

    server: str  # http://HOST:PORT or https://HOST:PORT
    index: str
    options: dict[str, str]

    def __str__(self) -> str:
        return f"{self.server}/{self.index}"


def parse(url: str, known: Collection[str]) -> Place:
    """Read a URL; what it holds besides server, index and the known options is refused.

    Raises:
        ConfigurationError: a part is missing or malformed, or it holds a user or password, which
            the message does not repeat.
        UnknownNameError: an option that does not exist.
    """
    example = "write elasticsearch://HOST:PORT/INDEX or elasticsearch+https://HOST/INDEX"
    # First, as other messages repeat the URL; and wherever, as a password may hold any character.
    if "@" in url:
        raise ConfigurationError(
            "the Elasticsearch URL holds a user or password, which would end up in logs; set "
            "ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD (an @ of "
            "an option is written %40)"
        )
    base, options = split_options(url)
    check_options("elasticsearch", options, known)
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"the Elasticsearch URL is malformed; {example}") from None
    if parts.scheme not in SCHEMES or not host or parts.fragment:
        raise ConfigurationError(f"the Elasticsearch URL is malformed; {example}")
    index = parts.path.strip("/")
    if not _INDEX_NAME.fullmatch(index):
        raise ConfigurationError(
            f"{index!r} names no index (lower case letters, digits, - _ . +); {example}"
        )
    scheme = SCHEMES[parts.scheme]
    name = f"[{host}]" if ":" in host else host
    port = port or {"http": 9200, "https": 443}[scheme]
    return Place(f"{scheme}://{name}:{port}", index, options)


@contextmanager
def told(place: Place, seconds: float) -> Iterator[None]:
    """Around a request, and the reading of its answer: what went wrong, in our words.

    Raises:
        Again: it failed, and may not fail next time.
        RetrievalError: it failed, and will fail again (no such index, no permission, ...).
    """
    import elasticsearch as es  # noqa: PLC0415  (only when used)

    try:
        yield
    except (TimeoutError, es.ConnectionTimeout) as error:
        raise Again(f"no answer within {seconds:.1f} s") from error
    except es.SSLError as error:  # a certificate does not become valid by asking again
        raise RetrievalError(
            f"no secure connection to {place.server}: {error.message}. ELASTICSEARCH_CA_CERTS "
            "names the file of an own certificate authority"
        ) from error
    except es.ConnectionError as error:
        raise Again("no connection") from error
    except es.UnsupportedProductError as error:  # also the page of a proxy before it
        raise Again("an answer that is not Elasticsearch's") from error
    except es.ApiError as error:  # not its cause: that repeats the whole answer
        status = error.meta.status
        if status in AGAIN:
            wait = retry_after(error.meta.headers.get("retry-after"))
            raise Again(f"status {status}", wait) from None
        raise RetrievalError(refusal(place, status, _kind_in(error.body))) from None
    except (es.SerializationError, ValueError, TypeError) as error:
        raise Again("an answer that cannot be read") from error


class Caller:
    """A client whose requests run in the thread that asks; for the threads of one process.

    Attributes:
        closing: set when it is closed.
    """

    def __init__(self, place: Place) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigurationError: the client is not installed, or the credentials make no sense.
        """
        given = _given(place)
        from elasticsearch import Elasticsearch  # noqa: PLC0415  (only when used)

        from research_env.retrieval.elasticsearch.node import DeadlineNode  # noqa: PLC0415

        self.closing = threading.Event()
        self._place = place
        self._client = Elasticsearch(place.server, node_class=DeadlineNode, **given)

    def ask(
        self,
        request: Callable[[Elasticsearch], Any],
        seconds: float,
        read: Callable[[bytes], Any] = read_json,
    ) -> Any:
        """One request, tried once.

        Args:
            request: asks a client.
            seconds: after which it is given up.
            read: makes something of the body, or raises ValueError.

        Returns:
            What was read.

        Raises:
            Again: it failed, and may not fail next time.
            RetrievalError: it failed, and will fail again (no such index, no permission, ...).
        """
        from research_env.retrieval.elasticsearch.node import within  # noqa: PLC0415

        with told(self._place, seconds), within(seconds):
            return read(request(self._client).body)

    def close(self) -> None:
        """End what is under way, and the connections; twice is harmless."""
        self.closing.set()
        self._client.close()


class Connection:
    """A client and the thread in which its requests run; for one process, any of its threads.

    The requests are asynchronous, so that every one can be given up at its deadline, whatever the
    server does; the thread of its own lets callers be inside an event loop, as in a notebook.
    """

    def __init__(self, place: Place) -> None:
        """Start the thread; nothing is sent yet.

        Raises:
            ConfigurationError: the client is not installed, or the credentials make no sense.
        """
        given = _given(place)
        from elasticsearch import AsyncElasticsearch  # noqa: PLC0415  (only when used)

        self.place = place
        self.client = AsyncElasticsearch(place.server, **given)
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="elasticsearch", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do something in the thread and wait for its result.

        Raises:
            RetrievalError: the connection is closed, or was closed meanwhile.
        """
        with self._closing:  # what starts here starts before the end, which then ends it
            if self._closed:
                work.close()
                raise RetrievalError(f"the connection to {self.place} has been closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RetrievalError(f"the connection to {self.place} was closed meanwhile") from None
        except BaseException:  # also KeyboardInterrupt: nothing goes on unseen
            future.cancel()
            raise

    def close(self) -> None:
        """End what is under way, the connections and the thread; twice is harmless."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            end = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        end.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()

    async def ask(
        self, request: Callable[[AsyncElasticsearch], Awaitable[Any]], seconds: float
    ) -> Any:
        """One request, tried once; see :meth:`Caller.ask`."""
        # Not client.options(request_timeout=...): that makes a client for each request.
        with told(self.place, seconds):
            async with asyncio.timeout(seconds):
                answer = await request(self.client)
            return read_json(answer.body)


def refusal(place: Place, status: int, kind: str) -> str:
    """What to say of an answer that no further try will change."""
    cure = {
        401: "; check ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and _PASSWORD",
        403: "; the user or API key lacks a privilege on this index",
        404: "; make it with: research-env index --corpus FILE --to elasticsearch://...",
    }.get(status, "")
    return f"Elasticsearch refuses at {place}: status {status} {kind}{cure}"


def kind_of(error: Any) -> str:
    """The type of an error, as the server calls it; never its text, which may repeat anything."""
    try:
        kind = error["root_cause"][0]["type"] if error.get("root_cause") else error["type"]
    except (KeyError, TypeError, IndexError, AttributeError):
        return "error"
    return kind if isinstance(kind, str) and re.fullmatch(r"\w{1,80}", kind) else "error"


def _kind_in(body: Any) -> str:
    """The type of the error that a body tells of."""
    try:
        return kind_of(read_json(body)["error"])
    except (ValueError, TypeError, KeyError):
        return "error"


def _unread() -> JsonSerializer:
    """Leaves bodies of answers as they come: who asked knows what to read from them."""
    from elasticsearch.serializer import JsonSerializer  # noqa: PLC0415  (only when used)

    class Unread(JsonSerializer):
        def loads(self, data: bytes) -> bytes:
            return data

    return Unread()


def _given(place: Place) -> dict[str, Any]:
    """What a client of either kind is made with.

    Raises:
        ConfigurationError: the client is not installed, or the credentials make no sense.
    """
    if not all(map(find_spec, ("elasticsearch", "aiohttp"))):
        raise ConfigurationError("elasticsearch:// needs its client: pip install .[elasticsearch]")
    given: dict[str, Any] = {
        "max_retries": 0,
        "retry_on_status": (),
        "request_timeout": None,
        "serializers": dict.fromkeys(_ANSWERS, _unread()),
    }
    key = secret_of("ELASTICSEARCH_API_KEY")
    user, password = (
        os.environ.get("ELASTICSEARCH_USERNAME"),
        os.environ.get("ELASTICSEARCH_PASSWORD"),
    )
    if key and (user or password):
        raise ConfigurationError(
            "both ELASTICSEARCH_API_KEY and ELASTICSEARCH_USERNAME or _PASSWORD are set; unset one"
        )
    if bool(user) != bool(password):
        raise ConfigurationError("set both ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD")
    if key:
        given["api_key"] = key
    if user and password:
        try:
            f"{user}{password}".encode()
        except UnicodeEncodeError:
            raise ConfigurationError(
                "ELASTICSEARCH_USERNAME or ELASTICSEARCH_PASSWORD is not in UTF-8"
            ) from None
        given["basic_auth"] = (user, password)
    if place.server.startswith("https"):
        given["ssl_context"] = _certificates()
    return given


def _certificates() -> ssl.SSLContext:
    """Whom to trust: the system's authorities, certifi's, and ``ELASTICSEARCH_CA_CERTS``.

    The name or the address by which the server is asked must stand in its certificate.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    authority = os.environ.get("ELASTICSEARCH_CA_CERTS")
    if authority:
        kind = "capath" if Path(authority).is_dir() else "cafile"
        try:
            context.load_verify_locations(**{kind: authority})
        except OSError as error:  # also of a file that holds no certificate
            raise ConfigurationError(
                f"no certificates in {authority!r}, which ELASTICSEARCH_CA_CERTS names"
            ) from error
    return context
