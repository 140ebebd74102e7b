from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval import Hit, Passage, open_retriever
from research_env.retrieval.base import Retriever
from research_env.retrieval.http import HttpRetriever
from research_env.retrieval.retry import Deadline, Retry
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

QUICK = Retry(deadline=20.0, first=0.001, longest=0.01)


def search_r1(engine: Retriever, *, ids: bool = True) -> Callable[[Call], Reply]:
    """Answers as search_r1/search/retrieval_server.py does, over another engine.

    Its dense retriever hands out the lines of the corpus ({"id", "contents"}), its BM25 retriever
    {"title", "text", "contents"} without an id. A body that pydantic refuses is a 422.
    """

    def document(passage: Passage) -> dict[str, str]:
        contents = f'"{passage.title}"\n{passage.text}'
        if ids:
            return {"id": passage.id, "contents": contents}
        title, _, text = contents.partition("\n")
        return {"title": title.strip('"'), "text": text, "contents": contents}

    def answer(call: Call) -> Reply:
        body = call.json()
        queries = body["queries"]
        strings = all(isinstance(query, str) for query in queries)
        if (call.method, call.path) != ("POST", "/retrieve") or not strings:
            return as_json({"detail": "no"}, 422)
        try:
            [query.encode() for query in queries]
        except UnicodeEncodeError:  # pydantic: string_unicode
            return as_json({"detail": "string_unicode"}, 422)
        result: list[list[Any]] = []
        for hits in engine.search(queries, body.get("topk") or 3):
            assert not isinstance(hits, RetrievalError)
            documents = [document(hit.passage) for hit in hits]
            result.append(
                [{"document": d, "score": h.score} for d, h in zip(documents, hits, strict=True)]
                if body.get("return_scores")
                else list(documents)
            )
        return as_json({"result": result})

    return answer


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("http"))


@pytest.fixture
def engine(index: Path) -> Iterator[Retriever]:
    engine = open_retriever(f"embedded:{index}?corpus=any", None)
    yield engine
    engine.close()


@pytest.fixture
def server(engine: Retriever) -> Iterator[Server]:
    with serving(search_r1(engine)) as server:
        yield server


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract(clause: Clause, server: Server) -> None:
    clause(lambda: open_retriever(f"{server.url}/retrieve?deadline=30", None))


def test_environments_travel(server: Server) -> None:
    environments_travel(f"{server.url}/retrieve")


def test_hits_are_those_of_the_engine_behind(server: Server, engine: Retriever) -> None:
    client = HttpRetriever(f"{server.url}/retrieve")
    assert client.search(WORDS, 4) == engine.search(WORDS, 4)
    assert server.calls[0].json() == {"queries": list(WORDS), "topk": 4, "return_scores": True}
    client.close()


def test_documents_without_ids_get_one_of_their_content(engine: Retriever) -> None:
    with serving(search_r1(engine, ids=False)) as server:
        client = HttpRetriever(f"{server.url}/retrieve")
        (first,), (again,) = client.search(["Ringo", "Ringo Starr"], 1)  # type: ignore[misc]
        assert first.passage == again.passage
        assert (first.passage.title, first.passage.text) == (PASSAGES[6].title, PASSAGES[6].text)
        assert len(first.passage.id) == 16
        client.close()


@pytest.mark.parametrize(
    ("entry", "hit"),
    [
        ({"document": {"id": 7, "contents": '"T"\nx\ny'}, "score": 2}, ("7", "T", "x\ny", 2.0)),
        ({"document": {"id": "a", "contents": "no title"}, "score": 1}, ("a", "no title", "", 1.0)),
        ({"document": {"id": "a", "contents": '""T""\nx'}, "score": 1}, ("a", '"T"', "x", 1.0)),
        ({"id": "a", "contents": '"T"\nx'}, ("a", "T", "x", 1.0)),
        ({"id": "a", "title": "T\nU", "text": "x", "contents": "?"}, ("a", "T\nU", "x", 1.0)),
    ],
)
def test_forms_of_documents(entry: dict[str, Any], hit: tuple[str, str, str, float]) -> None:
    with serving(lambda _: as_json({"result": [[entry]]})) as server:
        client = HttpRetriever(server.url)
        assert client.search(["q"], 3) == [[Hit(Passage(*hit[:3]), hit[3])]]
        client.close()


