"""The server engine, on servers that obey a test and on real ones of vLLM's."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from research_agent.engines.servers import pool, weight_sync
from research_agent.engines.servers.engine import ServerEngine, connect_servers
from research_agent.errors import (
    ConfigError,
    ContextError,
    EngineError,
    ModelError,
    NonFiniteError,
    ResearchAgentError,
)
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_qwen2
from tests.research_agent.fake_vllm import FakeVllm, script

RENDERER = make_renderer(byte_tokenizer(merges=True))
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
    monkeypatch.setattr(pool, "_TURN_TIMEOUT", 10.0)
    monkeypatch.setattr(pool, "SERVER_TIMEOUT", 0.3)
    monkeypatch.setattr(weight_sync, "SERVER_TIMEOUT", 0.3)
    monkeypatch.setattr(weight_sync, "_RETRY_PAUSE", 0.05)
    engines: list[ServerEngine] = []

    def start(*servers: FakeVllm, **settings: Any) -> ServerEngine:
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


def submit_at_once(
    engine: Engine, servers: Sequence[FakeVllm], slots: Sequence[int], text: str = "q{}"
) -> None:
    """Submit turns of which none ends before the servers have all; their gates stay closed."""
    for server in servers:
        server.gate.clear()
    submit(engine, slots, text)
    until(lambda: sum(server.now for server in servers) == len(slots))


def finish_at_once(engine: Engine, servers: Sequence[FakeVllm]) -> None:
    for server in servers:
        server.gate.set()
    finish(engine)


def test_the_server_with_least_to_do_gets_the_turn(make: Make, connect: Open) -> None:
    servers = [make(), make(), make()]
    engine = connect(*servers)
    submit_at_once(engine, servers, range(12))
    assert [server.now for server in servers] == [4, 4, 4]


def test_a_trajectory_stays_where_its_prefix_is(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    for turn in range(4):
        slots = range(6) if turn % 2 else range(5, -1, -1)  # in another order
        submit_at_once(engine, servers, slots, "q{}" if turn == 0 else "more")
        finish_at_once(engine, servers)
    homes = [{tuple(tokens[:2]) for tokens, _ in server.turns} for server in servers]
    assert [len(home) for home in homes] == [3, 3]
    assert not homes[0] & homes[1]
    assert [len(server.turns) for server in servers] == [12, 12]


def test_a_trajectory_leaves_a_server_that_is_much_busier(make: Make, connect: Open) -> None:
    servers = [make(), make()]
    engine = connect(*servers)
    submit_at_once(engine, servers, range(20))
    finish_at_once(engine, servers)
    at_home = [
        slot
        for slot in range(20)
        if any(tokens == RENDERER.encode_text(f"q{slot}") for tokens, _ in servers[0].turns)
    ]
    assert len(at_home) == 10
    submit_at_once(engine, servers, at_home, "more")
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


def test_turns_in_flight_are_no_more_than_the_connections_that_may_be_open(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "allow_open_files", lambda _: 512 + 5)
    server = make()
    engine = connect(server)
    server.gate.clear()
    submit(engine, range(6))
    until(lambda: server.now == 2)
    server.gate.set()
    assert len(finish(engine)) == 6
    assert server.most == 2


def test_turns_that_take_long_keep_no_server_from_being_looked_after(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server = make()
    engine = connect(server, max_in_flight=2)
    server.gate.clear()
    submit(engine, range(4))
    until(lambda: server.now == 2)
    asked, looks = len(server.turns), server.paths().count("/health")
    until(lambda: server.paths().count("/health") > looks + 1)  # they wait for no connection
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
    *,
    fault: str,
    make: Make,
    connect: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = connect(make())
    submit(alone, range(8))
    wanted = finish(alone)
    bad, good = make(), make()
    engine = connect(bad, good)
    monkeypatch.setattr(pool, "_TURN_TIMEOUT", 2.0 if fault == "hang" else 10.0)
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
    bad.missing = {"/health": 503, "/weight_info": 503}
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


def test_a_turn_that_every_server_fails_at_is_an_error(
    make: Make, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [make(mode="500"), make(mode="500")]
    engine = connect(*servers)
    monkeypatch.setattr(pool, "SERVER_TIMEOUT", 10.0)
    submit(engine, [0])
    with pytest.raises(EngineError, match=r"6 attempts to sample one turn of 2 tokens.*memory"):
        finish(engine)
    assert sum(len(server.turns) for server in servers) == 6


def test_a_server_that_comes_back_waits_for_the_next_weights(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server, other = make(), make()
    engine = connect(server, other)
    server.mode, server.fails = "500", 1
    server.missing = {"/weight_info": 503}
    submit(engine, range(2))
    finish(engine)
    assert "1 of 2 servers left" in caplog.text
    engine.load_weights(MODEL.named_parameters(), 1)
    assert server.version.split("-")[1] == "0"
    server.missing.clear()
    looks = server.paths().count("/weight_info")
    until(lambda: server.paths().count("/weight_info") > looks + 1)
    asked = len(server.turns)
    submit(engine, range(2), "more")
    assert [turn.version for turn in finish(engine).values()] == [1, 1]
    assert len(server.turns) == asked
    new = {name: torch.full_like(p, 0.5) for name, p in MODEL.named_parameters()}
    engine.load_weights(new.items(), 2)
    assert f"{server.url} is back" in caplog.text
    assert all(bool((weight == 0.5).all()) for weight in server.weights.values())
    submit(engine, [2])  # for the one that has sampled less
    assert [turn.version for turn in finish(engine).values()] == [2]
    assert server.version == other.version
    assert len(server.turns) == asked + 1
    submit(engine, [3])
    assert [turn.version for turn in finish(engine).values()] == [2]


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
    assert not any(folder.exists() for folder in folders)  # nobody needs what has been read
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


def test_a_server_that_stays_paused_is_left_out_until_the_next_weights(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the name of the current weights, and answers no turn."""
    bad, good = make(), make()
    engine = connect(bad, good)
    with monkeypatch.context() as patch:
        patch.setattr(bad, "_pause", lambda paused: {} if paused else b"500")
        bad.paused = True
        engine.load_weights(((name, p.detach()) for name, p in MODEL.named_parameters()), 1)
        assert f"{bad.url} is left out" in caplog.text
        bad.calls.clear()
        until(lambda: bad.paths().count("/weight_info") > 2)  # it is still looked at
        submit(engine, range(4))
        assert {turn.version for turn in finish(engine).values()} == {1}
        assert not bad.turns
        assert f"{bad.url} is back" not in caplog.text
    engine.load_weights(((name, p.detach()) for name, p in MODEL.named_parameters()), 2)
    assert f"{bad.url} is back" in caplog.text


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


