"""Answer metrics against pairs worked by hand, a slow oracle, and the laws that they obey."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env import Dataset, Question
from research_env.env import SearchQAEnv
from research_env.errors import UnknownNameError
from research_env.metrics import (
    cover_exact_match,
    exact_match,
    f1,
    normalize,
    normalize_r1_searcher,
)
from tests.research_env.fakes import Engine

NORMALIZED = [
    # text, SQuAD's way, R1-Searcher's way
    ("Paris", "paris", "paris"),
    ("  The   Beatles \n", "beatles", "beatles"),
    ("THE END", "end", "end"),
    ("a an the", "", ""),
    ("A.", "", ""),
    ("theatre", "theatre", "theatre"),
    ("An apple a day", "apple day", "apple day"),
    ("U.S.", "us", "u s"),
    ("a.m.", "am", "m"),
    ("the-end", "theend", "end"),
    ("rock'n'roll", "rocknroll", "rock n roll"),
    ("rock’n’roll", "rock’n’roll", "rock n roll"),
    ("O´Brien", "o´brien", "o brien"),
    ("well-known", "wellknown", "well known"),
    ("1,000", "1000", "1 000"),
    ("1861–1865", "1861–1865", "1861–1865"),
    ("$5.50 (US)", "550 us", "5 50 us"),
    ("snake_case", "snakecase", "snake case"),
    ("Zürich", "zürich", "zürich"),
    ("ZÜRICH", "zürich", "zürich"),
    ("Beyonce\u0301", "beyonce\u0301", "beyonce\u0301"),
    ("“Yesterday”", "“yesterday”", "“yesterday”"),
    ("l'a", "la", "l"),
    ("東京 the 都", "東京 都", "東京 都"),
    ("tab\tand\u00a0space\u3000wide", "tab and space wide", "tab and space wide"),
    ("True", "true", "yes"),
    ("False", "false", "no"),
    ("true", "true", "true"),
    ("", "", ""),
    ("?!...", "", ""),
]


@pytest.mark.parametrize(("text", "squad", "r1_searcher"), NORMALIZED)
def test_normalization_of_golden_texts(text: str, squad: str, r1_searcher: str) -> None:
    assert normalize(text) == squad
    assert normalize_r1_searcher(text) == r1_searcher


SCORED: list[tuple[str | None, tuple[str, ...], float, float, float, str]] = [
    # prediction, golds, exact match, F1, cover exact match, why
    ("Paris", ("Paris",), 1, 1, 1, "equal"),
    ("paris", ("PARIS",), 1, 1, 1, "case does not count"),
    ("The Beatles", ("Beatles",), 1, 1, 1, "article in the prediction"),
    ("Beatles", ("The Beatles",), 1, 1, 1, "article in the gold"),
    ("a an the Beatles", ("the Beatles",), 1, 1, 1, "articles anywhere"),
    ("U.S.", ("US",), 1, 1, 1, "full stops are deleted, not spaced"),
    ("U. S.", ("US",), 0, 0, 0, "a space splits the word"),
    ("Jean-Luc", ("JeanLuc",), 1, 1, 1, "a hyphen is deleted"),
    ("Jean-Luc", ("Jean Luc",), 0, 0, 0, "so it is not a space"),
    ("1,000", ("1000",), 1, 1, 1, "comma within a number"),
    ("3.14", ("314",), 1, 1, 1, "even a decimal point"),
    ("  Paris\n", ("Paris",), 1, 1, 1, "white space at the ends"),
    ("New   York", ("New York",), 1, 1, 1, "white space inside"),
    ("New\u00a0York", ("New York",), 1, 1, 1, "Unicode white space"),
    ("Paris.", ("Paris",), 1, 1, 1, "a final full stop"),
    ('"Paris"', ("Paris",), 1, 1, 1, "ASCII quotes"),
    ("“Paris”", ("Paris",), 0, 0, 0, "curly quotes are no ASCII punctuation"),
    ("Zürich", ("ZÜRICH",), 1, 1, 1, "Unicode lower case"),
    ("Zurich", ("Zürich",), 0, 0, 0, "an umlaut counts"),
    ("Beyonc\u00e9", ("Beyonce\u0301",), 0, 0, 0, "no Unicode normalization"),
    ("1861-1865", ("1861–1865",), 0, 0, 0, "hyphen deleted, dash kept"),
    ("東京", ("東京",), 1, 1, 1, "script without spaces: one word"),
    ("東京都", ("東京",), 0, 0, 0, "and a part of a word is not the word"),
    ("yes", ("yes",), 1, 1, 1, "yes"),
    ("Yes.", ("yes",), 1, 1, 1, "yes, written another way"),
    ("no", ("yes",), 0, 0, 0, "the other one"),
    ("yes it is", ("yes",), 0, 0, 1, "HotpotQA: F1 is 0 when only the gold is yes or no"),
    ("yes", ("yes indeed",), 0, 0, 0, "or only the prediction"),
    ("noanswer", ("noanswer given",), 0, 0, 0, "noanswer is closed, too"),
    ("yes and no", ("no and yes",), 0, 1, 1, "but not where it is one of several words"),
    ("true", ("yes",), 0, 0, 0, "true is not yes here (R1-Searcher maps True)"),
    ("Barack Obama", ("Obama",), 0, 2 / 3, 1, "P 1/2, R 1"),
    ("Obama", ("Barack Obama",), 0, 2 / 3, 0, "P 1, R 1/2"),
    ("Barack Hussein Obama", ("Barack Obama",), 0, 4 / 5, 1, "P 2/3, R 1"),
    ("Obama Barack", ("Barack Obama",), 0, 1, 1, "order counts for exact match only"),
    ("New York City", ("New York State",), 0, 2 / 3, 0, "P 2/3, R 2/3"),
    ("in the year 1984", ("1984",), 0, 1 / 2, 1, "P 1/3, R 1"),
    ("1984", ("1985",), 0, 0, 0, "nothing shared"),
    ("Bart", ("art",), 0, 0, 0, "whole words only"),
    ("tiger tiger", ("tiger",), 0, 2 / 3, 1, "P 1/2, R 1: repetition costs"),
    ("tiger", ("tiger tiger",), 0, 2 / 3, 1, "cover counts no repetition"),
    ("tiger tiger lion", ("tiger tiger",), 0, 4 / 5, 1, "shared words counted twice"),
    ("NYC", ("New York City", "NYC"), 1, 1, 1, "an alias"),
    ("New York", ("NYC", "New York City", "York"), 0, 4 / 5, 1, "best F1 4/5, York is covered"),
    ("Madrid", ("Paris", "Lutetia"), 0, 0, 0, "no alias fits"),
    ("yes", ("no", "yes"), 1, 1, 1, "closed answers are compared gold by gold"),
    ("", ("Paris",), 0, 0, 0, "empty prediction"),
    ("...", ("Paris",), 0, 0, 0, "empty after normalization"),
    ("the", ("a",), 1, 0, 1, "both empty after normalization: SQuAD 1.1 and HotpotQA give F1 0"),
    ("Paris", ("the",), 0, 0, 0, "an empty gold is covered by nothing but the empty"),
    ("Paris", (), 0, 0, 0, "no gold at all"),
    (None, ("Paris",), 0, 0, 0, "no prediction"),
    (None, ("",), 0, 0, 0, "no prediction is not an empty one"),
    ("\x00Paris", ("Paris",), 0, 0, 0, "a control character is part of the word"),
    ("\ud800", ("\ud800",), 1, 1, 1, "a lone surrogate is a character like any other"),
]


@pytest.mark.parametrize("row", SCORED, ids=[row[-1] for row in SCORED])
def test_metrics_of_golden_pairs(
    row: tuple[str | None, tuple[str, ...], float, float, float, str],
) -> None:
    prediction, golds, em, best_f1, cem, _why = row
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(best_f1, abs=1e-12)
    assert cover_exact_match(prediction, golds) == cem


def test_another_normalization_is_used_on_both_sides() -> None:
    assert exact_match("True", ["yes"], normalize_r1_searcher) == 1
    assert exact_match("yes", ["True"], normalize_r1_searcher) == 1
    assert f1("well-known", ["well known man"], normalize_r1_searcher) == pytest.approx(4 / 5)
    assert cover_exact_match("a well-known man", ["known"], normalize_r1_searcher) == 1
    assert cover_exact_match("a well-known man", ["known"]) == 0


# --- a slow oracle and laws ----------------------------------------------------------------------

PIECES = [*"abthe nyso A.,-_'’é\n", "the ", " an ", "yes", "no "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def slow_normalize(text: str) -> str:
    words = "".join(c for c in text.lower() if c not in string.punctuation).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def slow_f1(prediction: str, gold: str) -> float:
    ours, theirs = slow_normalize(prediction), slow_normalize(gold)
    if ours != theirs and {ours, theirs} & {"yes", "no", "noanswer"}:
        return 0.0
    left, shared = theirs.split(), 0
    for word in ours.split():
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(ours.split()), shared / len(theirs.split())
    return 2 * precision * recall / (precision + recall)


# "’" ends a word for the articles' boundary, but not for a split at white space.
@given(TEXTS.filter(lambda text: "’" not in text), TEXTS.filter(lambda text: "’" not in text))
def test_metrics_equal_a_slow_oracle(prediction: str, gold: str) -> None:
    assert normalize(prediction) == slow_normalize(prediction)
    assert exact_match(prediction, [gold]) == (slow_normalize(prediction) == slow_normalize(gold))
    assert f1(prediction, [gold]) == pytest.approx(slow_f1(prediction, gold), abs=1e-12)
    covered = all(
        word in (slow_normalize(prediction).split() or [""])
        for word in slow_normalize(gold).split() or [""]
    )
    assert cover_exact_match(prediction, [gold]) == covered


@given(TEXTS, st.lists(TEXTS, max_size=4))
def test_the_best_gold_counts_and_scores_stay_in_bounds(prediction: str, golds: list[str]) -> None:
    for metric in (exact_match, f1, cover_exact_match):
        alone = [metric(prediction, [gold]) for gold in golds]
        assert metric(prediction, golds) == max(alone, default=0.0)
        assert all(0.0 <= score <= 1.0 for score in alone)


@given(TEXTS, TEXTS)
def test_f1_is_symmetric_and_exact_match_implies_cover(one: str, other: str) -> None:
    assert f1(one, [other]) == pytest.approx(f1(other, [one]))
    assert exact_match(one, [other]) <= cover_exact_match(one, [other])


@given(TEXTS)
def test_normalizing_again_or_adding_an_article_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)
    assert normalize_r1_searcher(normalize_r1_searcher(text)) == normalize_r1_searcher(text)
    assert exact_match(text, [f" The {text}. "]) == 1.0


@pytest.mark.parametrize(
    ("language", "prediction", "gold", "scores"),
    [
        ("zh", "北京。", "北京", (1, 1, 1)),
        ("zh", "《红楼梦》", "红楼梦", (1, 1, 1)),
        ("zh", "１９９９年", "1999年", (1, 1, 1)),  # tokens: 1999, 年
        ("zh", "北京市", "北京", (0, 4 / 5, 1)),
        ("zh", "答案是奥斯陆大学", "奥斯陆大学", (0, 10 / 13, 1)),
        ("zh", "京北", "北京", (0, 2 / 4, 0)),  # a run of one token
        ("zh", "iPhone 手机", "IPHONE手机", (1, 1, 1)),  # iphone, 手, 机
        ("zh", "上海", "北京", (0, 0, 0)),
        ("zh", "。", "北京", (0, 0, 0)),
        ("ja", "「東京都」", "東京都", (1, 1, 1)),
        ("ja", "京都東", "東京都", (0, 1, 0)),  # a bag of characters
        ("ja", "ＡＢＣ 株式会社", "abc株式会社", (1, 1, 1)),
        ("ja", "東京です", "東京", (0, 4 / 6, 1)),
        ("ko", "《서울》", "서울", (1, 1, 1)),
        ("ko", "서울시", "서울", (0, 4 / 5, 1)),
        ("ko", "서울 시", "서울시", (0, 1, 0)),  # blanks count for exact match alone
        ("ko", "부산", "서울", (0, 0, 0)),
    ],
)
def test_languages_without_blanks_between_words(
    language: str, prediction: str, gold: str, scores: tuple[float, float, float]
) -> None:
    golds = ["什么", gold]
    exact, words, covered = scores
    assert exact_match(prediction, golds, language=language) == exact
    assert f1(prediction, golds, language=language) == pytest.approx(words)
    assert cover_exact_match(prediction, golds, language=language) == covered
    assert f1(None, golds, language=language) == 0.0


def test_english_is_compared_as_ever_whatever_the_script() -> None:
    assert f1("北京市", ["北京"]) == 0.0
    assert f1("the Tower", ["tower"]) == exact_match("the Tower", ["tower"]) == 1.0


@pytest.mark.parametrize("where", ["argument", "data set", "question"])
@pytest.mark.parametrize("name", ["research", "search-r1", "f1", "em", "cem"])
def test_the_data_set_chooses_the_language(where: str, name: str) -> None:
    extra = {"metric_language": "zh"} if where == "question" else {}
    question = Question("q", "首都？", ("北京",), extra=extra)
    data = Dataset("own", [question], None, "zh" if where == "data set" else None)
    protocol = "search-r1" if name == "search-r1" else "research"
    given: Any = {"metric_language": "zh"} if where == "argument" else {}
    box = "北京。" if protocol == "search-r1" else "\\boxed{北京。}"
    for settings, least, most in ((given, 1.0, 1.0), ({"metric_language": "en"}, 0.0, 0.1)):
        env = SearchQAEnv(
            dataset=data, retriever=Engine(), protocol=protocol, reward=name, **settings
        )
        env.reset(seed=0)
        _, earned, *_, info = env.step(f"<think>t</think><answer>{box}</answer>")
        assert least <= earned <= most
        assert info["metrics"]["em"] == info["metrics"]["f1"] == least


def test_unknown_languages_are_refused() -> None:
    data = Dataset("own", [Question("q", "?", ("x",), extra={"metric_language": "xx"})], None)
    with pytest.raises(
        UnknownNameError, match=r"metric_language of question 'q': 'xx'.*en, ja, ko"
    ):
        SearchQAEnv(dataset=data, retriever=Engine()).reset(seed=0)
    with pytest.raises(UnknownNameError, match="unknown metric_language 'zz'"):
        SearchQAEnv(dataset=data, retriever=Engine(), metric_language="zz")