@pytest.mark.parametrize(
    "entry",
    [
        None,
        5,
        [5],
        [{}],
        [{"document": None}],
        [{"document": {"id": "a"}, "score": 1}],
        [{"document": {"id": "a", "contents": 5}, "score": 1}],
        [{"document": {"id": "a", "contents": "x"}, "score": "high"}],
        [{"document": {"id": "a", "contents": "x"}, "score": float("nan")}],
        [{"document": {"id": "a", "contents": "x"}, "score": 10**400}],
        {"error": "the shard\nis gone"},
    ],
)
def test_an_entry_that_makes_no_sense_fails_its_query_alone(entry: object) -> None:
    good = [{"document": {"id": "a", "contents": '"T"\nx'}, "score": 1}]
    with serving(lambda _: as_json({"result": [good, entry, good]})) as server:
        client = HttpRetriever(server.url, retry=QUICK)
        first, broken, last = client.search(["1", "2", "3"], 3)
        assert first == last == [Hit(Passage("a", "T", "x"), 1.0)]
        assert isinstance(broken, RetrievalError)
        assert "\n" not in str(broken)
        assert len(server.calls) == 1
        client.close()


def test_requests_are_bounded_in_number_and_size(server: Server) -> None:
    client = HttpRetriever(f"{server.url}/retrieve", batch=3)
    queries = [f"rock {i}" for i in range(7)]
    client.search([*queries[:4], " ", *queries[4:]], 1)
    assert [call.json()["queries"] for call in server.calls] == [
        queries[:3],
        queries[3:6],
        queries[6:],
    ]
    client.close()

    server.calls.clear()
    client = HttpRetriever(f"{server.url}/retrieve")
    client.search(["rock"] * 50, 1000)  # 8 times 1,000 passages are the most for a request
    assert [len(call.json()["queries"]) for call in server.calls] == [8] * 6 + [2]

    server.calls.clear()
    assert client.search(["x" * (5 << 20), "rock"], 1)[1] != []
    assert server.calls[0].json()["queries"] == ["x" * 1_000, "rock"]
    client.close()


# --- faults -------------------------------------------------------------------------------------

GOOD = as_json({"result": [[{"document": {"id": "a", "contents": '"T"\nx'}, "score": 1.0}]]})
HIT = [Hit(Passage("a", "T", "x"), 1.0)]


@pytest.mark.parametrize(
    "fault",
    [
        Reply(503),
        Reply(429),
        Reply(500, b"Internal Server Error"),
        Reply(200, b"<html>garbage"),
        Reply(200, b"[" * 100_000),
        Reply(200, GOOD.body, cut=20),
        Reply(200, b"\xff\xfe", {"Content-Encoding": "gzip"}),
        Reply(200, zlib.compress(GOOD.body, wbits=31)[:-9], {"Content-Encoding": "gzip"}),
    ],
    ids=["503", "429", "500", "html", "nested", "cut", "no gzip", "cut gzip"],
)
def test_what_may_pass_is_tried_again(fault: Reply) -> None:
    replies = iter([fault, fault, GOOD])
    with serving(lambda _: next(replies)) as server:
        client = HttpRetriever(server.url, retry=Retry(30.0, 0.001, 0.01))
        assert client.search(["q"], 3) == [HIT]
        assert len(server.calls) == 3
        client.close()


def gzip(body: bytes, times: int) -> bytes:
    for _ in range(times):
        body = zlib.compress(body, wbits=31)
    return body


