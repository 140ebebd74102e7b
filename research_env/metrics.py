"""How an answer is compared with the gold answers: exact match, F1, cover exact match.

Every metric takes the prediction and all gold answers (the main one and its aliases) and returns
the best score over the golds, a float in [0, 1]. No prediction (``None``) scores 0.

Libraries differ in some details. The choices here, and their sources:

- Punctuation is the 32 ASCII characters and is deleted, as in SQuAD's evaluation ("U.S." becomes
  "us"). R1-Searcher replaces it by a space ("u s"): `normalize_r1_searcher`.
- Unicode is not normalized: "é" and "e" differ, and so do "–" and "-", composed and decomposed
  letters. SQuAD, HotpotQA and the code of the three papers agree on that.
- F1 is 0 if the texts differ and one is "yes", "no" or "noanswer", as in HotpotQA's evaluation and
  in the code of ReSearch and R1-Searcher; SQuAD and FlashRAG count the shared words.
- F1 of two texts that are both empty after normalization is 0, as in SQuAD 1.1 and HotpotQA (1 in
  SQuAD 2.0); their exact match is 1.
- Chinese, Japanese and Korean have rules of their own (`LANGUAGES`); the data set chooses the
  language, which is never guessed.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

Normalizer = Callable[[str], str]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACE_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_MAX_CACHED = 200  # characters
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower-case, delete ASCII punctuation and English articles, collapse white space.

    Punctuation is deleted before articles, so "a.m." becomes "am" and stays.

    References:
        SQuAD 1.1's ``evaluate-v1.1.py`` (Rajpurkar et al. 2016), used unchanged by HotpotQA,
        ReSearch and Search-R1.
    """
    # The metrics of an episode normalize the same few short texts. Long ones would fill the memory.
    return _normalized(text) if len(text) <= _MAX_CACHED else _normalized.__wrapped__(text)


@lru_cache(maxsize=4096)
def _normalized(text: str) -> str:
    return _collapse(text.lower().translate(_DELETE_PUNCTUATION))


def normalize_r1_searcher(text: str) -> str:
    """R1-Searcher's variant: punctuation, also ‘ ’ ´ and `, becomes a space; True becomes yes.

    The texts "True" and "False" are mapped exactly as they are written, so "true" stays "true".

    References:
        R1-Searcher, ``train/reward_server_qwen_zero.py``: ``normalize_answer`` after
        ``bool_mapping``.
    """
    text = {"True": "yes", "False": "no"}.get(text, text)
    return _collapse(text.lower().translate(_SPACE_PUNCTUATION))


@dataclass(frozen=True, slots=True)
class Language:
    """How answers are compared in a language whose words English rules do not tokenize.

    Attributes:
        normalize: is applied to both sides first.
        tokenize: splits a normalized text into tokens.
        overlap: counts the tokens that two lists share.
    """

    normalize: Normalizer
    tokenize: Callable[[str], list[str]]
    overlap: Callable[[list[str], list[str]], int]


def _fold_wide(text: str) -> str:
    """Full-width forms as ASCII, lower case, a space for punctuation and symbols of any script."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in folded)


def _normalize_wide(text: str) -> str:
    return "".join(_fold_wide(text).split())


def _normalize_chinese(text: str) -> str:
    """Without punctuation, and with a space between any two tokens."""
    return " ".join(_HAN_OR_WORD.findall(_fold_wide(text)))


def _normalize_korean(text: str) -> str:
    text = _KOREAN_BRACKETS.sub(" ", unicodedata.normalize("NFKC", text)).lower()
    return " ".join(text.translate(_DELETE_PUNCTUATION).split())


def _characters(text: str) -> list[str]:
    return [c for c in text if not c.isspace()]


def _shared(a: list[str], b: list[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def _longest_run(a: list[str], b: list[str]) -> int:
    return SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


_HAN_OR_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\s\u3400-\u9fff\uf900-\ufaff]+")
_KOREAN_BRACKETS = re.compile("['\"《》<>〈〉()‘’]")

LANGUAGES: Mapping[str, Language | None] = {
    "en": None,
    "zh": Language(_normalize_chinese, str.split, _longest_run),
    "ja": Language(_normalize_wide, _characters, _shared),
    "ko": Language(_normalize_korean, _characters, _shared),
}
"""The languages whose answers can be compared, by ISO 639-1 code; None: the rules for English.

