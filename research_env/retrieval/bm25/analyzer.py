"""Text to terms, as Lucene's ``EnglishAnalyzer`` (Elasticsearch's ``english``) makes them.

The chain is Lucene's: words by Unicode text segmentation (UAX #29), possessive ``'s`` removed,
lower case, 33 stop words removed, Porter's stemmer. Scores equal Elasticsearch's only if the
terms do. Three rules are left out: quotation marks inside Hebrew words, Katakana that an
underscore joins to letters, and sequences of several emoji.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable
from functools import lru_cache

STOP_WORDS = frozenset(  # Lucene's EnglishAnalyzer.ENGLISH_STOP_WORDS_SET
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their "
        "then there these they this to was will with",
    )
)
MAX_QUERY_WORDS = 512  # in two fields, the 1,024 clauses that every Elasticsearch takes
MAX_WORD_LENGTH = 255  # Lucene's StandardTokenizer cuts longer words into pieces of this length

# Every character is mapped to one that stands for its word-break property, so that one short
# regular expression over these stand-ins finds the words of any script.
_LETTER, _DIGIT, _JOINER, _EXTEND, _OTHER = "a", "0", "_", "~", " "
_BY_CATEGORY = {"Nd": _DIGIT, "Nl": _LETTER, "Pc": _JOINER, "Cf": _EXTEND}
_EXCEPTIONS = (  # where the general category does not tell the word-break property (Unicode 12)
    (":", r":\u00b7\u0387\u05f4\u2027\ufe13\ufe55\uff1a"),  # no break between letters
    (",", r",;\u037e\u0589\u060c\u060d\u066c\u07f8\u2044\ufe10\ufe14\ufe50\ufe54\uff0c\uff1b"),
    (".", r"'.\u2018\u2019\u2024\ufe52\uff07\uff0e"),  # no break between letters, nor digits
    (_JOINER, r"\u202f"),
    (_OTHER, r"\u02e5-\u02eb\u055a\u058a\u200b\u3006"),
    (_EXTEND, r"\uff9e\uff9f\U0001f3fb-\U0001f3ff"),
    (_LETTER, r"\u02c2-\u02c5\u02d2-\u02d7\u02de\u02df\u02ed\u02ef-\u02ff\u055b\u055c\u055e\u05f3"),
    (_LETTER, r"\u24b6-\u24e9\ua720\ua721\ua789\ua78a\uab5b\U0001f130-\U0001f189"),
    ("i", r"\u2e80-\u2fd5\u3007\u3021-\u3029\u3038-\u303a\u3400-\u4db5\u4e00-\u9fef\uf900-\ufad9"),
    ("i", r"\U00020000-\U0002fa1d\u3041-\u3096\u309d-\u309f\U0001b001-\U0001b11e\U0001f200"),
    ("k", r"\u3031-\u3035\u309b\u309c\u30a0-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u32d0-\u32fe"),
    ("k", r"\u3300-\u3357\uff66-\uff9d"),
    ("s", r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ec6\u0edc-\u0edf\u1000-\u103f"),
    ("s", r"\u1050-\u108f\u109a-\u109f\u1780-\u17d3\u17d7\u17dc\u17dd\u1950-\u1974"),
    ("e", r"\xa9\xae\u203c\u2049\u2122\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23e9-\u23f3"),
    ("e", r"\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-\u2685"),
    ("e", r"\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744\u2747"),
    ("e", r"\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u2934\u2935"),
    ("e", r"\u2b05-\u2b07\u2b50\U0001f000-\U0001f0f5\U0001f300-\U0001f3fa\U0001f400-\U0001f53d"),
    ("e", r"\U0001f546-\U0001f64f\U0001f680-\U0001f6ff\U0001f90c-\U0001f93a\U0001f93c-\U0001faff"),
)  # i: Han, Hiragana, each a word; k, s: Katakana, Thai and kin, runs; e: pictographs
# Underscores are tried where their run begins only, so that a long run costs no quadratic time.
_WORD = re.compile(
    r"(?:(?<!_)_++)?+[a0][a0_]*+(?:[:.,](?:(?<=a[:.])~*+(?=a)|(?<=0[,.])~*+(?=0))[a0_]++)*+"
    r"|(?:(?<!_)_++)?+k[k_]*+|s++|[ie]~*+"
)
_ASCII_WORD = re.compile(  # the same rules where no stand-ins are needed: three times as fast
    r"(?:(?<!_)_++)?+[A-Za-z0-9]\w*+"
    r"(?:[:.',;](?:(?<=[A-Za-z][:.'])(?=[A-Za-z])|(?<=[0-9][.',;])(?=[0-9]))\w++)*+",
    re.ASCII,
)
_EXTENDED = re.compile(r"([a0_ks])~+")
_POSSESSIVE = re.compile(r"['’＇][sS]\Z")


class _StandIns(dict[int, str]):
    """Maps code points to stand-ins (for ``str.translate``), and learns them as they occur."""

    def __init__(self) -> None:
        super().__init__()
        self._exceptions = [(stand_in, re.compile(f"[{set_}]")) for stand_in, set_ in _EXCEPTIONS]

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        stand_in = _BY_CATEGORY.get(category) or {"L": _LETTER, "M": _EXTEND}.get(category[0])
        for exception, members in self._exceptions:
            if members.match(character):
                stand_in = exception
        self[code] = stand_in or _OTHER
        return self[code]


_STAND_INS = _StandIns()


def words(text: str) -> list[str]:
    """Split a text into words at the boundaries of UAX #29, as Lucene's ``StandardTokenizer``."""
    if text.isascii():
        found = _ASCII_WORD.findall(text)
    else:
        stand_ins = text.translate(_STAND_INS)
        if _EXTEND in stand_ins:  # an accent or a format character belongs to what it follows
            stand_ins = _EXTENDED.sub(lambda match: match[1] * len(match[0]), stand_ins)
        found = [text[slice(*match.span())] for match in _WORD.finditer(stand_ins)]
    if max(map(len, found), default=0) > MAX_WORD_LENGTH:
        return [
            word[start : start + MAX_WORD_LENGTH]
            for word in found
            for start in range(0, len(word), MAX_WORD_LENGTH)
        ]
    return found


