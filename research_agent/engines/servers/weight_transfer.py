"""Weights from the learner's GPUs to vLLM servers, by vLLM's own transfer: NCCL, or CUDA IPC.

What vLLM 0.32 has for trainers (``vllm.distributed.weight_transfer``) does the work. All ranks
iterate over the weights, which gathers them bucket by bucket, and a rank that servers belong to
sends. By NCCL that is rank 0, in one group with all servers; the group is formed anew each time, so
that servers can join and leave between steps. By IPC it is a rank of each node, which hands on
where all ranks of the node have put a bucket, and every server reads from its own GPU.

vLLM's part blocks, and may hang where a server is gone: it runs in a thread. While NCCL sends a
bucket, no rank gathers the next one: work of two groups at a time on one GPU can deadlock.
"""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import repeat
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch

from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import LoopThread
from research_agent.engines.servers.client import RequestError
from research_agent.engines.servers.server import BACKEND, RELOAD_TIMEOUT, Server
from research_agent.errors import ConfigError, ModelError
from research_agent.system.redaction import one_line
from research_agent.system.threads import in_thread

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["nccl", "ipc"]

PARTIAL = "research-agent: partial"
"""The name that a server's weights have while others are on their way to it."""
BUCKET = 1 << 30
"""Bytes that are sent at a time."""
_GRACE = 30.0  # seconds for vLLM's thread to notice that a transfer was broken off


async def prepare_transfer(server: Server) -> None:
    """Make a server ready to receive weights from memory.

    Raises:
        RequestError: it does not answer, or fails.
    """
    if await server.client.weight_name() == PARTIAL:
        # What had come would be counted as part of the next weights: let vLLM put it away.
        with suppress(RequestError):
            await server.client.ask("POST", "start_weight_update")
        await server.client.ask("POST", "finish_weight_update", timeout=RELOAD_TIMEOUT)
    await server.client.ask("POST", "shutdown_weight_transfer_engine")  # the group before
    await server.client.ask("POST", "update_weight_version", {"new_version": PARTIAL})


