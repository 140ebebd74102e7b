"""Turns on servers that stand in for each other: who samples what, and who is dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from research_agent.engines.base import Finish, SamplingParams
from research_agent.engines.checks import CONTINUE
from research_agent.engines.remote import Client, RequestError, turn_seed
from research_agent.engines.servers.server import GENERATE, START, WeightTag, first_model
from research_agent.errors import EngineError

_LOG = logging.getLogger(__name__)

_CHECK = 5.0  # seconds between looks at a server's health; a fifth if it is dead
_TIMEOUT = 30.0  # seconds for the answer to a look
_REFUSED = (400, 413, 422)  # statuses for a turn that no server would take
_ATTEMPTS = 4  # per turn: this many plus one per server
_NEAR = 3  # turns that a server may have more than twice another's, and keep its trajectories


@dataclass(frozen=True)
class ServedWeights:
    """Which servers have which weights; the same on all ranks.

    Attributes:
        tag: the weights' name.
        models: address of each server that has them, and the name that it gives the policy.
        problems: address of each server that has not, and why.
    """

    tag: WeightTag
    models: Mapping[str, str]
    problems: Mapping[str, str]


@dataclass(eq=False)
class _Sampler:
    """A server as turns see it."""

    url: str
    turns: Client  # for turns, of which any number may be under way
    looks: Client  # for everything else, which must not wait for turns
    alive: bool = False
    model: str = ""  # the name it gives the policy
    load: int = 0  # turns under way
    taken: int = 0  # turns so far
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    problem: str = "it has not been asked yet"  # why it is not alive


@dataclass(eq=False)
class HeldTokens:
    """What a slot holds."""

    tokens: list[int] = field(default_factory=list)
    preferred_server: _Sampler | None = None  # sampled the last turn: its cache has the prefix


@dataclass(frozen=True)
class Turn:
    """What is to be sampled."""

    slot: int
    held: HeldTokens
    params: SamplingParams
    limit: int  # tokens


@dataclass(frozen=True)
class Sampled:
    """What a server sampled, as it came."""

    turn: Turn
    tokens: list[int]
    logprobs: list[float]  # [tokens]
    versions: list[int]  # [tokens], of the weights
    finish_reason: Finish  # as the server says


class _LostError(Exception):
    """A server that failed at a turn, or left while it was at it."""


class ServerPool:
    """The servers that one process samples from; it gives them no weights.

    Everything here runs in the event loop's thread. See ``ServerEngine`` for the arguments.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        end_ids: frozenset[int],
        *,
        turn_timeout: float,
        patience: float,
        max_in_flight: int,
        quiet: bool = False,
    ) -> None:
        """Ask nobody anything yet; with ``quiet`` warnings are only information."""
        self._servers = [
            _Sampler(url, Client(url, key, max_in_flight, keep_alive=True), Client(url, key))
            for url in urls
        ]
        self.clients = [client for each in self._servers for client in (each.turns, each.looks)]
        self._end_ids = end_ids
        self._turn_timeout = turn_timeout
        self._patience = patience
        self._places = asyncio.Semaphore(max_in_flight)
        self._tag = WeightTag("", 0, 0)
        self._back = asyncio.Event()  # set when a server comes back
        self._watches: list[asyncio.Task[None]] = []
        self._level = logging.INFO if quiet else logging.WARNING

    async def use(self, served: ServedWeights) -> None:
        """Sample from now on with these weights, on the servers that have them.

        Turns under way on other servers are sampled again.
        """
        self._tag = served.tag
        for server in self._servers:
            if server.url in served.models:
                self._admit(server, served.models[server.url])
            else:
                self._mark_dead(server, served.problems.get(server.url, server.problem))
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def play(self, turn: Turn) -> Sampled:
        """Sample a turn, on another server where one fails.

        Raises:
            EngineError: no server is left, or too many failed at it.
        """
        attempts = _ATTEMPTS + len(self._servers)  # then the turn itself is to blame
        async with self._places:
            for _ in range(attempts):
                server = await self._choose(turn.held)
                try:
                    return await self._sample(server, turn)
                except _LostError as lost:
                    problem = f"{server.url}: {lost}"
                    self._mark_dead(server, str(lost))
        raise EngineError(
            f"{attempts} attempts to sample one turn of {len(turn.held.tokens)} tokens before it "
            f"failed, the last with {problem}. Look into the servers' logs. {CONTINUE}"
        )

    async def _choose(self, held: HeldTokens) -> _Sampler:
        """The server that has the trajectory in its cache, else the one with the least to do."""
        alive = await self._living()
        least = min(alive, key=lambda server: (server.load, server.taken))
        if held.preferred_server in alive and held.preferred_server.load <= 2 * least.load + _NEAR:
            return held.preferred_server
        held.preferred_server = least
        return least

    async def _living(self) -> list[_Sampler]:
        """The servers that can be used; one is waited for."""
        try:
            async with asyncio.timeout(self._patience):
                while not (alive := [server for server in self._servers if server.alive]):
                    self._back.clear()
                    await self._back.wait()
        except TimeoutError:
            problems = {server.url: server.problem for server in self._servers}
            raise no_server(problems) from None
        return alive

    async def _sample(self, server: _Sampler, turn: Turn) -> Sampled:
        payload, tag = _request(server.model, turn, self._end_ids), self._tag
        request = asyncio.create_task(
            server.turns.ask("POST", GENERATE, payload, timeout=self._turn_timeout, decoder=_ANSWER)
        )
        server.requests.add(request)
        server.load += 1
        server.taken += 1
        try:
            answer = await request
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # the trajectory is not wanted any more
            raise _LostError(server.problem) from None
        except RequestError as error:
            if error.status in _REFUSED:
                raise EngineError(
                    f"{server.url} refuses a turn of {len(turn.held.tokens)} tokens before it: "
                    f"{error}. {CONTINUE}"
                ) from None
            raise _LostError(str(error)) from None
        finally:
            server.load -= 1
            server.requests.discard(request)
        return _read(answer, turn, self._end_ids, tag)

    def _admit(self, server: _Sampler, model: str) -> None:
        if self._watches and not server.alive:
            _LOG.log(self._level, "%s is back, with the current weights", server.url)
        server.alive, server.model = True, model
        self._back.set()

    def _mark_dead(self, server: _Sampler, problem: str) -> None:
        """Leave a server out until it has the current weights again; its turns go elsewhere."""
        server.problem = problem
        if not server.alive:
            return
        server.alive = False
        for request in server.requests:
            request.cancel()
        left = sum(other.alive for other in self._servers)
        of = f"{left} of {len(self._servers)} servers left"
        _LOG.log(self._level, "%s is left out (%s); %s", server.url, problem, of)

    async def _watch(self, server: _Sampler) -> None:
        """Check regularly whether a server is alive, or alive again."""
        while True:
            await asyncio.sleep(_CHECK if server.alive else _CHECK / 5)
            try:
                if server.alive:
                    await server.looks.ask("GET", "health", timeout=_TIMEOUT)
                else:
                    await self._look_again(server)
            except RequestError as error:
                self._mark_dead(server, str(error))

    async def _look_again(self, server: _Sampler) -> None:
        """Use a server again if it has the current weights, from before or by now.

        Raises:
            RequestError: it does not answer, or has others.
        """
        info = await server.looks.ask("GET", "weight_info", timeout=_TIMEOUT)
        found = str(info.get("weight_version")) if isinstance(info, dict) else ""
        if not self._tag.is_current(found):
            raise RequestError("it answers, and waits for the next weights")
        models = await server.looks.ask("GET", "v1/models", timeout=_TIMEOUT)
        try:
            self._admit(server, first_model(models, server.url)[0])
        except EngineError as error:
            raise RequestError(str(error)) from None