@pytest.mark.parametrize(
    "body",
    [
        gzip(GOOD.body, 1),
        gzip(GOOD.body[:9], 1) + gzip(GOOD.body[9:], 1),
        gzip(GOOD.body, 1) + b"\0",
    ],
    ids=["one member", "two members", "padded"],
)
def test_a_compressed_answer_is_read(body: bytes) -> None:
    with serving(lambda _: Reply(200, body, {"Content-Encoding": "gzip"})) as server:
        client = HttpRetriever(server.url)
        assert client.search(["q"], 3) == [HIT]
        assert server.calls[0].headers["Accept-Encoding"] == "gzip"
        client.close()


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (gzip(b"[" * (65 << 20), 1), "gzip", "an answer of more than 67108864 bytes"),
        (gzip(b"[" * (33 << 20), 1) * 2, "gzip", "an answer of more than 67108864 bytes"),
        (gzip(b"[" * (65 << 20), 3), "gzip, gzip, gzip", "Content-Encoding 'gzip, gzip, gzip'"),
        (gzip(GOOD.body, 2), "gzip, gzip", "Content-Encoding 'gzip, gzip'"),
        (GOOD.body, "identity, identity", "Content-Encoding 'identity, identity'"),
        (zlib.compress(GOOD.body), "deflate", "Content-Encoding 'deflate'"),
        (GOOD.body, "zstd", "Content-Encoding 'zstd'"),
    ],
)
def test_compressed_answers_are_bounded(body: bytes, encoding: str, message: str) -> None:
    """Three times gzip makes 65 MB of 300 bytes; httpx alone decodes all of them."""
    with serving(lambda _: Reply(200, body, {"Content-Encoding": encoding})) as server:
        client = HttpRetriever(server.url, retry=QUICK)
        (error,) = fails_in_place(client, ["q"])
        assert message in str(error)
        assert len(server.calls) == 1
        client.close()


def test_a_request_with_too_large_an_answer_is_split() -> None:
    def answer(call: Call) -> Reply:
        queries = call.json()["queries"]
        if len(queries) > 2 or "large" in queries:
            return as_json({"error": "too large"}, 413)
        return as_json({"result": [[{"id": q, "title": q, "text": ""}] for q in queries]})

    with serving(answer) as server:
        client = HttpRetriever(server.url, retry=QUICK)
        asked = ["a", "b", "c", "large", "d"]
        *found, last = client.search(asked, 3)
        assert [hits for hits in found if isinstance(hits, list)] == [
            [Hit(Passage(q, q, ""), 1.0)] for q in "abc"
        ]
        assert "status 413: " in str(found[3])
        assert last == [Hit(Passage("d", "d", ""), 1.0)]
        client.close()


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422, 501])
def test_a_refusal_is_final_and_is_told(status: int) -> None:
    with serving(lambda _: as_json({"error": "not\nthis \x1b[31m"}, status)) as server:
        client = HttpRetriever(server.url, retry=QUICK)
        (error,) = fails_in_place(client, ["q"])
        assert f"status {status}: " in str(error)
        assert "not" in str(error)
        assert len(server.calls) == 1
        client.close()


@pytest.mark.parametrize("fault", [Reply(503), Reply(200, GOOD.body, cut=3)], ids=["503", "cut"])
def test_retries_end_at_the_deadline(fault: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _: fault) as server:
        client = HttpRetriever(server.url, batch=1, retry=Retry(1.0, 0.01, 0.02))
        made, after = list[float](), Deadline.after

        def counted(seconds: float) -> Deadline:
            made.append(seconds)
            return after(seconds)

        monkeypatch.setattr(Deadline, "after", counted)
        fails_in_place(client, ["q", "r", "s"])
        assert made == [1.0]  # one deadline for all three
        assert len(server.calls) > 3
        client.close()