class _Links:
    """All servers of this rank as vLLM's trainer sees them: a ``VLLMWeightSyncClient``.

    A request that fails does not raise: the ranks iterate over the weights together, to the end.
    Instead ``problem`` of the server says why, it is left out from then on, and the trainer is shut
    down: NCCL would wait for the server. By IPC that does nothing, and the others go on.
    """

    def __init__(self, servers: Sequence[Server], loop: LoopThread) -> None:
        self.failed: Future[None] = Future()  # done as soon as a request has failed
        self.trainer: Any = None
        self._servers = servers
        self._loop = loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, rank = [], init_info.get("rank_offset", 0)
        for server in self._servers:
            infos.append(init_info | ({"rank_offset": rank} if "rank_offset" in init_info else {}))
            rank += server.size
        self._post("init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        if handles := update_info.pop("ipc_handles", None):  # they are no JSON
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._post("update_weights", [{"update_info": update_info}] * len(self._servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update")

    def _post(self, path: str, payloads: Sequence[dict[str, Any]] | None = None) -> None:
        async def post(server: Server, payload: dict[str, Any] | None) -> None:
            if server.problem:
                return
            try:
                await server.client.ask("POST", path, payload, timeout=RELOAD_TIMEOUT)
            except RequestError as error:
                server.problem = str(error)
                if not self.failed.done():
                    self.failed.set_result(None)
                if self.trainer:
                    in_thread(self.trainer.shutdown, "weights")

        async def post_all() -> None:
            await asyncio.gather(*map(post, self._servers, payloads or repeat(None)))

        self._loop.call(post_all())


def transfer(
    source: WeightSource,
    servers: Sequence[Server],
    loop: LoopThread,
    backend: Backend,
    device: torch.device,
) -> bool:
    """Send weights to this rank's servers, from all ranks at once.

    Args:
        source: the weights; they are consumed to their end on all ranks.
        servers: ready ones; none on ranks that do not send.
        loop: the event loop of the servers' clients.
        backend: "nccl" for servers on other GPUs, "ipc" for servers on the learner's own.
        device: the learner's GPU.

    Returns:
        Whether the servers that have no ``problem`` now have the weights. By NCCL one server that
        fails is the end of it for all.

    Raises:
        Exception: what failed here by IPC, on a rank without servers.
        ModelError: a name or shape that the model does not have, or a weight left out.
    """
    links = _Links(servers, loop)

    def send() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread has none
        try:
            links.trainer = _trainer(backend, links, source, servers)
            if backend == "ipc" or not links.failed.done():
                links.trainer.send_weights()
        finally:
            source.finish()
            if links.trainer:
                links.trainer.shutdown()

    work = in_thread(send, "weights")
    wait((work, links.failed) if backend == "nccl" else (work,), RELOAD_TIMEOUT, FIRST_COMPLETED)
    wait((work,), _GRACE)
    source.finish()
    error: BaseException | None = TimeoutError(f"no end of it within {RELOAD_TIMEOUT:g} s")
    if work.done():
        error = work.exception()
    alone = backend == "ipc" and not servers  # nobody else would say what failed here
    if error and (alone or isinstance(error, ModelError)):
        raise error
    if error and not any(server.problem for server in servers):
        for server in servers:
            server.problem = f"{type(error).__name__}: {one_line(str(error))}"
    failed = [server for server in servers if server.problem]
    for server in failed:
        server.problem = (
            f"no new weights by {backend}: {server.problem}. Was it started with "
            f"{BACKEND[backend]}, and can it reach any port here?"
        )
    return backend == "ipc" or not failed


class WeightSource:
    """Weights as vLLM's class of that name gives them, which can be gone through once.

    Two threads may go through them, each from where the other has come to.

    Args:
        names: names and shapes that the weights must have.
        weights: all of the model's.
        dtype: number format that is sent.
        device: the learner's, which sends; weights elsewhere are copied there.
    """

    def __init__(
        self,
        names: WeightNames,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shapes = names.shapes
        self._left = self._sendable(names.checked(weights))
        self._dtype, self._device = dtype, device
        self._lock = Lock()

    def metadata(self) -> list[Any]:
        """Name, number format and shape of each weight, in order."""
        from vllm.distributed.weight_transfer import ParamMeta  # noqa: PLC0415 - slow to import

        return [ParamMeta(name, self._dtype, shape) for name, shape in self._shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while found := self._next():
            yield found

    def finish(self) -> None:
        """Go through what is left, as the other ranks do."""
        while self._next():
            pass

    def _next(self) -> tuple[str, Tensor] | None:
        with self._lock:
            return next(self._left, None)

    def _sendable(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if weight.is_cuda:  # what is sent in other streams must have been computed
                torch.cuda.synchronize(weight.device)
            yield name, weight.detach().to(self._device, self._dtype)


def require_gpu(device: torch.device, backend: Backend) -> None:
    """Check that weights can be sent from a device.

    Raises:
        ConfigError: it is on no GPU, or vLLM is not installed.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"server+{backend} sends weights from a GPU's memory, and the model is on "
            f"{device}; name the engine server:URL,URL, which sends them through a folder"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its news break a progress bar
    try:
        import vllm.distributed.weight_transfer  # noqa: F401, PLC0415 - slow to import
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported ({error}), and server+{backend} needs it here as well; "
            "pip install 'research-env[vllm]', or name the engine server:URL,URL"
        ) from error


def _trainer(backend: Backend, links: _Links, source: Any, servers: Sequence[Server]) -> Any:
    """Make vLLM's end of a transfer, which meets with the servers of this rank if it has any."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory  # noqa: PLC0415
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo  # noqa: PLC0415
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo  # noqa: PLC0415

    settings: dict[str, Any] = {"rank": 0 if servers else 1, "packed": True}
    sizes = [torch.Size(each.shape).numel() * each.dtype.itemsize for each in source.metadata()]
    settings["packed_buffer_size_bytes"] = max(BUCKET, *sizes)
    if backend == "ipc":
        info: Any = IPCTrainerInitInfo(**settings)
    else:
        address, port = _meeting_place([server.url for server in servers])
        size = 1 + sum(server.size for server in servers)
        info = NCCLTrainerInitInfo(address, port, size, packed_num_buffers=1, **settings)
    trainer: Any = WeightTransferTrainerFactory.trainer_init(info, client=links, source=source)
    if backend == "nccl" and servers and trainer.model_update_group.disabled:
        raise RuntimeError("vLLM finds no NCCL here, or VLLM_DISABLE_PYNCCL is set")  # or is silent
    return trainer


def _meeting_place(urls: Sequence[str]) -> tuple[str, int]:
    """The address of this machine that all servers can reach, and a free port of it.

    Servers beside us are named by the loopback address, which servers elsewhere cannot use.
    """
    addresses = []
    for url in urls:
        there = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((there.hostname, there.port or 80))  # sends nothing
            addresses.append(str(way.getsockname()[0]))
    address = min(addresses, key=lambda each: each.startswith("127."), default="127.0.0.1")
    with socket.socket() as free:
        free.bind((address, 0))
        return address, int(free.getsockname()[1])
