"""What the engines in front of servers share: requests with clear errors, turns in a thread."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np

from research_agent.errors import ConfigError
from research_agent.system.redaction import redact

R = TypeVar("R")
T = TypeVar("T")

Close = Callable[[], Coroutine[Any, Any, None]]
"""Closes a client, in the event loop that used it."""


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

    def __contains__(self, slot: object) -> bool:
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
