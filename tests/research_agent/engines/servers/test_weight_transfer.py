"""Weights that go to servers from the learner's memory: who gets them, when, and what may fail.

The servers obey the test, and in place of vLLM's end of a transfer is one that blocks and hangs as
vLLM's does. With vLLM's own the transfers run in ``test_server_engine``, on doubles of CUDA.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from research_agent.engines import make_engine
from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import LoopThread
from research_agent.engines.servers import pool, weight_sync, weight_transfer
from research_agent.engines.servers.engine import ServerEngine, connect_servers
from research_agent.errors import ConfigError, EngineError, ModelError
from tests.research_agent.fake_vllm import FakeVllm
from tests.research_agent.test_server_engine import (
    MODEL,
    RENDERER,
    finish,
    submit,
    until,
)

BACKENDS = ["nccl", "ipc"]
INSPECT = ["/list_workers", "/server_info", "/server_info", "/version"]
INSPECT += ["/get_world_size", "/collective_rpc"]
PREPARE = ["/pause", "/weight_info", "/shutdown_weight_transfer_engine", "/update_weight_version"]
SEND = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"]
FINISH = ["/finish_weight_update", "/reset_prefix_cache", "/update_weight_version", "/resume"]
PROBE = ["/inference/v1/generate"]
require_paired = weight_sync._require_paired

Wires = dict[tuple[int, int], SimpleQueue[Any]]


class Trainer:
    """vLLM's end of a transfer, which sends all weights as one piece."""

    made: list[Trainer]
    wires: Wires

    def __init__(self, backend: str, links: Any, source: Any, servers: Sequence[Any]) -> None:
        self.backend, self.links, self.source, self.servers = backend, links, source, servers
        self.over = threading.Event()
        self.made.append(self)
        info: dict[str, Any] = {"packed": True}
        if backend == "nccl":
            address, port = weight_transfer._meeting_place([server.url for server in servers])
            socket.create_server((address, port)).close()  # vLLM's end listens there
            size = 1 + sum(server.size for server in servers)
            ranks = range(1, size)
            self.listeners = [self.wires.setdefault((port, rank), SimpleQueue()) for rank in ranks]
            info |= {"master_address": address, "master_port": port, "world_size": size}
            info |= {"rank_offset": 1}
        links.init_weight_transfer_engine(info)
        if links.failed.done() and backend == "nccl":
            self.over.wait(2)  # nobody comes to meet it
            raise RuntimeError("the group did not meet")

    def send_weights(self) -> None:
        self.links.start_weight_update()
        meta = self.source.metadata()
        info = {
            "names": [each.name for each in meta],
            "dtype_names": [str(each.dtype).split(".")[1] for each in meta],
            "shapes": [list(each.shape) for each in meta],
        }
        if self.backend == "ipc":
            tensors = [tensor for _, tensor in self.source]
            self.links.update_weights({**info, "ipc_handles": tensors})
        else:
            self._broadcast(info)
        self.links.finish_weight_update()

    def _broadcast(self, info: dict[str, Any]) -> None:
        pool = ThreadPoolExecutor(1)
        taken = pool.submit(self.links.update_weights, info)
        for _, tensor in self.source:
            for wire in self.listeners:
                wire.put(tensor.clone())
        while not self.over.wait(0.002) and not taken.done():
            pass  # as NCCL hangs, until it is aborted
        pool.shutdown(wait=False)

    def shutdown(self) -> None:
        self.over.set()


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Wires:
    """The wires of all groups; with them the model passes for one on a GPU."""
    monkeypatch.setattr(weight_sync, "require_gpu", lambda *_: None)
    monkeypatch.setattr(weight_sync, "_require_paired", lambda *_: None)
    monkeypatch.setattr(weight_transfer, "_trainer", Trainer)
    monkeypatch.setattr(weight_transfer.WeightSource, "metadata", metadata)
    monkeypatch.setattr(pool, "_CHECK", 0.05)
    monkeypatch.setattr(pool, "_TURN_TIMEOUT", 10.0)
    monkeypatch.setattr(pool, "SERVER_TIMEOUT", 0.3)
    monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 0.3)
    monkeypatch.setattr(weight_sync, "_RETRY_PAUSE", 0.05)
    Trainer.made, Trainer.wires = [], {}
    return Trainer.wires


def metadata(source: Any) -> list[SimpleNamespace]:
    """What vLLM's own class of it would hold."""
    return [
        SimpleNamespace(name=name, dtype=source._dtype, shape=shape)
        for name, shape in source._shapes.items()
    ]


@pytest.fixture
def make(wires: Wires) -> Iterator[Callable[..., FakeVllm]]:
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
        given: dict[str, Any] = {"transfer": "nccl"} | settings
        for server in servers:
            server.backend = given["transfer"]
        engines.append(connect_servers(MODEL, RENDERER, urls, 200, **given))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


Make = Callable[..., FakeVllm]
Open = Callable[..., ServerEngine]


