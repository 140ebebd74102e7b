"""A failure of the search engine is never evidence: real servers that fail in every way."""

from __future__ import annotations

import os
from collections.abc import Iterator

import gymnasium as gym
import pytest

from benchmarks.faults import EPISODES, FAULTS, INDEX, Fault, Stage, measure, stage
from tests.elasticsearch.server import ServerError, index_url

pytestmark = [pytest.mark.elasticsearch, pytest.mark.slow]

SLACK = 10.0  # seconds that a busy machine may add


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    """A server of this module's own: it is paused and killed."""
    try:
        with stage() as made:
            if made.server.container:
                pytest.skip("a container cannot be paused and killed from here")
            yield made
    except ServerError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_episodes_are_right_or_void_and_the_run_goes_on(fault: Fault, on: Stage) -> None:
    row = measure(fault, on)
    assert row.wrong == 0
    assert row.complete + row.void == EPISODES
    if fault.outcome == "some":
        assert 0 < row.void < EPISODES
    else:
        assert row.void == (EPISODES if fault.outcome == "void" else 0)
    assert row.after == EPISODES
    assert row.seconds < fault.deadline + SLACK


def test_background_searches_fail_in_time_and_go_on(on: Stage) -> None:
    url = f"{index_url(on.server.url, INDEX)}?deadline=2"
    env = gym.make_vec(
        "ReSearch-MiniWorld-v0", num_envs=4, retriever=url, autoreset_mode="Disabled"
    )
    actions = [f"<think>?</think><search>who {i}</search>" for i in range(4)]
    env.reset(seed=1)
    on.server.pause()
    try:
        env.unwrapped.send(range(4), actions)  # type: ignore[attr-defined]
        failed = env.unwrapped.recv(timeout=60, min_results=4)  # type: ignore[attr-defined]
    finally:
        on.server.resume()
    assert len(failed) == 4
    for result in failed:
        assert (result.observation, result.reward, result.truncated) == ("", 0.0, True)
        assert (result.info["void"], result.info["stop_reason"]) == (True, "backend_error")
        assert result.info["passage_ids"] == ()
    env.reset(seed=1)
    env.unwrapped.send(range(4), actions)  # type: ignore[attr-defined]
    answered = env.unwrapped.recv(timeout=60, min_results=4)  # type: ignore[attr-defined]
    assert len(answered) == 4
    assert not any(result.info["void"] for result in answered)
    env.close()
