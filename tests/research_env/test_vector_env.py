"""Many episodes at a time give the results of single environments, at any pace."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.env import SearchQAEnv
from research_env.errors import (
    ActionError,
    ClosedError,
    ConfigurationError,
    EpisodeError,
    RewardError,
    UnknownNameError,
    UnknownTaskError,
)
from research_env.vector_env import SearchQAVectorEnv, StepResult
from tests.research_env.fakes import DATASET, TIMEOUT, Engine, Gate, answer, forked, search


def make(num_envs: int = 3, **more: Any) -> SearchQAVectorEnv:
    return SearchQAVectorEnv(num_envs, **{"dataset": DATASET, "retriever": Engine(), **more})


# --- cutting and branching ------------------------------------------------------------------------


def test_truncate_gives_what_single_environments_give() -> None:
    env, single = (
        make(3, reward="f1-0.5*searches"),
        SearchQAEnv(dataset=DATASET, retriever=Engine(), reward="f1-0.5*searches"),
    )
    env.reset(seed=1)
    env.step([search("1")] * 3)
    results = env.truncate([2, 0], "length")
    assert [result.env_id for result in results] == [2, 0]
    for result in results:
        single.reset(seed=1, options={"episode": result.env_id})
        single.step(search("1"))
        assert result[1:] == single.truncate("length")
        assert (result.reward, result.info["stop_reason"]) == (-0.5, "length")
    with pytest.raises(EpisodeError, match=r"over \(length\)"):
        env.truncate([1, 0])
    assert env.episodes[1] is not None
    assert not env.episodes[1].over
    env.close()


def test_truncate_drops_what_is_in_flight() -> None:
    engine = Gate()
    env = make(2, retriever=engine)
    env.reset(seed=1)
    env.send([0, 1], [search("1"), answer("x")])
    (cut,) = env.truncate([0])
    assert (cut.info["stop_reason"], cut.info["metrics"]["searches"]) == ("length", 0.0)
    engine.opened.set()
    assert [result.env_id for result in env.recv(timeout=TIMEOUT)] == [1]
    assert env.recv(timeout=0) == []
    env.close()


def test_truncate_in_same_step_mode_starts_the_next_episode() -> None:
    env = make(1, autoreset_mode="SameStep")
    env.reset(seed=1)
    (cut,) = env.truncate([0])
    assert (cut.truncated, cut.info["final_info"]["stop_reason"]) == (True, "length")
    assert env.episodes[0] is not None
    assert not env.episodes[0].over
    env.close()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_truncate_loses_no_episode_that_has_ended(mode: str) -> None:
    env = make(3, autoreset_mode=mode)
    env.reset(seed=1)
    env.send([0], [answer("x")])
    before = env.episodes
    with pytest.raises(EpisodeError, match="0 has ended its episode; call recv first"):
        env.truncate([1, 0])
    with pytest.raises(EpisodeError, match="2 is named twice"):
        env.truncate([2, 2])
    assert env.episodes == before
    (result,) = env.recv(timeout=TIMEOUT)
    assert (result.env_id, result.terminated) == (0, True)
    env.close()


def test_branches_continue_from_the_present_state() -> None:
    env = make(4)
    env.reset(seed=1)
    env.step([search("1"), search("2"), answer("x"), search("3")])
    before = env.episodes
    env.send([3], [search("4")])
    env.branch(0, [2, 3, 0])
    assert env.episodes == (before[0], before[1], before[0], before[0])
    assert env.recv(timeout=0) == []
    question = env.episodes[0].question  # type: ignore[union-attr]
    env.send([2, 3], [answer(question.answers[0]), answer("x")])
    rewards = {result.env_id: result.reward for result in env.recv(timeout=TIMEOUT, min_results=2)}
    assert rewards == {2: 1.0, 3: 0.1}
    env.step([search("5")] * 2 + [""] * 2, mask=[True, True, False, False])
    assert [len(episode.turns) for episode in env.episodes if episode] == [2, 2, 2, 2]
    env.close()


def test_a_refused_branch_changes_nothing() -> None:
    env = make(3)
    with pytest.raises(EpisodeError, match="0 has no episode yet"):
        env.branch(0, [1])
    env.reset(seed=1)
    env.step([search("1"), answer("x"), search("1")])
    env.send([2], [search("2")])
    before = env.episodes
    for source, targets, message in (
        (1, [0], "1 cannot branch: its episode is over"),
        (2, [0], "2 has sent an action"),
        (0, [1, 3], "no sub-environment 3"),
        (5, [1], "no sub-environment 5"),
    ):
        with pytest.raises(EpisodeError, match=message):
            env.branch(source, targets)
    assert env.episodes == before
    env.close()


# --- lockstep ------------------------------------------------------------------------------------


def test_one_search_a_step_for_all_that_search() -> None:
    engine = Engine()
    env = make(4, retriever=engine)
    env.reset(seed=1)
    seen, rewards, terminated, truncated, infos = env.step(
        (search("1"), answer("no"), search("2"), search("1"))
    )
    assert engine.batches == [("1", "2")]  # the query of two is asked once
    assert seen[0] == seen[3] == ' <result>\n"Title 1"\nAbout 1 number 1.\n</result>'
    assert seen[1] == ""
    assert rewards.tolist() == [0.0, 0.1, 0.0, 0.0]
    assert terminated.tolist() == [False, True, False, False]
    assert not truncated.any()
    assert infos["query"].tolist() == ["1", "", "2", "1"]
    assert infos["passage_ids"].tolist() == [("p1",), (), ("p2",), ("p1",)]
    assert infos["metrics"]["f1"].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert infos["metrics"]["_f1"].tolist() == [False, True, False, False]


def test_a_step_asks_the_engine_once_however_many_search() -> None:
    engine = Engine()
    env = make(5, retriever=engine, max_batch=2)
    env.reset(seed=1)
    env.step([search(str(i)) for i in range(5)])
    assert engine.batches == [("0", "1", "2", "3", "4")]  # one deadline for all


def test_a_mask_steps_and_resets_some() -> None:
    env = make(3, autoreset_mode="Disabled", template="question")
    prompts, _ = env.reset(seed=1)
    seen, rewards, terminated, _, infos = env.step(
        ("", answer("no"), search("2")), mask=[False, True, True]
    )
    assert (seen[0], seen[1]) == ("", "")
    assert rewards.tolist() == [0.0, 0.1, 0.0]
    assert terminated.tolist() == [False, True, False]
    assert infos["_void"].tolist() == [False, True, True]

    again, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert again[0] == again[2] == ""
    assert again[1] != ""
    assert infos["_void"].tolist() == [False, True, False]
    seen, *_ = env.step((search("1"), search("2"), answer("x")))  # the others went on
    assert "About 1" in seen[0]
    assert "About 2" in seen[1]
    assert prompts[0] != ""


def test_a_group_of_samples_shares_its_question() -> None:
    env = make(4)
    _, infos = env.reset(seed=9, options={"episodes": [7, 7, 2, 2]})
    single = SearchQAEnv(dataset=DATASET, retriever=Engine())
    ids = [single.reset(seed=9, options={"episode": n})[1]["question_id"] for n in (7, 2)]
    assert infos["question_id"].tolist() == [ids[0], ids[0], ids[1], ids[1]]
    mask = [True, False, False, True]
    _, infos = env.reset(options={"episodes": [2, 0, 0, 7], "reset_mask": mask})
    assert infos["question_id"].tolist() == [ids[1], None, None, ids[0]]


def test_questions_may_be_chosen_by_id() -> None:
    env = make(3)
    env.reset(seed=1)
    prompts, infos = env.reset(options={"question_ids": ["q3", "q0", "q3"]})
    assert infos["question_id"].tolist() == ["q3", "q0", "q3"]
    assert prompts[0] == prompts[2] != prompts[1]
    mask = [False, True, False]
    _, infos = env.reset(options={"question_ids": [None, "q4", None], "reset_mask": mask})
    assert infos["question_id"].tolist() == [None, "q4", None]
    with pytest.raises(UnknownTaskError, match="no question has the id 'q9'"):
        env.reset(options={"question_ids": ["q1", "q1", "q9"]})
    with pytest.raises(ConfigurationError, match="an integer from 0 on, not -1"):
        env.reset(options={"episodes": [7, 8, -1]})
    assert [each.question.id for each in env.episodes if each] == ["q3", "q4", "q3"]
    for wrong in ({"question_ids": "q1"}, {"question_ids": ["q1"] * 3, "episodes": [1] * 3}):
        with pytest.raises(ConfigurationError):
            env.reset(options=wrong)
    env.close()


def test_without_options_the_sub_environments_share_out_the_order() -> None:
    env, single = make(2), SearchQAEnv(dataset=DATASET, retriever=Engine())
    order = [single.reset(seed=4)[1]["question_id"]]
    order += [single.reset()[1]["question_id"] for _ in range(5)]
    assert env.reset(seed=4)[1]["question_id"].tolist() == order[0:2]
    assert env.reset(options={"reset_mask": [True, False]})[1]["question_id"][0] == order[2]
    assert env.reset()[1]["question_id"].tolist() == [order[4], order[3]]
    assert env.num_tasks == 5


def test_a_refused_reset_changes_nothing() -> None:
    env, other = make(2), make(2)
    for each in (env, other):
        each.reset(seed=4)
    for options in ({"episodes": [0, -1]}, {"episode": 1}, {"reset_mask": [True]}):
        with pytest.raises(ConfigurationError):
            env.reset(seed=9, options=options)
    assert env.np_random_seed == 4
    for _ in range(3):
        ids = [each.reset()[1]["question_id"].tolist() for each in (env, other)]
        assert ids[0] == ids[1]


def test_a_generator_that_was_set_draws_the_order() -> None:
    orders = []
    for _ in range(2):
        env = make(2)
        env.reset(seed=4)
        env.np_random = np.random.default_rng(3)
        orders.append([each for _ in range(5) for each in env.reset()[1]["question_id"]])
    assert orders[0] == orders[1]
    assert sorted(orders[0][:5]) == [f"q{i}" for i in range(5)]
    with pytest.raises(ConfigurationError, match="a seed is an integer from 0 on, not -1"):
        env.reset(seed=-1)


def test_next_step_mode_spends_an_action_on_the_reset() -> None:
    env = make(1, template="question")
    env.reset(seed=4)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    _, rewards, terminated, _, infos = env.step([answer("no")])
    assert (rewards[0], terminated[0], infos["stop_reason"][0]) == (0.1, True, "answer")
    seen, rewards, terminated, _, infos = env.step(["ignored"])
    assert (rewards[0], terminated[0], infos["stop_reason"][0]) == (0.0, False, "")
    assert seen[0] == infos["question"][0] + "\n"


def test_same_step_mode_returns_the_last_info_as_final_info() -> None:
    env = make(1, autoreset_mode="SameStep", template="question")
    before = env.reset(seed=4)[1]["question_id"][0]
    seen, rewards, terminated, _, infos = env.step([answer("no")])
    assert (rewards[0], terminated[0], infos["stop_reason"][0]) == (0.1, True, "")
    assert seen[0] == infos["question"][0] + "\n"
    assert infos["final_obs"][0] == ""
    assert infos["final_info"]["question_id"][0] == before != infos["question_id"][0]
    assert infos["final_info"]["stop_reason"][0] == "answer"


def test_disabled_mode_refuses_to_step_what_is_over() -> None:
    env = make(2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=4)
    env.step([answer("no"), search("1")])
    with pytest.raises(EpisodeError, match="over"):
        env.step(["x", "x"])
    assert env.step(["", answer("no")], mask=[False, True])[2].tolist() == [False, True]


def test_an_action_that_is_not_text_moves_nobody() -> None:
    env = make(2)
    env.reset(seed=4)
    before = env.episodes
    wrong: Any
    for wrong in (None, 7, "ab", ["a"], ["a", "b", "c"]):
        with pytest.raises(ActionError, match="step takes 2 texts"):
            env.step(wrong)
        with pytest.raises(ActionError, match="send takes a text for each of the 2 ids"):
            env.send([0, 1], wrong)
    for wrong in ([search("1"), 2], [b"a", ""]):
        with pytest.raises(ActionError, match=r"an action is text, not (int|bytes)"):
            env.step(wrong)
        with pytest.raises(ActionError, match=r"an action is text, not (int|bytes)"):
            env.send([0, 1], wrong)
    assert env.episodes == before
    assert env.recv() == []


def test_steps_before_reset_are_refused() -> None:
    env = make(2)
    with pytest.raises(EpisodeError, match="sub-environment 0 has no episode yet"):
        env.step(["x", "x"])
    env.reset(options={"reset_mask": [True, False]})
    with pytest.raises(EpisodeError, match="sub-environment 1 has no episode yet"):
        env.send([1], ["x"])
    with pytest.raises(EpisodeError, match="no sub-environment 2"):
        env.send([2], ["x"])


def test_a_failed_search_voids_its_own_episode_only() -> None:
    env = make(2)
    env.reset(seed=4)
    _, rewards, terminated, truncated, infos = env.step([search("fail 1"), search("1")])
    assert truncated.tolist() == [True, False]
    assert infos["void"].tolist() == [True, False]
    assert not rewards.any()
    assert not terminated.any()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"autoreset_mode": "Never"}, UnknownNameError, "known: Disabled, NextStep, SameStep"),
        ({"render_mode": "human"}, UnknownNameError, "known: ansi"),
        *(({"num_envs": n}, ConfigurationError, "at least 1") for n in (0, 1.5, "2", None)),
        ({"max_batch": 0}, ConfigurationError, "at least 1"),
    ],
)
def test_bad_settings_are_refused(
    more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**{"num_envs": 2, **more})


def test_render_ansi_shows_each_episode() -> None:
    env = make(2, render_mode="ansi", template="question")
    env.reset(seed=1, options={"reset_mask": [True, False]})
    env.step(["no idea", ""], mask=[True, False])
    episode = env.episodes[0]
    assert episode is not None
    told = f"{episode.question.question}\nno idea\n[no_answer, reward 0]\n"
    assert env.render() == (told, "")


# --- send and recv -------------------------------------------------------------------------------


def test_results_come_when_they_are_ready() -> None:
    engine = Gate()
    env = make(3, retriever=engine)
    env.reset(seed=4)
    env.send([0, 2], [search("1"), answer("no")])
    assert [(r.env_id, r.reward) for r in env.recv(timeout=0)] == [(2, 0.1)]
    assert env.recv(timeout=0.01) == []
    with pytest.raises(EpisodeError, match="sub-environment 0 has sent an action"):
        env.send([0], ["x"])
    with pytest.raises(EpisodeError, match="sub-environment 0 has sent an action"):
        env.step(["x", "x", "x"])
    engine.opened.set()
    (result,) = env.recv(timeout=TIMEOUT)
    assert (result.env_id, result.info["passage_ids"], result.terminated) == (0, ("p1",), False)
    assert env.recv() == []  # nothing was sent: nothing to wait for
    env.close()


def test_batches_are_bounded_in_size_and_gathered_in_time() -> None:
    engine = Engine()
    env = make(5, retriever=engine, max_batch=3, max_wait=3600.0)
    env.reset(seed=4)
    env.send([0], [search("0")])
    env.send([1, 2], [search("1"), search("2")])
    assert len(env.recv(timeout=TIMEOUT, min_results=3)) == 3
    assert engine.batches == [("0", "1", "2")]  # full before the time was up
    env.close()

    gate = Gate()
    env = make(5, retriever=gate, max_batch=3, max_wait=0.0)
    env.reset(seed=4)
    env.send([0], [search("0")])
    assert gate.asked.acquire(timeout=TIMEOUT)  # "0" left alone: nobody waits for company
    env.send([1, 2, 3, 4], [search(str(i)) for i in range(1, 5)])
    gate.opened.set()
    assert len(env.recv(timeout=TIMEOUT, min_results=99)) == 5
    assert gate.batches == [("0",), ("1", "2", "3"), ("4",)]
    env.close()


def test_a_reset_drops_what_is_in_flight() -> None:
    engine = Gate()
    env = make(2, retriever=engine, template="question")
    env.reset(seed=4)
    env.send([0, 1], [search("1"), answer("no")])
    env.reset(options={"reset_mask": [True, True]})
    engine.opened.set()
    assert env.recv(timeout=0) == []
    env.send([0, 1], [search("2"), search("3")])
    results = env.recv(timeout=TIMEOUT, min_results=2)  # the result of "1" came before these
    assert sorted((r.env_id, r.info["query"]) for r in results) == [(0, "2"), (1, "3")]
    env.close()


def test_failures_in_the_background_void_and_bugs_are_raised() -> None:
    env = make(2)
    env.reset(seed=4)
    env.send([0, 1], [search("fail 1"), search("1")])
    results = {r.env_id: r for r in env.recv(timeout=TIMEOUT, min_results=2)}
    assert [results[i].info["void"] for i in (0, 1)] == [True, False]
    assert (results[0].truncated, results[0].reward) == (True, 0.0)
    env.send([1], [search("down")])
    assert env.recv(timeout=TIMEOUT)[0].info["void"]
    env.reset(seed=4)
    env.send([0], [search("crash")])
    with pytest.raises(ZeroDivisionError, match="a bug in the retriever"):
        env.recv(timeout=TIMEOUT)
    env.reset(seed=4)  # and life goes on
    env.send([0], [search("1")])
    assert env.recv(timeout=TIMEOUT)[0].info["passage_ids"] == ("p1",)
    env.close()


class FailsOnce:
    """A reward, of episodes or turns, whose call of this number fails."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, *episodes: Any) -> float:
        self.left -= 1
        return 1.0 / self.left if self.left == 0 else 1.0


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_reward_that_fails_moves_nobody(mode: AutoresetMode) -> None:
    env = make(3, reward=FailsOnce(2), autoreset_mode=mode)
    env.reset(seed=4)
    before = env.episodes
    actions = [search("1"), answer("x"), answer("y")]
    with pytest.raises(RewardError, match="division by zero"):
        env.send([0, 1, 2], actions)
    assert env.episodes == before
    env.send([0, 1, 2], actions)
    results = env.recv(timeout=TIMEOUT, min_results=3)
    assert sorted((r.env_id, r.reward) for r in results) == [(0, 0.0), (1, 1.0), (2, 1.0)]
    env.close()

    env = make(3, reward=FailsOnce(2), autoreset_mode=mode)
    env.reset(seed=4)
    before = env.episodes
    with pytest.raises(RewardError, match="division by zero"):
        env.step(actions)
    assert env.episodes == before
    assert env.step(actions)[1].tolist() == [0.0, 1.0, 1.0]
    env.reset(seed=4)
    env = make(2, reward=FailsOnce(2), autoreset_mode=mode)
    env.reset(seed=4)
    before = env.episodes
    with pytest.raises(RewardError, match="division by zero"):
        env.truncate([0, 1])
    assert env.episodes == before


