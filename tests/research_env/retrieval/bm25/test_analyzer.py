from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.retrieval.bm25 import analyzer
from research_env.retrieval.bm25.analyzer import (
    MAX_QUERY_WORDS,
    MAX_WORD_LENGTH,
    STOP_WORDS,
    _term,
    analyze,
    first_words,
    words,
)

# Made with org.apache.lucene.analysis.en.EnglishAnalyzer of Lucene 9.12.2, the version inside
# Elasticsearch 8.19: sentences of many scripts, random strings of separators, 2,000 English words.
LUCENE = [
    json.loads(line)
    for line in Path(__file__).with_name("lucene_english.jsonl").read_text("utf-8").splitlines()
]


def test_terms_are_those_of_lucene() -> None:
    assert len(LUCENE) == 248
    for case in LUCENE:
        assert analyze(case["text"]) == case["terms"], case["text"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Beatles' song", ["beatl", "song"]),
        ("O’Neil’s U.S. can't", ["o’neil", "u.", "can't"]),
        ("12:30 a:b 1,000.5 x,y", ["12", "30", "a:b", "1,000.5", "x", "y"]),
        ("possibly technology us", ["possibl", "technolog", "us"]),
        ("the of and", []),
        ("", []),
        ("東京 タワー", ["東", "京", "タワー"]),
    ],
)
def test_hand_worked_terms(text: str, terms: list[str]) -> None:
    assert analyze(text) == terms


def test_there_are_lucenes_33_stop_words() -> None:
    assert len(STOP_WORDS) == 33


def test_a_long_word_is_cut_into_pieces() -> None:
    assert [len(word) for word in words("x" * 600)] == [255, 255, 90]


def test_a_long_query_is_cut_after_its_first_words() -> None:
    text = " ".join(f"w{i}!" for i in range(2 * MAX_QUERY_WORDS))
    assert words(first_words(text)) == words(text)[:MAX_QUERY_WORDS]
    assert first_words(text).endswith(f"w{MAX_QUERY_WORDS - 1}")
    assert first_words("short, all of it! ") == "short, all of it! "
    blank = " " * 100_000 + "end"
    assert words(first_words(blank)) == ["end"]


@given(st.text(st.characters(codec=None), max_size=60))
def test_terms_of_any_text_are_words_that_an_index_can_hold(text: str) -> None:
    for term in analyze(text):
        assert term
        assert len(term) <= MAX_WORD_LENGTH
        assert not any(c.isspace() for c in term)
        term.encode("utf-8")  # no half of a surrogate pair


@given(st.text(st.sampled_from("ab1_.,:;' -"), max_size=30))
def test_ascii_has_no_rules_of_its_own(text: str) -> None:
    # a letter that is not ASCII, set apart, sends the same text through the general rules
    assert words(text + " é") == [*words(text), "é"]


def test_threads_do_not_disturb_each_other() -> None:
    cases = LUCENE[148:]  # the English words; their terms are forgotten, so that all stem anew
    _term.cache_clear()
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(case["text"] for case in cases if analyze(case["text"]) != case["terms"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(deadline=None)
@given(st.text(st.sampled_from("a1_.:'é\u0301\u30a2\u3042\u0e01 -")))
def test_underscores_belong_to_the_word_that_follows(text: str) -> None:
    """The patterns without the rule that tries a run of underscores once."""
    once = "(?:(?<!_)_++)?+"
    for name, plain in (("_WORD", "_*"), ("_ASCII_WORD", "_*+")):
        pattern = getattr(analyzer, name)
        assert once in pattern.pattern
        slow = re.compile(pattern.pattern.replace(once, plain), pattern.flags)
        marked = text.translate(analyzer._STAND_INS) if name == "_WORD" else text
        assert [m.span() for m in pattern.finditer(marked)] == [
            m.span() for m in slow.finditer(marked)
        ]


@pytest.mark.parametrize("start", ["", "\u00e9 "])
def test_a_megabyte_of_underscores_has_no_words_of_its_own(start: str) -> None:
    """A scan that starts again at every underscore would take an hour."""
    assert analyze(f"{start}name {'_' * 1_000_000} end")[-2:] == ["name", "end"]
