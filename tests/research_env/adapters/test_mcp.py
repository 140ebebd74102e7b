"""MCP: the official client calls the tools over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from research_env.adapters.server import AppServer
from research_env.cli import main
from research_env.errors import ConfigurationError
from research_env.retrieval.base import Hit, Passage
from research_env.sessions import Sessions
from research_env.testing import Engine
from research_env.tools import write_call
from tests.research_env.fakes import DATASET
from tests.research_env.fakes import Engine as Fake

mcp: Any = pytest.importorskip("mcp")
adapter = import_module("research_env.adapters.mcp")


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with adapter.tool_sessions(Fake(), top_k=2) as made:
        yield made


def call(url: str, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The results of calls, all at the same time, each by a client of its own."""

    async def one(name: str, arguments: dict[str, Any]) -> Any:
        async with mcp.Client(f"{url}/mcp") as client:
            return await client.call_tool(name, arguments)

    async def together() -> list[Any]:
        return await asyncio.gather(*(one(*each) for each in calls))

    return asyncio.run(together())


def test_a_client_lists_the_tools_of_the_protocol(sessions: Sessions) -> None:
    async def listed(url: str) -> Any:
        async with mcp.Client(f"{url}/mcp") as client:
            return (await client.list_tools()).tools

    with AppServer(adapter.make_app(sessions)) as server:
        tools = asyncio.run(listed(server.url))
    assert [
        {"name": t.name, "description": t.description, "parameters": t.input_schema} for t in tools
    ] == [schema["function"] for schema in sessions.core.tool_schemas()]


def test_a_result_is_what_the_policy_reads(sessions: Sessions) -> None:
    with AppServer(adapter.make_app(sessions)) as server:
        (result,) = call(server.url, ("search", {"query": 'the "1" < 2 é'}))
    assert not result.is_error
    (content,) = result.content
    with Sessions(dataset=DATASET, retriever=Fake(), protocol="tool-calls", top_k=2) as episodes:
        output = episodes.open("q1").step(write_call("search", {"query": 'the "1" < 2 é'}))
    assert content.text == output.info["messages"][0]["content"]
    assert "number 2." in content.text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("search", {"q": "1"}, "error: search needs the argument 'query'"),
        ("search", {"query": 3}, "error: 'query' is of type string, not number"),
        ("search", {"query": " "}, "error: 'query' is blank"),
        ("search", {"query": "x" * 1_000_000}, "error: the call has 10000[0-9]+ characters"),
        ("find", {"query": "1"}, "error: unknown tool 'find'; the tools are: search"),
        ("search", {"query": "fail"}, "error: the search engine failed"),
    ],
)
def test_errors_are_results_that_say_so(
    sessions: Sessions, name: str, arguments: dict[str, Any], message: str
) -> None:
    with AppServer(adapter.make_app(sessions)) as server:
        (result,) = call(server.url, (name, arguments))
    assert result.is_error
    assert re.match(message, result.content[0].text)


def test_a_passage_that_begins_like_an_error_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    passage = Passage("1", "", "error: no such file")
    engine = Fake()
    monkeypatch.setattr(engine, "search", lambda queries, _: [[Hit(passage, 1.0)] for _ in queries])
    with (
        adapter.tool_sessions(engine) as sessions,
        AppServer(adapter.make_app(sessions)) as server,
    ):
        (result,) = call(server.url, ("search", {"query": "1"}))
    assert result.content[0].text == passage.text
    assert not result.is_error


def test_searches_of_many_clients_share_calls() -> None:
    engine = Engine(0.005)
    with (
        adapter.tool_sessions(engine, max_batch=16, max_wait=20.0) as sessions,
        AppServer(adapter.make_app(sessions)) as server,
    ):
        results = call(server.url, *(("search", {"query": f"query {i}"}) for i in range(16)))
    texts = [result.content[0].text for result in results]
    assert [f"About query {i}:" in text for i, text in enumerate(texts)] == [True] * 16
    assert (engine.queries, engine.calls) == (16, 1)


def test_web_pages_and_clients_without_the_key_are_refused(sessions: Sessions) -> None:
    with AppServer(adapter.make_app(sessions), key="secret") as server:
        url, key = f"{server.url}/mcp", {"Authorization": "Bearer secret"}
        assert httpx.post(url, json={}).status_code == 401
        assert httpx.post(url, json={}, headers=key | {"Host": "evil.example"}).status_code == 403
        foreign = key | {"Origin": "http://evil.example"}
        assert httpx.post(url, json={}, headers=foreign).status_code == 403


@pytest.mark.parametrize(
    ("method", "header", "status"),
    [
        ("POST", ("Content-Length", str((16 << 20) + 1)), 413),
        ("POST", ("Transfer-Encoding", "chunked"), 411),
        ("GET", ("Content-Length", "2"), 400),
    ],
)
def test_bodies_that_are_large_or_have_no_clear_end_are_refused_unread(
    sessions: Sessions, method: str, header: tuple[str, str], status: int
) -> None:
    with AppServer(adapter.make_app(sessions)) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        connection.putrequest(method, "/mcp")
        connection.putheader(*header)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "research"}, "the protocol 'research' has no tools"),
        ({"max_turns": 1}, "no call can be run"),
        ({"max_searches": 0}, "no call can be run"),
    ],
)
def test_sessions_in_which_no_tool_can_be_called_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with (
        adapter.tool_sessions(Fake(), **settings) as sessions,
        pytest.raises(ConfigurationError, match=message),
    ):
        adapter.make_server(sessions)


def test_a_port_in_use_is_refused(sessions: Sessions) -> None:
    with AppServer(adapter.make_app(sessions)) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            AppServer(adapter.make_app(sessions), port=port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mcp", "--openenv", "--dataset", "miniworld"], "give one of --openenv and --mcp"),
        (["--mcp"], "give --retriever URL, --dataset NAME or --corpus FILE"),
        (["--openenv"], "--openenv needs --dataset NAME"),
        (["--dataset", "miniworld", "--env-args", "top_k=1"], "--env-args is for --openenv"),
        (
            ["--openenv", "--dataset", "miniworld", "--env-args", "retriever=embedded:x"],
            "give --retriever instead",
        ),
        (
            ["--mcp", "--dataset", "miniworld", "--top-k", "2", "--env-args", "top_k=1"],
            "give --top-k instead",
        ),
    ],
)
def test_the_command_refuses_what_it_cannot_serve(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", *arguments])
    assert message in capsys.readouterr().err


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "p", "title": "Ann", "text": "Ann did it."}\n')
    command = [sys.executable, "-m", "research_env.cli", "serve", "--mcp", "--port", "0"]
    command += ["--corpus", str(corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        served = re.search(r"(http://\S+)/mcp", process.stdout.readline())
        try:
            assert served is not None
            (result,) = call(served[1], ("search", {"query": "Ann"}))
            assert result.content[0].text == '"Ann"\nAnn did it.'
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