def test_an_interruption_while_a_reward_is_computed_costs_its_own_action_alone() -> None:
    left = [KeyboardInterrupt()]

    def reward(*_: Any) -> float:
        if left:
            raise left.pop()
        return 1.0

    env = make(2, turn_reward=reward)
    env.reset(seed=4)
    env.send([0, 1], [search("1"), search("2")])
    with pytest.raises(KeyboardInterrupt):
        env.recv(timeout=TIMEOUT, min_results=2)
    assert len(env.recv(timeout=TIMEOUT, min_results=2)) == 1
    assert env.recv(timeout=TIMEOUT, min_results=2) == []  # nothing is sent, so nobody waits
    env.close()


def test_a_reward_that_fails_in_the_background_costs_its_own_action_alone() -> None:
    env = make(2, turn_reward=FailsOnce(1))
    env.reset(seed=4)
    env.send([0, 1], [search("1"), search("2")])
    with pytest.raises(RewardError, match="division by zero"):
        env.recv(timeout=TIMEOUT, min_results=2)
    (result,) = env.recv(timeout=TIMEOUT)
    assert result.reward == 1.0
    failed = 1 - result.env_id
    with pytest.raises(EpisodeError, match="has no result yet"):
        env.send([failed], ["x"])
    env.reset(options={"reset_mask": [i == failed for i in range(2)]})
    env.send([failed], [search("3")])
    assert [r.env_id for r in env.recv(timeout=TIMEOUT)] == [failed]
    env.close()


