"""Weights from a GPU's memory to vLLM servers, by vLLM's own transfer: NCCL, or CUDA IPC.

What vLLM 0.32 has for trainers (``vllm.distributed.weight_transfer``) does the work, one server
after the other: its buffers take 2 GiB of the learner's GPU at a time (and with LoRA the weights as
they are sent are another copy of every matrix that is adapted). Each server has an NCCL
group of its own, so that one that dies takes none along. vLLM's part blocks, and may hang where a
server is gone: it runs in a thread that can be left to itself.
"""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch

from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import RequestError
from research_agent.engines.servers.pool import RELOAD_TIMEOUT
from research_agent.errors import ConfigError, EngineError
from research_agent.redaction import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.engines.servers.pool import Server

Backend = Literal["nccl", "ipc"]
T = TypeVar("T")

_PARTIAL = "research-agent: partial"  # a server's version while weights are on their way to it
_CURE = {
    "nccl": """Was it started with --weight-transfer-config '{"backend": "nccl"}', on GPUs other """
    "than the learner's, and can it reach any port here?",
    "ipc": "Was it started with VLLM_ALLOW_INSECURE_SERIALIZATION=1 and "
    """--weight-transfer-config '{"backend": "ipc"}', on the learner's GPU?""",
}


@dataclass(eq=False)
class _Link:
    """A server as vLLM's trainer sees it: a ``VLLMWeightSyncClient``, called from its threads."""

    server: Server
    loop: asyncio.AbstractEventLoop
    trainer: Any = None  # vLLM's end of the link
    version: str = ""  # of the weights that went over it last
    over: bool = False
    asking: set[asyncio.Task[Any]] = field(default_factory=set)
    refused: asyncio.Future[None] | None = None  # has the exception of a request that failed

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        if handles := update_info.pop("ipc_handles", None):  # they are no JSON
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update")

    def _post(self, path: str, payload: dict[str, Any] | None = None) -> None:
        if self.over:  # a thread that was left to itself has nothing to say any more
            raise RuntimeError("the link was broken off")
        asyncio.run_coroutine_threadsafe(self._ask(path, payload), self.loop).result(RELOAD_TIMEOUT)

    async def _ask(self, path: str, payload: dict[str, Any] | None) -> None:
        task = asyncio.current_task()
        assert task
        if self.over:
            raise RuntimeError("the link was broken off")
        self.asking.add(task)
        try:
            await self.server.need("POST", path, payload, RELOAD_TIMEOUT)
        except (RequestError, EngineError) as error:
            if self.refused and not self.refused.done():
                self.refused.set_exception(error)
            raise
        finally:
            self.asking.discard(task)

    def drop(self) -> None:
        """Break it off, whatever is under way."""
        self.over = True
        for task in list(self.asking):
            task.cancel()
        if self.trainer:
            _in_thread(self.trainer.shutdown)  # it ends what hangs on the GPU


