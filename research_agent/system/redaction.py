"""Remove secrets and control characters from errors, logs and records."""

from __future__ import annotations

import re
from array import array
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
    plain = "".join(characters)
    shown: list[str] = []
    done, hidden_until = 0, -1  # positions in text and in plain
    for place in range(len(plain) - SHORTEST_SECRET + 1):
        if plain[place : place + SHORTEST_SECRET] in grams:
            if place > hidden_until:
                shown += [text[done : starts[place]], _SHOWN]
            hidden_until = place + SHORTEST_SECRET
            done = starts[hidden_until]
    shown.append(text[done:])
    return "".join(shown)


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
