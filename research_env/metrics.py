"""How an answer is compared with the gold answers: exact match, F1, cover exact match.

Every metric takes the prediction and all gold answers (the main one and its aliases) and returns
the best score over the golds, a float in [0, 1]. No prediction (``None``) scores 0.

Libraries disagree about four details. Ours, and where they come from:

- Punctuation is the 32 ASCII characters and is deleted, as in SQuAD's evaluation ("U.S." is
  "us"). R1-Searcher puts a space in its place ("u s"): `normalize_r1_searcher`.
- Nothing is done about Unicode: "é" and "e" differ, and so do "–" and "-", composed and
  decomposed letters. SQuAD, HotpotQA and the three papers' codes agree on that.
- F1 is 0 when exactly one side is "yes", "no" or "noanswer", as in HotpotQA's evaluation and in
  the codes of ReSearch and R1-Searcher; SQuAD and FlashRAG count the shared words.
- Texts in Chinese, Japanese and Korean are compared by rules of their own (`LANGUAGES`), which are
  chosen by the data set and never guessed.
- F1 of two texts that are both empty after normalization is 0, as in SQuAD 1.1 and HotpotQA
  (SQuAD 2.0 says 1); their exact match is 1.
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
_KEPT_LENGTH = 200  # characters
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower-case, delete ASCII punctuation and English articles, collapse white space.

    Source: SQuAD 1.1's ``evaluate-v1.1.py`` (Rajpurkar et al. 2016), used unchanged by HotpotQA,
    ReSearch and Search-R1. Articles go after punctuation, so "a.m." becomes "am" and stays.
    """
    # One episode asks for the same few short texts again and again; long ones are not kept.
    return _normalized(text) if len(text) <= _KEPT_LENGTH else _normalized.__wrapped__(text)


@lru_cache(maxsize=4096)
def _normalized(text: str) -> str:
    return _collapse(text.lower().translate(_DELETE_PUNCTUATION))


def normalize_r1_searcher(text: str) -> str:
    """R1-Searcher's variant: punctuation, also ‘ ’ ´ and `, becomes a space; True is yes.

    Source: R1-Searcher, ``train/reward_server_qwen_zero.py`` (``normalize_answer`` after
    ``bool_mapping``; the mapping is exact, so "true" stays "true").
    """
    text = {"True": "yes", "False": "no"}.get(text, text)
    return _collapse(text.lower().translate(_SPACE_PUNCTUATION))


@dataclass(frozen=True, slots=True)
class Language:
    """How answers are compared in a language that does not divide words as English does.

    Attributes:
        normalize: what is done to both sides before exact match, and before they are divided.
        divide: the tokens of a normalized text.
        overlap: the number of tokens that two lists share.
    """

    normalize: Normalizer
    divide: Callable[[str], list[str]]
    overlap: Callable[[list[str], list[str]], int]


def _fold_wide(text: str) -> str:
    """Full-width forms as ASCII, lower case, without punctuation and symbols of any script."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in folded)


def _normalize_wide(text: str) -> str:
    return "".join(_fold_wide(text).split())


def _divide_chinese(text: str) -> list[str]:
    """A token per Han character, and one per run of other characters."""
    return _HAN_OR_WORD.findall(text)


def _normalize_chinese(text: str) -> str:
    """Punctuation divides no Han characters, so it goes; between other words a blank stays."""
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
    "zh": Language(_normalize_chinese, _divide_chinese, _longest_run),
    "ja": Language(_normalize_wide, _characters, _shared),
    "ko": Language(_normalize_korean, _characters, _shared),
}
"""The languages whose answers can be compared, by ISO 639-1 code.

- ``en``: as this module says.
- ``zh``: CMRC 2018 (Cui et al. 2019), ``cmrc2018_evaluate.py``: a token per Han character, words of
  other scripts whole, lower case, no punctuation; F1 from the longest common run of tokens. Beyond
  it, full-width forms equal their ASCII forms (NFKC), and all of Unicode's punctuation goes, not
  the script's list alone.
- ``ja``: JSQuAD of JGLUE (Kurihara et al. 2022): exact match and F1 of the bags of characters, with
  full-width forms folded and punctuation and spaces removed.
- ``ko``: KorQuAD 1.0 (Lim et al. 2019), ``evaluate-v1.0.py``: without brackets, quotes and ASCII
  punctuation; F1 of the bags of characters.

In the last three, an answer covers a gold if the normalized gold is a part of it.
"""


def exact_match(
    prediction: str | None,
    answers: Sequence[str],
    normalizer: Normalizer = normalize,
    *,
    language: str = "en",
) -> float:
    """1.0 when the normalized prediction equals a normalized gold answer, else 0.0.

    Args:
        prediction: the answer given, or None when there is none.
        answers: the gold answers; any of them counts.
        normalizer: what is done to both sides first; another language has its own.
        language: one of `LANGUAGES`.

    Source: SQuAD 1.1; ``em_check`` of Search-R1.
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
        prediction: the answer given, or None when there is none.
        answers: the gold answers; the best one counts.
        normalizer: what is done to both sides first; another language has its own.
        language: one of `LANGUAGES`.

    Source: SQuAD 1.1, with HotpotQA's rule for yes and no (see the head of this module);
    ``get_f1_score`` of ReSearch.
    """
    if prediction is None:
        return 0.0
    if rules := LANGUAGES[language]:
        return max([_f1_in(rules, prediction, answer) for answer in answers], default=0.0)
    predicted = normalizer(prediction)
    return max([_f1(predicted, normalizer(answer)) for answer in answers], default=0.0)


def cover_exact_match(
    prediction: str | None,
    answers: Sequence[str],
    normalizer: Normalizer = normalize,
    *,
    language: str = "en",
) -> float:
    """1.0 when every word of a gold answer occurs in the prediction, in any order, else 0.0.

    Whole words count ("art" is not covered by "Bart"), how often they occur does not. Search-R1's
    ``subem`` asks for a substring instead. A gold that is empty after normalization is covered by
    an empty prediction only.

    Args:
        prediction: the answer given, or None when there is none.
        answers: the gold answers; any of them counts.
        normalizer: what is done to both sides first; another language has its own.
        language: one of `LANGUAGES`.

    Source: R1-Searcher, ``cover_exact_match_score_1`` (the paper's ACC_R).
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


def _f1_in(rules: Language, prediction: str, answer: str) -> float:
    predicted, gold = (rules.divide(rules.normalize(text)) for text in (prediction, answer))
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
