"""The server engine, on servers that obey a test and on real ones of vLLM's."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from research_agent.engines import make_engine
from research_agent.engines.base import (
    Completion,
    Engine,
    KeepsTurns,
    SamplingParams,
)
from research_agent.engines.remote import turn_seed
from research_agent.engines.servers import pool, server_group, weight_sync, weight_transfer
from research_agent.engines.servers.engine import ServerEngine, connect_servers
from research_agent.engines.servers.weight_sync import model_weights
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import make_environments
from research_agent.errors import (
    ConfigError,
    ContextError,
    EngineError,
    ModelError,
    NonFiniteError,
    ResearchAgentError,
)
from research_agent.rollout import collect
from research_agent.trajectory import Trajectory
from tests.research_agent import cuda_double
from tests.research_agent.conftest import byte_tokenizer, codec_of, tiny_qwen2
from tests.research_agent.fake_vllm import FakeVllm, script
from tests.research_agent.test_collect import TOY, Limits
from tests.research_agent.torchrun import in_two_processes

RENDERER = codec_of(byte_tokenizer(merges=True))
END = RENDERER.tokenizer.eos_token_id
MODEL = tiny_qwen2(hidden=128)  # with the heads of 32 that vLLM wants, and a tied one

Make = Callable[..., FakeVllm]
Open = Callable[..., ServerEngine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Starts servers that obey the test."""
    servers: list[FakeVllm] = []

    def start(**settings: Any) -> FakeVllm:
        servers.append(FakeVllm(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.gate.set()
        server.hung.set()
        server.stop()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes engines over servers; they look after them often."""
    monkeypatch.setattr(pool, "_CHECK", 0.05)
    monkeypatch.setattr(server_group, "_CHECK", 0.05)
    monkeypatch.setattr(weight_sync, "_AGAIN", 0.05)
    engines: list[ServerEngine] = []

    def start(*servers: FakeVllm, **settings: Any) -> ServerEngine:
        settings = {"patience": 0.3, "turn_timeout": 10.0} | settings
        urls = [server.url for server in servers]
        engines.append(connect_servers(MODEL, RENDERER, urls, 200, **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def finish(engine: Engine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while engine.busy:
        done |= {completion.slot: completion for completion in engine.step()}
    return done


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def submit(engine: Engine, slots: Sequence[int], text: str = "q{}", **params: Any) -> None:
    for slot in slots:
        tokens = RENDERER.encode_text(text.format(slot))
        engine.submit(slot, tokens, SamplingParams(seed=slot, **{"max_tokens": 3} | params))


def test_a_turn_is_what_was_asked_for(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server)
    submit(engine, [4], "ab", temperature=0.5, stop=(";;",), max_tokens=5)
    (turn,) = finish(engine).values()
    prompt = RENDERER.encode_text("ab")
    (tokens, params) = server.turns[0]
    assert tokens == prompt
    assert params == {
        "temperature": 0.5,
        "max_tokens": 5,
        "seed": turn_seed(4, len(prompt)),
        "logprobs": 0,
        "stop": [";;"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "stop_token_ids": [END],
    }
    said = script(prompt, params["seed"], 5)
    assert turn == Completion(4, tuple(said), (-0.25,) * 5, RENDERER.decode(said), "length", 0)
    engine.submit(4, [9], SamplingParams(seed=4))
    finish(engine)
    assert server.turns[1][0] == [*prompt, *said, 9]  # what the slot holds, token for token
    assert server.turns[1][1]["seed"] == turn_seed(4, len(prompt) + 6)  # other draws
    assert server.turns[1][1]["max_tokens"] == 200 - len(prompt) - 6
    engine.release(4)
    with pytest.raises(ContextError, match="holds nothing"):
        engine.submit(4, [], SamplingParams())
    with pytest.raises(ContextError, match="200 tokens leave no room"):
        engine.submit(4, [1] * 200, SamplingParams())
    with pytest.raises(ValueError, match=r"temperature is 0\.005"):
        engine.submit(4, [1], SamplingParams(temperature=0.005))


@pytest.mark.parametrize(
    ("text", "begun", "kept", "ending"),
    [
        ("xx;;yy", "", "xx;;", "stop"),  # the server saw no stop string, and said more
        ("xx<|im_end|>yy", "", "xx<|im_end|>", "end"),
        (";yy", "ab;", ";", "stop"),  # it began before an interruption
        ("xxyy", "ab;", "xxyy", "length"),
    ],
)
def test_a_turn_ends_where_any_engine_ends_it(
    *,
    text: str,
    begun: str,
    kept: str,
    ending: str,
    make: Make,
    connect: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = connect(make())
    said = RENDERER.tokenizer(text)["input_ids"]
    monkeypatch.setattr("tests.research_agent.fake_vllm.script", lambda *_: list(said))
    prompt = [*RENDERER.encode_text("q"), *RENDERER.encode_text(begun)]
    params = SamplingParams(
        max_tokens=len(said), stop=(";;",), resumed_tokens=len(RENDERER.encode_text(begun))
    )
    engine.submit(0, prompt, params)
    turn = finish(engine)[0]
    assert RENDERER.decode(turn.tokens) == kept
    assert (turn.text, turn.finish_reason) == (kept.removesuffix("<|im_end|>"), ending)
    assert len(turn.logprobs) == len(turn.tokens)


def test_the_server_with_least_to_do_gets_the_turn(make: Make, connect: Open) -> None:
    servers = [make(), make(), make()]
    engine = connect(*servers)
    for server in servers:
        server.gate.clear()
    submit(engine, range(12))
    until(lambda: sum(server.now for server in servers) == 12)
    assert [server.now for server in servers] == [4, 4, 4]


def test_a_trajectory_stays_where_its_prefix_is(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for turn in range(4):
        slots = range(6) if turn % 2 else range(5, -1, -1)  # in another order
        submit(engine, slots, "q{}" if turn == 0 else "more")
        finish(engine)
    homes = [{tuple(tokens[:2]) for tokens, _ in server.turns} for server in servers]
    assert [len(home) for home in homes] == [3, 3]
    assert not homes[0] & homes[1]
    assert [len(server.turns) for server in servers] == [12, 12]


def test_a_trajectory_leaves_a_server_that_is_much_busier(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    submit(engine, range(20))
    finish(engine)
    at_home = [
        slot
        for slot in range(20)
        if any(tokens == RENDERER.encode_text(f"q{slot}") for tokens, _ in servers[0].turns)
    ]
    assert len(at_home) == 10
    for server in servers:
        server.gate.clear()
    submit(engine, at_home, "more")
    until(lambda: sum(server.now for server in servers) == 10)
    # Home are 4, as the other has none; then 2 for each that it has, as long as that is so.
    assert [server.now for server in servers] == [8, 2]


def test_turns_in_flight_are_bounded(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server, max_in_flight=2)
    server.gate.clear()
    submit(engine, range(6))
    until(lambda: server.now == 2)
    time.sleep(0.05)
    server.gate.set()
    assert len(finish(engine)) == 6
    assert server.most == 2


def test_turns_that_take_long_keep_no_server_from_being_looked_after(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "_TIMEOUT", 0.3)
    server = make()
    engine = connect(server, max_in_flight=2)
    server.gate.clear()
    submit(engine, range(4))
    until(lambda: server.now == 2)
    asked = len(server.turns)
    time.sleep(0.8)  # time for looks at its health that would wait too long for a connection
    server.gate.set()
    assert len(finish(engine)) == 4
    assert asked == 2 and len(server.turns) == 4
    assert "left out" not in caplog.text


def test_a_turn_that_is_refused_ends_the_run_and_harms_no_other(make: Make, connect: Open) -> None:
    servers = [make(mode="400"), make(mode="400")]
    engine = connect(*servers)
    submit(engine, [0])
    with pytest.raises(EngineError, match=r"refuses a turn of 2 tokens before it: .*too long"):
        finish(engine)
    assert sum(len(server.turns) for server in servers) == 1
    servers[0].mode = servers[1].mode = "well"
    submit(engine, [1, 2])
    assert len(finish(engine)) == 2


def test_a_step_waits_but_not_for_ever(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server)
    server.gate.clear()
    submit(engine, [0])
    begun = time.monotonic()
    assert engine.step() == []
    assert time.monotonic() - begun > 0.015  # a collector does not spin
    server.gate.set()
    assert [turn.slot for turn in finish(engine).values()] == [0]
    assert engine.step() == []


def test_a_released_turn_is_forgotten(make: Make, connect: Open) -> None:
    server = make()
    engine = connect(server)
    server.gate.clear()
    submit(engine, [0, 1])
    with pytest.raises(ValueError, match="slot 0 has a turn under way"):
        submit(engine, [0])
    until(lambda: server.now == 2)
    engine.release(0)
    assert engine.busy == 1
    server.gate.set()
    submit(engine, [0], "other")
    turns = finish(engine)
    assert server.turns[-1][0] == RENDERER.encode_text("other")
    assert list(turns[0].tokens) == script(*_asked(server, 2), 3)


def _asked(server: FakeVllm, turn: int) -> tuple[list[int], int]:
    tokens, params = server.turns[turn]
    return tokens, params["seed"]


FAULTS = ["500", "cut", "rubbish", "other", "short", "abort", "unequal", "old", "hang"]


@pytest.mark.parametrize("fault", FAULTS)
def test_turns_of_a_server_that_fails_are_sampled_again_elsewhere(
    fault: str, make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    alone = connect(make())
    submit(alone, range(8))
    wanted = finish(alone)
    bad, good = make(), make()
    engine = connect(bad, good, turn_timeout=0.5 if fault == "hang" else 10.0)
    bad.mode = fault
    bad.missing["/weight_info"] = 503  # it does not come back
    submit(engine, range(8))
    assert finish(engine) == wanted  # whole, and the same: same tokens, same seed
    assert bad.turns
    for turn in bad.turns:
        assert turn in good.turns
    assert f"{bad.url} is left out" in caplog.text
    submit(engine, range(8), "more")
    assert len(finish(engine)) == 8
    assert len(good.turns) == 16


def test_a_server_that_is_gone_is_found_out_while_it_is_waited_for(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = make(), make()
    engine = connect(bad, good)
    bad.gate.clear()
    submit(engine, [0, 1])
    until(lambda: bad.now)
    bad.missing = {"/health": 503, "/v1/models": 503}
    assert len(finish(engine)) == 2
    assert "status 503: that is not done here" in caplog.text


def test_death_of_all(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for server in servers:
        server.stop()
    submit(engine, range(4))
    with pytest.raises(EngineError) as caught:
        finish(engine)
    message = str(caught.value)
    for word in (servers[0].url, servers[1].url, "vllm serve", "checkpoint"):
        assert word in message
    assert (
        "ClientConnectorError" in message or "ServerDisconnectedError" in message
    )  # one was still open
    assert isinstance(caught.value, ResearchAgentError)
    for slot in range(4):
        engine.release(slot)
    assert not engine.busy
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        engine.load_weights(MODEL.named_parameters(), 1)


def test_a_turn_that_every_server_fails_at_is_an_error(make: Make, connect: Open) -> None:
    servers = [make(mode="500"), make(mode="500")]
    engine = connect(*servers, patience=10.0)
    submit(engine, [0])
    with pytest.raises(EngineError, match=r"6 attempts to sample one turn of 2 tokens.*memory"):
        finish(engine)
    assert sum(len(server.turns) for server in servers) == 6


def test_a_server_that_comes_back_gets_the_current_weights_first(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server, other = make(), make()
    engine = connect(server, other)
    server.mode, server.fails = "500", 1
    server.missing = {"/weight_info": 503, "/v1/models": 503}
    submit(engine, range(2))
    finish(engine)
    assert "1 of 2 servers left" in caplog.text
    new = {name: torch.full_like(p, 0.5) for name, p in MODEL.named_parameters()}
    engine.load_weights(new.items(), 1)
    assert server.version.split("-")[1] == "0"
    del server.calls[:]
    server.missing.clear()
    until(lambda: "is back" in caplog.text)
    paths = [path.partition("?")[0] for path in server.paths()]
    order = ["/pause", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert [path for path in paths if path in order][:4] == order
    assert len(server.folders()) == 1
    assert all(bool((weight == 0.5).all()) for weight in server.weights.values())
    submit(engine, range(2), "more")
    assert [turn.version for turn in finish(engine).values()] == [1, 1]
    assert server.version == other.version


def test_a_server_started_anew_serves_no_old_weights(make: Make, connect: Open) -> None:
    """It dies and comes back so fast that no request fails: its answers give it away."""
    server = make()
    engine = connect(server, patience=10.0)
    engine.load_weights(MODEL.named_parameters(), 1)
    current, server.version = server.version, "default"
    submit(engine, [0])
    turn = finish(engine)[0]
    assert turn.version == 1
    assert server.version == current
    assert len(server.folders()) == 3


def refuses_weights_that_are_not_the_models(engine: Engine) -> None:
    """Weights left out, unknown, of another shape: version 0 stays."""
    with pytest.raises(ModelError, match=r"1 weights were left out, such as 'model\.norm\.weight'"):
        engine.load_weights([w for w in MODEL.named_parameters() if w[0] != "model.norm.weight"], 1)
    with pytest.raises(ModelError, match=r"weight 'head' \[2\]: the model has none of that name"):
        engine.load_weights([("head", torch.zeros(2))], 1)
    with pytest.raises(ModelError, match=r"'model.norm.weight' \[2\]: the model has \[128\]"):
        engine.load_weights([("model.norm.weight", torch.zeros(2))], 1)
    submit(engine, [0])
    assert finish(engine)[0].version == 0


def test_new_weights_reach_all_servers_whole(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for server in servers:  # what the engine was made with
        assert set(server.weights) == set(MODEL.state_dict())  # the tied head by both its names
        for name, weight in MODEL.state_dict().items():
            assert torch.equal(server.weights[name], weight)
    submit(engine, [0])
    finish(engine)
    refuses_weights_that_are_not_the_models(engine)
    for version in (1, 2):
        new = {name: torch.full_like(p, version) for name, p in MODEL.named_parameters()}
        engine.load_weights(new.items(), version)
        for server in servers:
            assert all(bool((weight == version).all()) for weight in server.weights.values())
    folders = servers[0].folders()
    assert len(folders) == 3
    assert [folder.exists() for folder in folders] == [False, False, True]
    engine.close()
    assert not folders[-1].parent.exists()


def test_turns_under_way_continue_with_new_weights(make: Make, connect: Open) -> None:
    server = make(mode="mixed")
    engine = connect(server)
    assert isinstance(engine, KeepsTurns) and engine.keeps_turns
    server.gate.clear()
    submit(engine, range(2), max_tokens=5)
    until(lambda: server.now == 2)
    engine.load_weights(MODEL.named_parameters(), 1)
    assert server.paths().count("/pause?mode=keep") == server.paths().count("/resume") == 2
    server.gate.set()
    turns = finish(engine)
    assert [turn.versions for turn in turns.values()] == [(0, 0, 1, 1, 1)] * 2
    assert {turn.version for turn in turns.values()} == {1}
    assert len(server.turns) == 2  # nothing was cut, or asked for again
    server.mode = "well"
    submit(engine, [0], "more")  # the slot holds what it held
    finish(engine)
    assert server.turns[-1][0][:7] == [*RENDERER.encode_text("q0"), *turns[0].tokens]


def test_turns_on_a_server_that_misses_the_weights_are_sampled_again(
    make: Make, connect: Open
) -> None:
    bad, good = make(), make()
    engine = connect(bad, good)
    for server in (bad, good):
        server.gate.clear()
    submit(engine, range(4))
    until(lambda: bad.now == good.now == 2)
    bad.reloads = False
    engine.load_weights(MODEL.named_parameters(), 1)
    good.gate.set()
    assert {turn.version for turn in finish(engine).values()} == {1}
    assert len(good.turns) == 4
    for turn in bad.turns:
        assert turn in good.turns


def test_a_server_that_cannot_take_weights_is_left_out(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server, other = make(), make()
    engine = connect(server, other)
    server.reloads = False
    engine.load_weights(MODEL.named_parameters(), 1)
    assert "TMPDIR" in caplog.text
    before = len(server.turns)
    submit(engine, range(4))
    assert {turn.version for turn in finish(engine).values()} == {1}
    assert len(server.turns) == before
    other.reloads = False
    with pytest.raises(EngineError, match=r"no vLLM server can be used.*TMPDIR"):
        engine.load_weights(MODEL.named_parameters(), 2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"logprobs": "raw_logprobs"},
            EngineError,
            "not those at the sampling temp.*--logprobs-mode",
        ),
        ({"missing": {"/inference/v1/generate": 403}}, EngineError, "--enable-scale-out"),
        ({"missing": {"/collective_rpc": 404}}, EngineError, "VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/v1/models": 401}}, EngineError, "VLLM_API_KEY"),
        ({"workers": ["http://a:1", "http://b:1"]}, EngineError, "router.*server:http://a:1,http"),
        ({"balances": True}, EngineError, "another server each time: .* router or balancer"),
        ({"missing": {"/server_info": 404}}, EngineError, "DEV_MODE=1. Name each server itself"),
        ({"dtype": "bfloat16"}, EngineError, "weights in bfloat16.*gives them in float32"),
        ({"quantization": "fp8"}, EngineError, "weights in fp8 quantization"),
        ({"sizes": (2, 264, 64)}, EngineError, "another model: width 64, and the policy width 128"),
        ({"software": "0.33.0"}, EngineError, r"differ in version .*vLLM 0\.32\.0.*vLLM 0\.33\.0"),
        ({"gpus": None}, EngineError, "no vLLM server of release 0.32"),
        ({"context": 100}, ContextError, "100 tokens, too short for 200.*--max-model-len 200"),
    ],
)
def test_a_server_started_in_another_way_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str, make: Make, connect: Open
) -> None:
    first = make()
    with pytest.raises(error, match=message):
        connect(first, make(**settings))
    assert not first.paused


def test_servers_that_are_down_at_the_start(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    down, up = make(), make()
    down.stop()
    engine = connect(down, up)
    assert f"{down.url} cannot be used now: ClientConnectorError" in caplog.text
    submit(engine, [0])
    assert len(finish(engine)) == 1
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        connect(down)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([""], "no server's address"),
        (["localhost:8000"], "no server's address"),
        (["http://me:secret@host:1"], "may hold no password"),
        (["http://host:1", "http://host:1/v1/"], "name each one once"),
    ],
)
def test_addresses_that_cannot_be_used(urls: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_engine(f"server:{','.join(urls)}", MODEL, RENDERER, max_slots=1)
    assert "secret" not in str(caught.value)


def test_logits_that_are_not_finite(make: Make, connect: Open) -> None:
    engine = connect(make(mode="nan"))
    submit(engine, [0])
    with pytest.raises(NonFiniteError, match="version 0"):
        finish(engine)


def test_a_forgotten_engine_leaves_nothing_behind(make: Make) -> None:
    server = make()
    engine = connect_servers(MODEL, RENDERER, [server.url], 200)
    (folder,) = server.folders()
    assert folder.exists()
    submit(engine, [0])
    finish(engine)
    del engine
    gc.collect()
    assert not folder.parent.exists()
    until(lambda: all(thread.name != "servers" for thread in threading.enumerate()))


def test_it_is_made_by_its_name(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [make(), make()]
    monkeypatch.setenv("VLLM_API_KEY", "sesame\n")  # as a file of secrets ends
    name = f"server:{servers[0].url}/v1/, {servers[1].url}"
    engine = make_engine(name, MODEL, RENDERER, max_slots=4)
    assert engine.max_context == 256  # the model's
    for server in servers:
        assert server.paths()[0] == "/v1/models"
        assert set(server.keys) == {"Bearer sesame"}
    assert isinstance(engine, ServerEngine)
    engine.close()


def test_a_key_that_cannot_be_one_is_refused_and_not_shown(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "open\nsesame")
    with pytest.raises(ConfigError, match="VLLM_API_KEY holds characters") as caught:
        make_engine(f"server:{make().url}", MODEL, RENDERER, max_slots=1)
    assert "sesame" not in str(caught.value)


# Real servers.


class Vllm:
    """A real server, which can be started again on its port."""

    def __init__(self, folder: Path, transfer: str, plugin: dict[str, str]) -> None:
        self.transfer, self.plugin = transfer, plugin
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder.parent / f"{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            **self.plugin,
        }
        command = (
            f"-m vllm.entrypoints.openai.api_server --model {self.folder} --host 127.0.0.1 "
            f"--port {self.port} --dtype float32 --enforce-eager --max-model-len 256 "
            "--enable-scale-out --logprobs-mode processed_logprobs "
            f'--weight-transfer-config {{"backend":"{self.transfer}"}}'
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command.split()],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ready(self) -> None:
        deadline = time.monotonic() + 900
        while True:
            assert self.process
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start: {self.log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def version(self) -> str:
        return str(httpx.get(f"{self.url}/weight_info").json()["weight_version"])

    def checksums(self) -> Any:
        answer = httpx.post(f"{self.url}/weight_checker", json={"action": "checksum"}, timeout=60)
        return answer.json()["checksums"]

    def finished(self) -> int:
        """How many requests it has answered since its start."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(
            int(float(line.rpartition(" ")[2]))
            for line in lines
            if line.startswith("vllm:request_success_total")
        )


@pytest.fixture(scope="module")
def servers(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Vllm]]:
    """Two servers with weights that no test uses, and doubles of CUDA for their transfers."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    torch.manual_seed(9)
    model = tiny_qwen2(hidden=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    RENDERER.tokenizer.save_pretrained(folder)
    plugin = cuda_double.as_plugin(folder.parent / "plugin")
    both = [Vllm(folder, "nccl", plugin), Vllm(folder, "ipc", plugin)]
    for server in both:
        server.start()
    try:
        for server in both:
            server.ready()
        yield both
    finally:
        for server in both:
            server.kill()


def changed(model: Any, seed: int) -> Any:
    """The model with other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plays(engine: Engine, temperature: float = 0.0, **hooks: Any) -> list[Trajectory]:
    """24 trajectories of three turns each, of which many end inside the token ``>.``."""
    environments = make_environments(TOY, 8, {"turns": 3, "end": ">"})
    episodes = [(episode, sample) for episode in range(4) for sample in range(6)]
    limits = Limits(temperature=temperature, max_turn_tokens=24, max_prompt=100, max_response=200)
    return collect(engine, environments, RENDERER, episodes, limits, **hooks)


