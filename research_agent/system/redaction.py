"""Remove secrets and control characters from errors, logs and records."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from html import unescape

SHORTEST_SECRET = 8
"""In characters. Shorter keys, such as "EMPTY", are placeholders and are not redacted."""

_SHOWN = "[redacted]"
_CHARACTER = re.compile(
    r"%(?:25)*(?P<percent>[0-9a-fA-F]{2})"
    r"|\\+u(?P<json>[0-9a-fA-F]{4})|\\+x(?P<hex>[0-9a-fA-F]{2})"
    r"|(?P<entity>&\#?[0-9a-zA-Z]{1,8};)"
    r"|\\+(?P<escaped>[^\\])|(?P<plain>.)",
    re.DOTALL,
)


def redact(text: str, *secrets: str) -> str:
    """Replace every part of a secret in a text.

    Every run of :data:`SHORTEST_SECRET` characters of a secret is replaced, so incomplete secrets
    are found too. They are found as they are, JSON-escaped, percent-encoded or as HTML entities.

    Args:
        text: for example a server's answer.
        *secrets: keys; those shorter than :data:`SHORTEST_SECRET` are ignored.
    """
    # A secret can contain what looks like an escape, so its decoded form counts too.
    forms = {*secrets, *("".join(map(_decoded, _CHARACTER.finditer(each))) for each in secrets)}
    grams = {
        form[start : start + SHORTEST_SECRET]
        for form in forms
        for start in range(len(form) - SHORTEST_SECRET + 1)
    }
    if not grams:
        return text
    starts, characters = array("I"), []
    for match in _CHARACTER.finditer(text):
        starts.append(match.start())
        characters.append(_decoded(match))
    starts.append(len(text))
    hidden = [*_runs("".join(characters), starts, grams)]
    # A secret behind a "%" begins with what looks like an escape, so the plain text counts too.
    hidden += _runs(text, range(len(text) + 1), grams)
    shown: list[str] = []
    end = 0
    for start, stop in sorted(hidden):
        if not shown or start > end:
            shown += [text[end:start], _SHOWN]
        end = max(end, stop)
    return "".join([*shown, text[end:]])


def _runs(plain: str, starts: Sequence[int], grams: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield where a text has one of ``grams``, as (start, stop).

    Args:
        plain: the text's decoded characters.
        starts: where each of them begins in the text, and the length of the text.
        grams: texts of :data:`SHORTEST_SECRET` characters.
    """
    for place in range(len(plain) - SHORTEST_SECRET + 1):
        if plain[place : place + SHORTEST_SECRET] in grams:
            yield starts[place], starts[place + SHORTEST_SECRET]


def one_line(text: str, most: int = 300) -> str:
    """The first ``most`` characters of a text on one line, with "?" for unprintable ones."""
    cleaned = " ".join(text[: 4 * most].split())
    return "".join(c if c.isprintable() else "?" for c in cleaned[:most])


def _decoded(match: re.Match[str]) -> str:
    """The one character that a match stands for."""
    kind = match.lastgroup or "plain"
    found = match[kind]
    if kind in ("percent", "json", "hex"):
        return chr(int(found, 16))
    return (unescape(found) or "?")[0] if kind == "entity" else found
