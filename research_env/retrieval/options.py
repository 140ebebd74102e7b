"""The options of a retriever's URL: what stands behind its question mark."""

from __future__ import annotations

import math
from collections.abc import Collection
from urllib.parse import unquote, urlsplit

from research_env.errors import ConfigurationError, UnknownNameError


def split_options(url: str) -> tuple[str, dict[str, str]]:
    """The URL before its question mark, and the options behind it, percent-decoded.

    Raises:
        ConfigurationError: something there is not KEY=VALUE, or a key comes twice.
    """
    base, _, query = url.partition("?")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or key in options:
            raise ConfigurationError(
                f"the options of a retriever are KEY=VALUE, each once, not {key!r}; "
                "as in '...?key=value&other=value'"
            )
        options[key] = unquote(value)
    return base, options


def check_options(scheme: str, options: Collection[str], known: Collection[str]) -> None:
    """Refuse an option that the scheme does not have.

    Raises:
        UnknownNameError: names it, and those that exist.
    """
    for key in options:
        if key not in known:
            raise UnknownNameError(f"option of {scheme}", key, known)


def number(options: dict[str, str], key: str, default: float, least: float) -> float:
    """The value of an option that is a number.

    Raises:
        ConfigurationError: it is none, not finite, or below ``least``.
    """
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise ConfigurationError(
            f"{key}={options.get(key)!r} must be a number of at least {least:g}"
        )
    return value


def check_address(url: str) -> None:
    """Refuse a URL that is no ``http://HOST...`` or ``https://HOST...``, or holds a password.

    Raises:
        ConfigurationError: it does not repeat what may be secret.
    """
    if "@" in url:  # wherever: a password may hold any character
        raise ConfigurationError(
            "the address of a server holds an @: take user and password out; secrets come from the "
            "environment, never from the URL"
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, brackets that do not close
        usable = False
    if not usable:
        raise ConfigurationError(
            f"{url!r} is no address of a server; write it as in 'http://localhost:8000/retrieve'"
        )
