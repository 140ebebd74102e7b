"""The engine of OpenAI-compatible endpoints, in front of a server that obeys a test."""

from __future__ import annotations

import gzip
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.engines.openai import OpenAIEngine, OpenAIRenderer
from research_agent.engines.remote import turn_seed
from research_agent.environments import make_environments
from research_agent.errors import ConfigError, ContextError, EngineError
from research_agent.rollout import collect
from tests.research_agent.test_rollout import TOY, Limits

KEY = "sk-not-for-logs"
Answer = tuple[int, Any, dict[str, str]]


class Endpoint:
    """A server that answers with what the test puts in.

    Attributes:
        answers: the next ones, in order; behind them all are ``says``.
        says: makes an answer from the body of a request.
        asked: path and body of each request.
        most: how many were answered at a time, at most.
    """

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.says: Callable[[dict[str, Any]], Answer] = lambda _: well("hm")
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.at: list[float] = []
        self.now = self.most = 0
        self.delay = 0.0
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.asked.append((self.path, body))
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.at.append(time.monotonic())
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                    queued = endpoint.answers.pop(0) if endpoint.answers else None
                time.sleep(endpoint.delay)
                status, reply, headers = queued or endpoint.says(body)
                with lock:
                    endpoint.now -= 1
                if reply is None:
                    self.close_connection = True
                    return
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                length = str(len(data))
                for name, value in ({"Content-Length": length} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = "Content-Length" in headers

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


def well(text: str, reason: str | None = "stop", *, chat: bool = False, **more: Any) -> Answer:
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return 200, {"choices": [{**said, "finish_reason": reason, **more}]}, {}


def failed(status: int, message: str = "not now", **headers: str) -> Answer:
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for speed: the pauses of openai's retries begin at half a second."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001, raising=False)


@pytest.fixture
def connect(endpoint: Endpoint) -> Iterator[Callable[..., OpenAIEngine]]:
    engines: list[OpenAIEngine] = []

    def start(*, chat: bool = False, **settings: Any) -> OpenAIEngine:
        settings = {"deadline": 30.0} | settings
        engines.append(OpenAIEngine(endpoint.url, "m", OpenAIRenderer(chat), **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def ask(engine: Any, text: str = "Q?", slot: int = 0, **params: Any) -> Completion:
    """A first turn, or a later one, to its end."""
    renderer = engine._renderer
    first = slot not in engine._conversations
    tokens = renderer.encode_prompt(text) if first else renderer.encode_text(text)
    engine.submit(slot, tokens, SamplingParams(**({"stop": ("</search>",)} | params)))
    return finish(engine)[slot]


def finish(engine: Engine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while engine.busy:
        done |= {completion.slot: completion for completion in engine.step()}
    return done


@given(st.text(st.characters(codec=None)))
def test_the_renderer_loses_no_character(text: str) -> None:
    for chat in (False, True):
        renderer = OpenAIRenderer(chat)
        assert renderer.decode(renderer.encode_text(text)) == text
        assert renderer.decode(renderer.encode_prompt(text)) == text
        assert renderer.encode_text(text) == renderer.encode_text(text)


def test_pieces() -> None:
    renderer = OpenAIRenderer()
    tokens = renderer.encode_text("Who built the Brooklyn Bridge?\n\n<answer>")
    assert [renderer.decode([token]) for token in tokens] == [
        *("Who", " built", " the", " Brook", "lyn", " Bridg", "e", "?"),
        *("\n", "\n<", "answe", "r", ">"),
    ]


def test_messages_come_back_from_their_tokens() -> None:
    renderer = OpenAIRenderer(chat_template=True)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "role user\n"},
        {"role": "assistant", "content": ""},
    ]
    assert renderer.messages(renderer.encode_prompt("not used", messages)) == messages
    assert renderer.messages(renderer.encode_text("role user")) == []


def test_turns_of_text(endpoint: Endpoint, connect: Callable[..., OpenAIEngine]) -> None:
    endpoint.answers = [
        well("I look. <search>Citibank", stop_reason="</search>"),
        well("1812.", stop_reason=None),
    ]
    engine = connect()
    first = ask(engine, "Who founded it?\n", temperature=0.5, max_tokens=90, seed=3)
    assert first.text == "I look. <search>Citibank</search>"
    assert first.finish_reason == "stop"
    assert engine._renderer.decode(first.tokens) == first.text
    assert len(first.logprobs) == len(first.tokens) > 5
    assert all(math.isnan(logprob) for logprob in first.logprobs)
    second = ask(engine, "\n<result>Osgood</result>\n", seed=3)
    assert (second.text, second.finish_reason) == ("1812.", "end")
    prompt = "Who founded it?\n"
    position = len(engine._renderer.encode_text(prompt))
    assert endpoint.asked[0] == (
        "/v1/completions",
        {
            "model": "m",
            "prompt": prompt,
            "max_tokens": 90,
            "temperature": 0.5,
            "top_p": 1,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": turn_seed(3, position),
            "stop": ["</search>"],
        },
    )
    assert endpoint.asked[1][1]["prompt"] == prompt + first.text + "\n<result>Osgood</result>\n"
    assert endpoint.asked[1][1]["seed"] != endpoint.asked[0][1]["seed"]
    engine.release(0)
    with pytest.raises(ContextError, match="holds nothing"):
        engine.submit(0, [], SamplingParams())


@pytest.mark.parametrize(
    ("said", "more", "stop", "text", "ending"),
    [
        # The server says which it was, or that it was none.
        ("<search>x", {"stop_reason": "</search>"}, ["</search>"], "<search>x</search>", "stop"),
        ("<search>x", {"stop_reason": None}, ["</search>"], "<search>x", "end"),
        ("<search>x", {"stop_reason": 17}, ["</search>"], "<search>x", "end"),
        # It says nothing: only one that was left open can have ended the turn.
        ("<search>x", {}, ["</search>"], "<search>x</search>", "stop"),
        ("<answer>x", {}, ["</search>"], "<answer>x", "end"),
        ("<search>x</search>", {}, ["</search>"], "<search>x</search>", "stop"),  # it left it there
        ("<answer>x", {}, ["</search>", "</answer>"], "<answer>x</answer>", "stop"),
        ("<answer><search>x", {}, ["</search>", "</answer>"], "<answer><search>x", "end"),
        (
            "<|begin_of_query|>x",
            {},
            ["<|end_of_query|>"],
            "<|begin_of_query|>x<|end_of_query|>",
            "stop",
        ),
        ("So x", {}, ["\n"], "So x\n", "stop"),
        ("So x", {}, [], "So x", "end"),
        ("<search>x", {"reason": "length"}, ["</search>"], "<search>x", "length"),
        ("", {"reason": "content_filter"}, ["</search>"], "", "length"),
        ("", {}, ["</search>"], "", "end"),
    ],
)
def test_the_stop_string_is_put_back(
    *,
    said: str,
    more: dict[str, Any],
    stop: list[str],
    text: str,
    ending: str,
    endpoint: Endpoint,
    connect: Callable[..., OpenAIEngine],
) -> None:
    endpoint.answers = [well(said, **more)]
    turn = ask(connect(), stop=tuple(stop), max_tokens=1)
    assert (turn.text, turn.finish_reason) == (text, ending)


def test_chat_continues_the_answer(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.answers = [well("<search>x", chat=True), well("", chat=True), well("y", chat=True)]
    engine = connect(chat=True)
    ask(engine, "Q?")
    ask(engine, "<result>r</result>")
    ask(engine, " more ")
    assert {path for path, _ in endpoint.asked} == {"/v1/chat/completions"}
    assert endpoint.asked[0][1]["messages"] == [{"role": "user", "content": "Q?"}]
    assert "continue_final_message" not in endpoint.asked[0][1]
    body = endpoint.asked[1][1]
    assert body["messages"] == [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "<search>x</search><result>r</result>"},
    ]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert endpoint.asked[2][1]["messages"][-1]["content"].endswith("<result>r</result> more ")


def test_chat_continues_a_prefilled_answer(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda _: well("x", chat=True, stop_reason=None)
    engine = connect(chat=True)
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "<think>"}]
    engine.submit(0, engine._renderer.encode_prompt("", messages), SamplingParams())
    finish(engine)
    ask(engine, "!")
    assert endpoint.asked[0][1]["messages"] == messages
    assert endpoint.asked[0][1]["continue_final_message"] is True
    assert endpoint.asked[1][1]["messages"][1:] == [{"role": "assistant", "content": "<think>x!"}]


def test_chat_without_continuation_takes_turns(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine], caplog: pytest.LogCaptureFixture
) -> None:
    def says(body: dict[str, Any]) -> Answer:
        known = "continue_final_message" not in body
        return well("a", chat=True) if known else failed(400, "Unrecognized request argument")

    endpoint.says = says
    engine = connect(chat=True)
    for text in ("Q?", "one", "", "two"):
        ask(engine, text)
    assert endpoint.asked[-1][1]["messages"] == [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "aa"},  # nothing was said in between
        {"role": "user", "content": "two"},
    ]
    refused = [body for _, body in endpoint.asked if "continue_final_message" in body]
    assert len(refused) == 1
    assert len(endpoint.asked) == 5
    assert "observations are sent as user messages" in caplog.text


