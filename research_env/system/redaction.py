"""Keep secrets out of errors, logs and records.

Every message of this package's errors goes through :func:`redact_known`, and so does every text
from a server, before it is shortened.
"""

from __future__ import annotations

import base64
import os
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from html import unescape

SHORTEST_SECRET = 8
"""Characters. A shorter key, such as "EMPTY", is a placeholder and hides nothing."""

SECRET_VARIABLES = (
    "ELASTICSEARCH_API_KEY",
    "ELASTICSEARCH_PASSWORD",
    "OPENAI_API_KEY",
    "SERPER_API_KEY",
    "BRAVE_API_KEY",
    "TAVILY_API_KEY",
    "SEARXNG_TOKEN",
    "RETRIEVER_API_KEY",
    "HF_TOKEN",
)
"""Environment variables that hold a key, a token or a password."""

_SHOWN = "[redacted]"
_SHORTEST_WHOLE = 6  # characters of a secret that is replaced only if it is complete
_USER_INFO = re.compile(r"(//)[^\s]*@")
_PARAMETER = re.compile(
    r"""((?:[?&;]|%3F|%26)[\w.-]*(?:key|token|secret|passw|auth|signature)[\w.-]*(?:=|%3D))"""
    r"""[^&\s"'<>#]+""",
    re.IGNORECASE,
)
_CHARACTER = re.compile(
    r"%(?:25)*(?P<percent>[0-9a-fA-F]{2})"
    r"|\\+u(?P<json>[0-9a-fA-F]{4})|\\+x(?P<hex>[0-9a-fA-F]{2})"
    r"|(?P<entity>&\#?[0-9a-zA-Z]{1,8};)"
    r"|\\+(?P<escaped>[^\\])|(?P<plain>.)",
    re.DOTALL,
)


def redact(text: str, *secrets: str) -> str:
    """Replace secrets, and parts of secrets, in a text.

    A secret is found as it is, JSON-escaped, percent-encoded or as HTML entities. A part is found
    if it has :data:`SHORTEST_SECRET` characters.

    Args:
        text: for example the answer of a server.
        *secrets: keys; those shorter than :data:`SHORTEST_SECRET` are ignored.
    """
    # A secret may contain what looks like an escape, so it is also searched in decoded form.
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


def redact_known(text: str) -> str:
    """Replace the secrets that this package knows, and those that URLs contain.

    These are the values of :data:`SECRET_VARIABLES` and the Basic login of Elasticsearch (see
    :func:`redact`), users and passwords of URLs, and the values of URL parameters with names such
    as ``token=`` and ``api_key=``.

    Args:
        text: any text that may be shown or stored.
    """
    secrets = _known_secrets()
    if secrets:
        text = redact(text, *secrets)
        for secret in secrets:
            if _SHORTEST_WHOLE <= len(secret) < SHORTEST_SECRET:
                text = text.replace(secret, _SHOWN)
    if "@" in text:
        text = _USER_INFO.sub(rf"\1{_SHOWN}@", text)
    return _PARAMETER.sub(rf"\1{_SHOWN}", text)


def redact_url(url: str) -> str:
    """Redact a text that is one URL, whose password may contain spaces, newlines and slashes."""
    return redact_known(re.sub(r"//.*@", f"//{_SHOWN}@", url, flags=re.DOTALL))


def _known_secrets() -> list[str]:
    """The secrets in environment variables; those that are not ASCII also as Latin-1."""
    secrets = [os.environ.get(variable, "").strip() for variable in SECRET_VARIABLES]
    user, password = (os.environ.get(f"ELASTICSEARCH_{x}", "") for x in ("USERNAME", "PASSWORD"))
    if user and password:
        login = f"{user}:{password}".encode("utf-8", "surrogateescape")
        secrets.append(base64.b64encode(login).decode())
    secrets = [secret for secret in secrets if secret]
    encoded = [
        secret.encode("utf-8", "surrogateescape").decode("latin-1")  # decoded percent-encoding
        for secret in secrets
        if not secret.isascii()
    ]
    return secrets + encoded


def _decoded(match: re.Match[str]) -> str:
    """The one character that a match stands for."""
    kind = match.lastgroup or "plain"
    found = match[kind]
    if kind in ("percent", "json", "hex"):
        return chr(int(found, 16))
    return (unescape(found) or "?")[0] if kind == "entity" else found


def one_line(text: str, most: int = 200) -> str:
    """Return the beginning of a text on one line, without control characters and secrets."""
    cleaned = redact_known(" ".join(text[: 20 * most].split()))  # before it is cut
    return "".join(c if c.isprintable() else "?" for c in cleaned[:most])
