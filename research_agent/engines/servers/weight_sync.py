"""New weights for all servers: all ranks take part, and agree on what came of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from research_agent.distributed import (
    Repeatable,
    broadcast_object,
    full_tensor,
    raise_together,
    run_together,
    together,
)
from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import LoopThread, read_key
from research_agent.engines.servers.client import Client, RequestError
from research_agent.engines.servers.pool import ServedWeights, no_server
from research_agent.engines.servers.server import (
    PATIENCE,
    START,
    Needs,
    Server,
    WeightTag,
    weight_name,
)
from research_agent.engines.servers.weight_transfer import Transfer, prepare_transfer
from research_agent.errors import EngineError, ResearchAgentError
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = 1.0  # seconds between attempts while no server takes the weights


def model_weights(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return a model's weights, whole; its parameters may be sharded, and all ranks ask then."""
    return Repeatable(
        lambda: ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
    )


class _Report(NamedTuple):
    """What a rank tells the others of a server of its own; see ``Server``."""

    url: str
    software: str
    current: str
    problem: str


class WeightSync:
    """Gives weights to servers. Every rank has one and makes the same calls at the same time.

    Args:
        model: the policy.
        urls: the servers that this rank gives weights to; each server belongs to one rank.
        needs: what the run needs of its servers.
        require_alive: raises an ``EngineError`` if a server that this rank started has ended.

    Raises:
        ConfigError: an address that cannot be used, or a model whose weights cannot go this way.
    """

    def __init__(
        self,
        model: Any,
        urls: Sequence[str],
        needs: Needs,
        require_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._names = WeightNames(model)
        self._needs = needs
        self._require_alive = require_alive
        self._transfer = self._folder = None
        with together():
            dtype = getattr(torch, needs.dtype)
            if needs.carrier == "folder":
                self._folder = WeightFolder(self._names, dtype)
            else:
                self._transfer = Transfer(model, self._names, needs.carrier, dtype)
            self._servers = [Server(url, Client(url, read_key("VLLM_API_KEY"))) for url in urls]
        self._loop = LoopThread("weights", [server.client.aclose for server in self._servers])
        self._run = broadcast_object(secrets.token_hex(4))
        self._calls = 0
        self._started = False  # whether weights have been given

    def give(self, weights: Iterable[tuple[str, Tensor]], version: int) -> ServedWeights:
        """Give weights to all servers that can take them.

        Turns under way are paused meanwhile and then continue with the new weights.

        Args:
            weights: all of the model's. All ranks go through them together, once per attempt.
                After a transfer from memory that failed, an iterator cannot be sent again.
            version: their number.

        Raises:
            ContextError: a server has too short a context, at the first call.
            EngineError: no server took them, they cannot be written, or a server was started in
                another way, at the first call.
            ModelError: a name or shape that the model does not have, or a weight left out.
            StoppedError: this is not rank 0, which has the error.
        """
        self._calls += 1
        tag = WeightTag(self._run, version, self._calls)
        if not self._folder:
            return self._give(weights, tag)
        try:
            with together():
                folder = self._write(weights, str(tag))
            return self._give(weights, tag, folder)
        finally:
            self._folder.prune(())

    def close(self) -> None:
        """Delete the weights, and leave the servers, which keep running."""
        self._loop.close()
        if self._folder:
            self._folder.close()

    def _give(
        self, weights: Iterable[tuple[str, Tensor]], tag: WeightTag, folder: Path | None = None
    ) -> ServedWeights:
        """Attempt it until any server has the weights; every rank decides by the same reports.

        A server that fails has a problem, and is asked again when all others have failed, too.
        """
        deadline = time.monotonic() + PATIENCE
        self._forget_problems()
        while True:
            reports = self._on_all_ranks(self._inspect)
            _require_same_software(reports)
            if any(not report.problem for report in reports):
                reports = self._on_all_ranks(lambda: self._send(weights, str(tag), folder))
                if any(report.current == str(tag) for report in reports):
                    self._started = True
                    return ServedWeights(tag, _problems(reports))
                if self._transfer and iter(weights) is weights:
                    raise_together(no_server(_problems(reports)))
            elif broadcast_object(time.monotonic() > deadline):
                raise_together(no_server(_problems(reports)))
            else:
                self._forget_problems()
                time.sleep(_AGAIN)

    def _forget_problems(self) -> None:
        for server in self._servers:
            server.problem = ""

    def _on_all_ranks(self, work: Callable[[], None]) -> list[_Report]:
        """Do something with the servers of each rank; return what came of it at all servers."""

        def report() -> list[_Report]:
            work()
            return [
                _Report(each.url, each.software, each.current, each.problem)
                for each in self._servers
            ]

        return [each for reports in run_together(report) for each in reports]

    def _write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Path | None:
        """Write the weights if this rank has servers; yielding them is work of all ranks."""
        if self._folder and self._servers:
            return self._folder.write(weights, name)
        for _ in self._names.checked(weights):
            pass
        return None

    def _inspect(self) -> None:
        """See which servers of this rank are as the run needs them."""
        self._require_alive()
        self._loop.call(self._each(self._require_fit))

    def _send(self, weights: Iterable[tuple[str, Tensor]], name: str, folder: Path | None) -> None:
        """Pause the servers of this rank that are ready, send the weights, and resume them."""
        self._loop.call(self._each(self._pause))
        if self._transfer:
            ready = [server for server in self._servers if not server.problem]
            if not self._transfer.send(weights, ready, self._loop.loop):
                return
        self._loop.call(self._each(partial(self._resume, name=name, folder=folder)))

    async def _each(self, work: Callable[[Server], Awaitable[None]]) -> None:
        """Do something with all servers that have no problem, at the same time.

        Raises:
            ContextError, EngineError: before the first weights: one was started in another way.
        """
        servers = [server for server in self._servers if not server.problem]
        errors = await asyncio.gather(*map(work, servers), return_exceptions=True)
        harmless = (RequestError, ResearchAgentError) if self._started else RequestError
        for server, error in zip(servers, errors, strict=True):
            refused = isinstance(error, RequestError) and not error.retryable
            if refused and not self._started:
                raise EngineError(f"{server.url}: {error}. {START}")
            if error and not isinstance(error, harmless):
                raise error
            server.problem = str(error or "")

    async def _require_fit(self, server: Server) -> None:
        """Check that a server has the weights that it was given last, or how it was started."""
        if not server.current or await weight_name(server.client) != server.current:
            server.current = ""
            await server.inspect(self._needs)

    async def _pause(self, server: Server) -> None:
        await server.client.ask("POST", "pause?mode=keep")
        if self._transfer:
            await prepare_transfer(server)

    async def _resume(self, server: Server, name: str, folder: Path | None) -> None:
        """Let a server sample with the weights of a name, which it reads if they are files."""
        if folder:
            await server.reload(folder)
        # Keys and values of turns under way are computed again, with the new weights.
        reset = await server.client.ask("POST", "reset_prefix_cache?reset_running_requests=true")
        if not (isinstance(reset, dict) and reset.get("success")):
            raise RequestError("its cache of the old weights could not be emptied")
        await server.client.ask("POST", "update_weight_version", {"new_version": name})
        await server.client.ask("POST", "resume")
        if not server.current:
            await server.probe(name, self._needs.token)
        server.current = name


def _problems(reports: Sequence[_Report]) -> dict[str, str]:
    return {report.url: report.problem for report in reports if report.problem}


def _require_same_software(reports: Sequence[_Report]) -> None:
    """Compare the versions of all servers; the reports are the same on all ranks.

    Raises:
        EngineError: they differ, on rank 0; on others ``StoppedError``.
    """
    software = {report.url: report.software for report in reports if not report.problem}
    if len(set(software.values())) > 1:
        named = ", ".join(f"{url}: vLLM {version}" for url, version in software.items())
        raise_together(
            EngineError(f"the servers differ in version ({named}); start all with the same vLLM")
        )