def test_a_server_that_says_nothing_or_drips_is_left_at_the_deadline() -> None:
    left = threading.Event()

    def silent(_: Call) -> Reply:
        left.wait(30)
        return GOOD

    with serving(silent) as server:
        client = HttpRetriever(server.url, retry=Retry(0.3, 0.01, 0.02))
        fails_in_place(client, ["q"])
        left.set()
        client.close()

    dripped: list[float] = []

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        with connection, suppress(OSError):  # the client left
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(1500):
                connection.sendall(b" ")
                dripped.append(time.monotonic())
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        client = HttpRetriever(
            f"http://127.0.0.1:{listener.getsockname()[1]}/", retry=Retry(0.3, 0.01, 0.02)
        )
        fails_in_place(client, ["q"])
        client.close()
        thread.join(60)
        assert 0 < len(dripped) < 1000  # the connection was closed long before all had come


def test_retry_after_is_honored() -> None:
    replies = iter([Reply(503, headers={"Retry-After": "0.4"}), GOOD])
    times: list[float] = []

    def answer(_: Call) -> Reply:
        times.append(time.monotonic())
        return next(replies)

    with serving(answer) as server:
        client = HttpRetriever(server.url, retry=Retry(30.0, 0.001, 0.001))
        assert client.search(["q"], 3) == [HIT]
        assert times[1] - times[0] >= 0.4
        client.close()


def test_no_time_for_what_the_server_asks_gives_up_at_once() -> None:
    with serving(lambda _: Reply(503, headers={"Retry-After": "3600"})) as server:
        client = HttpRetriever(server.url, retry=Retry(deadline=1800.0))
        assert "503" in str(fails_in_place(client, ["q"])[0])
        assert len(server.calls) == 1
        client.close()


def test_a_server_that_is_gone_and_comes_back(engine: Retriever) -> None:
    with serving(search_r1(engine)) as server:
        port = int(server.url.rpartition(":")[2])
        client = HttpRetriever(f"{server.url}/retrieve", retry=Retry(2.0, 0.01, 0.02))
        good = client.search(WORDS, 2)
    assert "Connect" in str(fails_in_place(client, WORDS)[0])
    with serving(search_r1(engine), port):
        assert client.search(WORDS, 2) == good == engine.search(WORDS, 2)
    client.close()


def test_a_failed_request_leaves_the_others() -> None:
    def answer(call: Call) -> Reply:
        return Reply(400) if call.json()["queries"] == ["bad"] else GOOD

    with serving(answer) as server:
        client = HttpRetriever(server.url, batch=1, retry=QUICK)
        first, bad, last = client.search(["1", "bad", "2"], 3)
        assert first == last == HIT
        assert isinstance(bad, RetrievalError)
        client.close()


@pytest.mark.parametrize(
    "body", [{}, [], {"result": []}, {"result": [[], []]}, None, {"result": 5}]
)
def test_an_answer_of_another_format_is_told(body: object) -> None:
    with serving(lambda _: as_json(body)) as server:
        client = HttpRetriever(server.url, retry=QUICK)
        assert "Search-R1's format" in str(fails_in_place(client, ["q"])[0])
        client.close()


# --- settings -----------------------------------------------------------------------------------


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    for url in ("http://me:s3cret@host:80/r", "http://me:s3cret@host:x/", "http://me:/s3cret@h/"):
        with pytest.raises(ConfigurationError, match="environment") as caught:
            open_retriever(url, None)
        assert "s3cret" not in str(caught.value)


def test_good_addresses_are_taken() -> None:
    for url in ("http://localhost:8000/retrieve", "https://[::1]:80/x", "http://h?batch=2"):
        open_retriever(url, None).close()


def test_the_body_is_plain_json() -> None:
    with serving(lambda _: GOOD) as server:
        client = HttpRetriever(server.url)
        client.search(["\ud800 é \0 \U0001f3b8"], 1)
        assert json.loads(server.calls[0].body.decode())["queries"] == ["\ufffd é \0 \U0001f3b8"]
        client.close()
