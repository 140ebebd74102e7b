"""Stages of a run: how they are written, and when the next one begins; and the collapse monitor."""

from __future__ import annotations

import pytest

from research_agent.curriculum import CollapseMonitor, CurriculumState, Stage, parse_stages
from research_agent.errors import ConfigError


def test_stages_are_words() -> None:
    first, second, last = parse_stages(
        ["steps=20 until=1.4 reward=r1-searcher-stage1 top_k=3", "until=2 hops=[1,2]", "split=dev"]
    )
    assert first == Stage({"reward": "r1-searcher-stage1", "top_k": 3}, 20, 1.4)
    assert second == Stage({"hops": [1, 2]}, None, 2)
    assert last == Stage({"split": "dev"})
    assert parse_stages(["questions='a file.jsonl'"])[0].env_args == {"questions": "a file.jsonl"}
    assert parse_stages([]) == ()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["reward=em", "reward=f1"], "never ends"),
        (["steps=3", "steps=4"], "ends with the run"),
        (["steps=0", ""], "number from 1 on"),
        (["steps=2.5", ""], "number from 1 on"),
        (["until=soon", ""], "is a reward"),
        (["until=NaN", ""], "is a reward"),
        (["reward", ""], "KEY=VALUE"),
        (["reward='em", ""], "No closing quotation"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_stages(texts)


def test_steps_or_reward_end_a_stage() -> None:
    stages = parse_stages(["steps=7 until=0.5", "until=1", "top_k=1"])
    state = CurriculumState()
    # The mean of five steps reaches .5 with the fifth: 0 + .25 + .5 + .75 + 1 = 2.5.
    moved = [state.advance(stages, reward) for reward in (0, 0.25, 0.5, 0.75, 1.0)]
    assert moved == [False, False, False, False, True]
    assert state == CurriculumState(stage=1)
    assert [state.advance(stages, 1.0) for _ in range(5)] == [False] * 4 + [True]
    assert [state.advance(stages, 9.0) for _ in range(9)] == [False] * 9  # the last one
    assert state == CurriculumState(stage=2, steps=9, rewards=[9.0] * 5)

    state = CurriculumState()
    assert [state.advance(stages, 0.0) for _ in range(7)] == [False] * 6 + [True]


def test_steps_without_a_reward_end_a_stage_by_their_number_only() -> None:
    stages = parse_stages(["steps=8 until=1", ""])
    state = CurriculumState()
    rewards = [1.0, 1.0, None, 1.0, 1.0, None, 1.0]
    assert [state.advance(stages, reward) for reward in rewards] == [False] * 6 + [True]
    state = CurriculumState()
    assert [state.advance(stages, None) for _ in range(8)] == [False] * 7 + [True]


def test_a_monitor_sees_a_collapse_and_not_a_bad_step() -> None:
    monitor = CollapseMonitor(0.5, window=2)
    rewards = [0.1, 0.3, 0.8, 0.8, 0.3, 0.6, 0.5, 0.2, 0.1]
    found = [monitor.add(step, reward) for step, reward in enumerate(rewards, 1)]
    # The best average, 0.8, ends with step 4; half of it is 0.4; the last averages are .35 and .15.
    assert found == [None] * 7 + [4, 4]
    assert CollapseMonitor(0.9, window=1).add(1, 0.0) is None
    steady = CollapseMonitor(0.5, window=2)  # the latest of equal averages: the nearest checkpoint
    assert [steady.add(step, float(step <= 6)) for step in range(1, 9)] == [None] * 7 + [6]
    negative = CollapseMonitor(0.9, window=1)
    assert [negative.add(step, -reward) for step, reward in enumerate(rewards, 1)] == [None] * 9
