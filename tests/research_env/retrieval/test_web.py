"""Against a local server that answers in the providers' documented formats, not the services."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval import Hit, Passage, open_retriever, web
from research_env.retrieval.base import Retriever
from research_env.retrieval.retry import Retry
from tests.research_env.retrieval.retriever_contract import (
    CLAUSES,
    PASSAGES,
    WORDS,
    Clause,
    contract_index,
    environments_travel,
    fails_in_place,
)
from tests.research_env.servers import Call, Reply, Server, as_json, serving

KEY = "s3cret-key-0123456789"
QUICK = Retry(deadline=20.0, first=0.001, longest=0.01)
KEYS = {"serper": "SERPER_API_KEY", "brave": "BRAVE_API_KEY", "tavily": "TAVILY_API_KEY"}
NAMES = (*KEYS, "searxng")


def asked(call: Call, name: str) -> tuple[str, int]:
    """The query and count of a request, refused as the provider would refuse it."""
    if name == "serper":  # POST /search, X-API-KEY, {"q", "num"}
        assert (call.method, call.headers["X-API-KEY"]) == ("POST", KEY)
        body = call.json()
        assert set(body) == {"q", "num"}
        return body["q"], body["num"]
    if name == "tavily":  # POST /search, bearer token, {"query", "max_results"}; 400 characters
        assert (call.method, call.headers["Authorization"]) == ("POST", f"Bearer {KEY}")
        body = call.json()
        assert set(body) == {"query", "max_results"}
        assert 0 < len(body["query"]) <= 400
        assert body["max_results"] <= 20
        return body["query"], body["max_results"]
    assert (call.method, call.body) == ("GET", b"")
    params = {key: values[0] for key, values in parse_qs(urlsplit(call.path).query).items()}
    if name == "brave":  # GET, X-Subscription-Token, q of 400 characters and 50 words, count to 20
        assert call.headers["X-Subscription-Token"] == KEY
        assert 0 < len(params["q"]) <= 400
        assert len(params["q"].split()) <= 50
        assert 1 <= int(params["count"]) <= 20
        return params["q"], int(params["count"])
    assert urlsplit(call.path).path == "/search"
    assert params.keys() == {"q", "format"}
    assert params["format"] == "json"
    return params["q"], 1000


def answered(name: str, results: list[Passage]) -> dict[str, Any]:
    """An answer in the provider's documented form, with fields beside those that are read."""
    match name:
        case "serper":
            organic = [
                {"title": p.title, "link": p.id, "snippet": p.text, "position": i}
                for i, p in enumerate(results, start=1)
            ]
            return {
                "searchParameters": {"q": "?", "type": "search", "engine": "google"},
                "organic": organic,
                "peopleAlsoAsk": [{"question": "?", "snippet": "s", "title": "t", "link": "l"}],
                "credits": 1,
            }
        case "brave":
            listed = [
                {"title": p.title, "url": p.id, "description": p.text, "family_friendly": True}
                for p in results
            ]
            return {
                "type": "search",
                "query": {"original": "?"},
                "mixed": {"type": "mixed"},
                "web": {"type": "search", "results": listed},
            }
        case "tavily":
            rows = [
                {
                    "url": p.id,
                    "title": p.title,
                    "content": p.text,
                    "score": 0.9,
                    "raw_content": None,
                }
                for p in results
            ]
            return {"query": "?", "answer": None, "images": [], "results": rows, "response_time": 1}
        case _:
            found = [
                {"url": p.id, "title": p.title, "content": p.text, "engine": "x", "score": 1.0}
                for p in results
            ]
            return {"query": "?", "number_of_results": 0, "results": found, "suggestions": []}


def provider(name: str, engine: Retriever) -> Callable[[Call], Reply]:
    def answer(call: Call) -> Reply:
        query, count = asked(call, name)
        (hits,) = engine.search([query], min(count, 100))
        assert not isinstance(hits, RetrievalError)
        return as_json(answered(name, [hit.passage for hit in hits]))

    return answer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retriever]:
    index = contract_index(tmp_path_factory.mktemp("web"))
    engine = open_retriever(f"embedded:{index}?corpus=any", None)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEYS.values():
        monkeypatch.setenv(variable, KEY)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(name: str, engine: Retriever) -> Iterator[Server]:
    with serving(provider(name, engine)) as server:
        yield server


def url_of(name: str, server: Server, options: str = "rate=10000") -> str:
    return f"web:{name}?url={server.url}&{options}"


def client(answer: Callable[[Call], Reply], name: str = "serper", **more: Any) -> Any:
    """A server and a client of it, with quick retries."""

    class Both:
        def __enter__(self) -> tuple[Server, web.WebRetriever]:
            self._serving = serving(answer)
            server = self._serving.__enter__()
            settings = {"rate": 10_000.0, "retry": QUICK, "url": server.url, **more}
            self._client = web.WebRetriever(web.PROVIDERS[name], KEY, **settings)
            return server, self._client

        def __exit__(self, *_: object) -> None:
            self._client.close()
            self._serving.__exit__(None, None, None)

    return Both()


