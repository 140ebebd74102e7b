"""Turns on servers that stand in for each other: who samples what, and who is dead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from research_agent.engines.base import Finish, SamplingParams
from research_agent.engines.checks import CONTINUE
from research_agent.engines.remote import read_key, turn_seed
from research_agent.engines.servers.client import Client, RequestError
from research_agent.engines.servers.server import (
    GENERATE,
    RELOAD_TIMEOUT,
    SERVER_TIMEOUT,
    START,
    GenerateResponse,
    WeightTag,
)
from research_agent.errors import EngineError
from research_agent.system.open_files import allow_open_files

_LOG = logging.getLogger(__name__)

# Seconds that a turn may take, also paused by new weights; a server that takes longer is dead.
_TURN_TIMEOUT = 600.0 + RELOAD_TIMEOUT
_CHECK = 5.0  # seconds between looks at a server's health; a fifth if it is dead
_REFUSED = (400, 413, 422)  # statuses for a turn that no server would take
_ATTEMPTS = 4  # per turn: this many plus one per server
_OTHER_FILES = 512  # files that this process may have open besides connections for turns
_NEAR = 3  # turns that a server may have more than twice another's, and keep its trajectories


@dataclass(frozen=True)
class ServedWeights:
    """Which servers have which weights; the same on all ranks.

    Attributes:
        tag: the weights' name.
        problems: address of each server that does not have them, and why. All others do.
    """

    tag: WeightTag
    problems: Mapping[str, str]


@dataclass(eq=False)
class _Sampler:
    """A server as turns see it."""

    url: str
    client: Client
    alive: bool = True
    taken: int = 0  # turns so far
    turns: set[asyncio.Timeout] = field(default_factory=set)  # under way
    problem: str = ""  # why it is not alive


@dataclass(eq=False)
class Slot:
    """What a slot of the engine holds, and how its turn is sampled."""

    tokens: list[int] = field(default_factory=list)
    params: SamplingParams = field(default_factory=SamplingParams)
    preferred_server: _Sampler | None = None  # sampled the last turn: its cache has the prefix


@dataclass(frozen=True)
class Sampled:
    """What a server sampled, as it came."""

    tokens: list[int]
    logprobs: list[float]  # [tokens]
    versions: list[int]  # [tokens], of the weights
    finish_reason: Finish  # as the server says


class _LostError(Exception):
    """A server that failed at a turn, or left while it was at it."""


class ServerPool:
    """The servers that one process samples from; it gives them no weights.

    Everything here runs in the event loop's thread.

    Args:
        urls: addresses of the servers.
        end_ids: tokens that end a turn.
        max_in_flight: turns asked for at a time, times the number of servers; fewer if this process
            may not open as many connections.
        warns: whether to warn of servers that are lost; of several ranks one is enough.
    """

    def __init__(
        self, urls: Sequence[str], end_ids: frozenset[int], max_in_flight: int, *, warns: bool
    ) -> None:
        key = read_key("VLLM_API_KEY")
        self._servers = [_Sampler(url, Client(url, key, keep_alive=True)) for url in urls]
        self.closing = [server.client.aclose for server in self._servers]
        self._end_ids = end_ids
        # One for each turn, and one for each that a server has ended and we not closed yet.
        files = allow_open_files(2 * max_in_flight * len(urls) + _OTHER_FILES) - _OTHER_FILES
        most = min(max_in_flight * len(urls), files // 2)
        self._in_flight = asyncio.Semaphore(max(len(urls), most))
        self._tag = WeightTag("", 0, 0)
        self._problems: Mapping[str, str] = {}  # as in ServedWeights
        self._watches: list[asyncio.Task[None]] = []
        self._level = logging.WARNING if warns else logging.INFO

    async def use(self, served: ServedWeights) -> None:
        """Sample from now on with these weights, on the servers that have them.

        Turns under way on other servers are sampled again.
        """
        self._tag, self._problems = served.tag, served.problems
        for server in self._servers:
            if problem := served.problems.get(server.url):
                self._mark_dead(server, problem)
            else:
                self._readmit(server)
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def play(self, slot: Slot) -> Sampled:
        """Sample the turn of a slot, on another server where one fails.

        Raises:
            EngineError: no server is left, or too many failed at it.
        """
        attempts = _ATTEMPTS + len(self._servers)  # then the turn itself is to blame
        async with self._in_flight:
            for _ in range(attempts):
                server = await self._choose(slot)
                try:
                    return await self._sample(server, slot)
                except _LostError as lost:
                    problem = f"{server.url}: {lost}"
                    self._mark_dead(server, str(lost))
        raise EngineError(
            f"{attempts} attempts to sample one turn of {len(slot.tokens)} tokens before it "
            f"failed, the last with {problem}. Look into the servers' logs. {CONTINUE}"
        )

    async def _choose(self, slot: Slot) -> _Sampler:
        """The server that has the trajectory in its cache, else the one with the least to do.

        Raises:
            EngineError: no server can be used for a while.
        """
        deadline = time.monotonic() + SERVER_TIMEOUT
        while not (alive := [server for server in self._servers if server.alive]):
            if time.monotonic() > deadline:
                raise no_server({server.url: server.problem for server in self._servers})
            await asyncio.sleep(_CHECK / 5)
        least = min(alive, key=lambda server: (len(server.turns), server.taken))
        kept = slot.preferred_server
        if kept in alive and len(kept.turns) <= 2 * len(least.turns) + _NEAR:
            return kept
        slot.preferred_server = least
        return least

    async def _sample(self, server: _Sampler, slot: Slot) -> Sampled:
        payload, tag = _request(slot, self._end_ids), self._tag
        turn = asyncio.timeout(None)  # it ends at once if the server is left out
        server.turns.add(turn)
        server.taken += 1
        try:
            async with turn:
                answer = await server.client.ask(
                    "POST", GENERATE, payload, timeout=_TURN_TIMEOUT, form=GenerateResponse
                )
        except TimeoutError:
            raise _LostError(server.problem) from None
        except RequestError as error:
            if error.status in _REFUSED:
                raise EngineError(
                    f"{server.url} refuses a turn of {len(slot.tokens)} tokens before it: "
                    f"{error}. {CONTINUE}"
                ) from None
            raise _LostError(str(error)) from None
        finally:
            server.turns.discard(turn)
        return _read(answer, slot.params.max_tokens, self._end_ids, tag)

    def _readmit(self, server: _Sampler) -> None:
        if not server.alive:
            _LOG.log(self._level, "%s is back, with the current weights", server.url)
        server.alive = True

    def _mark_dead(self, server: _Sampler, problem: str) -> None:
        """Leave a server out until it has the current weights again; its turns go elsewhere."""
        server.problem = problem
        if not server.alive:
            return
        server.alive = False
        while server.turns:
            server.turns.pop().reschedule(0)
        left = sum(other.alive for other in self._servers)
        of = f"{left} of {len(self._servers)} servers left"
        _LOG.log(self._level, "%s is left out (%s); %s", server.url, problem, of)

    async def _watch(self, server: _Sampler) -> None:
        """Check regularly whether a server is alive, or alive again."""
        while True:
            await asyncio.sleep(_CHECK if server.alive else _CHECK / 5)
            try:
                if server.alive:
                    await server.client.ask("GET", "health")
                    continue
                name = await server.client.weight_name()
                # A server that failed at these weights may have their name and still be paused.
                if self._tag.is_current(name) and server.url not in self._problems:
                    self._readmit(server)
                else:
                    server.problem = "it answers, and waits for the next weights"
            except RequestError as error:
                self._mark_dead(server, str(error))


def no_server(problems: Mapping[str, str]) -> EngineError:
    """The error for servers of which none can be used, by address and problem."""
    reasons = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
    return EngineError(f"no vLLM server can be used ({reasons}). {START}. {CONTINUE}")


def _request(slot: Slot, end_ids: Iterable[int]) -> dict[str, Any]:
    params = slot.params
    return {
        "token_ids": slot.tokens,
        "sampling_params": {
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "seed": turn_seed(params.seed, len(slot.tokens)),
            "logprobs": 0,  # the sampled token alone
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be one
            "ignore_eos": True,  # the renderer says which tokens end a turn
            "stop_token_ids": sorted(end_ids),
        },
    }


def _read(answer: GenerateResponse, limit: int, end_ids: frozenset[int], tag: WeightTag) -> Sampled:
    """What a server sampled.

    Raises:
        _LostError: it is no whole turn, or one of older weights than those of the tag.
    """
    (choice,) = answer.choices
    tokens = choice.token_ids
    content = choice.logprobs.content if choice.logprobs else []
    spans = choice.weight_versions or []
    for span in spans:
        if not tag.is_current(span.version):
            raise _LostError(f"it sampled with weights {span.version}, not {tag}: started anew?")
    versions = [
        int(span.version.split("-")[1]) for span in spans for _ in range(span.start, span.end)
    ]
    if tokens != [each.token_id for each in content] or len(versions) != len(tokens):
        raise _LostError(
            f"its answer of {len(tokens)} tokens has {len(content)} log-probabilities and "
            f"{len(versions)} versions"
        )
    logprobs = [each.logprob for each in content]
    reason, stopped_by = choice.finish_reason, choice.stop_reason
    if reason == "stop" and (isinstance(stopped_by, str) or stopped_by in end_ids) and tokens:
        return Sampled(tokens, logprobs, versions, "stop")
    if reason == "length" and len(tokens) == limit:
        return Sampled(tokens, logprobs, versions, "length")
    raise _LostError(
        f"it ended a turn after {len(tokens)} of {limit} tokens "
        f"({reason}, {stopped_by}), for no reason of ours"
    )
