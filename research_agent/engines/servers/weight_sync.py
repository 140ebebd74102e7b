"""New weights for all servers: all ranks take part, and agree on what came of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from research_agent.distributed import (
    Repeatable,
    broadcast_object,
    full_tensor,
    gather,
    raise_together,
    rank_and_size,
    together,
)
from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import LoopThread, read_key
from research_agent.engines.servers.client import Client, RequestError
from research_agent.engines.servers.pool import ServedWeights, no_server
from research_agent.engines.servers.serve import ServerProcess
from research_agent.engines.servers.server import SERVER_TIMEOUT, START, Needs, Server, WeightTag
from research_agent.engines.servers.weight_transfer import (
    WeightSource,
    prepare_transfer,
    require_gpu,
    transfer,
)
from research_agent.errors import EngineError, ResearchAgentError
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

_RETRY_PAUSE = 1.0  # seconds between attempts while no server takes the weights


def model_weights(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return a model's weights, whole; its parameters may be sharded, and all ranks ask then."""
    return Repeatable(
        lambda: ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
    )


class WeightSync:
    """Gives weights to servers. Every rank has one and makes the same calls at the same time.

    Args:
        model: the policy.
        urls: the servers that this rank gives weights to; each server belongs to one rank.
        needs: what the run needs of its servers.
        device: where the learner's weights are or will be.
        process: the server that this rank has started, which ends with the object.

    Raises:
        ConfigError: an address that cannot be used, or a model whose weights cannot go this way.
    """

    def __init__(
        self,
        model: Any,
        urls: Sequence[str],
        needs: Needs,
        device: torch.device,
        process: ServerProcess | None = None,
    ) -> None:
        self._names = WeightNames(model)
        self._needs = needs
        self._process = process
        self._device = torch.empty(0, device=device).device  # with its number, if it is a GPU
        self._dtype = getattr(torch, needs.dtype)
        self._folder: WeightFolder | None = None
        with together():
            if needs.transfer == "folder":
                self._folder = WeightFolder(self._names, self._dtype)
            else:
                require_gpu(self._device, needs.transfer)
            self._servers = [Server(url, Client(url, read_key("VLLM_API_KEY"))) for url in urls]
        self._loop = LoopThread("weights", [server.client.aclose for server in self._servers])
        self._run = broadcast_object(secrets.token_hex(4))
        self._calls = 0
        self._software: str | None = None  # vLLM's version, once servers have weights

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> ServedWeights:
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
        folder = self._write(weights, str(tag))
        served = self._give(weights, tag, folder)
        if self._folder:
            self._folder.clear()
        return served

    def require_alive(self) -> None:
        """Raise an ``EngineError`` with its log if the server that this rank started has ended."""
        if self._process:
            self._process.require_alive()

    def close(self) -> None:
        """Delete the weights, and leave the servers; one that this rank started ends."""
        self._loop.close()
        for part in (self._folder, self._process):
            if part:
                part.close()

    def _give(
        self, weights: Iterable[tuple[str, Tensor]], tag: WeightTag, folder: Path | None
    ) -> ServedWeights:
        """Attempt it until any server has the weights; every rank decides by the same facts.

        A server that fails has a problem, and is asked again when all others have failed, too.
        """
        deadline = time.monotonic() + SERVER_TIMEOUT
        while True:
            for server in self._servers:
                server.problem = ""
            servers = self._on_all_ranks(self._inspect)
            while not all(server.problem for server in servers):
                _require_same_software(servers)
                if self._needs.transfer == "ipc":
                    _require_paired(servers)
                servers = self._on_all_ranks(lambda: self._send(weights, str(tag), folder))
                if any(server.current == str(tag) for server in servers):
                    self._software = next(s.software for s in servers if not s.problem)
                    return ServedWeights(tag, _problems(servers))
                if not self._folder and iter(weights) is weights:
                    raise_together(no_server(_problems(servers)))
                servers = self._on_all_ranks(self._inspect)
            if broadcast_object(time.monotonic() > deadline):
                raise_together(no_server(_problems(servers)))
            time.sleep(_RETRY_PAUSE)

    def _on_all_ranks(self, work: Callable[[], None]) -> list[Server]:
        """Do something with the servers of each rank; return all servers as they are then."""
        with together():
            work()
        return gather(self._servers)

    def _write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Path | None:
        """Write the weights if this rank has servers; yielding them is work of all ranks."""
        if not self._folder:
            return None
        with together():
            if self._servers:
                return self._folder.write(weights, name)
            for _ in self._names.checked(weights):
                pass
        return None

    def _inspect(self) -> None:
        """See which servers of this rank are as the run needs them."""
        self.require_alive()
        self._loop.call(self._each(self._require_fit))

    def _send(self, weights: Iterable[tuple[str, Tensor]], name: str, folder: Path | None) -> None:
        """Pause the servers of this rank that are ready, send the weights, and resume them."""
        self._loop.call(self._each(self._pause))
        if self._needs.transfer != "folder":
            source = WeightSource(self._names, weights, self._dtype, self._device)
            ready = [server for server in self._servers if not server.problem]
            if not transfer(source, ready, self._loop, self._needs.transfer, self._device):
                return
        self._loop.call(self._each(partial(self._resume, name=name, folder=folder)))

    async def _each(self, work: Callable[[Server], Awaitable[None]]) -> None:
        """Do something with all servers that have no problem, at the same time.

        Raises:
            ContextError, EngineError: before the first weights: one was started in another way.
        """
        servers = [server for server in self._servers if not server.problem]
        errors = await asyncio.gather(*map(work, servers), return_exceptions=True)
        started = self._software is not None
        harmless = (RequestError, ResearchAgentError) if started else RequestError
        for server, error in zip(servers, errors, strict=True):
            refused = isinstance(error, RequestError) and not error.retryable
            if refused and not started:
                raise EngineError(f"{server.url}: {error}. {START}")
            if error and not isinstance(error, harmless):
                raise error
            server.problem = str(error or "")

    async def _require_fit(self, server: Server) -> None:
        """Check that a server has the weights that it was given last, or how it was started."""
        if not server.current or await server.client.weight_name() != server.current:
            server.current = ""
            await server.inspect(self._needs)
        if self._software not in (None, server.software):
            raise RequestError(f"it has vLLM {server.software}, and the others {self._software}")

    async def _pause(self, server: Server) -> None:
        await server.client.ask("POST", "pause?mode=keep")
        if not self._folder:
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


