"""Requests to servers: what a hostile or broken answer comes to."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from typing import Any

import pytest

from research_agent.engines.servers import client as http
from research_agent.engines.servers.client import Client, RequestError
from tests.research_agent.engines.test_openai import Answer, Endpoint, failed

KEY = "sk-not-for-logs"


@pytest.fixture
def server() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.http.shutdown()
    server.http.server_close()


def ask(server: Endpoint, answer: Answer) -> Any:
    server.answers = [answer]

    async def once() -> Any:
        client = Client(server.url, KEY)
        try:
            return await client.ask("POST", "generate", {}, timeout=10.0)
        finally:
            await client.aclose()

    return asyncio.run(once())


def test_an_answer(server: Endpoint) -> None:
    assert ask(server, (200, {"a": 1}, {})) == {"a": 1}
    assert ask(server, (200, b"", {})) is None
    assert server.keys == [f"Bearer {KEY}"] * 2


def test_answers_that_could_fill_the_memory(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = gzip.compress(gzip.compress(b"\0" * 30_000_000))
    with pytest.raises(RequestError, match="no JSON"):  # as it came, unpacked by nobody
        ask(server, (200, stacked, {"Content-Encoding": "gzip, gzip"}))
    monkeypatch.setattr(http, "_LARGEST_ANSWER", 1000)
    with pytest.raises(RequestError, match="an answer of over") as caught:
        ask(server, (200, b" " * 2000, {}))
    assert not caught.value.retryable


def test_failures_are_told_without_the_key(server: Endpoint) -> None:
    with pytest.raises(RequestError, match=r"status 503: key \[redacted\]") as caught:
        ask(server, failed(503, "key " + "".join(f"%{ord(c):02x}" for c in KEY)))
    assert caught.value.retryable
    with pytest.raises(RequestError, match="no JSON") as caught:
        ask(server, (200, b"[" * 100_000, {}))
    assert caught.value.retryable


def test_a_connection_is_not_used_again_after_a_server_error() -> None:
    """As uvicorn does after an exception: it says nothing and answers nothing more on it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(await reader.readuntil(b"\r\n\r\n"))
        status = b"500 Error" if len(connections) == 1 else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read(1)  # another request would be lost
        writer.close()

    async def twice() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            with pytest.raises(RequestError, match="status 500"):
                await client.ask("POST", "pause", timeout=10.0)
            return await client.ask("POST", "pause", timeout=10.0)
        finally:
            await client.aclose()
            server.close()

    connections: list[bytes] = []
    assert asyncio.run(twice()) == {}
    assert len(connections) == 2
