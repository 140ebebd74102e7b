"""Search for many callers: coalesced, cached, in the background, in bounded batches.

In reinforcement learning a group of samples asks much the same, and so does the next epoch. A query
goes to the engine only if the same query is not being searched already and its hits are not cached.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from research_env.errors import ClosedError, RetrievalError
from research_env.retrieval.base import Hit
from research_env.retrieval.requests import Request, ToolResult

Found = list[Hit] | ToolResult | RetrievalError
"""The result of a query or tool call, or the engine's error."""
Ticket = TypeVar("Ticket")
Tell = Callable[[Found | Exception], None]
"""Takes the result of a query."""
_INTERRUPTED = RetrievalError("the search was interrupted; ask again")


@dataclass(frozen=True, slots=True)
class SearchCounts:
    """How many queries were answered in each way so far."""

    searched: int = 0
    """Queries sent to the engine."""
    coalesced: int = 0
    """Queries that shared the result of the same query, asked at the same time."""
    cache_hits: int = 0
    """Queries answered from the cache."""

    @property
    def asked(self) -> int:
        """Queries in all: searched, shared or cached."""
        return self.searched + self.coalesced + self.cache_hits

    @property
    def saved(self) -> float:
        """The share of the queries that the engine was spared, 0 to 1."""
        return (self.coalesced + self.cache_hits) / max(1, self.asked)


def raise_bug(found: Found | Exception) -> Found:
    """What was found, or the engine's error; any other error is raised.

    Raises:
        ClosedError: the searches were closed.
        Exception: a bug in the engine.
    """
    if isinstance(found, Exception) and (
        isinstance(found, ClosedError) or not isinstance(found, RetrievalError)
    ):
        raise found
    return found


