"""OpenEnv: its client plays the environment's episodes over its server's socket.

Run by ``make adapters-openenv``, in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openenv.core.generic_client import GenericEnvClient
from websockets.sync.client import connect

from research_env.adapters.openenv import SearchAction, SearchClient, SearchObservation, make_app
from research_env.adapters.server import AppServer
from research_env.sessions import Sessions
from research_env.testing import Played, conformance
from tests.blocks import ROOT, block_of
from tests.research_env.fakes import DATASET, answer, search, suite_sessions
from tests.research_env.fakes import Engine as Fake


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with Sessions(dataset=DATASET, retriever=Fake(), template="question") as made:
        yield made


@pytest.fixture
def server(sessions: Sessions) -> Iterator[AppServer]:
    with AppServer(make_app(sessions)) as made:
        yield made


def asked(url: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
    """What the server answers to a POST, or to a GET without a body."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    with urllib.request.urlopen(urllib.request.Request(url, data, sent), timeout=30) as response:
        return json.load(response)


def test_it_conforms_over_its_socket() -> None:
    with (
        suite_sessions() as (sessions, engine),
        AppServer(make_app(sessions)) as server,
    ):

        async def play(question_id: str, actions: Sequence[str]) -> Played:
            async with SearchClient(base_url=server.url) as client:
                prompt = (await client.reset(question_id=question_id)).observation.text
                results = [await client.step(SearchAction(text=action)) for action in actions]
                if not results[-1].done:
                    results.append(await client.step(SearchAction(truncate=True)))
            last = results[-1].observation
            texts = [result.observation.text for result in results]
            return Played(prompt, texts, last.reward, last.metrics, last.void)

        conformance(play, engine)


def test_16_sessions_at_once_play_their_own_episodes(sessions: Sessions, server: AppServer) -> None:
    rows = sessions.tasks(seed=3)

    async def play(number: int) -> SearchObservation:
        row = rows[number % 5]
        async with SearchClient(base_url=server.url) as client:
            first = (await client.reset(seed=3, index=number % 5)).observation
            assert (first.text, first.messages) == (row["prompt"], row["messages"])
            assert (first.terminators, first.question_id) == (["</search>"], row["id"])
            seen = await client.step(SearchAction(text=search(f"{number}")))
            assert f"About {number} number {number}." in seen.observation.text
            assert (seen.done, seen.reward, seen.observation.metrics) == (False, 0.0, {})
            founder = f"Founder {row['id'][1:]}" if number % 2 else "nobody"
            step = await client.step(SearchAction(text=answer(founder)))
            last: SearchObservation = step.observation
            state = await client.state()
            assert (state.question_id, state.step_count) == (row["id"], 2)
            assert state.stop_reason == last.stop_reason == "answer"
            return last

    async def play_all() -> list[SearchObservation]:
        return await asyncio.gather(*map(play, range(16)))

    for number, last in enumerate(asyncio.run(play_all())):
        assert (last.reward, last.metrics["em"]) == ((1.0, 1.0) if number % 2 else (0.1, 0.0))
        assert (last.done, last.terminated, last.truncated, last.void) == (True, True, False, False)


def test_a_void_episode_has_no_reward(server: AppServer) -> None:
    with SearchClient(base_url=server.url).sync() as client:
        client.reset(question_id="q1")
        result = client.step(SearchAction(text=search("fail")))
        assert (result.reward, result.done, result.observation.void) == (None, True, True)
        assert set(result.observation.metrics.values()) == {0.0}


def test_messages_are_not_compressed(server: AppServer) -> None:
    with connect(f"{server.url.replace('http', 'ws', 1)}/ws", compression="deflate") as socket:
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers


def test_without_a_task_resets_walk_through_the_order_of_the_seed(
    sessions: Sessions, server: AppServer
) -> None:
    with SearchClient(base_url=server.url).sync() as client:
        opened = [client.reset(seed=4 if n == 0 else None).observation for n in range(5)]
    assert [each.question_id for each in opened] == [row["id"] for row in sessions.tasks(seed=4)]


