"""The environment for one episode at a time."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from research_env import IDS, Episode, Hit, Question, UnicodeText
from research_env.core import StepOutput
from research_env.env import SearchQAEnv
from research_env.errors import (
    ActionError,
    ClosedError,
    ConfigurationError,
    DataError,
    EpisodeError,
    ResearchEnvError,
    RetrievalError,
    RewardError,
    UnknownNameError,
)
from research_env.rewards import METRICS
from tests.research_env.fakes import DATASET, QUESTIONS, Engine, ListCorpus, answer, search
from tests.research_env.test_hostile import Library

INFO_KEYS = {
    *("question_id", "question", "messages", "tools", "chat_markup", "query"),
    *("passage_ids", "passage_titles", "passage_scores", "state_key"),
    *("prediction", "answers", "supporting_ids", "strata", "metrics", "stop_reason", "void"),
}


def make(**settings: Any) -> SearchQAEnv:
    return SearchQAEnv(**{"dataset": DATASET, "retriever": Engine(), **settings})


def constant_reward(episode: Episode) -> float:
    return 0.25


def test_an_episode_from_prompt_to_reward() -> None:
    env = make(template="question")
    prompt, info = env.reset(seed=1, options={"question_id": "q3"})
    assert prompt == "Who founded company 3?\n"
    assert (info["question_id"], info["question"]) == ("q3", "Who founded company 3?")
    assert info["messages"] == [{"role": "user", "content": prompt}]

    seen, reward, terminated, truncated, info = env.step(search("company 3 4"))
    assert seen == (
        ' <result>\n"Title 3"\nAbout company 3 4 number 3.\n\n'
        '"Title 4"\nAbout company 3 4 number 4.\n</result>'
    )
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["query"] == "company 3 4"
    assert info["passage_ids"] == ("p3", "p4")
    assert info["passage_titles"] == ("Title 3", "Title 4")
    assert info["passage_scores"] == (6.0, 5.0)
    assert (info["answers"], info["metrics"], info["stop_reason"]) == ((), {}, "")

    seen, reward, terminated, truncated, info = env.step(answer("the founder 3"))
    assert (seen, reward, terminated, truncated) == ("", 1.0, True, False)
    assert (info["prediction"], info["stop_reason"]) == ("the founder 3", "answer")
    assert info["answers"] == ("Founder 3", "F. 3")
    assert info["supporting_ids"] == ("p3",)
    assert info["strata"] == {"hops": "", "type": ""}
    assert info["metrics"] == {
        "em": 1.0,
        "f1": 1.0,
        "cem": 1.0,
        "format": 1.0,
        "searches": 1.0,
        "support_recall": 1.0,
    }


def test_infos_have_constant_keys_and_types() -> None:
    env = make()
    infos = [env.reset(seed=1)[1], env.step(search("1"))[4], env.step(answer("x"))[4]]
    env.reset()
    infos.append(env.step(search("fail"))[4])
    for info in infos:
        assert set(info) == INFO_KEYS
        assert {k: type(v) for k, v in info.items()} == {k: type(v) for k, v in infos[0].items()}


def test_the_order_of_questions_is_drawn_from_the_seed_pass_by_pass() -> None:
    env = make()
    assert env.num_tasks == 5
    first = [env.reset(seed=3)[1]["question_id"]]
    first += [env.reset()[1]["question_id"] for _ in range(9)]
    assert sorted(first[:5]) == sorted(first[5:]) == [q.id for q in QUESTIONS]
    assert first[:5] != first[5:]

    for episode in (9, 0, 4, 7):  # any episode directly, in any order
        assert env.reset(options={"episode": episode})[1]["question_id"] == first[episode]
    assert env.reset()[1]["question_id"] == first[8]
    assert make().reset(seed=3, options={"episode": 6})[1]["question_id"] == first[6]
    large, small = make(), make()
    for env, number in ((large, 255), (small, np.uint8(255))):
        env.reset(seed=3, options={"episode": number})
    assert small.reset()[1]["question_id"] == large.reset()[1]["question_id"]
    other = [make().reset(seed=s)[1]["question_id"] for s in range(20)]
    assert len(set(other)) > 1


@pytest.mark.parametrize(
    ("reward", "earned"),
    [("r1-searcher-stage2", -2.0), ("r1-searcher-stage2-llama-0.25*searches", -1.5), ("f1", 0.0)],
)
def test_a_truncated_episode_is_scored_as_one_without_an_answer(reward: str, earned: float) -> None:
    env = make(protocol="r1-searcher", reward=reward)
    query = "t<|begin_of_query|>1 2<|end_of_query|>"

    def played(end: str) -> tuple[Any, ...]:
        env.reset(seed=1)
        for _ in range(2):
            env.step(query)
        return env.truncate("length") if end == "cut" else env.step(end)

    *cut, info = played("cut")
    *said, other = played("I do not know")
    assert cut == ["", earned, False, True]
    assert said == ["", earned, True, False]
    assert info["metrics"] == other["metrics"]
    assert info["metrics"]["searches"] == 2.0
    assert (info["stop_reason"], info["void"], info.keys()) == ("length", False, other.keys())


def test_truncating_before_reset_and_after_the_end_is_refused() -> None:
    env = make()
    with pytest.raises(EpisodeError, match="call reset first"):
        env.truncate()
    env.reset(seed=1)
    env.step(answer("x"))
    with pytest.raises(EpisodeError, match=r"over \(answer\)"):
        env.truncate("length")


def test_wrappers_pass_truncate_on() -> None:
    env = gym.make("SearchQA-v0", dataset=DATASET, retriever=Engine())
    env.reset(seed=1)
    assert env.get_wrapper_attr("truncate")("length")[3] is True


def test_long_passages_are_shortened() -> None:
    env = make(max_passage_chars=20)
    env.reset(seed=1)
    seen, *_, info = env.step(search("1 " + "long " * 50 + "2"))
    assert info["passage_ids"] == ("p1", "p2")
    passages = '"Title 1"\nAbout 1 long  […]\n\n"Title 2"\nAbout 1 long  […]'
    assert seen == f" <result>\n{passages}\n</result>"
    assert env.fingerprints()["limits"].endswith(", max_passage_chars 20")

    env = make(retriever=Library([("Title 1", "word " * 9_000)]))
    env.reset(seed=1)
    seen, *_ = env.step(search("1"))
    assert len(seen) == len(' <result>\n"Title 1"\n […]\n</result>') + 10_000 - len("Title 1")


def test_a_failing_engine_voids_the_episode_and_shows_nothing() -> None:
    env = make(reward=constant_reward)
    for query in ("fail 1", "down 1"):
        env.reset(seed=1)
        seen, reward, terminated, truncated, info = env.step(search(query))
        assert (seen, reward, terminated, truncated) == ("", 0.0, False, True)
        assert (info["void"], info["stop_reason"]) == (True, "backend_error")
        assert info["metrics"] == dict.fromkeys(METRICS, 0.0)
        assert info["passage_ids"] == ()
        with pytest.raises(EpisodeError, match="backend_error"):
            env.step(answer("x"))
    env.reset()
    assert env.step(answer("x"))[1] == 0.25  # the next episode is a new one


def test_a_bug_in_a_retriever_is_raised() -> None:
    env = make()
    env.reset(seed=1)
    with pytest.raises(ZeroDivisionError):
        env.step(search("crash"))


class Forgetful(Engine):
    """Answers one query less than it is asked."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        return super().search(queries, top_k)[1:]


