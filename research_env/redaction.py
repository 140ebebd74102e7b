"""Keep secrets out of errors, logs and provenance.

Servers repeat what they were sent: whole, escaped for JSON, percent-encoded, or cut. :func:`redact`
finds the package's secrets in all of these forms. Every error of the package passes its message
through it, and so does every text of a server before it is shortened.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from urllib.parse import quote, quote_plus

SECRET_VARIABLES = (
    "ELASTICSEARCH_API_KEY",
    "ELASTICSEARCH_PASSWORD",
    "OPENAI_API_KEY",
    "SERPER_API_KEY",
    "BRAVE_API_KEY",
    "TAVILY_API_KEY",
    "SEARXNG_TOKEN",
    "RESEARCH_SERVE_KEY",
    "HF_TOKEN",
)
"""Environment variables that hold a key, a token or a password."""

_MASK = "[hidden]"
_SHORTEST = 4  # characters; a shorter value would be found in ordinary words
_PIECE = 8  # characters of a secret that are not shown in a row, fewer for a short one

_USER_INFO = re.compile(r"(//)[^\s]*@")
_PARAMETER = re.compile(
    r"""((?:[?&;]|%3[fF]|%26)[\w.-]*(?:key|token|secret|passw|auth|signature)[\w.-]*(?:=|%3[dD]))"""
    r"""[^&\s"'<>#]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace secrets in a text.

    Replaced are the values of ``SECRET_VARIABLES`` in every form that a server might repeat them
    (plain, JSON-escaped, percent-encoded, HTML-escaped, in a Basic login, and pieces of at least
    eight characters of any of these), users and passwords of URLs, and the values of URL parameters
    whose names say that they are secret (``token=``, ``api_key=``, ...).

    Args:
        text: Anything that may be shown or stored.

    Returns:
        The text with ``[hidden]`` in place of what must not be shown.
    """
    secrets = tuple(_secrets())
    if secrets:
        text = _without(text, secrets)
    if "@" in text:
        text = _USER_INFO.sub(r"\1[hidden]@", text)
    return _PARAMETER.sub(r"\1[hidden]", text)


def redact_url(url: str) -> str:
    """Redact a text that is one URL: its password may hold spaces, line breaks and slashes."""
    return redact(re.sub(r"//.*@", "//[hidden]@", url, flags=re.DOTALL))


def _secrets() -> Iterator[str]:
    for variable in SECRET_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= _SHORTEST:
            yield secret
    user, password = (os.environ.get(f"ELASTICSEARCH_{x}", "") for x in ("USERNAME", "PASSWORD"))
    if user and password:
        yield base64.b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode()


def _forms(secret: str) -> set[str]:
    """The ways in which a secret may be written."""
    encoded = secret.encode("utf-8", "surrogateescape")
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    escaped |= {each.replace("/", r"\/") for each in escaped}
    escaped |= {json.dumps(each)[1:-1] for each in escaped}  # JSON within JSON
    percent = {quote(encoded, safe=""), quote(encoded), quote_plus(encoded)}
    percent |= {quote(each, safe="") for each in percent}
    forms = {secret, repr(secret)[1:-1], html.escape(secret)} | escaped | percent
    # Hexadecimal digits may be of either case.
    pattern = re.compile(r"%[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}")
    forms |= {pattern.sub(lambda m: m[0].lower(), each) for each in forms}
    forms |= {
        pattern.sub(lambda m: m[0][:2] + m[0][2:].upper(), each) for each in forms if "\\u" in each
    }
    return forms


def _without(text: str, secrets: Sequence[str]) -> str:
    """Replace every piece of a form of a secret that is too long to be a coincidence."""
    found = bytearray(len(text))  # 1 where a character belongs to a secret
    for secret in secrets:
        for size, pieces in _pieces(secret).items():
            for start in range(len(text) - size + 1):
                if text[start : start + size] in pieces:
                    found[start : start + size] = b"\1" * size
    if not any(found):
        return text
    parts: list[str] = []
    shown = 0  # up to where the text was copied
    # Secrets with up to three characters between them are one, written in more than one way.
    for match in re.finditer(b"\1+(?:\0{1,3}\1+)*", bytes(found)):
        parts += [text[shown : match.start()], _MASK]
        shown = match.end()
    return "".join(parts) + text[shown:]


@lru_cache(maxsize=64)
def _pieces(secret: str) -> dict[int, frozenset[str]]:
    """The pieces of all forms of a secret, by their length."""
    pieces: dict[int, set[str]] = {}
    for form in _forms(secret):
        size = min(_PIECE, max(_SHORTEST, len(form) // 2))
        starts = range(len(form) - size + 1)
        pieces.setdefault(size, set()).update(form[at : at + size] for at in starts)
    return {size: frozenset(each) for size, each in pieces.items()}