def tokens(trajectories: list[Trajectory]) -> list[list[int]]:
    return [trajectory.tokens for trajectory in trajectories]


def versions(trajectories: list[Trajectory]) -> set[int]:
    """The versions of the weights that any token was sampled with."""
    return {v for t in trajectories for s in t.segments if s.logprobs for v in s.versions or ()}


def worst_logprob(model: Any, trajectories: list[Trajectory], temperature: float) -> float:
    """The largest distance of a sampler's log-probability to a learner's."""
    worst, count = 0.0, 0
    for trajectory in trajectories:
        with torch.no_grad():
            logits = model(torch.tensor([trajectory.tokens])).logits[0].double()
        full = torch.log_softmax(logits / temperature, -1)
        at = 0
        for segment in trajectory.segments:
            for i, token in enumerate(segment.tokens):
                if segment.logprobs is not None:
                    worst = max(worst, abs(full[at - 1, token].item() - segment.logprobs[i]))
                    count += 1
                at += 1
    assert count > 500
    return worst


@pytest.mark.vllm
@pytest.mark.slow
def test_real_servers_take_weights_from_memory(
    servers: list[Vllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own transfers, on both sides; only CUDA and NCCL themselves are doubles."""
    cuda_double.install(monkeypatch.setattr)
    monkeypatch.setattr(weight_transfer, "require_gpu", lambda *_: None)
    monkeypatch.setattr(weight_transfer, "BUCKET", 2**18)  # of 1.5 MB
    model = changed(tiny_qwen2(hidden=128), 20)
    local = TransformersEngine(model, RENDERER, 8, 256)
    engines: list[Engine] = []
    for server in servers:
        name = f"server+{server.transfer}:{server.url}"
        engines.append(make_engine(name, model, RENDERER, max_slots=8))
    for version in range(4):
        if version:
            changed(model, version)
            local.load_weights(model.named_parameters(), version)
        expected = tokens(plays(local))
        for server, engine in zip(servers, engines, strict=True):
            before = server.version()
            if version:
                if version == 2:  # after a transfer that breaks off, too
                    cuda_double.break_off(after=3)
                engine.load_weights(model_weights(model), version)
                assert server.version() != before
            greedy = plays(engine)
            assert tokens(greedy) == expected
            assert versions(greedy) == {version}
            assert worst_logprob(model, greedy, 1.0) < 1e-4
    for server, engine in zip(servers, engines, strict=True):
        assert isinstance(engine, ServerEngine)
        engine.close()
        httpx.post(f"{server.url}/update_weight_version", json={"new_version": "default"})


@pytest.mark.vllm
@pytest.mark.slow
def test_real_servers(  # noqa: PLR0915
    servers: list[Vllm], caplog: pytest.LogCaptureFixture
) -> None:
    """One story, as each of its parts needs both servers: a minute to start."""
    caplog.set_level(logging.WARNING)
    model = tiny_qwen2(hidden=128)
    local = TransformersEngine(model, RENDERER, 8, 256)
    urls = ",".join(server.url for server in servers)
    engine = make_engine(f"server:{urls}", model, RENDERER, max_slots=8)

    # The servers have the model's weights, whatever they were started with.
    before = [server.finished() for server in servers]
    assert servers[0].version() == servers[1].version() != "default"
    greedy = plays(engine)
    assert tokens(greedy) == tokens(plays(local))
    ends = {segment.text[-1:] for t in greedy for segment in t.segments if segment.logprobs}
    assert ">" in ends or "." in ends
    finished = [
        server.finished() - already for server, already in zip(servers, before, strict=True)
    ]
    assert min(finished) > 10

    # Log-probabilities are the learner's at the sampling temperature, and seeds decide.
    for temperature in (1.0, 0.6):
        sampled = plays(engine, temperature)
        assert worst_logprob(model, sampled, temperature) < 1e-4
    assert tokens(plays(engine, temperature)) == tokens(sampled)
    assert tokens(plays(engine, temperature, seed=1)) != tokens(sampled)

    # New weights reach both.
    for version in (1, 2):
        changed(model, version)
        engine.load_weights(model.named_parameters(), version)
        local.load_weights(model.named_parameters(), version)
        assert servers[0].version() == servers[1].version()
        greedy = plays(engine)
        assert tokens(greedy) == tokens(plays(local))
        assert versions(greedy) == {version}
    assert worst_logprob(model, plays(engine, 1.0), 1.0) < 1e-4

    # Two ranks with sharded weights give them once, and sample what one process samples.
    assert isinstance(engine, ServerEngine)
    engine.close()  # a server is for one run: this one would give its own weights again
    arguments = [urls.split(","), "float32"]
    said = in_two_processes("tests.research_agent.server_worker", json.dumps({"real": arguments}))
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert servers[0].version() == servers[1].version()
    sums = [server.checksums() for server in servers]
    assert sums[0] == sums[1]
    plain = tiny_qwen2(hidden=128)
    engine = make_engine(f"server:{urls}", model, RENDERER, max_slots=8)
    engine.load_weights([(name, p.detach() * 2) for name, p in plain.named_parameters()], 2)
    assert [server.checksums() for server in servers] == sums
    for line in sorted(lines, key=lambda line: line["rank"]):
        for slot in range(4):
            seed = 4 * line["rank"] + slot
            params = SamplingParams(max_tokens=3, seed=seed)
            engine.submit(slot, RENDERER.encode_text(f"q{seed}"), params)
        alone = [[slot, list(turn.tokens), 2] for slot, turn in finish(engine).items()]
        assert sorted(alone) == [turn for turn in line["turns"] if turn[2] == 2]
        for slot in range(4):
            engine.release(slot)
    engine.load_weights(model.named_parameters(), 2)

    # One is killed in the middle.
    over: list[Trajectory] = []

    def kill_one(trajectory: Trajectory) -> None:
        over.append(trajectory)
        if len(over) == 6:
            servers[0].kill()

    greedy = plays(engine, on_finish=kill_one)
    assert tokens(greedy) == tokens(plays(local))
    assert not any(trajectory.void for trajectory in greedy)
    assert f"{servers[0].url} is left out" in caplog.text

    # It is started again while the weights change, and is used with the new ones only.
    changed(model, 3)
    engine.load_weights(model.named_parameters(), 3)
    local.load_weights(model.named_parameters(), 3)
    caplog.clear()  # on a busy machine it may have been away, and back, before
    servers[0].start()
    servers[0].ready()
    assert servers[0].finished() == 0
    until_back = time.monotonic() + 300
    while f"{servers[0].url} is back" not in caplog.text:
        assert time.monotonic() < until_back
        time.sleep(0.2)
    assert servers[0].version() == servers[1].version()
    greedy = plays(engine)
    assert tokens(greedy) == tokens(plays(local))
    assert servers[0].finished() > 10

    # All are killed.
    assert isinstance(engine, ServerEngine)
    engine.close()
    for server in servers:
        server.kill()
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        make_engine(f"server:{urls}", model, RENDERER, max_slots=8)
