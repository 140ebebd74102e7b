"""Requests to servers: what a hostile or broken answer comes to."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from typing import Any

import pytest

from research_agent.engines import remote
from research_agent.engines.remote import Client, RequestError
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
    with pytest.raises(RequestError, match="Content-Encoding 'gzip, gzip'") as caught:
        ask(server, (200, stacked, {"Content-Encoding": "gzip, gzip"}))
    assert not caught.value.retryable
    monkeypatch.setattr(remote, "_LARGEST_ANSWER", 1000)
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
