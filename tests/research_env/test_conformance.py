"""The conformance suite is passed by sessions and both environments, and fails whom it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from research_env.env import SearchQAEnv
from research_env.sessions import Sessions
from research_env.testing import ConformanceError, Engine, Played, conformance, settings
from research_env.vector_env import SearchQAVectorEnv, StepResult


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with Sessions(**settings()) as made:
        yield made


def engine_of(sessions: Sessions) -> Engine:
    engine = sessions.core.retriever
    assert isinstance(engine, Engine)
    return engine


def player(sessions: Sessions) -> Callable[[str, Sequence[str]], Played]:
    def play(question_id: str, actions: Sequence[str]) -> Played:
        session = sessions.open(question_id)
        outputs = [session.step(action) for action in actions]
        if not session.episode.over:
            outputs.append(session.truncate("length"))
        masked = "".join(output.observation for output in outputs)
        _, reward, _, _, info = outputs[-1]
        return Played(
            session.prompt,
            [output.observation for output in outputs],
            reward,
            info["metrics"],
            info["void"],
            kept="".join(actions),
            masked=masked,
        )

    return play


def test_sessions_conform_in_threads(sessions: Sessions) -> None:
    conformance(player(sessions), engine_of(sessions))


def test_sessions_conform_in_coroutines(sessions: Sessions) -> None:
    async def play(question_id: str, actions: Sequence[str]) -> Played:
        session = sessions.open(question_id)
        outputs = [await session.astep(action) for action in actions]
        if not session.episode.over:
            outputs.append(session.truncate("length"))
        _, reward, _, _, info = outputs[-1]
        texts = [output.observation for output in outputs]
        return Played(session.prompt, texts, reward, info["metrics"], info["void"])

    conformance(play, engine_of(sessions))


def test_the_single_environment_conforms() -> None:
    def play(question_id: str, actions: Sequence[str]) -> Played:
        env = SearchQAEnv(**settings())
        prompt, _ = env.reset(options={"question_id": question_id})
        outputs = [env.step(action) for action in actions]
        if not (outputs[-1].terminated or outputs[-1].truncated):
            outputs.append(env.truncate("length"))
        _, reward, _, _, info = outputs[-1]
        texts = [output.observation for output in outputs]
        return Played(prompt, texts, reward, info["metrics"], info["void"])

    conformance(play)


@pytest.mark.parametrize("background", [False, True])
def test_the_vector_environment_conforms(background: bool) -> None:
    def play(question_id: str, actions: Sequence[str]) -> Played:
        env = SearchQAVectorEnv(2, autoreset_mode="Disabled", **settings())
        prompts, _ = env.reset(options={"question_ids": ["q9", question_id]})
        texts: list[str] = []
        last: StepResult | None = None
        for action in actions:
            if background:
                env.send([1], [action])
                (last,) = env.recv()
            else:
                rows: Any = env.step(["", action], mask=[False, True])
                metrics = rows[4]["metrics"].items()
                info = {"void": rows[4]["void"][1]}
                info["metrics"] = {k: v[1] for k, v in metrics if not k.startswith("_")}
                observation, reward, terminated, truncated = (row[1] for row in rows[:4])
                last = StepResult(1, observation, reward, terminated, truncated, info)
            texts.append(last.observation)
        assert last is not None
        if not (last.terminated or last.truncated):
            (last,) = env.truncate([1], "length")
        env.close()
        return Played(
            prompts[1], texts, float(last.reward), last.info["metrics"], bool(last.info["void"])
        )

    conformance(play)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "x"}, "right: the prompt is 'x'"),
        ({"reward": 0.5}, "right: the reward is 0.5, not 1.0"),
        ({"metrics": {}}, "right: the metrics is {}"),
        ({"void": True}, "right: the void is True, not False"),
        ({"observations": []}, "right: the observations is"),
        ({"kept": "x"}, "right: the text that is kept is 'x'"),
        ({"masked": ""}, "right: the text that is masked is ''"),
    ],
)
def test_whatever_differs_is_named(
    sessions: Sessions, change: dict[str, Any], message: str
) -> None:
    play = player(sessions)
    with pytest.raises(ConformanceError, match=message):
        conformance(lambda *task: dataclasses.replace(play(*task), **change))


def test_a_void_episode_may_have_no_reward_but_not_one(sessions: Sessions) -> None:
    play = player(sessions)

    def changed(reward: float | None) -> Callable[[str, Sequence[str]], Played]:
        def drop(question_id: str, actions: Sequence[str]) -> Played:
            played = play(question_id, actions)
            return dataclasses.replace(played, reward=reward, metrics={}) if played.void else played

        return drop

    conformance(changed(None))
    with pytest.raises(ConformanceError, match=r"dead engine: a void episode has reward 0\.5"):
        conformance(changed(0.5))


def test_searches_one_by_one_do_not_conform() -> None:
    with Sessions(**settings(), max_batch=1) as sessions:
        play = player(sessions)
        conformance(play)
        with pytest.raises(ConformanceError, match="asked the engine 64 times for 64 queries"):
            conformance(play, engine_of(sessions))