def test_a_retriever_must_answer_each_query() -> None:
    env = make(retriever=Forgetful())
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="answered 1 queries with 0 results"):
        env.step(search("1"))


def test_limits_come_from_the_protocol_or_the_caller() -> None:
    env = make(max_searches=1)
    env.reset(seed=1)
    env.step(search("1"))
    _, _, terminated, truncated, info = env.step(search("2"))
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "max_searches")
    assert (info["query"], info["passage_ids"], info["metrics"]["searches"]) == ("2", (), 1.0)

    env = make(protocol="search-r1")
    env.reset(seed=1)
    for _ in range(4):
        assert not env.step("<search>1</search>")[3]
    assert env.step("<search>1</search>")[4]["stop_reason"] == "max_searches"


@pytest.mark.parametrize(("top_k", "found"), [(1, 1), (50, 4), (None, 4), (np.int64(2), 2)])
def test_top_k_may_exceed_what_there_is(top_k: Any, found: int) -> None:
    env = make(top_k=top_k)
    env.reset(seed=1)
    assert len(env.step(search("1 2 3 4"))[4]["passage_ids"]) == found


def test_protocols_set_the_defaults() -> None:
    env = make(protocol="r1-searcher", template="question")
    assert env.action_space == UnicodeText(terminators=("<|end_of_query|>",))
    env.reset(seed=1)
    info = env.step("<|begin_of_query|>1 2 3 4 5<|end_of_query|>")[4]
    assert len(info["passage_ids"]) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 2.5}, "top_k is an integer from 1 on, not 2.5"),
        ({"top_k": True}, "top_k is an integer"),
        ({"max_searches": -1}, "max_searches is an integer from 0 on, not -1"),
        ({"max_turns": 0}, "max_turns is an integer from 1 on, not 0"),
        ({"protocol": "search-r1", "max_searches": 8}, "set max_turns=9"),
        ({"render_mode": "rgb"}, "unknown render mode 'rgb'; known: ansi, human"),
        ({"dataset": type(DATASET)("none", (), None)}, "'none' has no question"),
        ({"split": "dev"}, "split='dev' is for data sets that are given by name"),
        ({"hops": 2}, "hops=2 is for data sets"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ResearchEnvError, match=message):
        make(**settings)


