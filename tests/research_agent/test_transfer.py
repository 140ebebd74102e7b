"""Weights that go to servers from the learner's memory: who gets them, when, and what may fail.

The servers obey the test, and in place of vLLM's end of a transfer is one that blocks and hangs as
vLLM's does. With vLLM's own the transfers run in ``test_server_engine``, on doubles of CUDA.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from research_agent.engines import make_engine
from research_agent.engines.servers import pool, weight_transfer
from research_agent.engines.servers.engine import ServerEngine
from research_agent.errors import ConfigError, EngineError
from tests.research_agent.fake_vllm import FakeVllm
from tests.research_agent.test_server_engine import (
    MODEL,
    RENDERER,
    finish,
    refuses_weights_that_are_not_the_models,
    submit,
    until,
)

BACKENDS = ["nccl", "ipc"]
MEET = ["/weight_info", "/shutdown_weight_transfer_engine", "/get_world_size"]
SEND = ["/update_weight_version", "/start_weight_update", "/update_weights"]
SEND += ["/finish_weight_update", "/reset_prefix_cache", "/update_weight_version"]
PROBE = ["/inference/v1/generate"] * 2


class Trainer:
    """vLLM's end of a link."""

    made: list[Trainer]
    wires: dict[int, SimpleQueue[Any]]
    sending: int
    most: int  # that sent at a time

    def __init__(self, backend: str, link: Any, held: Any, size: int) -> None:
        self.backend, self.link, self.held = backend, link, held
        self.over = threading.Event()
        self.made.append(self)
        info: dict[str, Any] = {"packed": False}
        if backend == "nccl":
            address, port = weight_transfer._meeting_place(link.server.url)
            self.wire = self.wires[port] = SimpleQueue()
            info = {"master_address": address, "master_port": port, "world_size": 1 + size}
        try:
            link.init_weight_transfer_engine(info)
        except Exception:
            self.over.wait(20 if backend == "nccl" else 0)  # nobody comes to meet it
            raise

    def send_weights(self) -> None:
        type(self).sending += 1
        type(self).most = max(self.most, self.sending)
        try:
            self.link.start_weight_update()
            tensors = [tensor for _, tensor in self.held]
            info = {
                "names": [name for name, _ in self.held],
                "dtype_names": [str(tensor.dtype).split(".")[1] for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
            if self.backend == "ipc":
                self.link.update_weights({**info, "ipc_handles": tensors})
            else:
                self._broadcast(info, tensors)
            self.link.finish_weight_update()
        finally:
            type(self).sending -= 1

    def _broadcast(self, info: dict[str, Any], tensors: list[Any]) -> None:
        pool = ThreadPoolExecutor(1)
        taken = pool.submit(self.link.update_weights, info)
        for tensor in tensors:
            self.wire.put(tensor.clone())
        while not self.wire.empty():
            if self.over.wait(0.002):
                raise RuntimeError("the communicator was aborted")
        taken.result()
        pool.shutdown(wait=False)

    def shutdown(self) -> None:
        self.over.set()


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> dict[int, SimpleQueue[Any]]:
    """The wires of all groups; with them the model passes for one on a GPU."""
    monkeypatch.setattr(weight_transfer, "require_gpu", lambda *_: None)
    monkeypatch.setattr(weight_transfer, "_trainer", Trainer)
    monkeypatch.setattr(pool, "_CHECK", 0.05)
    Trainer.made, Trainer.wires, Trainer.sending, Trainer.most = [], {}, 0, 0
    return Trainer.wires


@pytest.fixture
def make(wires: dict[int, SimpleQueue[Any]]) -> Iterator[Callable[..., FakeVllm]]:
    servers: list[FakeVllm] = []

    def start(**settings: Any) -> FakeVllm:
        servers.append(FakeVllm(wires=wires, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.hung.set()
        server.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., ServerEngine]]:
    engines: list[ServerEngine] = []

    def start(*servers: FakeVllm, **settings: Any) -> ServerEngine:
        urls = [server.url for server in servers]
        given: dict[str, Any] = {"patience": 0.3, "turn_timeout": 10.0, "by": "nccl"} | settings
        engines.append(ServerEngine(MODEL, RENDERER, urls, 200, **given))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


Make = Callable[..., FakeVllm]
Open = Callable[..., ServerEngine]


def filled(value: float) -> dict[str, Any]:
    return {name: torch.full_like(p, value) for name, p in MODEL.named_parameters()}


def holds(server: FakeVllm, value: float) -> bool:
    assert set(server.weights) == set(MODEL.state_dict())  # the tied head by both its names
    return all(bool((weight == value).all()) for weight in server.weights.values())


def asked(server: FakeVllm) -> list[str]:
    """The paths of all requests since the last call, but for looks at its health."""
    paths = [path.partition("?")[0] for path in server.paths()]
    del server.calls[:]
    return [path for path in paths if path != "/health"]


def updates(server: FakeVllm) -> int:
    return server.paths().count("/update_weights")


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_server_gets_the_weights_whole(
    backend: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    servers = [make(), make(gpus=2 if backend == "nccl" else 1)]
    name = f"server+{backend}:{','.join(server.url for server in servers)}"
    engine = make_engine(name, MODEL, RENDERER, max_slots=4, max_context=200)
    for server in servers:
        assert set(server.weights) == set(MODEL.state_dict())
        for name, weight in MODEL.state_dict().items():
            assert torch.equal(server.weights[name], weight)
        meet = [*MEET, "/init_weight_transfer_engine"]
        assert asked(server) == ["/v1/models", *meet, *SEND, *PROBE]
    if backend == "nccl":
        groups = [server.group for server in servers]
        assert {group["master_address"] for group in groups} == {"127.0.0.1"}
        assert len({group["master_port"] for group in groups}) == 2
        assert [group["world_size"] for group in groups] == [2, 3]
    for version in (1, 2):
        engine.load_weights(filled(version).items(), version)
        for server in servers:
            assert holds(server, version)
            bodies = [body for path, body in server.calls if path == "/update_weight_version"]
            assert bodies[0] != bodies[1]  # while it is under way, they are no weights of ours
            assert asked(server) == ["/weight_info", *SEND]
        assert servers[0].version == servers[1].version
        submit(engine, range(4))
        assert {turn.version for turn in finish(engine).values()} == {version}
        for server in servers:
            asked(server)
    assert {key for server in servers for key in server.keys} == {"Bearer sesame"}
    assert len(Trainer.made) == 2
    assert Trainer.most == 1  # one server after the other
    assert isinstance(engine, ServerEngine)
    engine.close()
    assert all(trainer.over.wait(5) for trainer in Trainer.made)


def test_weights_that_cannot_be_the_models_are_not_sent(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server)
    refuses_weights_that_are_not_the_models(engine)
    assert updates(server) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_server_that_cannot_meet_is_left_out(
    backend: str, make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = make(), make(missing={"/init_weight_transfer_engine": 500})
    engine = connect(bad, good, by=backend)
    how = f"""--weight-transfer-config '{{"backend": "{backend}"}}'"""
    assert f"{bad.url} cannot be used now: no new weights by {backend}: status 500" in caplog.text
    assert how in caplog.text
    submit(engine, range(4))
    assert len(finish(engine)) == 4
    assert len(good.turns) == 4
    with pytest.raises(EngineError, match="no vLLM server can be used") as caught:
        connect(bad, by=backend)
    assert how in str(caught.value)


def test_a_server_without_the_routes_is_refused(make: Make, connect: Open) -> None:
    with pytest.raises(EngineError, match=r"refuses /weight_info.*VLLM_SERVER_DEV_MODE=1"):
        connect(make(missing={"/weight_info": 404}))


def test_cuda_ipc_reaches_one_gpu(make: Make, connect: Open) -> None:
    with pytest.raises(EngineError, match=r"is on 2 GPUs, and server\+ipc reaches the learner's"):
        connect(make(gpus=2), by="ipc")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["500", "cut", "die", "hang"])
def test_a_server_that_fails_at_a_transfer_is_left_out(
    *,
    fault: str,
    backend: str,
    make: Make,
    connect: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, good = make(), make()
    engine = connect(bad, good, by=backend)
    trainer = next(made for made in Trainer.made if made.link.server.url == bad.url)
    bad.transfer = fault
    monkeypatch.setattr(weight_transfer, "RELOAD_TIMEOUT", 0.5 if fault == "hang" else 20.0)
    begun = time.monotonic()
    engine.load_weights(filled(1).items(), 1)
    assert time.monotonic() - begun < 10  # it did not wait for vLLM's end, which hangs
    assert holds(good, 1)
    assert f"{bad.url} is left out" in caplog.text
    if fault != "die":  # that is found out in several ways
        assert f"{bad.url} is left out (no new weights by {backend}: " in caplog.text
    if fault == "hang":
        assert "within 0.5 s" in caplog.text
    assert trainer.over.wait(5)  # which frees what hangs
    before = len(bad.turns)
    submit(engine, range(4))
    assert {turn.version for turn in finish(engine).values()} == {1}
    assert len(bad.turns) == before
    bad.missing["/v1/models"] = 503  # and as long as it is not well, nobody waits for it
    count = updates(bad)
    engine.load_weights(filled(2).items(), 2)
    assert holds(good, 2)
    assert updates(bad) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_taken_back_with_the_next_weights(
    backend: str, make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = make(), make()
    engine = connect(bad, good, by=backend)
    bad.transfer = "cut"
    engine.load_weights(filled(1).items(), 1)
    bad.transfer = "well"
    asked(bad)
    until(lambda: {"/v1/models", "/weight_info"} <= set(bad.paths()))  # while learning goes on
    time.sleep(0.1)
    assert set(asked(bad)) == {"/v1/models", "/weight_info"}
    assert f"{bad.url} is back" not in caplog.text
    engine.load_weights(filled(2).items(), 2)
    assert holds(bad, 2) and holds(good, 2)
    # What had been begun is ended first, or vLLM would count it as a part of these.
    path = [path for path in asked(bad) if path != "/v1/models"]
    path = path[path.index("/start_weight_update") :]
    meet = [*MEET[1:], "/init_weight_transfer_engine"]
    assert path == ["/start_weight_update", "/finish_weight_update", *meet, *SEND, *PROBE]
    assert f"{bad.url} is back" in caplog.text
    assert len(Trainer.made) == 3
    submit(engine, range(8))
    assert {turn.version for turn in finish(engine).values()} == {2}
    assert len(bad.turns) == 4


def test_a_server_started_anew_waits_for_the_next_weights(make: Make, connect: Open) -> None:
    anew, other = make(), make()
    engine = connect(anew, other)
    anew.version, anew.group = "default", {}
    submit(engine, range(4))
    turns = finish(engine)  # what it sampled gave it away
    assert {turn.version for turn in turns.values()} == {0}
    count = len(anew.turns)
    until(lambda: anew.paths()[-1:] == ["/weight_info"])
    time.sleep(0.1)
    submit(engine, range(4), "more")
    finish(engine)
    assert len(anew.turns) == count
    assert updates(anew) == 1
    anew.version, anew.group = "default", {}
    engine.load_weights(filled(1).items(), 1)
    assert holds(anew, 1)
    submit(engine, range(4))
    finish(engine)
    assert len(anew.turns) > count
    anew.version, anew.group = "default", {}  # again, and nobody has noticed
    engine.load_weights(filled(2).items(), 2)
    assert holds(anew, 2)


def test_a_server_that_was_only_away_needs_no_weights(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server = make()
    engine = connect(server, patience=10.0)
    server.mode, server.fails = "500", 1
    submit(engine, range(2))
    assert len(finish(engine)) == 2
    assert f"{server.url} is back, with the current weights" in caplog.text
    assert updates(server) == 1
    engine.load_weights(filled(1).items(), 1)
    assert holds(server, 1)
    assert len(Trainer.made) == 1  # in the same group


def test_all_are_gone(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for server in servers:
        server.transfer = "cut"
    begun = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine.load_weights(filled(1).items(), 1)
    assert time.monotonic() - begun > 0.3  # it had patience
    for word in (servers[0].url, servers[1].url, "RemoteProtocolError", "vllm serve", "checkpoint"):
        assert word in str(caught.value)


def test_the_only_one_is_waited_for(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server, patience=20.0)
    server.transfer = "cut"
    heal = threading.Timer(0.5, setattr, (server, "transfer", "well"))
    heal.start()
    engine.load_weights(filled(1).items(), 1)
    assert holds(server, 1)


def test_an_error_of_this_side_is_told(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Trainer) -> None:
        raise RuntimeError("NCCL error: unhandled cuda error")

    engine = connect(make())
    monkeypatch.setattr(Trainer, "send_weights", fail)
    with pytest.raises(EngineError) as caught:
        engine.load_weights(filled(1).items(), 1)
    assert "RuntimeError: NCCL error: unhandled cuda error" in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_on_the_cpu_is_refused(backend: str) -> None:
    with pytest.raises(ConfigError, match=rf"server\+{backend} sends.*model is on cpu.*server:URL"):
        make_engine(f"server+{backend}:http://localhost:1", MODEL, RENDERER, max_slots=1)


def test_a_learner_without_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM cannot be imported.*server\+nccl needs it here"):
        weight_transfer.require_gpu(SimpleNamespace(device=torch.device("cuda")), "nccl")


def test_names_that_no_engine_has() -> None:
    for name in ("server+nccl", "server+mpi:http://localhost:1", "server"):
        with pytest.raises(ConfigError, match=r"no engine is named.*server\+nccl:URL"):
            make_engine(name, MODEL, RENDERER, max_slots=1)