def test_the_whole_distribution_is_sampled_whatever_the_servers_defaults(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    def says(body: dict[str, Any]) -> Answer:
        if endpoint is strict and "min_p" in body:
            return failed(400, "Unrecognized request argument supplied: min_p")
        return well("a")

    strict: Endpoint | None = None
    endpoint.says = says
    ask(connect(), "Q?")
    body = endpoint.asked[-1][1]
    assert (body["top_p"], body["top_k"], body["min_p"]) == (1, -1, 0)
    assert body["repetition_penalty"] == 1
    strict = endpoint
    engine = connect()
    del endpoint.asked[:]
    assert ask(engine, "Q?").text == "a"
    ask(engine, "more")
    assert ["min_p" in body for _, body in endpoint.asked] == [True, False, False]


def test_ollama_neither_continues_answers_nor_texts(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine], caplog: pytest.LogCaptureFixture
) -> None:
    def says(body: dict[str, Any]) -> Answer:
        status, reply, headers = well("a", chat="messages" in body)
        return status, {**reply, "system_fingerprint": "fp_ollama"}, headers

    endpoint.says = says
    engine = connect(chat=True)
    ask(engine, "Q?")
    ask(engine, "one")
    assert endpoint.asked[-1][1]["messages"][1:] == [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "one"},
    ]
    assert "does not continue an answer (it is Ollama)" in caplog.text
    with pytest.raises(EngineError, match=r"is Ollama.*add --chat-template"):
        ask(connect(), "Q?")