def first_words(query: str) -> str:
    """Cut a query after its ``MAX_QUERY_WORDS``-th word.

    Elasticsearch refuses a query of too many words, and its limit depends on its memory. Every
    engine searches the first words only, so that all find the same.
    """
    if len(query) <= MAX_QUERY_WORDS:
        return query
    end = 0
    for word in words(query)[:MAX_QUERY_WORDS]:
        end = query.index(word, end) + len(word)
    return query[:end]


def analyze(text: str) -> list[str]:
    """Turn a text into its index terms, in order and with repetitions.

    Any text is words: operators, markup, control characters and lone surrogates have no meaning.

    >>> analyze("The Beatles' possibly-last U.S. concert")
    ['beatl', 'possibl', 'last', 'u.', 'concert']
    """
    return [term for term in map(_term, words(text)) if term]


@lru_cache(maxsize=1 << 18)
def _term(word: str) -> str:
    """Turn a word into its term, which is empty for a stop word."""
    word = _POSSESSIVE.sub("", word)
    # Java lowers character by character: no final sigma, and a dotted capital I becomes i.
    lower = word.lower() if word.isascii() else "".join(c.lower()[0] for c in word)
    return "" if lower in STOP_WORDS else _stem(lower)


_own = threading.local()  # a lock would be held for ever in a child that is forked meanwhile


def _stemmer() -> Callable[[str], str]:
    """This thread's stemmer: the object serves one thread at a time."""
    found: Callable[[str], str] | None = getattr(_own, "stem_word", None)
    if found is None:
        import Stemmer  # noqa: PLC0415  (only when something is analyzed)

        found = _own.stem_word = Stemmer.Stemmer("porter").stemWord
    return found


_DOUBLE_CONSONANT = re.compile(r"([chjkqvwx])\1(?:ed|ing)\Z")
_HAS_VOWEL_CONSONANT = re.compile(r"(?:[aeiou]|(?<=[^aeiou])y)(?:[^aeiouy]|(?<=[aeiou])y)")


def _stem(word: str) -> str:
    """Stem a word by Porter's algorithm, as Lucene does.

    Snowball's ``porter`` is the algorithm as published in 1980; Lucene follows Porter's own later
    program. That leaves words of two letters alone, removes more kinds of double consonant before
    ``ed`` and ``ing``, and has two other rules in step 2: ``bli`` to ``ble`` (published: ``abli``
    to ``able``) and ``logi`` to ``log``. No other rule touches such endings, unless an ``e``
    followed them, so that they can be applied to the published algorithm's result.
    """
    if len(word) < 3:
        return word
    stem_word = _stemmer()
    stem = stem_word(word)
    if stem.endswith("bli") and word[-1] != "e" and _HAS_VOWEL_CONSONANT.search(stem[:-3]):
        stem = stem_word(stem[:-1] + "e")
    log = stem.endswith("logi") and word[-1] != "e" and _HAS_VOWEL_CONSONANT.search(stem[:-4])
    undouble = stem[-2:-1] == stem[-1:] and _DOUBLE_CONSONANT.search(word)
    return stem[:-1] if log or undouble else stem