def _problems(servers: Sequence[Server]) -> dict[str, str]:
    return {server.url: server.problem for server in servers if server.problem}


def _require_paired(servers: Sequence[Server]) -> None:
    """Compare the number of the servers' GPUs with that of the ranks, if no server is missing.

    By IPC each GPU reads what the rank on it holds, which is not freed until it has been read.

    Raises:
        EngineError: they differ, on rank 0; on others ``StoppedError``.
    """
    gpus, ranks = sum(server.size for server in servers), rank_and_size()[1]
    if gpus != ranks and not any(server.problem for server in servers):
        raise_together(
            EngineError(
                f"the servers have {gpus} GPUs, and {ranks} ranks learn; by IPC each GPU reads from"
                " the rank on it. Start servers on the ranks' GPUs, all of them, or name them"
                " server: or server+nccl:"
            )
        )


def _require_same_software(servers: Sequence[Server]) -> None:
    """Compare the versions of all servers of all ranks.

    Raises:
        EngineError: they differ, on rank 0; on others ``StoppedError``.
    """
    software = {server.url: server.software for server in servers if not server.problem}
    if len(set(software.values())) > 1:
        named = ", ".join(f"{url}: vLLM {version}" for url, version in software.items())
        raise_together(
            EngineError(f"the servers differ in version ({named}); start all with the same vLLM")
        )
