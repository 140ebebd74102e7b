"""Searches for many askers: merged, remembered, in the background, in bounded batches.

In reinforcement learning a group of samples asks much the same, and so does the next epoch. A query
goes to the engine only if nobody is asking it at this moment and its hits are not remembered.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit

Found = list[Hit] | RetrievalError
Ticket = TypeVar("Ticket")


@dataclass(frozen=True, slots=True)
class SearchCounts:
    """How many queries were asked so far, and how each was answered: the three parts add up."""

    searched: int = 0
    """Sent to the engine."""
    merged: int = 0
    """Shared the result of the same query, asked at the same time."""
    remembered: int = 0
    """Answered from memory."""

    @property
    def asked(self) -> int:
        """All of them."""
        return self.searched + self.merged + self.remembered

    @property
    def saved(self) -> float:
        """The share of the queries that the engine was spared, 0 to 1."""
        return (self.merged + self.remembered) / max(1, self.asked)


class QueryBatcher(Generic[Ticket]):
    """Asks the engine for queries, at once or by threads that hand back what they found.

    A query that is already waiting or being searched is not asked again: its asker shares the
    result. The hits of the latest queries are remembered (the least recently used are forgotten
    first); failures never. A batch of a thread leaves when it is full or when its first query has
    waited long enough; several threads search, but one at a time gathers a batch, so that queries
    of the same moment go together. All methods are for one thread, that of the caller.
    """

    def __init__(
        self,
        search: Callable[[Sequence[str]], list[Found]],
        max_batch: int,
        max_wait: float,
        remember: int = 0,
        in_flight: int = 1,
    ) -> None:
        """Nothing is asked yet; the threads start when they are needed.

        Args:
            search: answers a batch of queries, an entry each, in order.
            max_batch: the most queries that a thread asks at once.
            max_wait: seconds that the first query of its batch waits for others.
            remember: the queries whose hits are remembered, at most; 0: none.
            in_flight: batches that may be searched at the same time, each by a thread.
        """
        self._search = search
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._remember = remember
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Ticket, Found | Exception]] = SimpleQueue()
        self._lock = threading.Lock()
        self._askers: dict[str, list[Ticket]] = {}
        self._memory: OrderedDict[str, tuple[Hit, ...]] = OrderedDict()
        self._searched = self._merged = self._remembered = 0
        self._in_flight = in_flight
        self._gathering = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def counts(self) -> SearchCounts:
        """What was asked so far."""
        return SearchCounts(self._searched, self._merged, self._remembered)

    def ask(self, queries: Sequence[str]) -> list[Found]:
        """Ask for queries and wait; returns an entry each, in order."""
        found: dict[str, Found] = {}
        with self._lock:
            for query in queries:
                if query in found:
                    continue
                hits = self._recall(query)
                if hits is not None:
                    found[query] = hits
        fresh = [query for query in dict.fromkeys(queries) if query not in found]
        self._searched += len(fresh)
        self._remembered += sum(query in found for query in queries)
        self._merged += sum(query not in found for query in queries) - len(fresh)
        if fresh:
            answers = self._search(fresh)
            with self._lock:
                for query, answer in zip(fresh, answers, strict=True):
                    found[query] = answer
                    self._learn(query, answer)
        return [found[query] for query in queries]

    def submit(self, ticket: Ticket, query: str) -> None:
        """Ask for a query; what is found comes back with the ticket.

        Raises:
            RetrievalError: it has been closed: nobody would answer.
        """
        if self._closed:
            raise RetrievalError("the searches have been closed")
        with self._lock:
            hits = self._recall(query)
            if hits is not None:
                self._remembered += 1
                self._done.put((ticket, hits))
            elif query in self._askers:
                self._merged += 1
                self._askers[query].append(ticket)
            else:
                self._searched += 1
                self._askers[query] = [ticket]
                self._queue.put(query)
        while len(self._threads) < self._in_flight:
            self._threads.append(threading.Thread(target=self._run, name="searches", daemon=True))
            self._threads[-1].start()

    def take(self, timeout: float | None) -> tuple[Ticket, Found | Exception] | None:
        """The next result, or None when there is none within ``timeout`` seconds (None: for ever).

        A result is hits, the engine's error, or whatever else went wrong in the thread. Once closed
        nothing is waited for.
        """
        if self._closed:
            timeout = 0
        try:
            return self._done.get(block=timeout != 0, timeout=timeout or None)
        except Empty:
            return None

    def close(self) -> None:
        """Stop the threads after the batches that they are busy with; the rest is dropped."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _recall(self, query: str) -> list[Hit] | None:
        hits = self._memory.get(query)
        if hits is None:
            return None
        self._memory.move_to_end(query)
        return list(hits)

    def _learn(self, query: str, found: Found | Exception) -> None:
        if isinstance(found, Exception) or not self._remember:
            return
        self._memory[query] = tuple(found)
        if len(self._memory) > self._remember:
            self._memory.popitem(last=False)

    def _run(self) -> None:
        while batch := self._gather():
            try:
                results: Sequence[Found | Exception] = self._search(batch)
                if len(results) != len(batch):
                    raise RuntimeError(
                        f"the retriever answered {len(batch)} queries with {len(results)} results"
                    )
            except Exception as error:  # it is raised again by whoever takes it
                results = [error] * len(batch)
            for query, found in zip(batch, results, strict=True):
                with self._lock:
                    askers = self._askers.pop(query)
                    self._learn(query, found)
                for ticket in askers:
                    self._done.put((ticket, found))

    def _gather(self) -> list[str]:
        """The next batch; an empty one means to stop."""
        with self._gathering:
            return self._next_batch()

    def _next_batch(self) -> list[str]:
        batch: list[str] = []
        deadline = None
        while len(batch) < self._max_batch:
            wait = None if deadline is None else deadline - time.monotonic()
            try:
                if wait is None or wait > 0:
                    query = self._queue.get(timeout=wait)
                else:
                    query = self._queue.get_nowait()
            except Empty:
                break
            if query is None:
                return []
            deadline = deadline or time.monotonic() + self._max_wait
            batch.append(query)
        return batch
