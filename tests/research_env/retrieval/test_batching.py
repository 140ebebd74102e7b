"""Coalescing and caching spare the engine queries, and change no result."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env.errors import RetrievalError
from research_env.retrieval.batching import Found, QueryBatcher, SearchCounts
from research_env.vector_env import SearchQAVectorEnv
from tests.research_env.fakes import DATASET, TIMEOUT, Engine, Gate, answer, search


def made(engine: Engine, cache_size: int, **more: Any) -> QueryBatcher[int]:
    settings = {"max_batch": 4, "max_wait": 0.0, **more}
    return QueryBatcher(
        lambda queries: engine.search(queries, 3), cache_size=cache_size, **settings
    )


def told(found: object) -> object:
    """Errors by their words, so that they compare."""
    return str(found) if isinstance(found, Exception) else found


def taken(searches: QueryBatcher[int]) -> tuple[int, Found | Exception]:
    result = searches.take(TIMEOUT)
    assert result is not None
    return result


# --- the cache ------------------------------------------------------------------------------------


def test_a_cached_query_is_not_asked_again() -> None:
    engine = Engine()
    searches = made(engine, 10)
    assert searches.ask(["1", "2", "1"]) == Engine().search(["1", "2", "1"], 3)
    assert searches.ask(["2", "3"]) == Engine().search(["2", "3"], 3)
    assert engine.batches == [("1", "2"), ("3",)]
    assert searches.counts == SearchCounts(searched=3, coalesced=1, cache_hits=1)
    assert (searches.counts.asked, searches.counts.saved) == (5, 0.4)
    searches.submit(7, "3")
    assert taken(searches) == (7, Engine().search(["3"], 3)[0])
    assert len(engine.batches) == 2
    searches.close()


def test_the_least_recently_used_is_dropped_first() -> None:
    engine = Engine()
    searches = made(engine, 2)
    for query in ("1", "2", "1", "3", "1", "2", "3"):
        searches.ask([query])
    # After "1 2 1" the oldest is 2, which 3 replaces; 1 stays; 2 then replaces 3.
    assert engine.batches == [("1",), ("2",), ("3",), ("2",), ("3",)]
    assert searches.counts == SearchCounts(searched=5, coalesced=0, cache_hits=2)


def test_failures_are_never_cached() -> None:
    engine = Engine()
    searches = made(engine, 10)
    for _ in range(2):
        first, failed = searches.ask(["1", "fail 2"])
        assert isinstance(first, list)
        assert isinstance(failed, RetrievalError)
    assert engine.batches == [("1", "fail 2"), ("fail 2",)]
    for number, query in enumerate(["fail 2", "down", "fail 2", "down", "crash"]):
        searches.submit(number, query)
        assert isinstance(taken(searches)[1], Exception)
    assert [batch for batch in engine.batches if "down" in batch] == [("down",)] * 2
    assert isinstance(searches.ask(["3"])[0], list)
    searches.close()


def test_hits_of_an_empty_result_are_cached_too() -> None:
    engine = Engine()
    searches = made(engine, 10)
    assert searches.ask(["nothing"]) == searches.ask(["nothing"]) == [[]]
    assert len(engine.batches) == 1


def test_callers_may_change_their_lists() -> None:
    searches = made(Engine(), 10)
    for _ in range(3):
        found = searches.ask(["1"])[0]
        assert found == Engine().search(["1"], 3)[0]
        assert isinstance(found, list)
        found.clear()


def test_a_cache_of_size_0_caches_nothing() -> None:
    engine = Engine()
    searches = made(engine, 0)
    assert searches.ask(["1", "1"]) == searches.ask(["1", "1"])
    assert engine.batches == [("1",), ("1",)]
    assert searches.counts == SearchCounts(searched=2, coalesced=2, cache_hits=0)


def test_queries_in_flight_are_coalesced_and_then_cached() -> None:
    engine = Gate()
    searches = made(engine, 10)
    for ticket in range(3):
        searches.submit(ticket, "1")
    assert engine.asked.acquire(timeout=TIMEOUT)
    searches.submit(3, "1")
    assert searches.take(0) is None
    engine.opened.set()
    assert [taken(searches)[0] for _ in range(4)] == [0, 1, 2, 3]
    searches.submit(4, "1")
    assert taken(searches)[0] == 4
    assert engine.batches == [("1",)]
    assert searches.counts == SearchCounts(searched=1, coalesced=3, cache_hits=1)
    searches.close()
    searches.close()


def test_who_waits_and_the_background_share_queries_in_flight() -> None:
    engine = Gate()
    searches = made(engine, 0, in_flight=2)
    with ThreadPoolExecutor(1) as pool:
        searches.submit(0, "1")
        assert engine.asked.acquire(timeout=TIMEOUT)
        asked = pool.submit(searches.ask, ["1", "2", "2"])
        assert engine.asked.acquire(timeout=TIMEOUT)
        searches.submit(1, "2")
        engine.opened.set()
        assert asked.result(TIMEOUT) == Engine().search(["1", "2", "2"], 3)
    assert sorted(taken(searches) for _ in range(2)) == [
        (ticket, Engine().search([query], 3)[0]) for ticket, query in enumerate("12")
    ]
    assert sorted(engine.batches) == [("1",), ("2",)]
    assert searches.counts == SearchCounts(searched=2, coalesced=3)
    searches.close()


def test_a_bug_and_an_interruption_leave_nobody_waiting() -> None:
    raised: list[BaseException] = [KeyboardInterrupt(), ZeroDivisionError("a bug")]

    def search_after_two_failures(queries: Sequence[str]) -> list[Found]:
        if raised:
            raise raised.pop()
        return [[] for _ in queries]

    searches: QueryBatcher[int] = QueryBatcher(search_after_two_failures, 4, 0.0)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        searches.ask(["1"])
    with pytest.raises(KeyboardInterrupt):
        searches.ask(["1"])
    searches.submit(1, "1")
    assert taken(searches) == (1, [])
    searches.close()


def test_an_interruption_while_queries_are_registered_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches = made(Engine(), 10)
    register = QueryBatcher._register

    def interrupted(self: Any, query: Any, tell: Any) -> bool:
        found = register(self, query, tell)
        if query == "2":
            raise KeyboardInterrupt
        return found

    for ask in (lambda: searches.ask(["1", "2"]), lambda: searches.submit(5, "2")):
        with monkeypatch.context() as patch:
            patch.setattr(QueryBatcher, "_register", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask()
        for ticket, query in enumerate("12"):
            searches.submit(ticket, query)
        found = dict(taken(searches) for _ in "12")
        while searches.take(0):  # what the interrupted one was told
            pass
        assert found.keys() <= {0, 1, 5}
    assert searches.ask(["1", "2"]) == Engine().search(["1", "2"], 3)
    searches.close()


def test_what_is_closed_takes_no_more_and_nobody_waits_for_it() -> None:
    for used in (True, False):
        searches = made(Engine(), 10)
        if used:
            searches.submit(1, "1")
            assert taken(searches)[0] == 1
        searches.close()
        with pytest.raises(RetrievalError, match="closed"):
            searches.submit(2, "2")
        with pytest.raises(RetrievalError, match="closed"):
            searches.ask(["2"])
        assert searches.take(None) is None


def test_closing_what_was_never_used() -> None:
    made(Engine(), 10).close()


def test_nothing_asked_is_nothing_saved() -> None:
    assert (SearchCounts().asked, SearchCounts().saved) == (0, 0.0)


# --- no result depends on it ----------------------------------------------------------------------

QUERIES = st.lists(st.sampled_from(["1", "2", "3", "1 2", "fail 3", "", "none"]), max_size=8)


@given(steps=st.lists(QUERIES, max_size=6), cache_size=st.integers(0, 4))
def test_what_is_found_is_what_the_engine_says(steps: list[list[str]], cache_size: int) -> None:
    searches = made(Engine(), cache_size)
    for queries in steps:
        expected = [told(found) for found in Engine().search(queries, 3)]
        assert [told(found) for found in searches.ask(queries)] == expected
        for ticket, query in enumerate(queries):
            searches.submit(ticket, query)
        found = dict(taken(searches) for _ in queries)
        assert [told(found[ticket]) for ticket in range(len(queries))] == expected
    assert searches.counts.asked == 2 * sum(map(len, steps))
    searches.close()


N = 3
ACTIONS = st.sampled_from(
    [*(search(query) for query in ("1", "1 2", "3", "fail 2")), answer("Founder 1"), "nothing"]
)
STEPS = st.lists(st.lists(ACTIONS, min_size=N, max_size=N), max_size=8)


def played(steps: list[list[str]], cache_size: int, background: bool) -> list[Any]:
    """All that a run of episodes shows, whichever way its steps are taken."""
    env = SearchQAVectorEnv(
        N, dataset=DATASET, retriever=Engine(), cache_size=cache_size, max_wait=0.0, max_searches=3
    )
    seen: list[Any] = [env.reset(seed=3)[0]]
    for actions in steps:
        if background:
            env.send(range(N), actions)
            results = sorted(env.recv(timeout=TIMEOUT, min_results=N))
            seen.append([(r.observation, r.reward, r.terminated, r.truncated) for r in results])
        else:
            observations, rewards, ends, cuts, _ = env.step(actions)
            rows = zip(observations, rewards.tolist(), ends.tolist(), cuts.tolist(), strict=True)
            seen.append(list(rows))
    counts = env.search_counts
    assert counts.cache_hits == 0 or cache_size > 0
    env.close()
    return seen


def test_several_batches_may_be_in_flight() -> None:
    both = threading.Barrier(2)

    def search_both(queries: Sequence[str]) -> list[Found]:
        both.wait(TIMEOUT)  # passes only while another batch is being searched
        return [[] for _ in queries]

    searches: QueryBatcher[int] = QueryBatcher(search_both, max_batch=1, max_wait=0.0, in_flight=2)
    for ticket, query in enumerate("abcd"):
        searches.submit(ticket, query)
    assert sorted(taken(searches) for _ in range(4)) == [(ticket, []) for ticket in range(4)]
    searches.close()


def test_queries_of_a_moment_go_together_however_many_threads_there_are() -> None:
    engine = Engine()
    searches = made(engine, 0, max_batch=3, max_wait=TIMEOUT, in_flight=3)
    for ticket, query in enumerate("123"):
        searches.submit(ticket, query)
    assert {taken(searches)[0] for _ in range(3)} == {0, 1, 2}
    assert engine.batches == [("1", "2", "3")]
    searches.close()


class Arrivals:
    """A queue into which queries come at given seconds of a clock that nobody waits for."""

    def __init__(self, seconds: Sequence[float], late: float = 0.0) -> None:
        self.seconds = list(seconds)
        self.late = late  # how long a thread whose wait is over still waits to run
        self.now = 0.0

    def empty(self) -> bool:
        return self.seconds[0] > self.now

    def get(self, timeout: float | None = None) -> str:
        if timeout is not None and self.seconds[0] > self.now + timeout:
            self.now += timeout + self.late
            raise Empty
        self.now = max(self.now, self.seconds.pop(0))
        return f"at {self.now:g}"


def test_a_batch_waits_for_as_long_as_queries_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Arrivals([1.0, 2.5, 4.0, 5.5, 8.0, 8.5, 9.0, 9.5, 10.0, 20.0])
    searches = made(Engine(), 0, max_batch=4, max_wait=2.0)
    monkeypatch.setattr(searches, "_queue", queue)
    assert searches._gather() == ["at 1", "at 2.5", "at 4", "at 5.5"]  # it is full
    assert searches._gather() == ["at 8", "at 8.5", "at 9", "at 9.5"]
    assert (searches._gather(), queue.now) == (["at 10"], 12.0)


def test_queries_that_come_while_the_thread_waits_to_run_join_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = Arrivals([1.0, 3.5, 3.9, 20.0], late=1.0)
    searches = made(Engine(), 0, max_batch=4, max_wait=2.0)
    monkeypatch.setattr(searches, "_queue", queue)
    assert searches._gather() == ["at 1", "at 4", "at 4"]


@pytest.mark.parametrize("in_flight", [None, 2])
def test_an_engine_is_asked_by_as_many_threads_as_it_says(in_flight: int | None) -> None:
    engine, most = Gate(in_flight or 1), in_flight or 1
    if in_flight is None:
        del engine.in_flight  # one that does not say is asked by one thread
    env = SearchQAVectorEnv(4, dataset=DATASET, retriever=engine, max_wait=0.0, max_batch=1)
    env.reset(seed=3)
    for i in range(4):
        env.send([i], [search(str(i))])
    for _ in range(most):
        assert engine.asked.acquire(timeout=TIMEOUT)
    assert not engine.asked.acquire(timeout=0.1)
    engine.opened.set()
    seen = 0
    while seen < 4:
        seen += len(env.recv(timeout=TIMEOUT))
    assert engine.most == most
    env.close()


@given(steps=STEPS, cache_size=st.integers(1, 5), background=st.booleans())
def test_episodes_are_the_same_with_and_without_a_cache(
    steps: list[list[str]], cache_size: int, background: bool
) -> None:
    assert played(steps, cache_size, background) == played(steps, 0, False)


@pytest.mark.parametrize("background", [False, True])
def test_environments_tell_what_was_saved(background: bool) -> None:
    env = SearchQAVectorEnv(4, dataset=DATASET, retriever=Engine(), max_wait=0.0)
    assert env.search_counts == SearchCounts()
    env.reset(seed=3)
    for _ in range(2):
        actions = [search("1"), search("1"), search("2"), search("2")]
        if background:
            for i, action in enumerate(actions):
                env.send([i], [action])
                env.recv(timeout=TIMEOUT)
        else:
            env.step(actions)
    coalesced = 0 if background else 2
    assert env.search_counts == SearchCounts(2, coalesced, 6 - coalesced)
    env.close()
