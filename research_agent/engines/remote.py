"""What the engines in front of servers share: requests with clear errors, turns in a thread."""

from __future__ import annotations

import asyncio
import json
import os
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np

from research_agent.errors import ConfigError
from research_agent.redaction import one_line, redact

R = TypeVar("R")
T = TypeVar("T")

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that are worth a retry; a server answers any other the same way again."""

_LARGEST_ANSWER = 64 << 20  # bytes


class RequestError(Exception):
    """A request without a usable answer.

    Attributes:
        status: the answer's HTTP status; None if there was no answer, or not a valid one.
    """

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed at another time or at another server."""
        return self.status is None or self.status in AGAIN


def read_key(variable: str) -> str | None:
    """Return the key in an environment variable; None if there is none.

    Raises:
        ConfigError: it holds characters that no key has; they are not repeated.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{variable} holds characters that no key has")
    return key or None


def check_address(url: str, key: str = "") -> None:
    """Refuse what is no server's address, or holds a secret; errors do not repeat the secret.

    Args:
        url: for example http://localhost:8000.
        key: the server's key, which the address must not hold either.

    Raises:
        ConfigError: no http or https address, or one with a password, a key or a query.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if "@" in url or "?" in url or "#" in url or redact(url, key) != url:
        raise ConfigError(
            "a server's address may hold no password, user, key or query: write it as "
            "http://HOST:PORT; keys come from the environment"
        )
    if not good:
        raise ConfigError(f"{url!r} is no server's address; write it as http://HOST:PORT")


def make_client(url: str, key: str | None = None, connections: int = 256) -> httpx.AsyncClient:
    """Make a client of one server, for one event loop.

    Args:
        url: the server's base address.
        key: sent as a bearer token; no repr shows it.
        connections: open connections at most; further requests wait, within their own timeout.

    Raises:
        ConfigError: see ``check_address``.
    """
    check_address(url, key or "")
    identity = {"Accept-Encoding": "identity"}  # a few compressed bytes could fill the memory
    return httpx.AsyncClient(
        base_url=url,
        headers=identity | ({"Authorization": f"Bearer {key}"} if key else {}),
        timeout=None,  # ``ask`` has one for the whole answer
        limits=httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=2.0,  # vLLM closes after 5 s; a request could meet that and look lost
        ),
    )


async def ask(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    payload: Mapping[str, Any] | None = None,
    *,
    timeout: float,
) -> Any:
    """Send a request once.

    Args:
        client: a client of the server.
        method: such as "POST".
        path: relative to the client's address.
        payload: sent as JSON.
        timeout: seconds until the last byte of the answer.

    Returns:
        The answer's JSON; None if it is empty.

    Raises:
        RequestError: no answer, a status other than 200, a compressed or too large answer, or no
            JSON. The message quotes the server without the key.
    """
    body = bytearray()
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")

    def safe(text: str) -> str:
        return one_line(redact(text[:10_000], key))

    try:
        async with (
            asyncio.timeout(timeout),
            client.stream(method, path, json=payload) as response,
        ):
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise RequestError(
                    f"an answer in Content-Encoding {one_line(encoding)!r}", status=415
                )
            async for part in response.aiter_raw():
                body += part
                if len(body) > _LARGEST_ANSWER:
                    raise RequestError(f"an answer of over {_LARGEST_ANSWER >> 20} MB", status=413)
    except TimeoutError:
        raise RequestError(f"no answer within {timeout:g} s") from None
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        problem = f"{type(error).__name__}: {safe(str(error))}".rstrip(": ")
        raise RequestError(problem) from None
    if response.status_code != 200:
        said = safe(_message(body))
        raise RequestError(
            f"status {response.status_code}{': ' if said else ''}{said}",
            status=response.status_code,
        )
    if not body:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the answer is no JSON") from None


def _message(body: bytes | bytearray) -> str:
    """The message in an error's body; OpenAI's format has a field for it."""
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return text


def turn_seed(seed: int, position: int) -> int:
    """Return a seed of 63 bits for one turn, for servers that know nothing of earlier turns.

    Args:
        seed: the trajectory's seed.
        position: number of tokens in the trajectory before the turn.
    """
    state = np.random.SeedSequence([seed % 2**64, position]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


class Closable(Protocol):
    """What ``Turns`` closes at its end."""

    async def aclose(self) -> None:
        """Close it, in the event loop of the turns."""
        ...


class Turns(Generic[R]):
    """Coroutines that sample turns, one per slot, in a thread with an event loop of its own.

    Closing or deleting the object ends the thread and closes the clients.
    """

    def __init__(self, name: str, clients: Sequence[Closable]) -> None:
        """Start the thread, with this name."""
        loop = asyncio.new_event_loop()
        Thread(target=_run, args=(loop,), name=name, daemon=True).start()
        self._loop = loop
        self._running: dict[int, Future[R]] = {}
        self._finished: SimpleQueue[tuple[int, Future[R]]] = SimpleQueue()
        # A function; the second call does nothing.
        self.close = weakref.finalize(self, _stop, loop, clients)

    @property
    def slots(self) -> list[int]:
        """Slots with a running turn."""
        return list(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, slot: int) -> bool:
        return slot in self._running

    def begin(self, slot: int, turn: Coroutine[Any, Any, R]) -> None:
        """Start the turn of a slot."""
        future = asyncio.run_coroutine_threadsafe(turn, self._loop)
        self._running[slot] = future
        finished = self._finished
        future.add_done_callback(lambda done: finished.put((slot, done)))

    def cancel(self, slot: int) -> None:
        """Cancel the turn of a slot, if there is one."""
        if future := self._running.pop(slot, None):
            future.cancel()

    def finished(self, timeout: float) -> dict[int, R]:
        """Return slot -> result of the finished turns.

        Waits until one is finished, for at most ``timeout`` seconds.

        Raises:
            Exception: what a turn raised.
        """
        done: dict[int, R] = {}
        deadline = time.monotonic() + timeout
        while self._running:
            left = 0.0 if done else max(0.0, deadline - time.monotonic())
            try:
                slot, future = self._finished.get(timeout=left)
            except Empty:
                break
            if self._running.get(slot) is future:  # otherwise it was cancelled
                del self._running[slot]
                done[slot] = future.result()
        return done

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop, and return its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting
            raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, clients: Sequence[Closable]) -> None:
    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        closing = [client.aclose() for client in clients]
        await asyncio.gather(*tasks, *closing, return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)
