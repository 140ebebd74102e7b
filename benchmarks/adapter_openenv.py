"""OpenEnv's part of :mod:`benchmarks.adapters`: clients that stay connected, one per episode.

``python -m benchmarks.adapter_openenv adapter URL EPISODES`` and ``... alone SECONDS EPISODES``
are its servers, each in a process of its own. The first prints the adapter's address, the second
that of the smallest environment.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from openenv.core.generic_client import GenericEnvClient

from benchmarks.adapter_alone import ALONE, OBSERVATION, Waits, make_waits
from benchmarks.adapter_script import (
    ANSWER,
    SEARCHES,
    Play,
    ServerProcess,
    System,
    search,
    settings,
)
from research_env.adapters.openenv import SearchAction, SearchClient, make_app
from research_env.adapters.server import AppServer
from research_env.sessions import Sessions


class _TextAction(Action):  # type: ignore[misc]
    text: str


class _TextObservation(Observation):  # type: ignore[misc]
    text: str


class _WaitingEnvironment(Environment[_TextAction, _TextObservation, State]):  # type: ignore[misc]
    """Waits at each search; the turn after the last search ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits
        self._turns = 0

    async def reset_async(self, **_: Any) -> _TextObservation:
        self._turns = 0
        return _TextObservation(text="Who founded it?")

    async def step_async(self, action: _TextAction, **_: Any) -> _TextObservation:
        self._turns += 1
        over = self._turns > SEARCHES
        if not over:
            await asyncio.wrap_future(self._waits.request(action.text))
        return _TextObservation(text=OBSERVATION, done=over)

    def reset(self, **_: Any) -> _TextObservation:
        raise NotImplementedError

    step = reset

    @property
    def state(self) -> State:
        return State()


def systems(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """Our server and client, and OpenEnv's own client with the smallest environment."""
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)

    def player(kind: Any, action: Any, *words: str) -> Play:
        server = ServerProcess(__name__, *words, str(episodes))
        stack.callback(server.stop)
        clients = [kind(base_url=server.url) for _ in range(episodes)]

        async def connect() -> None:
            await asyncio.gather(*(client.connect() for client in clients))

        async def close() -> None:
            await asyncio.gather(*(client.close() for client in clients))

        async def episode(i: int, number: int) -> bool:
            await clients[i].reset()
            for turn in range(SEARCHES):
                await clients[i].step(action(text=search(i, turn, number)))
            return bool((await clients[i].step(action(text=ANSWER))).done)

        async def together(number: int) -> None:
            assert all(await asyncio.gather(*(episode(i, number) for i in range(episodes))))

        loop.run_until_complete(connect())
        stack.callback(lambda: loop.run_until_complete(close()))
        return lambda number: loop.run_until_complete(together(number))

    yield System("OpenEnv", "adapter", player(SearchClient, SearchAction, "adapter", url))
    yield System("OpenEnv", ALONE, player(GenericEnvClient, dict, "alone", str(seconds)))


def main(words: list[str]) -> None:
    """Serve until the process is ended."""
    kind, what, episodes = words[0], words[1], int(words[2])
    if kind == "adapter":
        app = make_app(Sessions(**settings(what, episodes)), episodes)
    else:
        waits = make_waits(float(what))
        app = create_fastapi_app(
            lambda: _WaitingEnvironment(waits),
            _TextAction,
            _TextObservation,
            max_concurrent_envs=episodes,
        )
    server = AppServer(app)
    print(server.url, flush=True)
    server.run()


if __name__ == "__main__":
    main(sys.argv[1:])
