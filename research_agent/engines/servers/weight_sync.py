"""New weights for all servers: all ranks take part, and agree on what came of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from research_agent.distributed import (
    Repeatable,
    broadcast_object,
    full_tensor,
    raise_together,
    rank_and_size,
    run_together,
    together,
)
from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import LoopThread, read_key
from research_agent.engines.servers.client import Client, RequestError
from research_agent.engines.servers.pool import ServedWeights, no_server
from research_agent.engines.servers.server import PATIENCE, Needs, Server, WeightTag
from research_agent.engines.servers.weight_transfer import Transfer, prepare_transfer
from research_agent.errors import EngineError, ResearchAgentError
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.engines import Carrier

_AGAIN = 1.0  # seconds between attempts while no server takes the weights


def model_weights(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return a model's weights, whole; its parameters may be sharded, and all ranks ask then."""
    return Repeatable(
        lambda: ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
    )


@dataclass(frozen=True)
class _Report:
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
        carrier: how the weights get there.
        dtype: number format of the weights on the servers.
        context: tokens that a trajectory may have.
        token: one that a server can sample from, to try it.
        require_alive: raises an ``EngineError`` if a server that this rank started has ended.

    Raises:
        ConfigError: an address that cannot be used, or a model whose weights cannot go this way.
    """

    def __init__(
        self,
        model: Any,
        urls: Sequence[str],
        *,
        carrier: Carrier,
        dtype: torch.dtype,
        context: int,
        token: int,
        require_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._names = WeightNames(model)
        self._transfer = self._folder = None
        with together():
            if carrier != "folder":
                self._transfer = Transfer(model, self._names, carrier, dtype)
            elif rank_and_size()[0] == 0:
                self._folder = WeightFolder(self._names, dtype)
            self._servers = [Server(url, Client(url, read_key("VLLM_API_KEY"))) for url in urls]
        self._root = broadcast_object(self._folder.root if self._folder else None)
        self._needs = Needs(context, str(dtype).removeprefix("torch."), _sizes(model), carrier)
        self._token = token
        self._loop = LoopThread("weights", [server.client.aclose for server in self._servers])
        self._require_alive = require_alive
        self._run = broadcast_object(secrets.token_hex(4))
        self._calls = 0
        self._started = False  # whether weights have been given
        self._ready: list[Server] = []  # as the run needs them

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
        try:
            if not self._transfer:
                run_together(lambda: self._write(weights, str(tag)))
            return self._give(weights, tag)
        finally:
            if self._folder:
                self._folder.prune(())

    def close(self) -> None:
        """Delete the weights, and leave the servers, which keep running."""
        self._loop.close()
        if self._folder:
            self._folder.close()

    def _give(self, weights: Iterable[tuple[str, Tensor]], tag: WeightTag) -> ServedWeights:
        """Attempt it until any server has the weights; every rank decides by the same reports."""
        deadline = time.monotonic() + PATIENCE
        problems: dict[str, str] = {}
        skipped: set[str] = set()  # servers that failed a moment ago
        while True:
            reports = _on_all_ranks(lambda: self._inspect(skipped))
            problems |= {report.url: report.problem for report in reports if report.problem}
            _require_same_software(reports)
            if any(not report.problem for report in reports):
                reports = _on_all_ranks(lambda: self._send(weights, str(tag)))
                failed = {report.url: report.problem for report in reports if report.problem}
                problems |= failed
                if given := {report.url for report in reports if report.current}:
                    self._started = True
                    left_out = {url: why for url, why in problems.items() if url not in given}
                    return ServedWeights(tag, frozenset(given), left_out)
                if self._transfer and iter(weights) is weights:
                    raise_together(no_server(problems))
                skipped.update(failed)
            elif broadcast_object(time.monotonic() > deadline):
                raise_together(no_server(problems))
            else:
                skipped.clear()
                time.sleep(_AGAIN)

    def _inspect(self, skipped: set[str]) -> list[_Report]:
        """See which servers of this rank are as the run needs them, but for those skipped."""
        self._require_alive()
        asked = [server for server in self._servers if server.url not in skipped]
        self._ready = self._loop.call(self._each(self._require_fit, asked))
        return _reports(asked)

    def _write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        if self._folder:
            self._folder.write(weights, name)
            return
        for _ in self._names.checked(weights):  # to yield them is work of all ranks
            pass

    def _send(self, weights: Iterable[tuple[str, Tensor]], name: str) -> list[_Report]:
        """Pause the servers of this rank that are ready, send the weights, and resume them."""
        got = self._loop.call(self._each(self._pause, self._ready))
        if self._transfer:
            got = self._transfer.send(weights, got, self._loop.loop)
        for server in set(self._ready) - set(got):
            server.current = ""
        self._loop.call(self._each(partial(self._resume, name=name), got))
        return _reports(self._ready)

    async def _each(
        self, work: Callable[[Server], Awaitable[None]], servers: Sequence[Server]
    ) -> list[Server]:
        """Do something with all servers at the same time.

        Returns:
            Those with which it went well; ``problem`` of the others says what did not.

        Raises:
            ContextError, EngineError: before the first weights: one was started in another way.
        """
        errors = await asyncio.gather(*map(work, servers), return_exceptions=True)
        harmless = (RequestError, ResearchAgentError) if self._started else RequestError
        for server, error in zip(servers, errors, strict=True):
            if error and not isinstance(error, harmless):
                raise error
            server.problem = str(error or "")
            if error:
                server.current = ""
        return [server for server in servers if not server.problem]

    async def _require_fit(self, server: Server) -> None:
        """Check that a server has the weights that it was given last, or how it was started."""
        if not server.current or await server.weights() != server.current:
            server.current = ""
            await server.inspect(self._needs)

    async def _pause(self, server: Server) -> None:
        await server.ask("POST", "pause?mode=keep")
        if self._transfer:
            await prepare_transfer(server)

    async def _resume(self, server: Server, name: str) -> None:
        """Let a server sample with the weights of a name, which it reads if they are files."""
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
        server.current = name


def _on_all_ranks(work: Callable[[], list[_Report]]) -> list[_Report]:
    return [report for reports in run_together(work) for report in reports]


def _reports(servers: Sequence[Server]) -> list[_Report]:
    return [_Report(each.url, each.software, each.current, each.problem) for each in servers]


def _sizes(model: Any) -> dict[str, int]:
    """Sizes of a model that its servers must have as well."""
    config = model.config.get_text_config()
    names = {"layers": "num_hidden_layers", "tokens": "vocab_size", "width": "hidden_size"}
    found = {size: getattr(config, name, None) for size, name in names.items()}
    return {size: number for size, number in found.items() if isinstance(number, int)}


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