def test_closing_voids_no_episode() -> None:
    env = make(3, max_wait=3600.0)  # a search that is alone waits until it is closed
    env.reset(seed=4)
    env.send([0, 1], [search("1"), answer("no")])
    before = env.episodes
    env.close()
    with pytest.raises(ClosedError, match="make a new environment"):
        env.recv()
    assert [r.env_id for r in env.recv()] == [1]
    with pytest.raises(ClosedError):
        env.send([1, 2], ["", search("1")])
    with pytest.raises(ClosedError):
        env.step(["", "", search("1")], mask=[False, True, True])
    assert env.episodes == before
    assert env.recv() == []
    env.send([2], [answer("no")])  # an answer needs no engine
    assert [r.terminated for r in env.recv()] == [True]


def test_a_forked_child_sends_and_receives_by_itself() -> None:
    env = make(2)
    env.reset(seed=4)
    env.send([0], [search("1")])
    env.recv(timeout=TIMEOUT)

    def play() -> Any:
        env.reset(seed=4)
        env.send([0, 1], [search("1"), search("2")])
        return [r.info["query"] for r in env.recv(timeout=TIMEOUT, min_results=2)]

    assert sorted(forked(play)) == ["1", "2"]
    env.close()


# --- the same results as single environments, whatever the order of completion -------------------