@pytest.mark.parametrize("language", ["fr", ["zh"], None])
def test_the_language_of_every_question_is_checked_at_once(language: Any) -> None:
    wrong = Question("q9", "Who?", ("Ann",), extra={"metric_language": language})
    data = type(DATASET)("own", (*QUESTIONS, wrong), None)
    with pytest.raises(UnknownNameError, match=r"of question 'q9': .*known: en, ja"):
        make(dataset=data)
    make(dataset=data, metric_language="ko")


def test_settings_are_checked_before_anything_is_indexed() -> None:
    class Untouched(ListCorpus):
        def fingerprint(self) -> str:
            raise AssertionError("the corpus was read")

    data = type(DATASET)("own", QUESTIONS, Untouched(()))
    for wrong in ({"turn_reward": "new_suport"}, {"max_passage_chars": 0}, {"reward": "f2"}):
        with pytest.raises(ResearchEnvError):
            SearchQAEnv(dataset=data, **wrong)


@pytest.mark.parametrize(
    ("protocol", "reward", "warned"),
    [
        ("research", "r1-searcher-stage2", True),
        ("research", "f1+0.1*recall-0.1*searches", True),
        ("research", "research-strict-0.1*searches", False),
        ("r1-searcher", "r1-searcher-stage1", False),
        ("search-r1", "f1", False),
    ],
)
def test_the_reward_of_another_paper_is_warned_of(
    protocol: str, reward: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make(protocol=protocol, reward=reward)
    assert ("which no episode of" in caplog.text) == warned


def test_a_seed_may_be_numpys() -> None:
    env = make()
    assert env.reset(seed=np.int64(7)) == env.reset(seed=7)  # type: ignore[arg-type]


def test_a_generator_that_was_set_draws_the_order_of_questions() -> None:
    env = make()
    orders = []
    for _ in range(2):
        env.np_random = np.random.default_rng(3)
        orders.append([env.reset()[1]["question_id"] for _ in range(10)])
    assert orders[0] == orders[1]
    assert sorted(orders[0][:5]) == sorted(orders[0][5:]) == [f"q{i}" for i in range(5)]
    env.np_random = np.random.default_rng(5)
    assert orders[0] != [env.reset()[1]["question_id"] for _ in range(10)]
    with pytest.raises(ConfigurationError, match="a seed is an integer from 0 on, not -1"):
        env.reset(seed=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question_id": "q9"}, "no question has the id 'q9'; there are 5, the first is 'q0'"),
        ({"episode": -1}, "from 0 on, not -1"),
        ({"episode": 1.5}, r"from 0 on, not 1\.5"),
        ({"episode": 1, "question_id": "q1"}, "takes one of the options"),
        ({"episodes": [1]}, "takes one of the options"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make().reset(seed=1, options=options)


def test_an_id_is_for_one_question() -> None:
    twice = replace(DATASET, questions=[*DATASET.questions, DATASET.questions[2]])
    with pytest.raises(DataError, match="2 questions of 'tiny' have the id 'q2'"):
        make(dataset=twice)


def test_a_refused_reset_changes_nothing() -> None:
    env, other = make(), make()
    for each in (env, other):
        each.reset(seed=4)
    for options in ({"episode": -1}, {"episodes": [1]}, {"question_id": "q9"}):
        with pytest.raises(ConfigurationError):
            env.reset(seed=9, options=options)
    assert env.np_random_seed == 4
    assert [env.reset()[1]["question_id"] for _ in range(7)] == [
        other.reset()[1]["question_id"] for _ in range(7)
    ]


def test_steps_before_reset_and_after_the_end_are_refused() -> None:
    made = gym.make("SearchQA-v0", dataset=DATASET, retriever=Engine())
    for env in (make(), made):
        with pytest.raises(EpisodeError, match="call reset first"):
            env.step("x")
        env.reset(seed=1)
        env.step("x")
        with pytest.raises(EpisodeError, match=r"over \(no_answer\); reset it first"):
            env.step("x")
        env.reset()
        with pytest.raises(ActionError, match="not int"):
            env.step(1)  # type: ignore[arg-type]
        assert env.step(answer("x"))[2]  # a refused action is as if it had not been


def test_the_checker_of_gymnasium_has_no_complaint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rules in ("research", "r1-searcher", "search-r1"):
            env = gym.make("SearchQA-v0", dataset=DATASET, retriever=Engine(), protocol=rules)
            check_env(env.unwrapped)
            env.close()


def test_pickling_and_copying_in_the_middle_of_an_episode() -> None:
    env = make()
    env.reset(seed=5)
    env.step(search("1"))
    twins = (pickle.loads(pickle.dumps(env)), copy.deepcopy(env))
    expected = env.step(answer("Founder 1"))
    after = env.reset()
    for twin in twins:
        assert twin.step(answer("Founder 1")) == expected
        assert twin.reset() == after


def test_render_ansi_shows_the_whole_episode() -> None:
    env = make(render_mode="ansi", template="question")
    assert env.render() == ""
    env.reset(options={"question_id": "q1"})
    assert env.render() == "Who founded company 1?\n"
    env.step("<search>1</search>")
    text = (
        "Who founded company 1?\n<search>1</search>"
        ' <result>\n"Title 1"\nAbout 1 number 1.\n</result>'
    )
    assert env.render() == text
    env.step(answer("Founder 1"))
    assert env.render() == text + answer("Founder 1") + "\n[answer, reward 1]\n"
    env.reset(options={"question_id": "q2"})
    assert env.render() == "Who founded company 2?\n"


def test_a_reward_is_computed_once_and_one_that_fails_loses_no_episode() -> None:
    calls: list[Episode] = []

    def reward(episode: Episode) -> float:
        calls.append(episode)
        return 1 / (len(calls) - 1)

    env = make(render_mode="ansi", reward=reward)
    ends: list[Callable[[], StepOutput]] = [lambda: env.step(answer("Founder 1")), env.truncate]
    for end in ends:
        env.reset(options={"question_id": "q1"})
        calls.clear()
        with pytest.raises(RewardError, match="division by zero"):
            end()
        assert end().reward == 1.0
        assert str(env.render()).endswith("reward 1]\n")
        assert len(calls) == 2


def test_render_human_prints_as_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    env = make(render_mode="human", template="question")
    env.reset(options={"question_id": "q1"})
    env.step("<search>1</search>")
    env.step("no idea")
    assert env.render() is None
    assert capsys.readouterr().out == (
        "Who founded company 1?\n\n<search>1</search>"
        ' <result>\n"Title 1"\nAbout 1 number 1.\n</result>\n'
        "no idea\n[no_answer, reward 0]\n\n"
    )


def test_closing_leaves_a_retriever_that_was_lent() -> None:
    engine = Engine()
    env = make(retriever=engine)
    env.close()
    env.close()
    assert engine.closed == 0


def test_a_search_after_close_is_an_error_and_voids_nothing() -> None:
    env = make()
    env.reset(options={"question_id": "q0"})
    env.close()
    with pytest.raises(ClosedError, match="have been closed; make a new environment"):
        env.step(search("1"))
    assert env.step(answer("Founder 0"))[1] == 1.0  # an answer needs no engine


def test_every_id_names_its_data_by_strings() -> None:
    assert set(IDS) == {
        *("ReSearch-MuSiQue-v0", "ReSearch-HotpotQA-v0", "ReSearch-2Wiki-v0"),
        *("ReSearch-Bamboogle-v0", "ReSearch-MiniWorld-v0", "SearchQA-v0"),
    }
    for name in IDS:
        spec = gym.spec(name)
        assert isinstance(spec.entry_point, str)
        assert isinstance(spec.vector_entry_point, str)
        assert EnvSpec.from_json(spec.to_json()) == spec


def local(name: str, folder: Path) -> dict[str, Any]:
    """What an id needs besides its name, where the data is a local folder."""
    if name == "SearchQA-v0":
        questions, corpus = folder / "questions.jsonl", folder / "corpus.jsonl"
        questions.write_text('{"id": "q", "question": "Who?", "answers": ["Ann"]}\n')
        corpus.write_text('{"id": "p", "title": "Ann", "text": "Ann did."}\n')
        return {"questions": str(questions), "corpus": str(corpus)}
    if name == "ReSearch-Bamboogle-v0":  # it has no corpus of its own: borrow one
        folder.joinpath("corpus.jsonl").write_text('{"id": "p", "title": "A", "text": "B."}\n')
        return {"corpus": str(folder / "corpus.jsonl")}
    return {} if "MiniWorld" in name else {"split": "dev"}


@pytest.fixture
def home(
    research_data: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of data, with a cache folder of the tests' own."""
    cache = tmp_path_factory.getbasetemp() / "research-cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(cache))
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", IDS)
def test_every_id_passes_the_checker_and_its_spec_remakes_it(name: str, tmp_path: Path) -> None:
    settings = local(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(name, **settings)
        check_env(env.unwrapped)

    assert env.spec is not None
    twins: list[gym.Env[str, str]] = [
        EnvSpec.from_json(env.spec.to_json()).make(),
        pickle.loads(pickle.dumps(env)),
    ]
    expected = env.reset(seed=4), env.step("<search>Ann was born</search>"), env.step(answer("x"))
    for twin in twins:
        told = (
            twin.reset(seed=4),
            twin.step("<search>Ann was born</search>"),
            twin.step(answer("x")),
        )
        assert told == expected
        twin.close()
    env.close()

    vector = gym.make_vec(name, num_envs=2, **settings)
    assert type(vector).__name__ == "SearchQAVectorEnv"
    assert vector.reset(seed=4)[0][0] == expected[0][0]
    assert vector.spec is not None
    remade = gym.make_vec(EnvSpec.from_json(vector.spec.to_json()))
    assert remade.num_envs == 2
    assert remade.reset(seed=4)[0] == vector.reset(seed=4)[0]
    vector.close()
    remade.close()
