"""The connection to Elasticsearch: its URL, its credentials, and one request at a time.

Requests go through Elasticsearch's own asynchronous client, whose event loop runs in a private
thread (:class:`SyncClient`). So each request has one deadline, which holds whatever the server does
(an answer that trickles in byte by byte, a name that takes long to resolve), and callers may
themselves be inside an event loop, as in a notebook.

Credentials come from the environment and stay inside the client object: ``ELASTICSEARCH_API_KEY``,
or ``ELASTICSEARCH_USERNAME`` and ``ELASTICSEARCH_PASSWORD``. ``ELASTICSEARCH_CA_CERTS`` names the
file or folder of your own certificate authority. TLS certificates are always verified.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import selectors
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

from research_env.errors import ConfigurationError, ResearchEnvError, RetrievalError
from research_env.retrieval.json_text import read_json
from research_env.retrieval.retry import RETRYABLE_STATUSES, retry_after
from research_env.retrieval.url import check_options, is_host, secret_of, split_options

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch
    from elasticsearch.serializer import JsonSerializer

Body = dict[str, Any]
"""A JSON object of Elasticsearch's API."""
Result = TypeVar("Result")

MAPPING_VERSION = 1
"""Version of the fields and of what is stored in them; raise it when any of them changes."""
META_KEY = "research_env"
"""Our key in the ``_meta`` of an index."""

_SCHEMES = {"elasticsearch": "http", "elasticsearch+https": "https"}
_INDEX_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,199}")
_PATH_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]{1,100}){0,8}")
# The media types that a server uses for this client, and that a proxy may use instead.
_JSON_TYPES = ("application/vnd.elasticsearch+json", "application/json")