class QueryBatcher(Generic[Ticket]):
    """Send queries to the engine in batches, from the calling thread or from background threads.

    A query that is already waiting or being searched is not sent again: it shares the result. The
    hits of the latest queries are cached (the least recently used are dropped first), failures
    never. A background batch is sent when it is full or when no query has come for ``max_wait``:
    callers that were answered together ask again together, one soon after the other. Several
    threads search, but one at a time gathers a batch, so that queries of the same moment go
    together. Any thread may call any method. A forked child keeps the cache, and starts threads of
    its own; the results of what its parent has asked come to the parent alone.
    """

    def __init__(
        self,
        search: Callable[[Sequence[Any]], Sequence[Found | Exception]],
        max_batch: int,
        max_wait: float,
        cache_size: int = 0,
        in_flight: int = 1,
    ) -> None:
        """Ask nothing yet; the threads start when they are needed.

        Args:
            search: answers a batch of queries or tool calls, with one entry for each, in order; an
                exception is for whoever asked for that one.
            max_batch: the most queries in a background batch.
            max_wait: seconds that a batch waits for one more query.
            cache_size: the most queries whose hits are cached; 0: none.
            in_flight: how many batches the engine takes at the same time.
        """
        self._engine = search
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._cache_size = cache_size
        self._cache: OrderedDict[Request, tuple[Hit, ...] | ToolResult] = OrderedDict()
        self._searched = self._coalesced = self._cache_hits = 0
        self._in_flight = in_flight
        self._closed = False
        self._start_over()
        _BATCHERS.add(self)

    def _start_over(self) -> None:
        """Have no threads and no queries; a forked child has neither the threads nor free locks."""
        self._queue: SimpleQueue[Request | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Ticket, Found | Exception]] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending: dict[Request, list[Tell]] = {}  # who has it searched is the first
        self._slots = threading.BoundedSemaphore(self._in_flight)
        self._gathering = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def counts(self) -> SearchCounts:
        """How the queries so far were answered."""
        return SearchCounts(self._searched, self._coalesced, self._cache_hits)

    def ask(self, queries: Sequence[Request]) -> list[Found]:
        """Ask for queries together and wait; return one entry per query, in order.

        Raises:
            ClosedError: :meth:`close` was called.
            Exception: whatever the engine raised that is no ``RetrievalError`` (a bug).
        """
        done: SimpleQueue[tuple[int, Found | Exception]] = SimpleQueue()
        asked = [(query, partial(_put, done, n)) for n, query in enumerate(queries)]
        with self._told_if_interrupted(asked):
            with self._lock:
                fresh = [query for query, tell in asked if self._register(query, tell)]
            if fresh:
                self._answer(fresh)
        found = dict(done.get() for _ in queries)
        return [raise_bug(found[n]) for n in range(len(queries))]

    def submit(self, ticket: Ticket, query: Request) -> None:
        """Ask for a query in the background; :meth:`take` returns the result with the ticket.

        Raises:
            ClosedError: :meth:`close` was called before: nobody would answer.
        """
        self._enqueue(query, partial(_put, self._done, ticket))

    def request(self, query: Request) -> Future[Found]:
        """Ask for a query in the background.

        Returns:
            A future. An error of the engine is its result; a bug or :meth:`close` is its exception.

        Raises:
            ClosedError: :meth:`close` was called before: nobody would answer.
        """
        future: Future[Found] = Future()

        def settle(found: Found | Exception) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(raise_bug(found))
            except Exception as error:
                future.set_exception(error)

        self._enqueue(query, settle)
        return future

    def take(self, timeout: float | None) -> tuple[Ticket, Found | Exception] | None:
        """Return the next result of :meth:`submit`.

        Args:
            timeout: seconds to wait for one; None: no limit. After :meth:`close` nobody waits.

        Returns:
            The ticket, and what was found or what went wrong; None if nothing came in time.
        """
        if self._closed:
            timeout = 0
        try:
            return self._done.get(block=timeout != 0, timeout=timeout or None)
        except Empty:
            return None

    def close(self) -> None:
        """Stop the threads after their present batches; queries that still wait get ClosedError."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
        with self._lock:
            left = [tell for callbacks in self._pending.values() for tell in callbacks]
            self._pending.clear()
        for tell in left:
            tell(ClosedError())

    def _enqueue(self, query: Request, tell: Tell) -> None:
        with self._told_if_interrupted([(query, tell)]), self._lock:
            if self._register(query, tell):
                self._queue.put(query)
            while len(self._threads) < self._in_flight:
                thread = threading.Thread(target=self._run, name="searches", daemon=True)
                thread.start()
                self._threads.append(thread)

    @contextmanager
    def _told_if_interrupted(self, asked: Sequence[tuple[Request, Tell]]) -> Iterator[None]:
        """Leave no query of a block to wait for an answer after Ctrl-C: others would wait too."""
        try:
            yield
        except BaseException:
            with self._lock:
                mine = [query for query, tell in asked if tell in self._pending.get(query, ())[:1]]
                told = [self._pending.pop(query) for query in mine]
            for callbacks in told:
                for tell in callbacks:
                    tell(_INTERRUPTED)
            raise

    def _register(self, query: Request, tell: Tell) -> bool:
        """Whether the caller, who holds the lock, must have the query searched.

        If not, its result is cached, or somebody has it searched already.
        """
        if self._closed:
            raise ClosedError
        hits = self._cached(query)
        if hits is not None:
            self._cache_hits += 1
            tell(hits)
            return False
        if query in self._pending:
            self._coalesced += 1
            self._pending[query].append(tell)
            return False
        self._searched += 1
        self._pending[query] = [tell]
        return True

    def _answer(self, batch: Sequence[Request]) -> None:
        """Search for pending queries, and tell the results to all who wait for them.

        All queries go at once, so that they share one deadline: in parts, each part would wait for
        a dead server. No more threads ask the engine than it allows.
        """
        results: Sequence[Found | Exception] = [_INTERRUPTED] * len(batch)
        try:
            with self._slots:
                found = self._engine(batch)
            if len(found) != len(batch):
                raise RuntimeError(
                    f"the retriever answered {len(batch)} queries with {len(found)} results"
                )
            results = found
        except Exception as error:  # the receiver of the result raises it
            results = [error] * len(batch)
        finally:  # also at Ctrl-C: others may wait for these queries
            with self._lock:
                told = [self._pending.pop(query, []) for query in batch]
                for query, result in zip(batch, results, strict=True):
                    self._keep(query, result)
            for callbacks, result in zip(told, results, strict=True):
                for tell in callbacks:
                    tell(list(result) if isinstance(result, list) else result)

    def _cached(self, query: Request) -> list[Hit] | ToolResult | None:
        found = self._cache.get(query)
        if found is None:
            return None
        self._cache.move_to_end(query)
        return list(found) if isinstance(found, tuple) else found

    def _keep(self, query: Request, found: Found | Exception) -> None:
        if isinstance(found, Exception) or not self._cache_size:
            return
        self._cache[query] = tuple(found) if isinstance(found, list) else found
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _run(self) -> None:
        while batch := self._gather():
            self._answer(batch)

    def _gather(self) -> list[Request]:
        """Wait for the next batch; an empty one means to stop."""
        with self._gathering:
            batch: list[Request] = []
            while len(batch) < self._max_batch:
                try:
                    query = self._queue.get(timeout=self._max_wait if batch else None)
                except Empty:
                    if self._queue.empty():
                        break
                    continue  # asked in time, while this thread waited for the interpreter's lock
                if query is None:
                    return []
                batch.append(query)
            return batch


def _put(done: SimpleQueue[tuple[Any, Found | Exception]], ticket: Any, found: Any) -> None:
    done.put((ticket, found))


_BATCHERS: WeakSet[QueryBatcher[Any]] = WeakSet()


def _start_all_over() -> None:
    for batcher in _BATCHERS:
        batcher._start_over()


os.register_at_fork(after_in_child=_start_all_over)
