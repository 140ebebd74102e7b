"""What the engines that ask servers share: requests whose failures speak, and turns in a thread."""

from __future__ import annotations

import asyncio
import json
import os
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np

from research_agent.errors import ConfigError

R = TypeVar("R")
T = TypeVar("T")

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes of failures that may pass; any other is answered the same way again."""

_LARGEST_ANSWER = 64 << 20  # bytes


class RequestError(Exception):
    """A request without an answer that can be used.

    Attributes:
        status: of the answer; None where there was none, or one of rubbish.
        wait: seconds that the server asks to be left alone for (Retry-After).
    """

    def __init__(self, problem: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(problem)
        self.status = status
        self.wait = wait

    @property
    def retryable(self) -> bool:
        """Whether the same request may be answered another time, or elsewhere."""
        return self.status is None or self.status in AGAIN


def read_key(variable: str) -> str | None:
    """The key in an environment variable; None where there is none.

    Raises:
        ConfigError: it holds characters that no key has; it is not repeated.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{variable} holds characters that no key has")
    return key or None


def make_client(url: str, key: str | None = None, connections: int = 256) -> httpx.AsyncClient:
    """A client of the server at ``url``, for one event loop.

    Args:
        url: what the paths of its requests are relative to.
        key: sent as a bearer token; shown by no repr.
        connections: how many may be open; a request beyond waits, within its own time.

    Raises:
        ConfigError: no http or https address, or one with a password in it.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ConfigError(f"{url!r} is no address; write it as http://HOST:PORT") from None
    if parts.username or parts.password:
        raise ConfigError("a server's address may hold no password; keys come from the environment")
    if not good or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no server's address; write it as http://HOST:PORT")
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=None,  # of our own, for the whole answer
        limits=httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=2.0,  # vLLM closes after 5: a request may meet that, and look lost
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
    """Send a request once; its answer, of JSON (None where it is empty and the status is 200).

    Args:
        client: whose server to ask.
        method: such as "POST".
        path: relative to the client's address.
        payload: sent as JSON.
        timeout: seconds until the last byte of the answer.

    Raises:
        RequestError: no answer, a status other than 200, or no JSON. It quotes the server, but no
            key.
    """
    body = bytearray()
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")

    def safe(text: str) -> str:
        """A text on one line, without the key, should somebody repeat it."""
        return one_line(text.replace(key, "***") if key else text)

    try:
        async with (
            asyncio.timeout(timeout),
            client.stream(method, path, json=payload) as response,
        ):
            async for part in response.aiter_bytes():
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
            wait=retry_after(response.headers.get("Retry-After")),
        )
    if not body:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the answer is no JSON") from None


def _message(body: bytes | bytearray) -> str:
    """What an error's body says; OpenAI's form holds it in a field."""
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return text


def one_line(text: str, most: int = 300) -> str:
    """The beginning of a text, on one line and fit to be printed."""
    cleaned = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in cleaned[:most])


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None where it makes no sense.

    Args:
        header: its value, a number of seconds or a date.
    """
    text = (header or "").strip()
    try:
        seconds = float(text) if text[:1].isdigit() else _until(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, seconds) if seconds < 1e6 else None


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def turn_seed(seed: int, position: int) -> int:
    """A seed for the draws of one turn, of 63 bits, for servers that count from its beginning.

    Args:
        seed: of the trajectory.
        position: how many tokens the trajectory has before the turn.
    """
    state = np.random.SeedSequence([seed % 2**64, position]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


class Turns(Generic[R]):
    """Turns under way, one a slot, as coroutines in an event loop of a thread of its own.

    The thread ends when the object is closed or forgotten, and the clients are closed with it.
    """

    def __init__(self, name: str, clients: Sequence[httpx.AsyncClient]) -> None:
        """Start the thread, with this name."""
        loop = asyncio.new_event_loop()
        Thread(target=_run, args=(loop,), name=name, daemon=True).start()
        self._loop = loop
        self._running: dict[int, Future[R]] = {}
        self._finished: SimpleQueue[tuple[int, Future[R]]] = SimpleQueue()
        # To be called; the second call does nothing.
        self.close = weakref.finalize(self, _stop, loop, clients)

    @property
    def slots(self) -> list[int]:
        """The slots whose turn is under way."""
        return list(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, slot: int) -> bool:
        return slot in self._running

    def begin(self, slot: int, turn: Coroutine[Any, Any, R]) -> None:
        """Let the turn of a slot run."""
        future = asyncio.run_coroutine_threadsafe(turn, self._loop)
        self._running[slot] = future
        finished = self._finished
        future.add_done_callback(lambda done: finished.put((slot, done)))

    def cancel(self, slot: int) -> None:
        """Break off the turn of a slot, if there is one."""
        if future := self._running.pop(slot, None):
            future.cancel()

    def finished(self, timeout: float) -> dict[int, R]:
        """Slot and result of the turns that are finished.

        One is waited for, for at most ``timeout`` seconds.

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
        """Run a coroutine in the event loop, and wait for what it returns."""
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


def _stop(loop: asyncio.AbstractEventLoop, clients: Sequence[httpx.AsyncClient]) -> None:
    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        closing = [client.aclose() for client in clients]
        await asyncio.gather(*tasks, *closing, return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)
