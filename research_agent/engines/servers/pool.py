"""Servers that stand in for each other: who samples what, with which weights, and who is dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from research_agent.engines.base import Finish, SamplingParams
from research_agent.engines.checks import CONTINUE
from research_agent.engines.remote import RequestError, ask, turn_seed
from research_agent.errors import ContextError, EngineError

if TYPE_CHECKING:
    from torch import Tensor

RELOAD_TIMEOUT = 900.0
"""Seconds that a server may take for new weights, or for the first turn of all."""

_LOG = logging.getLogger(__name__)

_START = (
    "Start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out "
    "--logprobs-mode processed_logprobs; if it asks for a key, put that in VLLM_API_KEY here"
)
_WAITS = ", and now it answers and waits for the next weights"
_GENERATE = "inference/v1/generate"
_CHECK = 5.0  # seconds between looks at a server's health
_AGAIN = 1.0  # second between attempts while everything waits
_LONGEST_PAUSE = 30.0  # seconds between attempts to take a server back
_ANSWER = 30.0  # seconds for the answer to a request that costs a server next to nothing
_ABORT = 10.0  # seconds for handing over turns that are interrupted
_REFUSED = (400, 413, 422)  # what a turn is answered with that no server would take
_ATTEMPTS = 4  # of a turn, besides one a server
_NEAR = 3  # turns that a server may have more than twice another's, and keep its trajectories


@dataclass(eq=False)
class Server:
    """A server, and what is known of it."""

    url: str
    turns: httpx.AsyncClient  # asks for turns, of which there may be any number under way
    control: httpx.AsyncClient  # asks for all else, which must not wait for them
    alive: bool = False
    model: str = ""  # the name it gives the policy
    version: str = ""  # of the weights it was given last
    reading: str = ""  # the version of the weights that it is being given
    load: int = 0  # turns under way
    taken: int = 0  # turns so far
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    problem: str = "it has not been asked yet"  # why it is not alive
    waiting: bool = False  # it answers again, and waits for the next weights
    admission: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        wait: float = _ANSWER,
    ) -> Any:
        """Ask it something; raises ``RequestError``."""
        return await ask(self.control, method, path, payload, timeout=wait)

    async def need(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        wait: float = _ANSWER,
    ) -> Any:
        """Ask it for what a server of ours can do; ``EngineError`` where it never will."""
        try:
            return await self.ask(method, path, payload, wait)
        except RequestError as error:
            if error.retryable:
                raise
            raise EngineError(f"{self.url} refuses /{path}: {error}. {_START}") from None

    async def weights(self) -> str:
        """The version of the weights that it says it has; raises as ``need`` does."""
        info = await self.need("GET", "weight_info")
        return str(info.get("weight_version")) if isinstance(info, dict) else ""


class WeightTransfer(Protocol):
    """How weights get to servers. Each version of them has a name that no other has."""

    persistent: bool
    """Whether weights can be given for as long as they are current, while learning goes on too."""

    def publish(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        """Take weights that are to be given to servers, under a name.

        Raises:
            EngineError: there is no room for them.
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        ...

    async def push(self, server: Server, name: str) -> None:
        """Let a server load the weights of a name.

        Raises:
            EngineError: it was started in another way.
            RequestError: it does not answer, or fails.
        """
        ...

    def prune(self, names: Collection[str]) -> None:
        """Learning goes on: let go of all weights but those of these names."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


@dataclass(eq=False)
class Trajectory:
    """What a slot holds."""

    tokens: list[int] = field(default_factory=list)
    preferred_server: Server | None = (
        None  # the server that sampled its last turn has its prefix in cache
    )


@dataclass(frozen=True)
class Turn:
    """What is to be sampled."""

    slot: int
    held: Trajectory
    params: SamplingParams
    limit: int  # tokens


@dataclass(frozen=True)
class Sampled:
    """What a server sampled, as it came."""

    turn: Turn
    tokens: list[int]
    logprobs: list[float]  # [tokens]
    finish_reason: Finish  # as the server says


class _WaitingError(RequestError):
    """A server that answers, and has other weights than the current ones."""


class _LostError(Exception):
    """A server that failed at a turn, or left while it was at it."""


class ServerPool:
    """The servers; everything here runs in the event loop's thread."""

    def __init__(
        self,
        servers: list[Server],
        transfer: WeightTransfer,
        end_ids: frozenset[int],
        context: int,
        *,
        turn_timeout: float,
        patience: float,
        max_in_flight: int,
    ) -> None:
        """Ask nobody anything yet; see ``ServerEngine`` for the arguments."""
        self._servers = servers
        self._transfer = transfer
        self._end_ids = end_ids
        self._context = context
        self._turn_timeout = turn_timeout
        self._patience = patience
        self._places = asyncio.Semaphore(max_in_flight)
        self._current = ""  # the weights' version on the servers
        self._back = asyncio.Event()  # set when a server comes back
        self._interrupting = False
        self._watches: list[asyncio.Task[None]] = []

    @property
    def reading(self) -> set[str]:
        """The versions of the weights that some server may be reading."""
        return {server.reading for server in self._servers if server.reading}

    async def start(self, version: str) -> None:
        """Make the servers fit to be used, each with the transfer's weights of this name.

        Raises:
            ContextError: one has too short a context.
            EngineError: none answers, or one was started in another way.
        """
        self._current = version
        found = await asyncio.gather(*map(self._admit, self._servers), return_exceptions=True)
        for server, problem in zip(self._servers, found, strict=True):
            if isinstance(problem, RequestError):
                server.problem = str(problem)
                _LOG.warning("%s cannot be used now: %s", server.url, problem)
            elif problem:
                raise problem
        if not any(server.alive for server in self._servers):
            raise self._nobody()
        self._watches = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def play(self, turn: Turn) -> Sampled:
        """Sample a turn, on another server where one fails.

        Raises:
            EngineError: no server is left, or too many failed at it.
        """
        attempts = _ATTEMPTS + len(self._servers)  # then the turn itself is to blame
        async with self._places:
            if self._interrupting:
                return Sampled(turn, [], [], "interrupted")
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

    async def update_weights(self, version: str) -> None:
        """Give every living server the transfer's weights of this name; see that one has them.

        Where they can be given only now, those that wait for them get them as well, and where none
        has them it is tried again while there is patience.

        Raises:
            EngineError: none could.
        """
        self._current = version
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience
        while True:
            await asyncio.gather(*map(self._offer_weights, self._servers))
            if self._transfer.persistent or any(server.alive for server in self._servers):
                break
            if clock() > deadline:
                raise self._nobody()
            await asyncio.sleep(_AGAIN)
        await self._living()

    async def interrupt(self) -> None:
        """Let the servers answer at once with what they have; wait for that, but not for long."""
        self._interrupting = True
        try:
            async with asyncio.timeout(_ABORT):
                while busy := [s for s in self._servers if s.requests]:
                    aborts = [s.ask("POST", "abort_requests", {}) for s in busy]
                    await asyncio.gather(*aborts, return_exceptions=True)
                    await asyncio.sleep(0.05)  # a request may have been on its way
        except TimeoutError:
            pass
        finally:
            self._interrupting = False

    async def _choose(self, held: Trajectory) -> Server:
        """The server that has the trajectory in its cache, else the one with the least to do."""
        alive = await self._living()
        least = min(alive, key=lambda server: (server.load, server.taken))
        if held.preferred_server in alive and held.preferred_server.load <= 2 * least.load + _NEAR:
            return held.preferred_server
        held.preferred_server = least
        return least

    async def _living(self) -> list[Server]:
        """The servers that can be used; one is waited for."""
        if not any(server.alive for server in self._servers):
            try:
                async with asyncio.timeout(self._patience):
                    while not any(server.alive for server in self._servers):
                        self._back.clear()
                        await self._back.wait()
            except TimeoutError:
                raise self._nobody() from None
        return [server for server in self._servers if server.alive]

    def _nobody(self) -> EngineError:
        reasons = "; ".join(
            f"{server.url}: {server.problem}{_WAITS if server.waiting else ''}"
            for server in self._servers
        )
        return EngineError(f"no vLLM server can be used ({reasons}). {_START}. {CONTINUE}")

    async def _sample(self, server: Server, turn: Turn) -> Sampled:
        payload = _request(server.model, turn, self._end_ids)
        asking = ask(server.turns, "POST", _GENERATE, payload, timeout=self._turn_timeout)
        request = asyncio.create_task(asking)
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
        return _read(answer, turn, self._end_ids, self._current, interrupted=self._interrupting)

    def _mark_dead(self, server: Server, problem: str) -> None:
        """Use a server no more, until it has been admitted again; its turns go elsewhere."""
        if not server.alive:
            return
        server.alive = False
        server.problem = problem
        for request in server.requests:
            request.cancel()
        left = sum(other.alive for other in self._servers)
        _LOG.warning(
            "%s is left out (%s); %d of %d servers left",
            server.url,
            problem,
            left,
            len(self._servers),
        )

    async def _watch(self, server: Server) -> None:
        """Look after a server for ever: whether it lives, and whether it lives again."""
        pause = 1.0
        while True:
            await asyncio.sleep(_CHECK if server.alive else pause)
            try:
                if server.alive:
                    await server.ask("GET", "health")
                else:
                    await self._readmit(server, learning=True)
                pause = 1.0
            except (RequestError, EngineError, ContextError) as error:
                self._mark_dead(server, str(error))
                server.waiting = isinstance(error, _WaitingError)
                server.problem = server.problem if server.waiting else str(error)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _offer_weights(self, server: Server) -> None:
        """Give a server the current weights, if it lives or waits for them."""
        try:
            if server.alive:
                await self._push(server)
            elif server.waiting:
                await self._readmit(server)
        except (RequestError, EngineError, ContextError) as error:
            self._mark_dead(server, str(error))
            server.problem, server.waiting = str(error), False

    async def _readmit(self, server: Server, *, learning: bool = False) -> None:
        """Admit a server that was lost, and say so; where two would do it, one does."""
        async with server.admission:
            if not server.alive:
                await self._admit(server, learning=learning)
                _LOG.warning("%s is back, with the current weights", server.url)

    async def _admit(self, server: Server, *, learning: bool = False) -> None:
        """Make a server fit to be used.

        Args:
            server: which one.
            learning: the weights may be changing, so that not every transfer can give them.

        Raises:
            ContextError: its context is too short.
            EngineError: it was started in another way.
            RequestError: it does not answer, or fails.
        """
        models = await server.need("GET", "v1/models")
        try:
            server.model = str(models["data"][0]["id"])
            context = int(models["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError):
            raise EngineError(f"{server.url} is no vLLM server. {_START}") from None
        if context < self._context:
            raise ContextError(
                f"{server.url} has a context of {context} tokens, too short for {self._context}; "
                f"start it with --max-model-len {self._context}, or shorten the run's prompt and "
                "response"
            )
        server.version = ""  # it may have been started anew, and have any weights
        while server.version != self._current:
            if learning and not self._transfer.persistent:
                await self._identify_weights(server)
            else:
                await self._push(server)  # before it samples: one that failed at it dies of a turn
            await self._check(server)
        server.alive, server.waiting = True, False
        self._back.set()

    async def _push(self, server: Server) -> None:
        """Let a server have the current weights."""
        version = server.reading = self._current
        try:
            await self._transfer.push(server, version)
            reset = await server.need("POST", "reset_prefix_cache?reset_running_requests=true")
            if not (isinstance(reset, dict) and reset.get("success")):
                raise RequestError("its cache of the old weights could not be emptied")
            await server.need("POST", "update_weight_version", {"new_version": version})
            server.version = version
        finally:
            server.reading = ""

    async def _identify_weights(self, server: Server) -> None:
        """See that a server has the current weights still: it was away, but not started anew."""
        version = self._current
        if await server.weights() != version:
            raise _WaitingError("it has other weights")
        server.version = version

    async def _check(self, server: Server) -> None:
        """Sample two tokens, and see whether their log-probabilities are what a learner needs."""
        found = []
        for temperature in (1.0, 2.0):
            sampling = {"temperature": temperature, "max_tokens": 1, "logprobs": 5, "seed": 0}
            payload = {"token_ids": [min(self._end_ids)], "sampling_params": sampling}
            answer = await server.need("POST", _GENERATE, payload, RELOAD_TIMEOUT)
            try:
                tops = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
                found.append({int(top["token_id"]): float(top["logprob"]) for top in tops})
            except (LookupError, TypeError, ValueError):
                raise EngineError(f"{server.url} is no vLLM server. {_START}") from None
        if not _processed(*found):
            raise EngineError(
                f"{server.url} gives log-probabilities that are not those at the sampling "
                f"temperature. {_START}"
            )


def _processed(one: Mapping[int, float], two: Mapping[int, float]) -> bool:
    """Whether these can be log-probabilities of tokens at temperatures 1 and 2, one a token.

    Distances between them halve then; in raw ones they stay. Of logits all numbers halve.
    """
    both = one.keys() & two.keys()

    def spread(numbers: Mapping[int, float]) -> float:
        return max(numbers[t] for t in both) - min(numbers[t] for t in both) if both else 0.0

    if not spread(one) > 0.01:  # all alike: nothing can be told
        return True
    if not 0.4 < spread(two) / spread(one) < 0.6:
        return False
    top = max(one.values())
    certain = -0.01 < top <= 0
    return certain or (top <= 0 and any(abs(one[t] - 2 * two[t]) > 1e-3 for t in both))


def _request(model: str, turn: Turn, end_ids: Iterable[int]) -> dict[str, Any]:
    params = turn.params
    return {
        "model": model,
        "token_ids": turn.held.tokens,
        "sampling_params": {
            "temperature": params.temperature,
            "max_tokens": turn.limit,
            "seed": turn_seed(params.seed, len(turn.held.tokens)),
            "logprobs": 0,  # of the sampled token only
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be one
            "ignore_eos": True,  # the renderer says which tokens end a turn
            "stop_token_ids": sorted(end_ids),
        },
    }


def _read(
    answer: Any, turn: Turn, end_ids: frozenset[int], tag: str, *, interrupted: bool
) -> Sampled:
    """What a server sampled.

    Raises:
        _LostError: it is no whole turn of the current weights.
    """
    try:
        (choice,) = answer["choices"]
        tokens = [int(token) for token in choice["token_ids"]]
        content = choice["logprobs"]["content"] if tokens else []
        logprobs = [float(each["logprob"]) for each in content]
        same = tokens == [each["token_id"] for each in content]
        versions = {str(span["version"]) for span in choice["weight_versions"] or ()}
        reason, stopped_by = choice["finish_reason"], choice["stop_reason"]
    except (LookupError, TypeError, ValueError) as error:
        raise _LostError(f"its answer is not vLLM's ({type(error).__name__}: {error})") from None
    if not same or versions != ({tag} if tokens else set()):
        had = ", ".join(versions) or "none"
        raise _LostError(f"it sampled with weights {had}, not {tag}: was it started anew?")
    if reason == "abort" and interrupted:
        return Sampled(turn, tokens, logprobs, "interrupted")
    if reason == "stop" and (isinstance(stopped_by, str) or stopped_by in end_ids) and tokens:
        return Sampled(turn, tokens, logprobs, "stop")
    if reason == "length" and len(tokens) == turn.limit:
        return Sampled(turn, tokens, logprobs, "length")
    raise _LostError(
        f"it ended a turn after {len(tokens)} of {turn.limit} tokens "
        f"({reason}, {stopped_by}), for no reason of ours"
    )