# --- every provider -------------------------------------------------------------------------------


# The services with the strictest limits on queries, one asked by GET and one by POST.
STRICTEST = pytest.mark.parametrize("name", ["brave", "tavily"], indirect=True)


@STRICTEST
@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract(clause: Clause, name: str, server: Server) -> None:
    clause(lambda: open_retriever(url_of(name, server), None))


@STRICTEST
def test_environments_travel(server: Server, name: str) -> None:
    environments_travel(url_of(name, server))


def test_what_a_service_finds_is_found(server: Server, name: str, engine: Retriever) -> None:
    with closing(open_retriever(url_of(name, server), None)) as client:
        for ours, theirs in zip(client.search(WORDS, 3), engine.search(WORDS, 3), strict=True):
            assert [hit.passage for hit in ours] == [hit.passage for hit in theirs]  # type: ignore[union-attr]


def test_results_become_passages_in_their_order(name: str) -> None:
    with client(lambda _: as_json(answered(name, list(PASSAGES))), name) as (_, engine):
        (hits,) = engine.search(["q"], 3)
        assert hits == [Hit(PASSAGES[0], 1.0), Hit(PASSAGES[1], 1 / 2), Hit(PASSAGES[2], 1 / 3)]


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("serper", {"searchParameters": {}, "credits": 1}),
        ("brave", {"type": "search", "query": {}}),
        ("brave", {"type": "search", "web": None}),
        ("tavily", {"results": []}),
        ("searxng", {"results": []}),
        ("searxng", {"results": [], "unresponsive_engines": []}),
    ],
)
def test_no_results_are_no_hits(provider: str, answer: object) -> None:
    with client(lambda _: as_json(answer), provider) as (_, engine):
        assert engine.search(["q"], 3) == [[]]


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("serper", {"message": "Not enough credits"}),
        ("serper", {"organic": []}),
        ("brave", {"error": {"code": "RATE_LIMITED"}}),
        ("brave", {"type": "ErrorResponse", "web": None}),
        ("tavily", {"detail": {"error": "no plan"}}),
        ("searxng", {"results": [], "unresponsive_engines": [["google", "CAPTCHA\n"]]}),
    ],
)
def test_a_failure_with_status_200_is_not_taken_for_no_results(
    provider: str, answer: object
) -> None:
    with client(lambda _: as_json(answer), provider) as (_, engine):
        fails_in_place(engine, ["q"])


def test_some_engines_that_do_not_answer_void_no_results_of_others() -> None:
    answer = {**answered("searxng", list(PASSAGES)), "unresponsive_engines": [["google", "x"]]}
    with client(lambda _: as_json(answer), "searxng") as (_, engine):
        assert engine.search(["q"], 1) == [[Hit(PASSAGES[0], 1.0)]]


def test_a_result_may_lack_title_and_snippet(name: str) -> None:
    reply = answered(name, [Passage("https://a", "", "")])
    rows = reply.get("organic") or reply.get("results") or reply["web"]["results"]
    for key in ("title", "snippet", "description", "content"):
        rows[0].pop(key, None)
    with client(lambda _: as_json(reply), name) as (_, engine):
        assert engine.search(["q"], 3) == [[Hit(Passage("https://a", "", ""), 1.0)]]


NO_ROWS: tuple[object, ...] = (5, [5], [{}])
BROKEN: list[object] = [{"searchParameters": {}, "organic": rows} for rows in NO_ROWS]


@pytest.mark.parametrize("body", [None, [], 5, *BROKEN])
def test_another_format_fails_the_query(body: object) -> None:
    with client(lambda _: as_json(body)) as (server, engine):
        fails_in_place(engine, ["q"])
        assert len(server.calls) == 1


# --- limits ---------------------------------------------------------------------------------------

NONE = as_json({"searchParameters": {}, "organic": []})


def test_the_budget_ends_the_queries_of_a_run() -> None:
    with client(lambda _: NONE, budget=3) as (server, engine):
        assert engine.search(["1", "2", " "], 3) == [[], [], []]
        found = engine.search(["3", "4", "5", ""], 3)
        failed = [str(each) for each in found if isinstance(each, RetrievalError)]
        assert failed == ["the budget of 3 web requests is spent"] * 2
        assert found[3] == []
        assert len(server.calls) == 3


