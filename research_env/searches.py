"""Searches that run in the background, in bounded batches, each query of the moment only once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit

Found = list[Hit] | RetrievalError
Ticket = TypeVar("Ticket")


class Searches(Generic[Ticket]):
    """A thread that takes queries, asks the engine by batches, and hands back what it found.

    A query that is already waiting or being searched is not asked again: its asker shares the
    result. A batch leaves when it is full or when its first query has waited long enough. All
    methods are for one thread, that of the caller.
    """

    def __init__(
        self,
        search: Callable[[Sequence[str]], list[Found]],
        max_batch: int,
        max_wait: float,
    ) -> None:
        """Start the thread.

        Args:
            search: answers a batch of queries, an entry each, in order.
            max_batch: the most queries that are asked at once.
            max_wait: seconds that the first query of a batch waits for others.
        """
        self._search = search
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Ticket, Found | Exception]] = SimpleQueue()
        self._lock = threading.Lock()
        self._askers: dict[str, list[Ticket]] = {}
        self._thread = threading.Thread(target=self._run, name="searches", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket, query: str) -> None:
        """Ask for a query; what is found comes back with the ticket."""
        with self._lock:
            askers = self._askers.setdefault(query, [])
            askers.append(ticket)
            if len(askers) == 1:
                self._queue.put(query)

    def take(self, timeout: float | None) -> tuple[Ticket, Found | Exception] | None:
        """The next result, or None when there is none within ``timeout`` seconds (None: for ever).

        A result is hits, the engine's error, or whatever else went wrong in the thread.
        """
        try:
            return self._done.get(block=timeout != 0, timeout=timeout or None)
        except Empty:
            return None

    def close(self) -> None:
        """Stop the thread after the batch that it is busy with; the rest is dropped."""
        self._queue.put(None)
        self._thread.join()

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
                for ticket in askers:
                    self._done.put((ticket, found))

    def _gather(self) -> list[str]:
        """The next batch; an empty one means to stop."""
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
