"""Sessions give the results of single environments; test_conformance.py has many at a time."""

from __future__ import annotations

import asyncio
import doctest
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import research_env.sessions
from research_env.env import SearchQAEnv
from research_env.errors import (
    ActionError,
    ClosedError,
    ConfigurationError,
    EpisodeError,
    UnknownTaskError,
)
from research_env.sessions import Session, Sessions
from tests.research_env.fakes import DATASET, TIMEOUT, Engine, Gate, answer, forked, search


def make(**more: Any) -> Sessions:
    return Sessions(**{"dataset": DATASET, "retriever": Engine(), **more})


@pytest.mark.parametrize("protocol", ["research", "search-r1"])
def test_a_session_is_what_a_single_environment_is(protocol: str) -> None:
    settings: Any = {"dataset": DATASET, "retriever": Engine(), "protocol": protocol}
    env = SearchQAEnv(**settings)
    with Sessions(**settings) as sessions:
        for task in ("q1", 2):
            options = {"question_id": task} if isinstance(task, str) else {"episode": task}
            prompt, info = env.reset(seed=5, options=options)
            session = sessions.open(task, seed=5)
            assert (session.prompt, session.info) == (prompt, info)
            for action in ([""] if protocol == "search-r1" else []) + [search("1 2"), answer("x")]:
                assert session.step(action) == env.step(action)
            env.reset(seed=5, options=options)
            session = sessions.open(task, seed=5)
            assert session.step(search("fail")) == env.step(search("fail"))
            env.reset(seed=5, options=options)
            session = sessions.open(task, seed=5)
            assert session.truncate("length") == env.truncate("length")
        space: Any = env.action_space
        assert sessions.terminators == space.terminators
        assert sessions.fingerprints() == env.fingerprints()


@pytest.mark.parametrize("last", [answer("Founder 1"), answer("nobody"), search("fail"), None])
def test_the_reward_of_a_whole_episode_is_that_of_its_steps(last: str | None) -> None:
    """Searches find gold passages or nothing new; the last turn answers, fails, or is cut."""
    with make(template="question", turn_reward="0.25*new_support-0.1*redundancy") as sessions:
        for queries in ([], ["1"], ["2", "1", "1"]):
            session = sessions.open("q1")
            outputs = [session.step(search(query)) for query in queries]
            outputs.append(session.truncate() if last is None else session.step(last))
            total = session.total_reward(outputs[-1])
            if outputs[-1].info["void"]:
                assert total == 0.0
                continue
            assert total == pytest.approx(sum(output.reward for output in outputs))
            if queries == ["1"] and last == answer("Founder 1"):
                assert total == pytest.approx(1.25)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(research_env.sessions) == (0, 3)


def test_tasks_are_rows_in_the_order_of_the_episodes() -> None:
    with make(template="instruct") as sessions:
        rows = sessions.tasks(seed=3)
        assert len(rows) == sessions.num_tasks == 5
        assert {row["id"] for row in rows} == {f"q{i}" for i in range(5)}
        for number, row in enumerate(rows):
            assert row.keys() == {"id", "prompt", "messages", "tools", "strata"}
            session = sessions.open(number, seed=3)
            assert session.info["question_id"] == row["id"]
            assert (session.prompt, session.info["messages"]) == (row["prompt"], row["messages"])
            assert session.info["strata"] == row["strata"]
        assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("task", ["q9", "", 5, -1, 10**9, None, 1.0])
def test_unknown_tasks_are_refused(task: Any) -> None:
    with make() as sessions:
        for kind in (UnknownTaskError, ConfigurationError, IndexError):
            with pytest.raises(kind, match=r"no question has the id|there is no task"):
                sessions.open(task)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_seed_is_a_number_from_0_on(seed: Any) -> None:
    with make() as sessions:
        for call in (lambda: sessions.tasks(seed), lambda: sessions.open(0, seed)):
            with pytest.raises(ConfigurationError, match=f"integer from 0 on, not {seed}"):
                call()