class Transfer:
    """A ``WeightTransfer`` that sends the learner's own tensors, and so only while learning waits.

    Args:
        model: the policy on its GPU, whose names and shapes the weights must have.
        backend: "nccl" for servers on other GPUs, "ipc" for servers on the learner's own.

    Raises:
        ConfigError: the model is on no GPU, or vLLM is not installed.
    """

    persistent = False

    def __init__(self, model: Any, backend: Backend) -> None:
        require_gpu(model, backend)
        self._backend = backend
        self._device = model.device
        self._names = WeightNames(model)
        self._held: list[tuple[str, Tensor]] = []  # this very list is what vLLM reads
        self._links: dict[str, _Link] = {}  # by the server's address
        self._turn = asyncio.Lock()

    def publish(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        """Take weights that are to be sent; they must not change until ``prune``.

        Raises:
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        self._held[:] = [(each, weight.detach()) for each, weight in self._names.checked(weights)]

    async def push(self, server: Server, name: str) -> None:
        """Send a server the weights; meet with it first, where it is new or was started anew.

        Raises:
            EngineError: it was started in another way.
            RequestError: it does not answer, or fails.
        """
        try:
            await self._send(server, name)
        except RequestError as error:
            raise RequestError(
                f"no new weights by {self._backend}: {error}. {_CURE[self._backend]}"
            ) from None

    def prune(self, names: Collection[str]) -> None:
        """Let go of the tensors, which learning is about to change."""
        self._held.clear()

    def close(self) -> None:
        """Let go of the servers."""
        self._held.clear()
        for link in self._links.values():
            link.drop()
        self._links.clear()

    async def _send(self, server: Server, name: str) -> None:
        version = await server.weights()
        link = self._links.pop(server.url, None)
        if link and link.version != version:
            link.drop()
            link = None
        link = link or _Link(server, asyncio.get_running_loop())
        try:
            if not link.trainer:
                link.trainer = await self._meet(link, version)
            await server.need("POST", "update_weight_version", {"new_version": _PARTIAL})
            await self._work(link, link.trainer.send_weights)
        except BaseException:
            link.drop()
            raise
        link.version = name
        self._links[server.url] = link

    async def _meet(self, link: _Link, version: str) -> Any:
        """Meet with a server; returns vLLM's end of the link."""
        server = link.server
        if version == _PARTIAL:
            # What had come would be counted as part of the next weights: let vLLM put it away.
            with suppress(RequestError):
                await server.ask("POST", "start_weight_update")
            await server.ask("POST", "finish_weight_update", wait=RELOAD_TIMEOUT)
        await server.need("POST", "shutdown_weight_transfer_engine")  # of a run before
        answer = await server.need("GET", "get_world_size")
        size = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(size, int):
            raise RequestError(f"it does not say on how many GPUs it is ({answer!r})")
        if self._backend == "ipc" and size > 1:
            raise EngineError(
                f"{server.url} is on {size} GPUs, and server+ipc reaches the learner's only; use "
                "server+nccl, with servers on other GPUs"
            )
        make = partial(_trainer, self._backend, link, self._held, size)
        return await self._work(link, make)

    async def _work(self, link: _Link, work: Callable[[], T]) -> T:
        """Let vLLM do its work; leave it where a request fails, or at the time limit."""
        async with self._turn:
            link.refused = link.loop.create_future()
            working = asyncio.wrap_future(_in_thread(partial(_on, self._device, work)))
            working.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen to
            both = (working, link.refused)
            await asyncio.wait(both, timeout=RELOAD_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if link.refused.done():
            link.refused.result()
        if not working.done():
            raise RequestError(f"no end of it within {RELOAD_TIMEOUT:g} s")
        if error := working.exception():
            raise RequestError(f"{type(error).__name__}: {one_line(str(error))}")
        return working.result()


def require_gpu(model: Any, backend: Backend) -> None:
    """Check that a model's weights can be sent.

    Raises:
        ConfigError: it is on no GPU, or vLLM is not installed.
    """
    if model.device.type != "cuda":
        raise ConfigError(
            f"server+{backend} sends weights from a GPU's memory, and the model is on "
            f"{model.device}; name the engine server:URL,URL, which sends them through a folder"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its news break a progress bar
    try:
        import vllm.distributed.weight_transfer  # noqa: F401, PLC0415 - slow to import
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported ({error}), and server+{backend} needs it here as well; "
            "pip install 'research-env[vllm]', or name the engine server:URL,URL"
        ) from error


def _trainer(backend: Backend, link: _Link, held: list[tuple[str, Tensor]], size: int) -> Any:
    """Let vLLM meet with a server that is on so many GPUs; returns vLLM's end of the link."""
    from vllm.distributed.weight_transfer import (  # noqa: PLC0415
        ParamMeta,
        WeightSource,
        WeightTransferTrainerFactory,
    )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo  # noqa: PLC0415
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo  # noqa: PLC0415

    class Held(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in held]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(held)

    info: Any = IPCTrainerInitInfo(rank=0)
    if backend == "nccl":
        address, port = _meeting_place(link.server.url)
        info = NCCLTrainerInitInfo(address, port, 1 + size, rank=0)
    trainer: Any = WeightTransferTrainerFactory.trainer_init(info, client=link, source=Held())
    if backend == "nccl" and trainer.model_update_group.disabled:
        raise RuntimeError("vLLM finds no NCCL here, or VLLM_DISABLE_PYNCCL is set")  # or is silent
    return trainer


def _meeting_place(url: str) -> tuple[str, int]:
    """The address that we have where a server is, and a free port of it."""
    there = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way, socket.socket() as free:
        way.connect((there.hostname, there.port or 80))  # sends nothing
        free.bind((way.getsockname()[0], 0))
        address, port = free.getsockname()
        return str(address), int(port)


def _on(device: torch.device, work: Callable[[], T]) -> T:
    """Do it on a device, in a thread that has done nothing there yet."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize()  # vLLM reads in streams of its own, which wait for no update
    return work()


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Let a thread do it that nobody need wait for, not even Python at its end."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="weights", daemon=True).start()
    return future
