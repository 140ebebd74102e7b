"""GEM: its own make, vector environments and wrappers play the environment's episodes."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest

from research_env.env import SearchQAEnv
from research_env.errors import EpisodeError, UnknownTaskError
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.research_env.fakes import DATASET, Engine, answer, search, suite_sessions

gem: Any = pytest.importorskip("gem")
adapter = import_module("research_env.adapters.gem")
NAME = "research:Test-v0"


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    entries = import_module("gem.envs.registration").ENV_REGISTRY
    before = dict(entries)
    yield
    entries.clear()
    entries.update(before)


@pytest.fixture
def sessions(registry: None) -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Engine(), template="question") as made:
        adapter.register(NAME, made)
        yield made


def test_it_conforms_in_threads() -> None:
    with suite_sessions() as (sessions, engine):
        adapter.register(NAME, sessions)

        def play(question_id: str, actions: Sequence[str]) -> Played:
            env = gem.make(NAME)
            prompt, _ = env.reset(question_id=question_id)
            outputs = [env.step(action) for action in actions]
            if not (outputs[-1][2] or outputs[-1][3]):
                outputs.append(env.truncate())
            _, reward, _, _, info = outputs[-1]
            texts = [output[0] for output in outputs]
            return Played(prompt, texts, reward, info["metrics"], info["void"])

        conformance(play, engine)


@pytest.mark.parametrize("async_mode", [False, True])
def test_its_vector_environments_play_the_tasks_in_the_order_of_their_seeds(
    sessions: Sessions, async_mode: bool
) -> None:
    envs = gem.make_vec([NAME] * 3, async_mode=async_mode)
    prompts, _ = envs.reset(seed=7)
    begun = [sessions.open(0, 7 + i) for i in range(3)]
    assert prompts == [session.prompt for session in begun]
    seen, rewards, *_ = envs.step([search(f"{i}") for i in range(3)])
    assert seen == [session.step(search(f"{i}")).observation for i, session in enumerate(begun)]
    assert list(rewards) == [0.0] * 3
    founders = [session.episode.question.answers[0] for session in begun]
    prompts, rewards, terminated, _, infos = envs.step(
        [answer(founders[0]), answer("nobody"), answer(founders[2])]
    )
    assert list(terminated) == [True] * 3
    assert list(rewards) == [1.0, 0.1, 1.0]
    assert prompts == [sessions.open(1, 7 + i).prompt for i in range(3)]
    assert [info["final_info"]["metrics"]["em"] for info in infos] == [1.0, 0.0, 1.0]
    assert [info["final_info"]["void"] for info in infos] == [False] * 3
    if async_mode:
        envs.thread_pool_executer.shutdown()


def test_a_copy_of_an_info_is_a_dictionary_of_its_own(sessions: Sessions) -> None:
    env = gem.make(NAME)
    _, info = env.reset(question_id="q1")
    *_, after = env.step(search("1"))
    for each in (info, after):
        copied = copy.deepcopy(each)
        assert copied == each
        copied["question"] = "another"
        assert each["question"] == sessions.open("q1").info["question"]


def test_searches_of_a_vector_environment_share_calls() -> None:
    with suite_sessions(max_batch=16, max_wait=20.0) as (sessions, engine):
        adapter.register(NAME, sessions)
        envs = gem.make_vec([NAME] * 16, async_mode=True)
        envs.reset(seed=0)
        envs.step([f"<search>query {i}</search>" for i in range(16)])
        envs.thread_pool_executer.shutdown()
        assert (engine.queries, engine.calls) == (16, 1)


@pytest.mark.parametrize("wrapper", ["concat", "concat_with_action"])
def test_its_wrappers_run_to_the_same_reward(sessions: Sessions, wrapper: str) -> None:
    (wrap,) = import_module("gem.wrappers.wrapper_factory").get_wrapper_fns(wrapper)
    (track,) = import_module("gem.wrappers.wrapper_factory").get_wrapper_fns("episode_tracking")
    env = track(wrap(gem.make(NAME, seed=3)))
    prompt, _ = env.reset()
    session = sessions.open(0, 3)
    assert prompt == session.prompt
    text, *_ = env.step(search("2"))
    assert session.step(search("2")).observation in text
    _, reward, terminated, _, info = env.step(answer(session.episode.question.answers[0]))
    assert (reward, terminated) == (1.0, True)
    assert (info["step_counter"], info["cumulative_rewards"]) == (2, 1.0)


def test_the_order_goes_on_after_the_last_task_as_in_gymnasium(sessions: Sessions) -> None:
    env = gem.make(NAME, seed=4)
    prompts = [env.reset()[0] for _ in range(15)]
    assert sorted(prompts[:5]) == sorted(prompts[5:10])
    assert env.reset(seed=4)[0] == prompts[0]
    peer = SearchQAEnv(dataset=DATASET, retriever=Engine(), template="question")
    assert prompts == [peer.reset(seed=None if n else 4)[0] for n in range(15)]


def test_a_spawned_environment_continues_or_starts_anew(sessions: Sessions) -> None:
    env = gem.make(NAME, seed=4)
    env.reset(question_id="q1")
    env.step(search("1"))
    same = env.spawn(same_state=True)
    assert same.step(answer("Founder 1"))[4]["metrics"]["searches"] == 1.0
    assert env.step(answer("nobody"))[4]["metrics"]["em"] == 0.0
    with pytest.raises(EpisodeError, match="call reset before step"):
        env.spawn(seed=5).step("x")


def test_unknown_tasks_and_steps_after_the_end_are_refused(sessions: Sessions) -> None:
    env = gem.make(NAME)
    with pytest.raises(UnknownTaskError, match="q9"):
        env.reset(question_id="q9")
    env.reset(question_id="q1")
    env.step(answer("x"))
    with pytest.raises(EpisodeError, match="the episode is over"):
        env.step(answer("x"))


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(adapter).failed == 0
