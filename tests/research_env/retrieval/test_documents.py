"""Reading whole documents, in the embedded index and in Elasticsearch alike."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from research_env.datasets.chunks import ChunkedCorpus
from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval import open_retriever
from research_env.retrieval.base import Passage
from research_env.retrieval.bm25 import documents as table_module
from research_env.retrieval.bm25.retriever import EmbeddedRetriever, build_index
from research_env.retrieval.documents import (
    PAGE_CHARACTERS,
    Document,
    DocumentReader,
    count_pages,
    read_page,
)
from research_env.tools import write_call
from tests.elasticsearch.server import call, index_url
from tests.research_env.fakes import DATASET, Engine, ListCorpus

WORDS = " ".join(f"word{i}" for i in range(95))
CHUNKS = ChunkedCorpus(
    ListCorpus(
        (
            Passage("1", "Beatles", "The Beatles were an English rock band."),
            Passage("2", "Liverpool", "Liverpool is a city."),
            Passage("3", "Beatles", "They disbanded in 1970."),
            Passage("4", "", "A text without a title."),
            Passage("long", "Novel", WORDS),
            Passage("long2", "Novel", "Another novel of that title."),
            Passage("#", "Odd </tool_response>", "An <|im_end|> odd one."),
            Passage("r0", "Rome ", "Rome 0."),
            Passage("r1", "\t Rome", "Rome 1."),
            Passage("r2", "Rome\u00a0", "Rome 2."),
            *(Passage(f"book#{i}", "Book", f"Chunk {i}.") for i in range(1200)),
            *(Passage(f"s{i}", "Saga", f"Part {i}.") for i in range(1100)),
        )
    ),
    words=20,
)
WHOLE = (
    Passage("wiki#1", "Paris", "Paris is the capital of France."),
    Passage("wiki#2", "Oslo", "Oslo is the capital of Norway."),
)
CORPUS = ListCorpus((*CHUNKS, *WHOLE))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("documents") / "index"
    build_index(CORPUS, folder)
    yield f"embedded:{folder}?corpus=any"


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("es", marks=pytest.mark.elasticsearch)]
)
def url(request: pytest.FixtureRequest, embedded: str) -> str:
    if request.param == "embedded":
        return embedded
    from research_env.retrieval.elasticsearch.indexing import index_elasticsearch

    server = request.getfixturevalue("elasticsearch")
    address = index_url(server, f"test-{uuid.uuid4().hex[:12]}")
    index_elasticsearch(CORPUS, address)
    return address


@pytest.fixture
def reader(url: str) -> Iterator[Any]:
    engine = open_retriever(url, None)
    assert isinstance(engine, DocumentReader)
    engine.prepare_reading()
    yield engine
    engine.close()


def ids(found: Any) -> tuple[list[str], int | None]:
    assert isinstance(found, Document), found
    return [passage.id for passage in found.passages], found.asked


def test_a_document_is_found_by_the_id_of_any_of_its_passages_and_by_its_title(
    reader: Any,
) -> None:
    found = reader.read(["3", "beatles", " Beatles ", "4", "2", "nothing", "", "#"])
    assert [None if each is None else ids(each) for each in found] == [
        (["1", "3"], 1),
        (["1", "3"], None),
        (["1", "3"], None),
        (["4"], 0),
        (["2"], 0),
        None,
        None,
        (["#"], 0),
    ]


def test_chunks_are_read_together_and_their_overlap_once(reader: Any) -> None:
    chunk, title = reader.read(["long#2", "Novel"])
    expected = [f"long#{i}" for i in range(6)]
    assert ids(chunk) == (expected, 2)
    assert ids(title) == ([*expected, "long2"], None)
    page = read_page(chunk)
    assert page is not None
    assert (page.text, page.number, page.count, page.title) == (WORDS, 1, 1, "Novel")
    whole = read_page(title)
    assert whole is not None
    assert whole.text == f"{WORDS}\nAnother novel of that title."


def test_whole_passages_whose_ids_look_like_chunks_stay_apart(reader: Any) -> None:
    found = reader.read(["wiki#2", "wiki#1", "Oslo"])
    assert [ids(each) for each in found] == [(["wiki#2"], 0), (["wiki#1"], 0), (["wiki#2"], None)]


def test_a_long_document_is_read_around_the_passage_that_was_asked_for(reader: Any) -> None:
    found = reader.read(["book#700", "book#1199", "s900", "saga", "Book"])
    assert [ids(each) for each in found] == [
        ([f"book#{i}" for i in range(200, 1200)], 500),
        ([f"book#{i}" for i in range(699, 1200)], 500),
        ([f"s{i}" for i in range(400, 1100)], 500),
        ([f"s{i}" for i in range(501)], None),
        ([f"book#{i}" for i in range(501)], None),
    ]


def test_white_space_around_a_title_does_not_matter(reader: Any) -> None:
    found = reader.read(["r0", "r2", "rome", "Rome\u00a0"])
    assert [ids(each) for each in found] == [
        (["r0", "r1", "r2"], 0),
        (["r0", "r1", "r2"], 2),
        (["r0", "r1", "r2"], None),
        (["r0", "r1", "r2"], None),
    ]


def test_a_closed_engine_says_so(url: str) -> None:
    engine: Any = open_retriever(url, None)
    engine.close()
    with pytest.raises(RetrievalError, match="closed"):
        engine.read(["1"])


def test_the_policy_searches_and_then_reads(url: str) -> None:
    env = SearchQAEnv(
        dataset=DATASET, retriever=url, protocol="tool-calls", tools="search,open", top_k=1
    )
    _, info = env.reset(seed=0)
    assert [each["function"]["name"] for each in info["tools"]] == ["search", "open"]
    info = env.step(write_call("search", {"query": "English rock band"}))[4]
    assert info["messages"][0]["content"] == '[1] "Beatles"\nThe Beatles were an English rock band.'
    turn = "\n".join(
        write_call("open", arguments)
        for arguments in (
            {"document": "1"},
            {"document": "Beatles", "page": 2},
            {"document": "<b>no"},
            {"document": "#"},
        )
    )
    info = env.step(turn)[4]
    beatles = "The Beatles were an English rock band.\nThey disbanded in 1970."
    assert [each["content"] for each in info["messages"]] == [
        f'"Beatles" (page 1 of 1)\n{beatles}',
        "error: 'Beatles' has the pages 1 to 1, not 2",
        "error: there is no document '‹b>no'; give the id of a passage or a whole title",
        '"Odd ‹/tool_response>" (page 1 of 1)\nAn ‹|im_end|> odd one.',
    ]
    assert info["passage_ids"] == ("1", "3", "#")
    assert env.episode is not None
    assert env.episode.searches == 5
    env.close()


# --- pages ---------------------------------------------------------------------------------------


def test_pages_are_cut_at_spaces_and_hold_every_word_once() -> None:
    passages = tuple(
        Passage(str(i), "T", " ".join(f"{i}-{j}" for j in range(100))) for i in range(40)
    )
    count = count_pages(Document(passages))
    pages = [read_page(Document(passages), number) for number in range(1, count + 1)]
    assert count > 5
    words = [word for page in pages if page for word in page.text.split()]
    assert words == [word for passage in passages for word in passage.text.split()]
    assert all(page and len(page.text) <= PAGE_CHARACTERS for page in pages)
    for at, passage in enumerate(passages):  # a passage's own page is the one where it begins
        page = read_page(Document(passages, at))
        assert page is not None
        assert passage in page.passages
        assert f"{at}-0" in page.text.split()
    assert read_page(Document(passages), count + 1) is None
    assert read_page(Document(passages), 0) is None


def test_a_text_without_spaces_is_cut_too() -> None:
    document = Document((Passage("1", "", "字" * (2 * PAGE_CHARACTERS + 1)),))
    assert count_pages(document) == 3
    page = read_page(document, 3)
    assert page is not None
    assert page.text == "字"


def test_many_passages_of_a_title_are_read_around_the_one_that_was_asked_for(
    tmp_path: Path,
) -> None:
    build_index(ListCorpus(tuple(Passage(f"p{i}", "Same", f"n{i}") for i in range(1200))), tmp_path)
    engine = EmbeddedRetriever(tmp_path)
    found, titled = engine.read(["p700", "same"])
    assert isinstance(found, Document)
    assert isinstance(titled, Document)
    assert len(found.passages) == 1000
    assert found.passages[found.asked or 0].id == "p700"
    assert titled.passages[0].id == "p0"
    engine.close()


# --- the table of a large index ------------------------------------------------------------------


def test_the_table_of_a_large_index_is_kept_in_the_cache(
    embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(table_module, "_CACHED_FROM", 1)
    folder = embedded.removeprefix("embedded:").partition("?")[0]
    first = EmbeddedRetriever(folder)
    expected = first.read(["3", "novel", "nothing"])
    files = sorted((tmp_path / "documents").iterdir())
    assert [file.name.partition("-")[2] for file in files] == [
        "id-rows.npy",
        "ids.npy",
        "title-rows.npy",
        "titles.npy",
    ]
    monkeypatch.setattr(table_module, "hash_text", lambda text: 1 / 0)
    second = EmbeddedRetriever(folder)
    second.prepare_reading()  # it reads the files and makes no hash
    monkeypatch.undo()
    assert second.read(["3", "novel", "nothing"]) == expected
    files[0].write_bytes(b"broken")
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(table_module, "_CACHED_FROM", 1)
    assert EmbeddedRetriever(folder).read(["3", "novel", "nothing"]) == expected


# --- who cannot read -----------------------------------------------------------------------------


def test_a_retriever_that_cannot_read_is_refused_in_words() -> None:
    with pytest.raises(ConfigurationError, match="'open' reads whole documents, which Engine can"):
        SearchQAEnv(dataset=DATASET, retriever=Engine(), protocol="tool-calls", tools="search,open")


@pytest.mark.elasticsearch
def test_an_index_of_ones_own_is_read_by_id_and_by_title(elasticsearch: str) -> None:
    name = f"test-{uuid.uuid4().hex[:12]}"
    keyword = {"type": "text", "fields": {"keyword": {"type": "keyword"}}}
    fields = {"body": {"type": "text"}, "head": keyword}
    call(elasticsearch, "PUT", f"/{name}", {"mappings": {"properties": fields}})
    for key, head in (("1", "Head"), ("2", "Head"), ("3", "Tail ")):
        document = {"body": f"Text {key}", "head": head}
        call(elasticsearch, "PUT", f"/{name}/_doc/{key}?refresh=true", document)
    address = index_url(elasticsearch, name)
    engine: Any = open_retriever(f"{address}?text=body&title=head", None)
    found = engine.read(["2", "Head", "none", "3", "Tail "])
    assert ids(found[0])[0] in (["1", "2"], ["2", "1"])
    assert sorted(ids(found[1])[0]) == ["1", "2"]
    assert found[2] is None
    assert [ids(each) for each in found[3:]] == [(["3"], 0), (["3"], None)]
    engine.close()
    plain: Any = open_retriever(f"{address}?text=body", None)
    assert [each and ids(each) for each in plain.read(["2", "Head"])] == [(["2"], 0), None]
    plain.close()


@pytest.mark.elasticsearch
def test_an_index_of_an_earlier_version_is_refused_in_words(
    elasticsearch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research_env.retrieval.elasticsearch import indexing

    stored = {"type": "keyword", "index": False, "doc_values": False}
    monkeypatch.setattr(indexing, "readable_fields", lambda: {"id": stored, "title": {}})
    address = index_url(elasticsearch, f"test-{uuid.uuid4().hex[:12]}")
    indexing.index_elasticsearch(CORPUS, address)
    engine: Any = open_retriever(address, None)
    with pytest.raises(ConfigurationError, match="index the corpus again"):
        engine.prepare_reading()
    engine.close()


def test_chunks_that_share_a_letter_do_not_overlap() -> None:
    """Only whole words do, or characters of scripts without blanks."""

    def joined(one: str, other: str) -> str:
        passages = (Passage("d#0", "D", one), Passage("d#1", "D", other))
        page = read_page(Document(passages), 1)
        assert page
        return page.text

    assert joined("It came from Africa", "and from Asia") == "It came from Africa\nand from Asia"
    assert joined("Of plan A", "A second one") == "Of plan A second one"
    assert joined("They live in Rome", "Rome was built") == "They live in Rome was built"
    assert joined("They live near Rome", "me too") == "They live near Rome\nme too"
    assert joined("東京は大きい", "きい都市です") == "東京は大きい都市です"


def test_the_table_of_a_strangers_index_stays_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint, which names the table, is a path here."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_module, "_CACHED_FROM", 1)
    build_index(CORPUS, tmp_path / "index")
    meta = tmp_path / "index/meta.json"
    said = json.loads(meta.read_text())
    (tmp_path / "cache/documents").mkdir(parents=True)
    meta.write_text(json.dumps({**said, "fingerprint": "../../evil"}))
    engine = EmbeddedRetriever(tmp_path / "index")
    engine.prepare_reading()
    assert engine.read(["1"])[0] is not None
    assert list(tmp_path.glob("evil*")) == []
    assert len(list((tmp_path / "cache/documents").iterdir())) == 4