def test_a_seed_with_an_index_begins_its_order_there(sessions: Sessions, server: AppServer) -> None:
    with SearchClient(base_url=server.url).sync() as client:
        resets: list[dict[str, int]] = [{"seed": 4, "index": 1}, {}, {"index": 3}, {}]
        opened = [client.reset(**each).observation.question_id for each in resets]
    order = [row["id"] for row in sessions.tasks(seed=4)]
    assert opened == [order[1], order[2], sessions.tasks()[3]["id"], order[3]]


def test_the_task_routes_list_what_reset_opens(sessions: Sessions, server: AppServer) -> None:
    base = f"{server.url}/research"
    assert [split["name"] for split in asked(f"{base}/splits")] == ["train"]
    assert asked(f"{base}/num_tasks", {"split": "train"})["num_tasks"] == 5
    task = asked(f"{base}/task", {"split": "train", "index": 3})["task"]
    assert task["id"] == sessions.tasks()[3]["id"]
    with SearchClient(base_url=server.url).sync() as client:
        assert client.reset(split="train", index=3).observation.question_id == task["id"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        asked(f"{base}/task", {"split": "train", "index": 5})


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"question_id": "q9"}, "q9"),
        ({"index": 5}, "a number from 0 to 4"),
        ({"index": -1}, "a number from 0 to 4"),
        ({"split": "dev"}, "dev"),
        (
            {"index": 1, "question_id": "q1"},
            r"one of index \(1\) and question_id \('q1'\), not both",
        ),
    ],
)
def test_tasks_that_are_not_there_are_refused(
    server: AppServer, reset: dict[str, Any], message: str
) -> None:
    with (
        SearchClient(base_url=server.url).sync() as client,
        pytest.raises(RuntimeError, match=message),
    ):
        client.reset(**reset)


def test_steps_out_of_turn_are_refused_and_the_session_goes_on(server: AppServer) -> None:
    with SearchClient(base_url=server.url).sync() as client:
        with pytest.raises(RuntimeError, match="call reset before step"):
            client.step(SearchAction(text="x"))
        client.reset(question_id="q1")
        client.step(SearchAction(text=answer("x")))
        with pytest.raises(RuntimeError, match="the episode is over"):
            client.step(SearchAction(text="x"))
        assert client.reset(question_id="q2").observation.question_id == "q2"
    with GenericEnvClient(base_url=server.url).sync() as generic:
        generic.reset(question_id="q1")
        with pytest.raises(RuntimeError, match="Invalid message"):
            generic.step({"texts": "x"})


def test_more_sessions_than_allowed_are_refused(sessions: Sessions) -> None:
    with (
        AppServer(make_app(sessions, max_sessions=1)) as server,
        SearchClient(base_url=server.url).sync() as first,
    ):
        first.reset()
        with (
            pytest.raises(RuntimeError, match="capacity"),
            SearchClient(base_url=server.url).sync() as second,
        ):
            second.reset()


def test_web_pages_and_clients_without_the_key_are_refused(sessions: Sessions) -> None:
    with AppServer(make_app(sessions), key="secret") as server:
        key = {"Authorization": "Bearer secret"}
        with SearchClient(base_url=server.url, headers=key).sync() as client:
            assert client.reset(question_id="q1").observation.question_id == "q1"
        for headers in ({}, key | {"Origin": "http://evil.example"}):
            with (
                pytest.raises(Exception, match=r"40[13]"),
                SearchClient(base_url=server.url, headers=headers).sync() as client,
            ):
                client.reset()


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "research_env.cli", "serve", "--openenv", "--port", "0"]
    command += ["--dataset", "miniworld", "--env-args", "template=question", "top_k=1"]
    env = os.environ | {"RESEARCH_CACHE": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        served = re.search(r"http://\S+", process.stdout.readline())
        assert served is not None
        try:
            with SearchClient(base_url=served[0].rstrip(";")).sync() as client:
                client.reset(seed=7, index=0)
                seen = client.step(SearchAction(text="<search>Who founded it?</search>"))
                assert seen.observation.text.strip().startswith("<result>")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_the_documented_example_runs(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "RESEARCH_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", block_of("OpenEnv", "python")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "['</search>']" in done.stdout
    assert re.search(r"^0\.\d+ True \{'em': 0\.0, ", done.stdout, re.M)
