"""Servers that a run starts itself: how, and that none is left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from research_agent.engines import make_engine
from research_agent.engines.checks import require_gpus
from research_agent.engines.servers import engine as server_engine
from research_agent.engines.servers import serve
from research_agent.engines.servers.engine import ServerEngine
from research_agent.engines.spec import EngineSpec, parse_engine
from research_agent.errors import ConfigError, EngineError
from tests.research_agent.test_server_engine import MODEL, RENDERER, finish, submit, until

FAKE = (sys.executable, "-m", "tests.research_agent.fake_vllm")
ROOT = Path(__file__).parents[4]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """What the program that was started says of itself."""
    file = tmp_path / "record.json"
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(file))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(serve, "_PROGRAM", FAKE)
    return lambda: json.loads(file.read_text())


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def test_a_server_is_started_as_the_run_needs_it(
    record: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    engine = make_engine(
        "serve:tp=2,dp=3,memory=0.5", MODEL, RENDERER, max_slots=4, max_context=200
    )
    submit(engine, range(4))
    assert len(finish(engine)) == 4
    found = record()
    expected = {
        "host": "127.0.0.1",
        "tensor-parallel-size": "2",
        "data-parallel-size": "3",
        "gpu-memory-utilization": "0.5",
        "max-model-len": "200",
        "max-num-seqs": "4",
        "dtype": "float32",
        "load-format": "dummy",
        "logprobs-mode": "processed_logprobs",
    }
    assert expected.items() <= found["settings"].items()
    assert "enable-scale-out" in found["settings"]
    environment = found["environment"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert "LOCAL_RANK" not in environment and "MASTER_PORT" not in environment
    folder = Path(found["settings"]["model"])
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert (folder / "tokenizer.json").exists()
    assert isinstance(engine, ServerEngine)
    engine.close()
    assert gone(found["pid"])
    assert not folder.exists()


def test_a_forgotten_engine_stops_its_server(record: Callable[[], Any]) -> None:
    engine = make_engine("serve", MODEL, RENDERER, max_slots=4, max_context=200)
    pid = record()["pid"]
    assert not gone(pid)
    del engine
    gc.collect()
    until(lambda: gone(pid))


def test_a_server_that_dies_is_told_with_its_output(record: Callable[[], Any]) -> None:
    engine = make_engine("serve", MODEL, RENDERER, max_slots=4, max_context=200)
    os.kill(record()["pid"], signal.SIGKILL)
    submit(engine, [0])
    with pytest.raises(EngineError, match=r"vllm serve ended with status 137.*same command"):
        finish(engine)
    assert isinstance(engine, ServerEngine)
    engine.close()


def test_a_server_that_dies_before_it_gets_weights_is_told_with_its_output(
    record: Callable[[], Any],
) -> None:
    engine = make_engine("serve", MODEL, RENDERER, max_slots=4, max_context=200)
    os.kill(record()["pid"], signal.SIGKILL)
    assert isinstance(engine, ServerEngine)
    until(lambda: gone(engine._sync._process._process.pid))  # type: ignore[union-attr]
    with pytest.raises(EngineError, match=r"vllm serve ended with status 137.*same command"):
        engine.load_weights(MODEL.named_parameters(), 1)
    engine.close()


def test_a_server_that_does_not_start_is_told_with_its_output(
    record: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = "(EngineCore) RuntimeError: no CUDA devices\n" + 3000 * "x" + "\nSystemError: closed"
    monkeypatch.setenv("FAKE_VLLM_FAILS", output)
    message = r"ended with status 1\..*first error: RuntimeError: no CUDA devices\..*x\nSystemErr"
    with pytest.raises(EngineError, match=f"(?s){message}"):
        make_engine("serve", MODEL, RENDERER, max_slots=4, max_context=200)


def test_a_server_is_stopped_though_another_process_holds_its_pipe(
    record: Callable[[], Any],
) -> None:
    """As one does that was forked after the server was started."""
    engine = make_engine("serve", MODEL, RENDERER, max_slots=4, max_context=200)
    assert isinstance(engine, ServerEngine)
    pipe = engine._sync._process._process.stdin  # type: ignore[union-attr]
    assert pipe
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[pipe.fileno()]
    ) as holder:
        engine.close()
        assert holder.poll() is None
        until(lambda: gone(record()["pid"]))
        holder.communicate(b"\n")


@pytest.mark.parametrize(
    ("number", "forked"),
    [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGKILL, True)],
)
def test_no_server_outlives_the_process_that_started_it(
    number: signal.Signals, forked: bool, tmp_path: Path
) -> None:
    """However it ends, with its whole group, or while a process that it forked lives on."""
    supervisor = [sys.executable, str(serve._SUPERVISOR)]
    command = [*supervisor, *FAKE, "--port=0", "--max-model-len=9", "--dtype=float32"]
    code = (
        "import os, subprocess, sys\n"
        f"server = subprocess.Popen({command}, stdin=subprocess.PIPE, start_new_session=True)\n"
        f"if {forked} and not os.fork():\n"
        "    os.setsid()\n"
        "sys.stdin.read()"
    )
    record = tmp_path / "record.json"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"FAKE_VLLM_RECORD": str(record), "PYTHONPATH": str(ROOT)},
    )
    until(lambda: record.exists() and record.read_text().endswith("}"))
    pid = json.loads(record.read_text())["pid"]
    os.killpg(parent.pid, number)
    parent.wait()
    until(lambda: gone(pid))
    assert parent.stdin
    parent.stdin.close()  # ends the forked process


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_gpus("serve", 2, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"serve with 4 GPUs.*2 are visible"):
        require_gpus("serve", 4, torch.device("cuda"))
    require_gpus("serve", 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("engine", "ranks", "transfer"),
    [
        ("serve:tp=2,dp=4", "8", "ipc"),
        ("serve:tp=2", "8", "folder"),  # six ranks hold what nobody would read
        ("serve:tp=8", "1", "folder"),  # seven GPUs have no rank to read from
    ],
)
def test_gpus_and_ranks_in_pairs_exchange_weights_in_memory(
    engine: str, ranks: str, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(model: Any, renderer: Any, settings: list[str]) -> SimpleNamespace:
        started.extend(settings)
        return SimpleNamespace(url="http://127.0.0.1:1")

    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(server_engine, "ServerProcess", start)
    monkeypatch.setattr(server_engine, "connect_servers", lambda *_, **given: given["transfer"])
    made: Any = make_engine(
        engine, MODEL, RENDERER, max_slots=4, max_context=200, device=torch.device("cuda")
    )
    assert made == transfer
    backend = '--weight-transfer-config={"backend": "ipc"}'
    assert (backend in started) == (transfer == "ipc")


@pytest.mark.parametrize("engine", ["serve", "server+nccl:http://localhost:1"])
def test_servers_get_weights_from_where_they_will_be(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may load a model on the CPU, though it learns on a GPU."""
    seen: list[Any] = []

    def sync(model: Any, urls: Any, needs: Any, device: Any, process: Any) -> None:
        seen.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        server_engine, "ServerProcess", lambda *_: SimpleNamespace(url="http://127.0.0.1:1")
    )
    monkeypatch.setattr(server_engine, "WeightSync", sync)
    for device in (torch.device("cuda"), None):
        with pytest.raises(InterruptedError):
            make_engine(engine, MODEL, RENDERER, max_slots=1, max_context=200, device=device)
    assert seen == [torch.device("cuda"), MODEL.device]


def test_names_of_engines() -> None:
    assert parse_engine("transformers") == EngineSpec("transformers")
    assert parse_engine("vllm") == EngineSpec("vllm", tp=1, memory=0.4)
    assert parse_engine("vllm:tp=2,memory=0.6") == EngineSpec("vllm", tp=2, memory=0.6)
    assert parse_engine("serve:tp=8,dp=2") == EngineSpec("serve", tp=8, dp=2, memory=0.4)
    server = parse_engine("server+nccl:http://a:1,http://b:2")
    assert server == EngineSpec("server", urls=("http://a:1", "http://b:2"), transfer="nccl")
    for name in ("warp", "serve:", "server", "server+mpi:http://a:1", "vllm+nccl:tp=2"):
        with pytest.raises(ConfigError, match="no engine is named"):
            parse_engine(name)
    for name in ("vllm:dp=2", "serve:tp=0", "serve:tp=x", "serve:memory=1.5", "transformers:tp=2"):
        with pytest.raises(ConfigError, match=r"is no setting of.*write tp=N"):
            parse_engine(name)
