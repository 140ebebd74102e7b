"""What the engines in front of servers share: requests with clear errors, turns in a thread."""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np

from research_agent.errors import ConfigError
from research_agent.system.redaction import one_line, redact

R = TypeVar("R")
T = TypeVar("T")

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that are worth a retry; a server answers any other the same way again."""

Close = Callable[[], Coroutine[Any, Any, None]]
"""Closes a client, in the event loop that used it."""

_LARGEST_ANSWER = 64 << 20  # bytes


class RequestError(Exception):
    """A request without a usable answer.

    Attributes:
        status: the answer's HTTP status; None if there was no answer, or none that is JSON.
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


class Client:
    """HTTP client of one server, for one event loop. It may be made before the loop runs.

    Args:
        url: the server's base address.
        key: sent as a bearer token; no attribute and no error shows it.
        keep_alive: use connections again. It is faster, but uvicorn ends a connection without a
            word after an error, and the next request may meet that and be lost.

    Raises:
        ConfigError: see ``check_address``.

    The environment's proxies are not used: samplers stand beside the trainer.
    """

    def __init__(self, url: str, key: str | None = None, *, keep_alive: bool = False) -> None:
        check_address(url, key or "")
        self._base = url.rstrip("/") + "/"
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None
        # Functions, since no attribute shall hold the key.
        # A few compressed bytes could fill the memory.
        self._headers: Callable[[], dict[str, str]] = lambda: {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }
        self._shown: Callable[[str], str] = lambda text: one_line(redact(text[:10_000], key or ""))

    async def ask(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        timeout: float,
        form: Any = Any,
    ) -> Any:
        """Send a request once.

        Args:
            method: such as "POST".
            path: relative to the client's address.
            payload: sent as JSON.
            timeout: seconds until the last byte of the answer.
            form: the type that the answer must have, such as a ``msgspec.Struct``.

        Returns:
            The answer, of that type; None if it is empty and any is good.

        Raises:
            RequestError: no answer, a status other than 200, a compressed or too large answer, or
                one of another form. The message quotes the server without the key.
        """
        data = None if payload is None else msgspec.json.encode(payload)
        try:
            async with asyncio.timeout(timeout):
                status, body = await self._send(method, path, data)
        except TimeoutError:
            raise RequestError(f"no answer within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {self._shown(str(error))}".rstrip(": ")
            raise RequestError(problem) from None
        if status != 200:
            said = self._shown(_message(body))
            raise RequestError(f"status {status}{': ' if said else ''}{said}", status=status)
        if form is Any and not body:
            return None
        try:
            return msgspec.json.decode(body, type=form)
        except msgspec.ValidationError as error:
            raise RequestError(f"an answer of another form: {error}", status) from None
        except (msgspec.DecodeError, RecursionError):
            raise RequestError("the answer is no JSON") from None

    async def _send(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        if self._session is None:  # it belongs to the loop that runs now
            self._session = aiohttp.ClientSession(
                headers=self._headers(),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(
                    limit=0,
                    force_close=not self._keep_alive,
                    # vLLM closes after 5 s; a request could meet that and look lost.
                    keepalive_timeout=2.0 if self._keep_alive else None,
                ),
            )
        async with self._session.request(
            method, self._base + path, data=data, allow_redirects=False
        ) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise RequestError(
                    f"an answer in Content-Encoding {one_line(encoding)!r}", status=415
                )
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > _LARGEST_ANSWER:
                    raise RequestError(f"an answer of over {_LARGEST_ANSWER >> 20} MB", status=413)
            return response.status, bytes(body)

    async def aclose(self) -> None:
        """Close all connections, in the event loop that used them."""
        if self._session is not None:
            await self._session.close()


def _message(body: bytes) -> str:
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


class LoopThread:
    """An event loop in a thread of its own. Closing or deleting the object ends it.

    Args:
        name: name of the thread.
        closing: what closes the clients that are used in the loop.
    """

    def __init__(self, name: str, closing: Sequence[Close]) -> None:
        self.loop = asyncio.new_event_loop()
        Thread(target=_run, args=(self.loop,), name=name, daemon=True).start()
        # A function; the second call does nothing.
        self.close = weakref.finalize(self, _stop, self.loop, closing)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop, and return its result."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting
            raise


class Turns(Generic[R]):
    """Coroutines that sample turns, one per slot, in a thread with an event loop of its own.

    Closing or deleting the object ends the thread and closes the clients.

    Args:
        name: name of the thread.
        closing: what closes the clients that the coroutines use.
    """

    def __init__(self, name: str, closing: Sequence[Close]) -> None:
        self._thread = LoopThread(name, closing)
        self._running: dict[int, Future[R]] = {}
        self._finished: SimpleQueue[tuple[int, Future[R]]] = SimpleQueue()
        self.close, self.call = self._thread.close, self._thread.call

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, slot: int) -> bool:
        return slot in self._running

    def begin(self, slot: int, turn: Coroutine[Any, Any, R]) -> None:
        """Start the turn of a slot."""
        future = self._thread.start(turn)
        self._running[slot] = future
        finished = self._finished
        future.add_done_callback(lambda done: finished.put((slot, done)))

    def cancel(self, slot: int) -> None:
        """Cancel the turn of a slot, if there is one."""
        if future := self._running.pop(slot, None):
            future.cancel()

    def finished(self, timeout: float) -> dict[int, R]:
        """Return slot -> result of the finished turns.

        Waits until one is finished, or nothing has happened for ``timeout`` seconds.

        Raises:
            Exception: what a turn raised.
        """
        done: dict[int, R] = {}
        while self._running:
            try:
                slot, future = self._finished.get(timeout=0.0 if done else timeout)
            except Empty:
                break
            if self._running.get(slot) is future:  # otherwise it was cancelled
                del self._running[slot]
                done[slot] = future.result()
        return done


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, closing: Sequence[Close]) -> None:
    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(close() for close in closing), return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)
