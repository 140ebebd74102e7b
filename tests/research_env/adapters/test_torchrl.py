"""TorchRL: its own rollouts, batched environments and pools play the environment's episodes."""

from __future__ import annotations

import doctest
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest

from research_env.errors import ConfigurationError, EpisodeError, UnknownTaskError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.research_env.fakes import DATASET, Engine, answer, search, suite_sessions

envs: Any = pytest.importorskip("torchrl.envs")
tensordict: Any = import_module("tensordict")
adapter = import_module("research_env.adapters.torchrl")


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Engine(), template="question") as made:
        yield made


def founder(observation: str) -> str:
    return observation.rpartition("company ")[2].removesuffix("?\n")


def policy(td: Any) -> Any:
    """Search for the number of the company that is asked for; then answer, company 2 wrongly."""
    texts = td["observation"]
    single = isinstance(texts, str)
    actions = []
    for text in [texts] if single else texts:
        number = founder(text) if text.startswith("Who") else text.split("About ")[1][0]
        name = "nobody" if number == "2" else f"Founder {number}"
        actions.append(search(number) if text.startswith("Who") else answer(name))
    return td.set("action", actions[0] if single else tensordict.NonTensorStack(*actions))


def test_it_conforms_in_threads() -> None:
    with suite_sessions() as (sessions, engine):

        def play(question_id: str, actions: Sequence[str]) -> Played:
            env = adapter.make_env(sessions)
            data = env.reset(options={"question_id": question_id})
            prompt, texts = data["observation"], []
            assert data["question_id"] == question_id
            for action in actions:
                last = env.step(data.set("action", action))["next"]
                texts.append(last["observation"])
                data = last.clone()
            reward, void = round(last["reward"].item(), 6), bool(last["void"].item())
            metrics = {name: round(value.item(), 6) for name, value in last["metrics"].items()}
            if not last["done"]:
                _, reward, _, _, info = env.truncate()
                metrics, void = info["metrics"], info["void"]
            return Played(prompt, texts, reward, metrics, void)

        conformance(play, engine)


def test_its_rollout_goes_on_to_the_end_of_the_episode(sessions: Sessions) -> None:
    env = adapter.make_env(sessions, seed=3)
    rows = sessions.tasks(seed=3)
    for row in rows[:3]:
        data = env.rollout(10, policy)
        number = row["id"].removeprefix("q")
        right = number != "2"
        assert data["question_id"] == [row["id"]] * 2
        assert data["observation"][0] == row["prompt"]
        assert data["action"] == [
            search(number),
            answer(f"Founder {number}" if right else "nobody"),
        ]
        assert data["next", "reward"].flatten().tolist() == pytest.approx([0, 1 if right else 0.1])
        assert data["next", "metrics", "em"].flatten().tolist() == [0, float(right)]
        assert data["next", "terminated"].flatten().tolist() == [False, True]
        assert not data["next", "void"].any()


def test_a_void_episode_is_marked(sessions: Sessions) -> None:
    env = adapter.make_env(sessions)
    data = env.rollout(10, lambda td: td.set("action", search("fail")))
    assert data["next", "void"].flatten().tolist() == [True]
    assert data["next", "truncated"].flatten().tolist() == [True]
    assert data["next", "reward"].flatten().tolist() == [0]


def test_its_batched_environment_rolls_out(sessions: Sessions) -> None:
    makers = [lambda i=i: adapter.make_env(sessions, seed=i) for i in range(3)]
    data = envs.SerialEnv(3, makers).rollout(10, policy)
    opened = [sessions.tasks(seed=i)[0]["id"] for i in range(3)]
    assert [row[0] for row in data["question_id"]] == opened
    assert data["next", "metrics", "em"][:, 1].flatten().tolist() == [
        float(question != "q2") for question in opened
    ]


def test_searches_of_a_pool_of_threads_share_calls() -> None:
    with suite_sessions(max_batch=8, max_wait=20.0) as (sessions, engine):
        pool = envs.AsyncEnvPool(
            [lambda i=i: adapter.make_env(sessions, seed=i) for i in range(8)], backend="threading"
        )
        data = pool.reset()
        actions = [f"<search>query {i}</search>" for i in range(8)]
        seen = pool.step(data.set("action", tensordict.NonTensorStack(*actions)))["next"]
        pool.close()
        assert [f"About query {i}" in text for i, text in enumerate(seen["observation"])] == [
            True
        ] * 8
        assert (engine.queries, engine.calls) == (8, 1)


def test_unknown_tasks_and_steps_after_the_end_are_refused(sessions: Sessions) -> None:
    env = adapter.make_env(sessions)
    with pytest.raises(EpisodeError, match="call reset before step"):
        adapter.SessionEnv(sessions).step("x")
    with pytest.raises(UnknownTaskError, match="q9"):
        env.reset(options={"question_id": "q9"})
    with pytest.raises(ConfigurationError, match=r"'question_id', not \['episode'\]"):
        env.reset(options={"episode": 3})
    data = env.step(env.reset().set("action", answer("x")))
    with pytest.raises(EpisodeError, match="the episode is over"):
        env.step(data["next"].clone().set("action", "x"))


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(adapter).failed == 0