def test_a_forked_child_searches_by_itself() -> None:
    engine = Gate()
    with make(retriever=engine) as sessions, ThreadPoolExecutor(1) as pool:

        def search_twice() -> list[str]:
            engine.opened.set()  # the child's own copy
            session = sessions.open("q1")
            return [session.step(search(query)).info["query"] for query in ("1", "2")]

        busy = pool.submit(sessions.open("q0").step, search("1"))
        assert engine.asked.acquire(timeout=TIMEOUT)
        try:
            assert forked(search_twice) == ["1", "2"]
        finally:
            engine.opened.set()
        assert busy.result(TIMEOUT).info["query"] == "1"


def test_two_steps_at_once_are_refused_and_nothing_is_lost() -> None:
    engine = Gate()
    with make(retriever=engine) as sessions, ThreadPoolExecutor(1) as pool:
        session = sessions.open("q0")
        first = pool.submit(session.step, search("1"))
        assert engine.asked.acquire(timeout=TIMEOUT)
        with pytest.raises(EpisodeError, match="this session is taking a step"):
            session.step(answer("x"))
        with pytest.raises(EpisodeError, match="this session is taking a step"):
            session.truncate("length")
        engine.opened.set()
        assert first.result(TIMEOUT).info["query"] == "1"
        assert session.step(answer("Founder 0")).reward == 1.0


def test_errors_leave_the_session_as_it_was() -> None:
    with make() as sessions:
        session = sessions.open("q0")
        before = session.episode
        with pytest.raises(ActionError):
            session.step(None)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError):
            session.step(search("crash"))
        assert session.episode is before
        session.step(answer("x"))
        with pytest.raises(EpisodeError, match=r"over \(answer\)"):
            session.step("x")
        with pytest.raises(EpisodeError, match=r"over \(answer\)"):
            session.truncate("length")


def test_a_cancelled_step_can_be_taken_again() -> None:
    engine = Gate()

    async def impatient(session: Session) -> Any:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(session.astep(search("1")), 0.05)
        engine.opened.set()
        return await session.astep(search("1"))

    with make(retriever=engine) as sessions:
        session = sessions.open("q0")
        assert asyncio.run(impatient(session)).info["query"] == "1"
        assert len(session.episode.turns) == 1


def test_closing_wakes_whoever_waits_and_refuses_the_rest() -> None:
    engine = Gate()
    sessions = make(retriever=engine, max_batch=1)
    session, other = sessions.open("q0"), sessions.open("q1")
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(session.step, search("1"))
        assert engine.asked.acquire(timeout=TIMEOUT)
        waiting = pool.submit(other.step, search("2"))
        while sessions.search_counts.searched < 2:
            pass
        closing = pool.submit(sessions.close)
        while not sessions.searches.closed:
            pass
        engine.opened.set()
        closing.result(TIMEOUT)
        assert busy.result(TIMEOUT).info["query"] == "1"
        try:
            assert waiting.result(TIMEOUT).info["query"] == "2"
        except ClosedError:
            assert other.episode.turns == ()
    with pytest.raises(ClosedError, match="have been closed"):
        session.step(search("3"))
    assert not session.episode.void
    with pytest.raises(ClosedError):
        sessions.open("q2")
    assert session.step(answer("Founder 0")).reward == 1.0  # an answer needs no engine
    sessions.close()


def test_a_fork_continues_on_its_own() -> None:
    with make() as sessions:
        session = sessions.open("q2")
        session.step(search("1"))
        fork = session.fork()
        assert fork.episode is session.episode
        assert fork.step(answer("Founder 2")).reward == 1.0
        assert not session.episode.over
        assert session.step(answer("nobody")).reward == 0.1
        assert pickle.loads(pickle.dumps(fork.episode)) == fork.episode


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("max_batch", (0, "3", None), "max_batch is an integer of at least 1"),
        ("max_wait", (-1, "x", float("nan"), float("inf"), None), "max_wait is at least 0 seconds"),
        ("cache_size", (-1, 1.5), "cache_size=.* must be an integer"),
        ("top_k", (0,), "top_k is an integer from 1 on"),
    ],
)
def test_bad_settings_are_refused(name: str, values: tuple[Any, ...], message: str) -> None:
    for value in values:
        with pytest.raises(ConfigurationError, match=message):
            make(**{name: value})