def test_a_second_retriever_of_a_process_has_no_second_budget(engine: Retriever) -> None:
    with serving(provider("serper", engine)) as server:
        url = f"web:serper?url={server.url}/second&rate=10000&budget=3"
        first, second = open_retriever(url, None), open_retriever(url, None)
        assert isinstance(first.search(["rock", "city"], 1)[1], list)
        first.close()
        found = second.search(["rock", "city"], 1)
        assert [str(each) for each in found if isinstance(each, RetrievalError)] == [
            "the budget of 3 web requests is spent"
        ]
        second.close()
        third = open_retriever(url, None)
        assert "spent" in str(fails_in_place(third, ["rock"])[0])
        third.close()
        assert len(server.calls) == 3


def test_attempts_count_against_the_budget() -> None:
    with client(lambda _: Reply(503), budget=2) as (server, engine):
        assert "budget" in str(fails_in_place(engine, ["q"])[0])
        assert len(server.calls) == 2


def test_requests_keep_to_the_rate() -> None:
    times: list[float] = []

    def answer(_: Call) -> Reply:
        times.append(time.monotonic())
        return NONE

    with client(answer, rate=20.0, retry=Retry(deadline=20.0)) as (_, engine):
        start = time.monotonic()
        assert engine.search([str(i) for i in range(5)], 3) == [[]] * 5
        assert time.monotonic() - start >= 4 / 20
        assert len(times) == 5


def test_a_turn_after_the_deadline_is_not_waited_for() -> None:
    with client(lambda _: NONE, rate=0.001) as (server, engine):
        found = engine.search(["1", "2", "3"], 3)
        assert (
            sorted(str(each) for each in found)[1:]
            == ["too many web searches for the rate and the deadline"] * 2
        )
        assert len(server.calls) == 1


def test_retries_and_refusals() -> None:
    replies = iter([Reply(429), Reply(500), NONE])
    with client(lambda _: next(replies), retry=Retry(20.0, 0.001, 0.01)) as (server, engine):
        assert engine.search(["q"], 3) == [[]]
        assert len(server.calls) == 3
    with client(lambda _: Reply(403)) as (server, engine):
        assert "status 403" in str(fails_in_place(engine, ["q"])[0])
        assert len(server.calls) == 1


def test_one_query_may_fail_alone() -> None:
    def answer(call: Call) -> Reply:
        return Reply(400) if call.json()["q"] == "bad" else NONE

    with client(answer) as (_, engine):
        first, bad, last = engine.search(["1", "bad", "2"], 3)
        assert first == last == []
        assert isinstance(bad, RetrievalError)


# --- keys and settings ----------------------------------------------------------------------------


def test_no_key_is_in_a_log_an_error_a_repr_or_a_recording(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for logger in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=logger)
    told = []

    def echoes(call: Call) -> Reply:  # a service that repeats the key in its error
        return Reply(401, f"bad key {KEY} in {dict(call.headers)}".encode())

    made: list[web.HttpRequest] = []
    spied = web.PROVIDERS[name]

    def request(*arguments: Any) -> web.HttpRequest:
        made.append(spied.request(*arguments))
        return made[-1]

    with serving(echoes) as server:
        record = tmp_path / "record.sqlite"
        engine = open_retriever(f"{url_of(name, server)}&cache={record}", None)
        told += [str(e) + repr(e) for e in fails_in_place(engine, ["q"])]
        told.append(repr(engine))
        engine.close()
        told.append(record.read_bytes().decode("latin-1"))
        direct = web.WebRetriever(replace(spied, request=request), KEY, url=server.url, retry=QUICK)
        told += [str(e) + repr(e) for e in fails_in_place(direct, ["q"])]
        told += [repr(direct), repr(direct.__dict__["_provider"]), *map(repr, made)]
        direct.close()
    assert made
    assert any("status 401" in each for each in told)
    assert KEY not in "".join(told)
    assert caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("name", list(KEYS), indirect=True)
def test_a_key_that_is_missing_or_no_key_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", "  "):
        monkeypatch.setenv(KEYS[name], value)
        with pytest.raises(ConfigurationError, match=KEYS[name]):
            open_retriever(f"web:{name}", None)
    for value in ("s3cret\nX-Other: 1", "s3crét"):
        monkeypatch.setenv(KEYS[name], value)
        with pytest.raises(ConfigurationError, match=KEYS[name]) as caught:
            open_retriever(f"web:{name}", None)
        assert "s3cr" not in str(caught.value)


def test_queries_are_sent_as_one_short_line() -> None:
    with client(lambda _: NONE) as (server, engine):
        engine.search(["a\n b\0\x1bc\ud800 \t d", "w " * 80, "x" * 1000], 3)
        sent = sorted(call.json()["q"] for call in server.calls)
        assert sent == ["a b c d", " ".join(["w"] * 50), "x" * 400]
        engine.search(WORDS, 3)
        assert {call.json()["q"] for call in server.calls[3:]} == set(WORDS)
