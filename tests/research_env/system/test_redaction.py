"""Known secrets stay out of errors; tests/test_redaction.py has the forms that servers use."""

from __future__ import annotations

import base64
import json
import pickle
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env.errors import ConfigurationError, DataNotFoundError, RetrievalError
from research_env.retrieval import open_retriever
from research_env.system.redaction import redact_known, redact_url
from tests.research_env.servers import as_json, serving

KEY = 's3cr/t+"Straße"\\ü&=%41-0123456789abcdef'


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ELASTICSEARCH_USERNAME", "ann")
    monkeypatch.setenv("ELASTICSEARCH_PASSWORD", KEY)
    return KEY


FORMS = {
    "plain": KEY,
    "json in utf-8": json.dumps(KEY, ensure_ascii=False),
    "json in json": json.dumps(json.dumps({"said": KEY})),
    "percent": quote(KEY, safe=""),
    "percent twice": quote(quote(KEY, safe=""), safe=""),
    "repr": repr(KEY),
    "login": "Basic " + base64.b64encode(f"ann:{KEY}".encode()).decode(),
    "middle": KEY[10:24],
}


@pytest.mark.parametrize("form", FORMS)
def test_no_piece_of_a_secret_is_shown(form: str, key: str) -> None:
    shown = redact_known(f"wrong key {FORMS[form]} for ann")
    assert shown.startswith("wrong key ")
    assert shown.endswith(" for ann")
    assert "[redacted]" in shown
    kept = shown.replace("[redacted]", "")
    assert len(kept) < len("wrong key  for ann") + 30  # quotes, braces and names around it
    for word in ("s3cr", "Stra", "0123", "abcdef", "41-"):
        assert word not in kept


@given(st.text(max_size=60), st.integers(0, 20), st.integers(8, 40), st.text(max_size=60))
def test_any_long_piece_in_any_text_is_replaced(
    before: str, at: int, size: int, after: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-0123456789-abcdefghij-ABCDEFGHIJ")
        secret = "sk-0123456789-abcdefghij-ABCDEFGHIJ"
        shown = redact_known(before + secret[at : at + size] + after)
        assert not any(secret[i : i + 8] in shown for i in range(len(secret) - 7))


def test_texts_without_a_secret_stay(key: str) -> None:
    for text in ("", "nothing", "http://host:9200/i: status 404", "a@b", "keys=3 tokens=5", "ann"):
        assert redact_known(text) == text


def test_what_a_url_names_as_secret_is_replaced() -> None:
    assert redact_known("GET http://h/s?q=x&api_key=abc&n=1 failed") == (
        "GET http://h/s?q=x&api_key=[redacted]&n=1 failed"
    )
    assert redact_known("http://h/?token=abc") == "http://h/?token=[redacted]"
    assert redact_known("web:searxng?url=http://h/%3Ftoken%3Dabc") == (
        "web:searxng?url=http://h/%3Ftoken%3D[redacted]"
    )
    assert redact_known("see https://u:p@h/i") == "see https://[redacted]@h/i"
    assert redact_url("elasticsearch://u:a b\n/c@h/i") == "elasticsearch://[redacted]@h/i"


def test_every_error_is_redacted(key: str) -> None:
    for kind in (ConfigurationError, RetrievalError, DataNotFoundError):
        error = kind(f"said {json.dumps(key)}")
        for each in (error, pickle.loads(pickle.dumps(error))):
            assert str(each) == 'said "[redacted]"'
            assert KEY[:12] not in repr(each)


def test_a_token_of_searxng_goes_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "http://h/?token=T0KEN-of-mine",
        "http://h/%3Ftoken%3DT0KEN-of-mine",
        "http://h/#T0KEN",
    ):
        with pytest.raises(ConfigurationError, match="SEARXNG_TOKEN") as told:
            open_retriever(f"web:searxng?url={url}", None)
        assert "T0KEN" not in str(told.value)


def test_a_server_that_repeats_the_token_does_not_get_it_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEARXNG_TOKEN", "T0KEN-of-mine-0123")
    said = {"results": [], "unresponsive_engines": [["x", "Bearer T0KEN-of-mine-0123"]]}
    with serving(lambda _: as_json(said)) as server:
        engine = open_retriever(f"web:searxng?url={server.url}&deadline=1", None)
        [found] = engine.search(["x"], 1)
        engine.close()
        assert server.calls[0].headers["Authorization"] == "Bearer T0KEN-of-mine-0123"
    assert isinstance(found, RetrievalError)
    assert "did not answer" in str(found)
    assert "[redacted]" in str(found)
    assert "T0KEN" not in str(found)
