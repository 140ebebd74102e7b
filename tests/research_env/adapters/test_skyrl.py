"""skyrl-gym: its own make and step, from threads, are the environment's episodes."""

from __future__ import annotations

import doctest
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest

from research_env.errors import ConfigurationError, EpisodeError, RetrievalError, UnknownTaskError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.research_env.fakes import DATASET, Engine, answer, search, suite_sessions

skyrl_gym: Any = pytest.importorskip("skyrl_gym")
adapter = import_module("research_env.adapters.skyrl")


@pytest.fixture
def name() -> Iterator[str]:
    registry = import_module("skyrl_gym.envs.registration").registry
    before = dict(registry)
    yield "research-of-the-test"
    registry.clear()
    registry.update(before)


@pytest.fixture
def sessions(name: str) -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Engine(), template="question") as made:
        adapter.register(name, made)
        yield made


def test_it_conforms_in_threads(name: str) -> None:
    with suite_sessions() as (sessions, engine):
        adapter.register(name, sessions)

        def play(question_id: str, actions: Sequence[str]) -> Played:
            env = skyrl_gym.make(name, extras={"extra_info": {"question_id": question_id}})
            messages, info = env.init([{"role": "user", "content": "replaced"}])
            assert messages == info["messages"]
            texts, reward, done, void = [], 0.0, False, False
            for action in actions:
                try:
                    output = env.step(action)
                except RetrievalError:
                    done = void = True
                    continue
                reward, done = output["reward"], output["done"]
                texts += [message["content"] for message in output["observations"]]
            if not done:
                reward = env.truncate()["reward"]
            metrics = env.get_metrics()
            assert metrics.pop("void") == float(void)
            return Played(messages[0]["content"], texts, reward, metrics, void)

        conformance(play, engine)


def test_environments_of_a_batch_are_made_and_stepped_in_threads(
    name: str, sessions: Sessions
) -> None:
    def rollout(number: int) -> tuple[float, list[str]]:
        env = skyrl_gym.make(name, env_config={}, extras={"question_id": f"q{number % 5}"})
        env.init([])
        seen = env.step(search(f"{number}"))["observations"]
        last = env.step(answer(f"Founder {number % 5}"))
        assert (last["done"], last["observations"]) == (True, [])
        env.close()
        return last["reward"], [message["content"] for message in seen]

    with ThreadPoolExecutor(16) as pool:
        for number, (reward, (seen,)) in enumerate(pool.map(rollout, range(16))):
            assert reward == 1.0
            assert f"About {number} number {number}." in seen


def test_metrics_have_the_same_keys_at_every_end(name: str, sessions: Sessions) -> None:
    env = skyrl_gym.make(name, extras={"question_id": "q1", "max_turns": 3})
    assert (env.max_turns, env.get_metrics()) == (3, {})
    env.init([])
    cut = env.get_metrics()  # SkyRL's budget of tokens can end an episode at any place
    env.step(answer("Founder 1"))
    right = env.get_metrics()
    env.init([])
    env.step(search("number 1"))
    later = env.get_metrics()
    env.init([])
    with pytest.raises(RetrievalError, match="the search engine failed"):
        env.step(search("fail"))
    void = env.get_metrics()
    assert cut.keys() == later.keys() == right.keys() == void.keys()
    assert (cut["em"], right["em"], void["em"]) == (0.0, 1.0, 0.0)
    assert (cut["void"], right["void"], void["void"]) == (0.0, 0.0, 1.0)
    assert type(env).aggregate_metrics([right, cut])["em"] == 0.5


def test_max_turns_of_the_row_truncates_and_scores(name: str) -> None:
    settings: dict[str, Any] = {"template": "question", "turn_reward": "0.25*new_support"}
    with Sessions(dataset=DATASET, retriever=Engine(), **settings) as made:
        adapter.register(name, made)
        env = skyrl_gym.make(name, extras={"question_id": "q1", "max_turns": 2})
        for _ in range(2):
            env.init([])
            first, last = env.step(search("2")), env.step(search("1"))
            assert (first["done"], first["reward"]) == (False, 0.0)
            assert (last["done"], last["reward"], last["observations"]) == (True, 0.25, [])
            assert last["metadata"]["stop_reason"] == "length"
            metrics = env.get_metrics()
            assert (metrics["searches"], metrics["support_recall"]) == (2.0, 1.0)
            with pytest.raises(EpisodeError, match="the episode is over"):
                env.step(search("3"))
            env.init([])
            env.step(search("2"))
            right = env.step(answer("Founder 1"))
            assert (right["reward"], right["metadata"]["stop_reason"]) == (1.0, "answer")


def test_bad_rows_and_steps_are_refused(name: str, sessions: Sessions) -> None:
    with pytest.raises(ConfigurationError, match=r"no question_id.*it has \['data_source'\]"):
        skyrl_gym.make(name, extras={"data_source": "x"})
    with pytest.raises(UnknownTaskError, match="q9"):
        skyrl_gym.make(name, extras={"question_id": "q9"}).init([])
    env = skyrl_gym.make(name, extras={"question_id": "q1"})
    with pytest.raises(EpisodeError, match="call init before step"):
        env.step("x")
    env.init([])
    env.step(answer("x"))
    with pytest.raises(EpisodeError, match="the episode is over"):
        env.step(answer("x"))


def test_the_example_of_the_docstring_runs(name: str) -> None:
    assert doctest.testmod(adapter).failed == 0
