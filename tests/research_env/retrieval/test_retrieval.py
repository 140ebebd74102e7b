"""The contract of retrievers, for the embedded engine and for engines by their URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_env.errors import ConfigurationError, ResearchEnvError, UnknownNameError
from research_env.retrieval import SCHEMES, open_retriever
from research_env.retrieval.bm25.retriever import EmbeddedRetriever
from research_env.system.redaction import redact_url
from tests.research_env.retrieval.retriever_contract import (
    CLAUSES,
    Clause,
    ContractCorpus,
    contract_index,
    environments_travel,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("retrieval"))


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract_of_the_embedded_engine(clause: Clause, index: Path) -> None:
    clause(lambda: EmbeddedRetriever(index, ContractCorpus()))


def test_environments_with_an_embedded_engine_travel(index: Path) -> None:
    environments_travel(f"embedded:{index}?corpus=any")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http:", ConfigurationError, "no address"),
        ("http://", ConfigurationError, "no address"),
        ("http:///retrieve", ConfigurationError, "no address"),
        ("http://host:port/retrieve", ConfigurationError, "no address"),
        ("http://host:99999/", ConfigurationError, "no address"),
        ("http://[::1/", ConfigurationError, "no address"),
        ("http://host/?deadline=soon", ConfigurationError, "deadline='soon'"),
        ("http://host/?deadline=inf", ConfigurationError, "deadline='inf'"),
        ("http://host/?batch=0", ConfigurationError, "batch='0'"),
        ("http://host/?batch=2&batch=3", ConfigurationError, "each once"),
        ("http://host/?batch", ConfigurationError, "KEY=VALUE"),
        ("https://host/?topk=3", UnknownNameError, "unknown option of https 'topk'"),
        ("web:", UnknownNameError, "known: brave, searxng, serper, tavily"),
        ("web:bing", UnknownNameError, "'bing'"),
        ("web:serper?topk=3", UnknownNameError, "option of web 'topk'"),
        ("web:serper?key=abc", UnknownNameError, "option of web 'key'"),
        ("web:serper?budget=0", ConfigurationError, "budget='0'"),
        ("web:serper?rate=0", ConfigurationError, "rate='0'"),
        ("web:searxng", ConfigurationError, "web:searxng.url=http://HOST:PORT"),
        ("web:searxng?url=ftp://host", ConfigurationError, "no address"),
        ("web:searxng?url=http://u:p&SECRET@h", ConfigurationError, "not '...'"),
    ],
)
def test_bad_urls_are_refused(
    url: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "key")
    with pytest.raises(error, match=message):
        open_retriever(url, None)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:pw?SECRET@host/retrieve",
        "http://u:pw?SECRET&more@host/retrieve",
        "https://u:pw?SECRET=more@host/retrieve",
        "https://u:pw?cache=x&cache&SECRET@host/retrieve",
        "elasticsearch://user:pa?SECRET@host:9200/idx",
        "elastic://user:1/SECRET@h/idx",
        "web:searxng?url=http://u:p&SECRET@h",
        "web:searxng?url=http://u:p&SECRET=more@h",
    ],
)
def test_no_part_of_a_password_is_repeated(url: str) -> None:
    with pytest.raises(ResearchEnvError) as caught:
        open_retriever(url, None)
    assert "SECRET" not in str(caught.value)


def test_a_url_is_shown_without_user_and_password() -> None:
    assert redact_url("elastic://user:1/S@x@h/idx") == "elastic://[redacted]@h/idx"
    assert redact_url("elastic://user:1\n2@h/idx") == "elastic://[redacted]@h/idx"
    assert redact_url("solr://h:1/idx") == "solr://h:1/idx"


def test_every_scheme_is_named_where_one_is_unknown() -> None:
    with pytest.raises(UnknownNameError) as caught:
        open_retriever("solr:x", None)
    assert all(f"{scheme}:..." in str(caught.value) for scheme in SCHEMES)