- ``zh``: CMRC 2018 (Cui et al. 2019), ``cmrc2018_evaluate.py``: a token per Han character and per
  word of another script, lower case, no punctuation; F1 from the longest common run of tokens.
  Unlike there, full-width forms equal their ASCII forms (NFKC), and all punctuation of Unicode is
  removed.
- ``ja``: JSQuAD of JGLUE (Kurihara et al. 2022): exact match and F1 of the bags of characters, with
  full-width forms folded and punctuation and spaces removed.
- ``ko``: KorQuAD 1.0 (Lim et al. 2019), ``evaluate-v1.0.py``: without brackets, quotes and ASCII
  punctuation; F1 of the bags of characters.

In these three, a prediction covers a gold answer if it contains it, both normalized.
"""


def exact_match(
    prediction: str | None,
    answers: Sequence[str],
    normalizer: Normalizer = normalize,
    *,
    language: str = "en",
) -> float:
    """1.0 if the normalized prediction equals a normalized gold answer, else 0.0.

    Args:
        prediction: the answer given; None if there is none.
        answers: the gold answers; any of them counts.
        normalizer: is applied to both sides first; languages but English have their own.
        language: one of `LANGUAGES`.

    References:
        SQuAD 1.1; ``em_check`` of Search-R1.
    """
    if prediction is None:
        return 0.0
    if rules := LANGUAGES[language]:
        normalizer = rules.normalize
    return float(normalizer(prediction) in map(normalizer, answers))


def f1(
    prediction: str | None,
    answers: Sequence[str],
    normalizer: Normalizer = normalize,
    *,
    language: str = "en",
) -> float:
    """Best F1 between the bags of words of the prediction and of a gold answer.

    ``F1 = 2PR / (P + R)``, with P the share of the prediction's words found in the gold and R the
    share of the gold's words found in the prediction, words counted as often as they occur.

    Args:
        prediction: the answer given; None if there is none.
        answers: the gold answers; the best one counts.
        normalizer: is applied to both sides first; languages but English have their own.
        language: one of `LANGUAGES`.

    References:
        SQuAD 1.1, with HotpotQA's rule for yes and no (see the head of this module);
        ``get_f1_score`` of ReSearch.
    """
    if prediction is None:
        return 0.0
    if rules := LANGUAGES[language]:
        return max([_f1_by(rules, prediction, answer) for answer in answers], default=0.0)
    predicted = normalizer(prediction)
    return max([_f1(predicted, normalizer(answer)) for answer in answers], default=0.0)


def cover_exact_match(
    prediction: str | None,
    answers: Sequence[str],
    normalizer: Normalizer = normalize,
    *,
    language: str = "en",
) -> float:
    """1.0 if every word of a gold answer occurs in the prediction, in any order, else 0.0.

    Whole words count ("Bart" does not cover "art"), and each counts once. Search-R1's ``subem``
    asks for a substring instead. Only an empty prediction covers a gold that is empty after
    normalization.

    Args:
        prediction: the answer given; None if there is none.
        answers: the gold answers; any of them counts.
        normalizer: is applied to both sides first; languages but English have their own.
        language: one of `LANGUAGES`.

    References:
        R1-Searcher, ``cover_exact_match_score_1`` (the paper's ACC_R).
    """
    if prediction is None:
        return 0.0
    if rules := LANGUAGES[language]:
        whole, golds = rules.normalize(prediction), map(rules.normalize, answers)
        return float(any(gold in whole if gold else not whole for gold in golds))
    words = set(normalizer(prediction).split(" "))
    return float(any(words.issuperset(normalizer(answer).split(" ")) for answer in answers))


def _collapse(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _f1_by(rules: Language, prediction: str, answer: str) -> float:
    predicted, gold = (rules.tokenize(rules.normalize(text)) for text in (prediction, answer))
    shared = rules.overlap(predicted, gold) if predicted and gold else 0
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def _f1(predicted: str, gold: str) -> float:
    if predicted == gold:
        return float(bool(gold))
    predicted_words, gold_words = predicted.split(), gold.split()
    closed = predicted in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS
    if closed or set(gold_words).isdisjoint(predicted_words):
        return 0.0
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))