def test_a_server_that_comes_back_with_another_release_is_left_out(
    make: Make, connect: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server, other = make(), make()
    engine = connect(server, other)
    server.stop()
    engine.load_weights(MODEL.named_parameters(), 1)
    make(port=int(server.url.rpartition(":")[2]), software="0.33.0")
    caplog.clear()
    for version in (2, 3):
        engine.load_weights(MODEL.named_parameters(), version)
        submit(engine, [0])
        assert finish(engine)[0].version == version
    assert f"{server.url} is back" not in caplog.text


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
        ({"missing": {"/inference/v1/generate": 401}}, EngineError, "VLLM_API_KEY"),
        ({"workers": ["http://a:1", "http://b:1"]}, EngineError, "router.*server:http://a:1,http"),
        (
            {"balances": True},
            EngineError,
            "another process answers each time.*--api-server-count 1.*balancer",
        ),
        ({"missing": {"/server_info": 404}}, EngineError, "DEV_MODE=1.* Name each server itself"),
        ({"dtype": "bfloat16"}, EngineError, "weights in bfloat16.*gives them in float32"),
        ({"quantization": "fp8"}, EngineError, "weights in fp8 quantization"),
        ({"sizes": (2, 264, 64)}, EngineError, "another model: width 64, and the policy width 128"),
        ({"software": "0.33.0"}, EngineError, r"differ in version .*vLLM 0\.32\.0.*vLLM 0\.33\.0"),
        (
            {"gpus": None},
            EngineError,
            "get_world_size gives an answer of another form",
        ),
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
    assert f"{down.url} is left out (ClientConnectorError" in caplog.text
    submit(engine, [0])
    assert len(finish(engine)) == 1
    with pytest.raises(EngineError, match="no vLLM server can be used"):
        connect(down)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([""], "no server's address"),
        (["http://host:1", "http://host:1/v1/"], "name each one once"),
    ],
)
def test_addresses_that_cannot_be_used(urls: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(f"server:{','.join(urls)}", MODEL, RENDERER, max_slots=1)


def test_logits_that_are_not_finite(make: Make, connect: Open) -> None:
    engine = connect(make(mode="nan"))
    submit(engine, [0])
    with pytest.raises(NonFiniteError, match="version 0"):
        finish(engine)


def test_a_forgotten_engine_leaves_nothing_behind(make: Make) -> None:
    server = make()
    engine = connect_servers(MODEL, RENDERER, [server.url], 200)
    (folder,) = server.folders()
    assert folder.parent.exists()
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