def no_server(problems: Mapping[str, str]) -> EngineError:
    """The error for servers of which none can be used, by address and problem."""
    reasons = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
    return EngineError(f"no vLLM server can be used ({reasons}). {START}. {CONTINUE}")


def _request(model: str, turn: Turn, end_ids: Iterable[int]) -> dict[str, Any]:
    params = turn.params
    return {
        "model": model,
        "token_ids": turn.held.tokens,
        "sampling_params": {
            "temperature": params.temperature,
            "max_tokens": turn.limit,
            "seed": turn_seed(params.seed, len(turn.held.tokens)),
            "logprobs": 0,  # the sampled token alone
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be one
            "ignore_eos": True,  # the renderer says which tokens end a turn
            "stop_token_ids": sorted(end_ids),
        },
    }


# What of vLLM's answer is read; the rest is passed over undecoded.
class _Token(msgspec.Struct):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_ANSWER = msgspec.json.Decoder(_Answer)


def _read(answer: _Answer | None, turn: Turn, end_ids: frozenset[int], tag: WeightTag) -> Sampled:
    """What a server sampled.

    Raises:
        _LostError: it is no whole turn, or one of older weights than those of the tag.
    """
    if answer is None or len(answer.choices) != 1:
        raise _LostError("its answer is not vLLM's: it has not one choice")
    choice = answer.choices[0]
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
        return Sampled(turn, tokens, logprobs, versions, "stop")
    if reason == "length" and len(tokens) == turn.limit:
        return Sampled(turn, tokens, logprobs, versions, "length")
    raise _LostError(
        f"it ended a turn after {len(tokens)} of {turn.limit} tokens "
        f"({reason}, {stopped_by}), for no reason of ours"
    )