def test_refusals_of_requests_in_flight_together_are_one(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine], caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(4)

    def says(body: dict[str, Any]) -> Answer:
        if "continue_final_message" not in body:
            return well("a", chat=True)
        together.wait(30)  # none is refused before all are asked
        return failed(400, "Unrecognized request argument")

    endpoint.says = says
    engine = connect(chat=True)
    for slot in range(4):
        ask(engine, "Q?", slot)
    for slot in range(4):
        engine.submit(slot, engine._renderer.encode_text("one"), SamplingParams())
    assert [turn.text for turn in finish(engine).values()] == ["a"] * 4
    assert endpoint.asked[-1][1]["messages"][1:] == [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "one"},
    ]
    assert caplog.text.count("observations are sent as user messages") == 1


def test_an_answer_without_its_reasoning_is_refused_where_no_tools_are_called(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    message = {"role": "assistant", "content": "12", "reasoning_content": "I look. <search>x"}
    endpoint.says = lambda _: (
        200,
        {"choices": [{"message": message, "finish_reason": "stop"}]},
        {},
    )
    with pytest.raises(EngineError, match=r"the reasoning out .*without --reasoning-parser"):
        ask(connect(chat=True))
    engine = connect(chat=True)
    tool = {"type": "function", "function": {"name": "search"}}
    engine.submit(0, engine._renderer.encode_prompt("Q?", None, [tool]), SamplingParams())
    assert finish(engine)[0].text == "12"  # such an answer is a message of its own


FAULTS: dict[str, Answer] = {
    "503 of a proxy": (503, b"<html>upstream</html>", {}),
    "empty": (200, b"", {}),
    "rubbish": (200, b"ok <", {}),
    "cut": (200, None, {}),
    "truncated": (200, b'{"choices": [{"text": "h', {"Content-Length": "500"}),
    "nested rubbish": (200, b"[" * 100_000, {}),
    "another shape": (200, {"object": "list", "choices": []}, {}),
    "a list": (200, [1, 2], {}),
    "a text that is none": (200, {"choices": [{"text": 5, "finish_reason": "stop"}]}, {}),
    "not finished": well("h", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_failures_are_retried(
    fault: str, endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.answers = [FAULTS[fault], FAULTS[fault], well("well", stop_reason=None)]
    turn = ask(connect())
    assert (turn.text, turn.finish_reason) == ("well", "end")
    assert len(endpoint.asked) == 3
    assert endpoint.asked[0] == endpoint.asked[2]


@pytest.mark.parametrize("fault", ["503 of a proxy", "truncated", "nested rubbish"])
def test_lasting_failures_are_raised(
    fault: str, endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda _: FAULTS[fault]
    engine = connect(max_retries=2)
    with pytest.raises(EngineError) as caught:
        ask(engine)
    assert len(endpoint.asked) == 3
    for word in (endpoint.url, "'m'", "What was played is kept"):
        assert word in str(caught.value)
    assert not engine.busy


def test_retry_after_beyond_two_minutes_is_not_waited_for(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda _: failed(429, "no more today", **{"Retry-After": "3600"})
    with pytest.raises(EngineError, match=r"no more today\. Send fewer requests at a time"):
        ask(connect())
    assert len(endpoint.asked) == 1


def test_the_deadline_is_one_of_all_retries(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda _: failed(503, **{"Retry-After": "60"})
    with pytest.raises(EngineError, match=r"no answer within 0\.3 s\. Is it up"):
        ask(connect(deadline=0.3))
    endpoint.says, endpoint.delay = lambda _: well("late"), 3.0
    with pytest.raises(EngineError, match=r"no answer within 0\.3 s\. Is it up"):
        ask(connect(deadline=0.3))


def test_a_proxy_of_the_environment_is_used(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", endpoint.url.removesuffix("/v1"))
    engine = OpenAIEngine("http://model.invalid/v1", "m", OpenAIRenderer())
    assert ask(engine).text == "hm"
    engine.close()
    assert [path for path, _ in endpoint.asked] == ["http://model.invalid/v1/completions"]


def test_down(endpoint: Endpoint, connect: Callable[..., OpenAIEngine]) -> None:
    endpoint.http.shutdown()
    endpoint.http.server_close()
    with pytest.raises(EngineError, match=r"ConnectError.*Is it up, and its address right"):
        ask(connect(max_retries=1))


def test_answers_that_could_fill_the_memory_are_refused(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = b"\0" * 30_000_000
    for _ in range(3):
        stacked = gzip.compress(stacked, mtime=0)
    assert len(stacked) < 1_000
    endpoint.says = lambda _: (200, stacked, {"Content-Encoding": "gzip, gzip, gzip"})
    with pytest.raises(EngineError, match="an answer in Content-Encoding 'gzip, gzip, gzip'"):
        ask(connect())
    monkeypatch.setattr("research_agent.engines.openai._LARGEST_ANSWER", 1 << 20)
    endpoint.says = lambda _: well("x" * (2 << 20))
    with pytest.raises(EngineError, match="an answer of over 1 MB"):
        ask(connect())
    assert len(endpoint.asked) == 2  # neither is requested again


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "OPENAI_API_KEY"),
        (403, "OPENAI_API_KEY"),
        (404, "--chat-template"),
        (400, "status 400: not now"),
        (418, "status 418"),
    ],
)
def test_refusals_are_not_asked_again(
    status: int, message: str, endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda _: failed(status)
    with pytest.raises(EngineError, match=message):
        ask(connect())
    assert len(endpoint.asked) == 1


def test_the_key_is_sent_and_never_shown(
    endpoint: Endpoint,
    connect: Callable[..., OpenAIEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.answers = [well(f"it is {KEY}")]
    engine = connect()
    assert ask(engine).text == "it is [redacted]"
    assert endpoint.keys == [f"Bearer {KEY}"]
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    percent = "".join(f"%{ord(c):02X}" for c in KEY)
    for status in (400, 401):
        for form in (KEY, escaped, percent, f"{KEY[:10]}...", f"{'x' * 290} {KEY}"):
            endpoint.says = lambda _, s=status, f=form: failed(s, f"wrong key {f}")  # type: ignore[misc]
            with pytest.raises(EngineError) as caught:
                ask(engine)
            for shown in (str(caught.value), repr(caught.value), caplog.text):
                assert not any(each in shown for each in (KEY[:8], escaped[:30], percent[:15]))
    assert KEY not in repr(engine) + repr(vars(engine))


def test_without_a_key_none_is_sent(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask(connect())
    assert endpoint.keys == [None]


def limited(body: dict[str, Any], room: int) -> Answer:
    """An endpoint whose context has room for so many words of prompt and answer."""
    used = len(body["prompt"].split())
    if used + body["max_tokens"] > room:
        return failed(400, f"This model's maximum context length is {room} tokens")
    return well(" ha" * body["max_tokens"], "length")


def test_an_answer_fills_the_context(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.says = lambda body: limited(body, 20)
    turn = ask(connect(), "one two three", max_tokens=1000)
    assert turn.text == " ha" * 17
    assert turn.finish_reason == "length"
    engine = connect()
    ask(engine, "one two three", max_tokens=14)
    turn = ask(engine, " four five six", max_tokens=5)
    assert (turn.text, turn.tokens, turn.finish_reason) == ("", (), "length")
    with pytest.raises(ContextError, match=r"does not fit the model 'm'.*length is 20 tokens"):
        ask(engine, "so " * 30, slot=1)


def test_models_that_call_the_limit_by_another_name(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    engine = connect(chat=True)
    endpoint.says = lambda b: failed(400, message) if "max_tokens" in b else well("hm", chat=True)
    assert ask(engine, max_tokens=7).text == "hm"
    assert endpoint.asked[-1][1]["max_completion_tokens"] == 7


def test_the_limit_of_requests_in_flight_together_stays_under_another_name(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    together = threading.Barrier(4)

    def says(body: dict[str, Any]) -> Answer:
        if "max_tokens" not in body:
            return well("hm", chat=True)
        together.wait(30)  # none is refused before all are asked
        return failed(400, message)

    endpoint.says = says
    engine = connect(chat=True)
    for slot in range(4):
        tokens = engine._renderer.encode_prompt(f"q{slot}")
        engine.submit(slot, tokens, SamplingParams(max_tokens=300))
    assert len(finish(engine)) == 4
    assert [body.get("max_completion_tokens") for _, body in endpoint.asked[4:]] == [300] * 4


def test_requests_at_a_time_are_bounded(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    endpoint.delay = 0.05
    engine = connect(concurrency=3)
    for slot in range(9):
        engine.submit(slot, engine._renderer.encode_text(f"q{slot}"), SamplingParams())
    with pytest.raises(ValueError, match="slot 0 has a turn under way"):
        engine.submit(0, [1], SamplingParams())
    assert engine.busy == 9
    assert len(finish(engine)) == 9
    assert endpoint.most == 3


def test_episodes_through_an_endpoint(
    endpoint: Endpoint, connect: Callable[..., OpenAIEngine]
) -> None:
    """The copy game, by a model that copies; one that is down in between."""
    endpoint.says = lambda body: well(body["prompt"][-2], stop_reason=None)
    endpoint.answers = [failed(500), (200, b"", {})]
    engine = connect()
    renderer: Any = engine._renderer
    environments = make_environments(TOY, 3, {"turns": 3})
    episodes = [(episode, 0) for episode in range(4)]
    for overlap in (False, True):
        played = collect(engine, environments, renderer, episodes, Limits(overlap=overlap))
        assert [trajectory.metrics["right"] for trajectory in played] == [1.0] * 4
        assert [s.text for s in played[1].segments] == ["b=", "b", "?c=", "c", "?d=", "d"]
    assert not engine.busy


def test_it_is_not_for_training(connect: Callable[..., OpenAIEngine]) -> None:
    with pytest.raises(EngineError, match="cannot take weights"):
        connect().load_weights([], 1)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000/v1", "http://me:pass@host/v1", "ftp://host"),
        *("http://host/v1?api-key=pass@", "http://host/sk-not-for-logs/v1", "http://host:x/v1"),
    ],
)
def test_addresses_that_cannot_be_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError) as caught:
        OpenAIEngine(url, "m", OpenAIRenderer())
    assert "pass@" not in str(caught.value)
    assert KEY not in str(caught.value)