def filled(value: float) -> dict[str, Any]:
    return {name: torch.full_like(p, value) for name, p in MODEL.named_parameters()}


def holds(server: FakeVllm, value: float | None) -> bool:
    assert set(server.weights) == set(MODEL.state_dict())  # the tied head by both its names
    return value is None or all(bool((w == value).all()) for w in server.weights.values())


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
    servers = [make(gpus=2, backend=backend), make(backend=backend)]
    name = f"server+{backend}:{','.join(server.url for server in servers)}"
    engine = make_engine(name, MODEL, RENDERER, max_slots=4, max_context=200)
    for server in servers:
        assert set(server.weights) == set(MODEL.state_dict())
        for name, weight in MODEL.state_dict().items():
            assert torch.equal(server.weights[name], weight)
        assert asked(server) == [*INSPECT, *PREPARE, *SEND, *FINISH, *PROBE]
    for version in (1, 2):
        engine.load_weights(filled(version).items(), version)
        for server in servers:
            assert holds(server, version)
            assert not server.paused
            bodies = [body for path, body in server.calls if path == "/update_weight_version"]
            assert bodies[0] != bodies[1]  # while it is under way, they are no weights of ours
            assert asked(server) == ["/weight_info", *PREPARE, *SEND, *FINISH]
        assert servers[0].version == servers[1].version
        submit(engine, range(4))
        assert {turn.version for turn in finish(engine).values()} == {version}
        for server in servers:
            asked(server)
    if backend == "nccl":  # one group of all, formed anew for each version
        groups = [server.group for server in servers]
        assert {group["master_address"] for group in groups} == {"127.0.0.1"}
        assert groups[0]["master_port"] == groups[1]["master_port"]
        assert [group["world_size"] for group in groups] == [4, 4]
        assert [group["rank_offset"] for group in groups] == [1, 3]
        assert len({port for port, _ in Trainer.wires}) == 3
    assert {key for server in servers for key in server.keys} == {"Bearer sesame"}
    assert len(Trainer.made) == 3
    assert all(trainer.over.wait(5) for trainer in Trainer.made)
    assert isinstance(engine, ServerEngine)
    engine.close()


def test_weights_go_in_the_precision_of_the_run(make: Make, connect: Open) -> None:
    server = make(dtype="bfloat16")
    engine = connect(server, dtype="bfloat16")
    assert {weight.dtype for weight in server.weights.values()} == {torch.bfloat16}
    for name, weight in MODEL.state_dict().items():
        assert torch.equal(server.weights[name], weight.bfloat16())
    engine.load_weights(filled(0.5).items(), 1)
    assert holds(server, 0.5)


