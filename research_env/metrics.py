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
- F1 of two texts that are both empty after normalisation is 0, as in SQuAD 1.1 and HotpotQA
  (SQuAD 2.0 says 1); their exact match is 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
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


def exact_match(
    prediction: str | None, answers: Sequence[str], normalizer: Normalizer = normalize
) -> float:
    """1.0 when the normalised prediction equals a normalised gold answer, else 0.0.

    Args:
        prediction: the answer given, or None when there is none.
        answers: the gold answers; any of them counts.
        normalizer: what is done to both sides first.

    Source: SQuAD 1.1; ``em_check`` of Search-R1.
    """
    if prediction is None:
        return 0.0
    return float(normalizer(prediction) in map(normalizer, answers))


def f1(prediction: str | None, answers: Sequence[str], normalizer: Normalizer = normalize) -> float:
    """Best F1 between the bags of words of the prediction and of a gold answer.

    ``F1 = 2PR / (P + R)``, with P the share of the prediction's words found in the gold and R the
    share of the gold's words found in the prediction, words counted as often as they occur.

    Args:
        prediction: the answer given, or None when there is none.
        answers: the gold answers; the best one counts.
        normalizer: what is done to both sides first.

    Source: SQuAD 1.1, with HotpotQA's rule for yes and no (see the head of this module);
    ``get_f1_score`` of ReSearch.
    """
    if prediction is None:
        return 0.0
    predicted = normalizer(prediction)
    return max([_f1(predicted, normalizer(answer)) for answer in answers], default=0.0)


def cover_exact_match(
    prediction: str | None, answers: Sequence[str], normalizer: Normalizer = normalize
) -> float:
    """1.0 when every word of a gold answer occurs in the prediction, in any order, else 0.0.

    Whole words count ("art" is not covered by "Bart"), how often they occur does not. Search-R1's
    ``subem`` asks for a substring instead. A gold that is empty after normalisation is covered by
    an empty prediction only.

    Args:
        prediction: the answer given, or None when there is none.
        answers: the gold answers; any of them counts.
        normalizer: what is done to both sides first.

    Source: R1-Searcher, ``cover_exact_match_score_1`` (the paper's ACC_R).
    """
    if prediction is None:
        return 0.0
    words = set(normalizer(prediction).split(" "))
    return float(any(words.issuperset(normalizer(answer).split(" ")) for answer in answers))


def _collapse(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _f1(predicted: str, gold: str) -> float:
    if predicted == gold:
        return float(bool(gold))
    predicted_words, gold_words = predicted.split(), gold.split()
    closed = predicted in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS
    if closed or set(gold_words).isdisjoint(predicted_words):
        return 0.0
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))