N = 3
SEARCHING = [search(query) for query in ("1", "1 2", "3", "fail 2", " ")]
ENDING = ["nothing", *(answer(text) for text in ("Founder 1", "F. 3", "no"))]
ACTIONS = st.sampled_from([*SEARCHING, *ENDING])
SCRIPTS = st.lists(st.lists(ACTIONS, max_size=6), min_size=N, max_size=N)


def single_plays(scripts: list[list[str]], seed: int, rules: str) -> list[list[tuple[Any, ...]]]:
    """Each script through an environment of its own, on the episodes of its share."""
    plays = []
    for i, script in enumerate(scripts):
        env = SearchQAEnv(dataset=DATASET, retriever=Engine(), protocol=rules, max_searches=2)
        number = i
        results: list[tuple[Any, ...]] = [env.reset(seed=seed, options={"episode": number})]
        for action in script:
            result = env.step(action)
            results.append(tuple(result))
            if result.terminated or result.truncated:
                number += N
                results.append(env.reset(options={"episode": number}))
        plays.append(results)
    return plays


def single_infos(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """The info of one sub-environment out of the batched ones."""
    return {
        key: single_infos(value, i) if isinstance(value, dict) else value[i]
        for key, value in infos.items()
        if not key.startswith("_") and (key == "metrics" or infos["_" + key][i])
    }


@settings(deadline=None)
@given(
    scripts=SCRIPTS,
    seed=st.integers(0, 5),
    rules=st.sampled_from(["research", "search-r1"]),
    max_batch=st.integers(1, 4),
    pace=st.integers(0, 1_000),
)
def test_any_pace_gives_the_results_of_single_environments(
    scripts: list[list[str]], seed: int, rules: str, max_batch: int, pace: int
) -> None:
    env = make(
        N,
        autoreset_mode="Disabled",
        protocol=rules,
        max_searches=2,
        max_batch=max_batch,
        max_wait=0,
    )
    # No draws of Hypothesis: how many there are depends on what is ready when
    draw = random.Random(pace)
    plays: list[list[tuple[Any, ...]]] = []
    seen, infos = env.reset(seed=seed)
    for i in range(N):
        plays.append([(seen[i], single_infos(infos, i))])
    left = [list(script) for script in scripts]
    busy: set[int] = set()
    while any(left) or busy:
        free = [i for i in range(N) if left[i] and i not in busy]
        go = [i for i in free if draw.random() < 0.5]
        if not go and not busy:
            go = free[:1]
        env.send(go, [left[i].pop(0) for i in go])
        busy.update(go)
        for result in env.recv(TIMEOUT, draw.randint(0, 3)):
            assert isinstance(result, StepResult)
            i = result.env_id
            busy.remove(i)
            plays[i].append(tuple(result[1:]))
            if result.terminated or result.truncated:
                seen, infos = env.reset(options={"reset_mask": [j == i for j in range(N)]})
                plays[i].append((seen[i], single_infos(infos, i)))
    env.close()
    assert plays == single_plays(scripts, seed, rules)


@settings(deadline=None)
@given(
    scripts=SCRIPTS,
    seed=st.integers(0, 5),
    mode=st.sampled_from(["NextStep", "SameStep", "Disabled"]),
    data=st.data(),
)
def test_lockstep_in_every_mode_gives_the_results_of_single_environments(
    scripts: list[list[str]], seed: int, mode: str, data: st.DataObject
) -> None:
    env = make(N, autoreset_mode=mode, max_searches=2)
    seen, infos = env.reset(seed=seed)
    plays: list[list[tuple[Any, ...]]] = [[(seen[i], single_infos(infos, i))] for i in range(N)]
    left = [list(script) for script in scripts]
    over = [False] * N
    while any(left) or (mode == "NextStep" and any(over)):
        able = [bool(left[i]) or (mode == "NextStep" and over[i]) for i in range(N)]
        mask = [can and data.draw(st.booleans(), label="step") for can in able]
        if not any(mask):
            mask = able
        spent = [mode == "NextStep" and over[i] for i in range(N)]
        actions = ["" if spent[i] or not mask[i] else left[i].pop(0) for i in range(N)]
        seen, rewards, terminated, truncated, infos = env.step(actions, mask)
        for i in (i for i in range(N) if mask[i]):
            info = single_infos(infos, i)
            flags = float(rewards[i]), bool(terminated[i]), bool(truncated[i])
            over[i] = flags[1] or flags[2]
            if spent[i]:
                assert flags == (0.0, False, False)
                plays[i].append((seen[i], info))
            elif over[i] and mode == "SameStep":
                final = info.pop("final_info")
                plays[i] += [(info.pop("final_obs"), *flags, final), (seen[i], info)]
            else:
                plays[i].append((seen[i], *flags, info))
            if over[i] and mode == "Disabled":
                seen_i, infos_i = env.reset(options={"reset_mask": [j == i for j in range(N)]})
                plays[i].append((seen_i[i], single_infos(infos_i, i)))
    env.close()
    assert plays == single_plays(scripts, seed, "research")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_vector_environments_of_gymnasium_take_it_too(mode: str) -> None:
    more: dict[str, Any] = {"dataset": DATASET, "retriever": Engine(), "template": "question"}
    env = gym.make_vec("SearchQA-v0", num_envs=2, vectorization_mode=mode, **more)
    single = SearchQAEnv(**more)
    try:
        seen, _ = env.reset(seed=[3, 3])  # type: ignore[arg-type]
        assert seen == (single.reset(seed=3)[0],) * 2
        seen, rewards, terminated, *_ = env.step((search("1 2"), answer("no")))
        assert seen == (single.step(search("1 2"))[0], "")
        assert rewards.tolist() == [0.0, 0.1]
        assert terminated.tolist() == [False, True]
    finally:
        env.close()
    assert isinstance(env, AsyncVectorEnv) == (mode == "async")
