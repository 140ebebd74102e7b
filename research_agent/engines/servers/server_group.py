"""The servers that one rank gives weights to: what is done to them before and after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from research_agent.engines.remote import RequestError
from research_agent.engines.servers.server import Needs, Server
from research_agent.engines.servers.weight_transfer import prepare_transfer
from research_agent.errors import ContextError, EngineError

_LOG = logging.getLogger(__name__)

_CHECK = 5.0  # seconds between looks for servers that came back

_PROBLEMS = (RequestError, EngineError, ContextError)


@dataclass(frozen=True)
class Outcome:
    """What came of a piece of work on one rank's servers, by their addresses.

    Attributes:
        models: the name that each server gives the policy, where it went well.
        problems: what went wrong on the others.
        software: versions of vLLM.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)


class ServerGroup:
    """Servers of one rank; everything here runs in the event loop of their clients.

    Args:
        servers: each belongs to one rank only.
        needs: what the run needs of them.
        root: the folder that has a folder for each version of the weights; None if they are sent
            from memory.
        token: one that a server can sample from, to try it.
    """

    def __init__(
        self, servers: Sequence[Server], needs: Needs, root: Path | None, token: int
    ) -> None:
        self.ready: list[Server] = []
        """Paused, and waiting for weights."""
        self.excluded: set[str] = set()
        """Addresses of servers that are not asked for now."""
        self._servers = servers
        self._needs = needs
        self._root = root
        self._token = token
        self._strict = True  # until weights have been given once
        self._keeper: asyncio.Task[None] | None = None

    async def prepare(self) -> Outcome:
        """Pause the servers that are as the run needs them; they are ``ready`` then.

        Raises:
            ContextError: before the first weights: a server has too short a context.
            EngineError: before the first weights: one was started in another way.
        """
        await self._stop_keeper()
        asked = [server for server in self._servers if server.url not in self.excluded]
        found = await asyncio.gather(*map(self._prepare, asked), return_exceptions=True)
        self.ready = [server for server, problem in zip(asked, found, strict=True) if not problem]
        problems: dict[str, str] = {}
        for server, problem in zip(asked, found, strict=True):
            if problem is None:
                continue
            if self._is_fatal(problem):
                raise problem
            problems[server.url] = str(problem)
            if self._strict and server.problem != str(problem):
                _LOG.warning("%s cannot be used now: %s", server.url, problem)
            server.problem = str(problem)
        software = {server.url: server.software for server in self.ready}
        return Outcome({server.url: server.model for server in self.ready}, problems, software)

    async def cancel(self) -> None:
        """Let the servers that are ready go on without new weights."""
        going_on = (server.ask("POST", "resume") for server in self.ready)
        await asyncio.gather(*going_on, return_exceptions=True)

    async def resume(self, name: str, problems: Mapping[str, str]) -> Outcome:
        """Resume the servers, with the weights of this name.

        Args:
            name: of the weights.
            problems: of servers that are ready and did not get them.
        """
        got = [server for server in self.ready if server.url not in problems]
        resumed = (self._resume(server, name) for server in got)
        found = await asyncio.gather(*resumed, return_exceptions=True)
        problems = dict(problems)
        for server, problem in zip(got, found, strict=True):
            if problem is None:
                continue
            if self._is_fatal(problem):
                raise problem
            problems[server.url] = str(problem)
        self._strict = False
        for server in self.ready:
            server.current = "" if server.url in problems else name
        models = {server.url: server.model for server in self.ready if server.current}
        return Outcome(models, problems)

    async def keep(self, name: str) -> None:
        """From now on give these weights to servers that come back.

        Only from a folder, which can be read at any time; the learner's memory changes.
        """
        await self._stop_keeper()
        if self._root and self._servers and name:
            self._keeper = asyncio.create_task(self._keep(name))

    def _is_fatal(self, problem: BaseException) -> bool:
        """Whether it ends the run: at its beginning servers must be as it needs them."""
        if self._strict:
            return not isinstance(problem, RequestError)
        return not isinstance(problem, _PROBLEMS)

    async def _stop_keeper(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _keep(self, name: str) -> None:
        while True:
            await asyncio.sleep(_CHECK)
            await asyncio.gather(*(self._readmit(server, name) for server in self._servers))

    async def _readmit(self, server: Server, name: str) -> None:
        try:
            if server.current == await server.weights() == name:
                return
            await self._prepare(server)
            await self._resume(server, name)
            server.current = name
        except _PROBLEMS as error:
            server.current = ""
            _LOG.info("%s has not the current weights: %s", server.url, error)

    async def _prepare(self, server: Server) -> None:
        """Pause a server, if it is as the run needs it; raises ``_PROBLEMS``."""
        if not server.current or await server.weights() != server.current:
            server.current = ""
            await server.inspect(self._needs)
        await server.ask("POST", "pause?mode=keep")
        if not self._root:
            await prepare_transfer(server)

    async def _resume(self, server: Server, name: str) -> None:
        """Let a server sample with the weights of a name; raises ``_PROBLEMS``."""
        if self._root:
            await server.reload(self._root / name)
        # Keys and values of turns under way are computed again, with the new weights.
        reset = await server.ask("POST", "reset_prefix_cache?reset_running_requests=true")
        if not (isinstance(reset, dict) and reset.get("success")):
            raise RequestError("its cache of the old weights could not be emptied")
        await server.ask("POST", "update_weight_version", {"new_version": name})
        await server.ask("POST", "resume")
        if not server.current:
            await server.probe(name, self._token)