def test_weights_that_are_not_the_models(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server)
    for weights in ([("head", torch.zeros(2))], list(filled(1).items())[:-1]):
        with pytest.raises(ModelError):
            engine.load_weights(weights, 1)
        assert server.version == weight_transfer.PARTIAL  # nobody takes them for ours
    engine.load_weights(filled(2).items(), 2)
    assert holds(server, 2)
    submit(engine, range(2))
    assert {turn.version for turn in finish(engine).values()} == {2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_server_that_cannot_meet_is_left_out(
    backend: str, make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = make(), make(missing={"/init_weight_transfer_engine": 500})
    engine = connect(bad, good, transfer=backend)
    assert holds(good, None)
    submit(engine, range(4))
    assert len(finish(engine)) == 4
    assert len(good.turns) == 4
    with pytest.raises(EngineError, match="no vLLM server can be used") as caught:
        connect(bad, transfer=backend)
    problem = f"no new weights by {backend}: /init_weight_transfer_engine gives status 500"
    assert problem in str(caught.value)
    assert f"""--weight-transfer-config '{{"backend": "{backend}"}}'""" in str(caught.value)


def test_another_port_is_taken_where_one_is_in_use(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = weight_transfer._meeting_place
    with socket.create_server(("127.0.0.1", 0)) as listener:
        places = [listener.getsockname()]
        monkeypatch.setattr(
            weight_transfer, "_meeting_place", lambda urls: places.pop() if places else find(urls)
        )
        monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 20.0)
        engine = connect(make())
        assert not places and len(Trainer.made) == 2
        submit(engine, range(2))
        assert len(finish(engine)) == 2
        monkeypatch.setattr(weight_transfer, "_meeting_place", lambda _: listener.getsockname())
        monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 0.3)
        with pytest.raises(EngineError, match=r"no new weights by nccl: .*in use"):
            connect(make())


@pytest.mark.parametrize(
    ("settings", "by"),
    [({"backend": "ipc"}, "nccl"), ({"backend": "nccl"}, "ipc"), ({"unpickles": False}, "ipc")],
)
def test_a_server_that_takes_no_weights_this_way_is_refused(
    settings: dict[str, Any], by: str, make: Make
) -> None:
    server = make(**({"backend": by} | settings))
    with pytest.raises(EngineError, match=rf"takes no weights by {by}.*weight-transfer-config"):
        make_engine(f"server+{by}:{server.url}", MODEL, RENDERER, max_slots=1, max_context=200)


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
    engine = connect(bad, good, transfer=backend)
    bad.transfer = fault
    monkeypatch.setattr(weight_transfer, "RELOAD_TIMEOUT", 1.5 if fault == "hang" else 20.0)
    engine.load_weights(filled(1).items(), 1)  # does not wait for vLLM's end, which hangs
    assert holds(good, 1)
    assert f"{bad.url} is left out" in caplog.text
    if fault != "die":  # a death is noticed in several ways
        assert f"{bad.url} is left out (no new weights by {backend}: " in caplog.text
    if fault == "hang":
        assert "within 1.5 s" in caplog.text
    assert all(trainer.over.wait(5) for trainer in Trainer.made)  # which frees what hangs
    before = len(bad.turns)
    submit(engine, range(4))
    assert {turn.version for turn in finish(engine).values()} == {1}
    assert len(bad.turns) == before
    bad.missing = {"/weight_info": 503}  # while it is not well
    count = updates(bad)
    engine.load_weights(filled(2).items(), 2)
    assert holds(good, 2)
    assert updates(bad) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_taken_back_with_the_next_weights(
    backend: str, make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = make(), make()
    engine = connect(bad, good, transfer=backend)
    bad.transfer = "cut"
    engine.load_weights(filled(1).items(), 1)
    bad.transfer = "well"
    asked(bad)
    until(lambda: "/weight_info" in bad.paths())  # while learning goes on
    time.sleep(0.1)
    assert set(asked(bad)) == {"/weight_info"}
    assert f"{bad.url} is back" not in caplog.text
    engine.load_weights(filled(2).items(), 2)
    assert holds(bad, 2) and holds(good, 2)
    # What had been begun is ended first, or vLLM would count it as a part of these.
    path = [path for path in asked(bad) if path != "/weight_info"]
    path = path[path.index("/start_weight_update") :]
    end = [path for path in PREPARE[1:] if path != "/weight_info"]
    rest = [*end, *SEND, *FINISH, *PROBE]
    assert path == ["/start_weight_update", "/finish_weight_update", *rest]
    assert f"{bad.url} is back" in caplog.text
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
    submit(engine, range(4, 8))
    finish(engine)
    assert len(anew.turns) > count
    anew.version, anew.group = "default", {}  # again, and nobody has noticed
    engine.load_weights(filled(2).items(), 2)
    assert holds(anew, 2)


def test_a_server_that_was_only_away_needs_no_weights(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    engine = connect(server)
    monkeypatch.setattr(pool, "SERVER_TIMEOUT", 10.0)
    server.mode, server.fails = "500", 1
    submit(engine, range(2))
    assert len(finish(engine)) == 2
    assert f"{server.url} is back, with the current weights" in caplog.text
    assert updates(server) == 1
    engine.load_weights(filled(1).items(), 1)
    assert holds(server, 1)


def test_all_are_gone(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for server in servers:
        server.transfer = "cut"
    begun = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine.load_weights(filled(1).items(), 1)
    assert time.monotonic() - begun > 0.3  # it had patience
    for word in (
        servers[0].url,
        servers[1].url,
        "ServerDisconnectedError",
        "vllm serve",
        "checkpoint",
    ):
        assert word in str(caught.value)


def test_the_only_one_is_waited_for(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    engine = connect(server)
    monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 20.0)
    server.transfer = "cut"
    heal = threading.Timer(0.5, setattr, (server, "transfer", "well"))
    heal.start()
    engine.load_weights(filled(1).items(), 1)
    assert holds(server, 1)


def test_weights_that_can_be_had_once_are_sent_once(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    engine = connect(server)
    monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 20.0)
    server.transfer = "cut"
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        engine.load_weights(iter(filled(1).items()), 1)
    assert updates(server) == 2  # the first was at the start


def test_by_ipc_every_gpu_of_the_servers_has_a_rank(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank puts down for a GPU that nobody has would never be freed."""
    monkeypatch.setattr(weight_sync, "_require_paired", require_paired)
    engine = connect(make(), transfer="ipc")
    engine.close()
    with pytest.raises(EngineError, match="the servers have 2 GPUs, and 1 ranks learn"):
        connect(make(), make(), transfer="ipc")
    connect(make(), make(), transfer="nccl").close()


def test_a_rank_without_servers_says_what_failed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Trainer:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weight_transfer, "_trainer", fail)
    loop = LoopThread("weights", [])
    names, device = WeightNames(MODEL), torch.device("cpu")
    source = weight_transfer.WeightSource(names, filled(1).items(), torch.float32, device)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        weight_transfer.transfer(source, [], loop, "ipc", device)
    assert not list(source)  # the other ranks gathered the weights with this one
    loop.close()


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
        weight_transfer.require_gpu(torch.device("cuda"), "nccl")