class RetryableError(Exception):
    """A request that failed in a way that may pass.

    Attributes:
        wait: Seconds that the server asks to wait before the next attempt; None if it says nothing.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class IndexAddress:
    """An index of a server: what ``elasticsearch://HOST:PORT/PREFIX/INDEX?...`` names.

    Attributes:
        server: ``http://HOST:PORT`` or ``https://HOST:PORT``, with the path prefix if there is one.
        index: Name of the index or alias.
        options: What follows the question mark, decoded.
    """

    server: str
    index: str
    options: dict[str, str]

    def __str__(self) -> str:
        return f"{self.server}/{self.index}"


def parse_address(url: str, known: Collection[str]) -> IndexAddress:
    """Parse an Elasticsearch URL.

    Args:
        url: ``elasticsearch://HOST:PORT/INDEX?KEY=VALUE`` or ``elasticsearch+https://...``; a
            server behind a reverse proxy may have a path prefix, ``HOST/PREFIX/INDEX``.
        known: Names of the options that may follow.

    Returns:
        Its parts.

    Raises:
        ConfigurationError: A part is missing or malformed, the URL names several indices, or it
            holds a user or password, which the message does not repeat.
        UnknownNameError: An option does not exist.
    """
    example = "write elasticsearch://HOST:PORT/INDEX or elasticsearch+https://HOST/INDEX"
    # Checked first, as other messages repeat the URL; and in all of it, as a password may hold any
    # character.
    if "@" in url:
        raise ConfigurationError(
            "the Elasticsearch URL holds a user or password, which would end up in logs; set "
            "ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD (write an "
            "@ in an option as %40)"
        )
    base, options = split_options(url)
    check_options("elasticsearch", options, known)
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"the Elasticsearch URL is malformed; {example}") from None
    if parts.scheme not in _SCHEMES or not host or not is_host(host) or parts.fragment:
        raise ConfigurationError(f"the Elasticsearch URL is malformed; {example}")
    prefix, _, index = parts.path.rstrip("/").rpartition("/")
    if re.search(r"[,*]|^_all$|%2c|%2a", index, re.IGNORECASE):
        raise ConfigurationError(
            f"{index!r} names several indices (lists and wildcards); name one index, or make an "
            "alias over them (POST _aliases) and name that"
        )
    if not _INDEX_NAME.fullmatch(index):
        raise ConfigurationError(
            f"{index!r} names no index (lower case letters, digits, - _ . +); {example}"
        )
    if not _PATH_PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"the path {prefix!r} before the index {index!r} is not a prefix of a server "
            f"(letters, digits, - _ . ~ between slashes); {example}"
        )
    scheme = _SCHEMES[parts.scheme]
    name = f"[{host}]" if ":" in host else host
    port = port or {"http": 9200, "https": 443}[scheme]
    return IndexAddress(f"{scheme}://{name}:{port}{prefix}", index, options)


@contextmanager
def translate_errors(address: IndexAddress, seconds: float) -> Iterator[None]:
    """Translate what goes wrong with a request, or with reading its answer, into our errors.

    Args:
        address: What is asked, for the messages.
        seconds: Time limit of the request, for the messages.

    Raises:
        RetryableError: The request failed, and the next attempt might succeed.
        RetrievalError: The request failed, and would fail again (no such index, no permission, a
            server that is not Elasticsearch, ...).
    """
    import elasticsearch as es  # noqa: PLC0415  (only when used)

    try:
        yield
    except ResearchEnvError:
        raise
    except (TimeoutError, es.ConnectionTimeout) as error:
        raise RetryableError(f"no answer within {seconds:.1f} s") from error
    except es.SSLError as error:  # a certificate does not become valid by asking again
        raise RetrievalError(
            f"no secure connection to {address.server}: {error.message}. ELASTICSEARCH_CA_CERTS "
            "names the file of your own certificate authority"
        ) from error
    except es.ConnectionError as error:
        raise RetryableError("no connection") from error
    except es.UnsupportedProductError as error:
        try:
            read_json(error.body)
        except (ValueError, TypeError):  # the page of a proxy, while the server is away
            raise RetryableError("an answer that is not Elasticsearch's") from None
        raise RetrievalError(
            f"{address.server} is not Elasticsearch: its answers lack the header "
            "X-Elastic-Product. It is OpenSearch or Elasticsearch before 7.14, which are not "
            "supported, or a proxy that removes the header, which must let it through"
        ) from None
    except es.ApiError as error:  # without its cause, which repeats the whole answer
        status = error.meta.status
        if status in RETRYABLE_STATUSES:
            wait = retry_after(error.meta.headers.get("retry-after"))
            raise RetryableError(f"status {status}", wait) from None
        raise RetrievalError(refusal(address, status, _error_type_of(error.body))) from None
    except (es.SerializationError, ValueError, TypeError) as error:
        raise RetryableError("an answer that cannot be read") from error


class SyncClient:
    """A client of Elasticsearch for the threads of one process.

    Requests run in the event loop of a thread of its own, which ends when the client is closed.

    Attributes:
        address: The index that is asked.
        closing: Set when the client is closed.
    """

    def __init__(self, address: IndexAddress) -> None:
        """Start the thread; nothing is sent yet.

        Args:
            address: The index to ask.

        Raises:
            ConfigurationError: The client library is not installed, or the credentials contradict
                each other.
        """
        kwargs = _client_kwargs(address)
        from elasticsearch import AsyncElasticsearch  # noqa: PLC0415  (only when used)

        from research_env.retrieval.elasticsearch.session import (  # noqa: PLC0415  (loads aiohttp)
            BoundedNode,
        )

        self.address = address
        self.closing = threading.Event()
        self._process = os.getpid()
        self._lock = threading.Lock()
        # A forked process shares an epoll instance with its parent and would disturb it when it
        # frees its copy of this loop; poll() keeps nothing in the kernel.
        self._loop = asyncio.SelectorEventLoop(selectors.PollSelector())
        # Errors of requests reach whoever waits for them.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._client = AsyncElasticsearch(address.server, node_class=BoundedNode, **kwargs)
        self._thread = threading.Thread(
            target=_run_loop, args=(self._loop,), name="elasticsearch", daemon=True
        )
        self._thread.start()

    def ask(
        self,
        request: Callable[[AsyncElasticsearch], Awaitable[Any]],
        seconds: float,
        read: Callable[[bytes], Result],
    ) -> Result:
        """Send one request, once, and wait for its answer.

        Args:
            request: Sends it with the client that it gets.
            seconds: Time limit for the request and its whole answer.
            read: Parses the body in the calling thread; raises ValueError if it cannot.

        Returns:
            What was read.

        Raises:
            RetryableError: The request failed, and the next attempt might succeed.
            RetrievalError: The request failed, and would fail again; or the client was closed.
        """
        with translate_errors(self.address, seconds):
            return read(self.run(self._body(request, seconds)))

    async def ask_async(
        self, request: Callable[[AsyncElasticsearch], Awaitable[Any]], seconds: float
    ) -> Any:
        """Send one request from a coroutine that :meth:`run` runs; see :meth:`ask`."""
        with translate_errors(self.address, seconds):
            return read_json(await self._body(request, seconds))

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the thread and wait for its result.

        Args:
            work: May call :meth:`ask_async`.

        Returns:
            Its result.

        Raises:
            RetrievalError: The client is closed, or was closed meanwhile.
        """
        with self._lock:  # either it starts before the end, which then cancels it, or not at all
            if self.closing.is_set():
                work.close()
                raise RetrievalError(f"the connection to {self.address} has been closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RetrievalError(f"the connection to {self.address} was closed meanwhile") from None
        except BaseException:  # also KeyboardInterrupt: nothing continues in the background
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel running requests, close the connections and end the thread.

        Closing twice is harmless, and so is closing in a forked process, which has no such thread.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            if not self.closing.is_set():
                self.closing.set()
                asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _body(
        self, request: Callable[[AsyncElasticsearch], Awaitable[Any]], seconds: float
    ) -> bytes:
        # Not client.options(request_timeout=...), which makes a client for each request, and whose
        # timeout does not cover everything that can take time.
        async with asyncio.timeout(seconds):
            body: bytes = (await request(self._client)).body
            return body

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
        await asyncio.sleep(0)  # lets the transports close their sockets
        self._loop.stop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop until it is stopped, then free it. It holds no reference to the client."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def refusal(address: IndexAddress, status: int, error_type: str) -> str:
    """Describe an answer that no further attempt would change, and what to do about it."""
    advice = {
        401: "; check ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and _PASSWORD",
        403: "; the user or API key lacks a privilege on this index",
        404: "; make it with: research-env index --corpus FILE --to elasticsearch://...",
        406: "; OpenSearch and Elasticsearch before 8 are not supported",
    }.get(status, "")
    return f"Elasticsearch refuses at {address}: status {status} {error_type}{advice}"


def error_type(error: Any) -> str:
    """The type of an error in Elasticsearch's words; never its text, which may repeat anything."""
    try:
        kind = error["root_cause"][0]["type"] if error.get("root_cause") else error["type"]
    except (KeyError, TypeError, IndexError, AttributeError):
        return "error"
    return kind if isinstance(kind, str) and re.fullmatch(r"\w{1,80}", kind) else "error"


def _error_type_of(body: Any) -> str:
    """The type of the error that the body of an answer describes."""
    try:
        return error_type(read_json(body)["error"])
    except (ValueError, TypeError, KeyError):
        return "error"


def _raw_serializer() -> JsonSerializer:
    """A serializer that leaves answers as bytes: whoever asked knows what to read from them."""
    from elasticsearch.serializer import JsonSerializer  # noqa: PLC0415  (only when used)

    class RawAnswers(JsonSerializer):
        def loads(self, data: bytes) -> bytes:
            return data

    return RawAnswers()


def _client_kwargs(address: IndexAddress) -> dict[str, Any]:
    """The arguments of the client, with credentials from the environment.

    Raises:
        ConfigurationError: The client library is not installed, or the credentials contradict each
            other.
    """
    if not all(map(find_spec, ("elasticsearch", "aiohttp"))):
        raise ConfigurationError("elasticsearch:// needs its client: pip install .[elasticsearch]")
    kwargs: dict[str, Any] = {
        "max_retries": 0,
        "retry_on_status": (),
        "request_timeout": None,
        "serializers": dict.fromkeys(_JSON_TYPES, _raw_serializer()),
    }
    authorization = _authorization()
    if authorization:
        # As a header, since the client encodes user and password as ASCII.
        kwargs["headers"] = {"authorization": authorization}
    if address.server.startswith("https"):
        kwargs["ssl_context"] = _certificates()
    return kwargs


def _authorization() -> str | None:
    """The value of the header Authorization; None if no credentials are set.

    Raises:
        ConfigurationError: The credentials contradict each other or cannot be encoded.
    """
    key = secret_of("ELASTICSEARCH_API_KEY")
    user = os.environ.get("ELASTICSEARCH_USERNAME")
    password = os.environ.get("ELASTICSEARCH_PASSWORD")
    if key and (user or password):
        raise ConfigurationError(
            "both ELASTICSEARCH_API_KEY and ELASTICSEARCH_USERNAME or _PASSWORD are set; unset one"
        )
    if bool(user) != bool(password):
        raise ConfigurationError("set both ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD")
    if key:
        return f"ApiKey {key}"
    if not user:
        return None
    try:
        login = f"{user}:{password}".encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            "ELASTICSEARCH_USERNAME or ELASTICSEARCH_PASSWORD is not in UTF-8"
        ) from None
    return f"Basic {base64.b64encode(login).decode()}"


def _certificates() -> ssl.SSLContext:
    """Trust the system's authorities, certifi's, and ``ELASTICSEARCH_CA_CERTS``.

    The name or the address by which the server is asked must stand in its certificate.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    authority = os.environ.get("ELASTICSEARCH_CA_CERTS")
    if authority:
        kind = "capath" if Path(authority).is_dir() else "cafile"
        try:
            context.load_verify_locations(**{kind: authority})
        except OSError as error:  # also raised for a file that holds no certificate
            raise ConfigurationError(
                f"no certificates in {authority!r}, which ELASTICSEARCH_CA_CERTS names"
            ) from error
    return context
