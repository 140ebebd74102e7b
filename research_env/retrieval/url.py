"""Check a retriever's URL and read its options (``?key=value&...``) and its secrets."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from urllib.parse import unquote, urlsplit

from research_env.errors import ConfigurationError, UnknownNameError

_HOST = re.compile(r"[^\s\\/^`{|}<>\"]+")


def split_options(url: str) -> tuple[str, dict[str, str]]:
    """Split a URL at its question mark.

    Returns:
        What stands before the question mark, and the options behind it, percent-decoded.

    Raises:
        ConfigurationError: an option is not KEY=VALUE, or a key comes twice. The message does not
            repeat it if there is an @: it may be the end of a password with a question mark in it.
    """
    base, _, query = url.partition("?")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or key in options:
            shown = "'...'" if "@" in query else repr(key)
            raise ConfigurationError(
                f"the options of a retriever are KEY=VALUE, each once, not {shown}; "
                "as in '...?key=value&other=value'"
            )
        options[key] = unquote(value)
    return base, options


def check_options(scheme: str, options: Mapping[str, str], known: Collection[str]) -> None:
    """Refuse an option that the scheme does not have.

    Raises:
        UnknownNameError: names the options that exist. It repeats the unknown one only if there is
            no @, which may be the end of a password.
    """
    secret = any("@" in key or "@" in value for key, value in options.items())
    for key in options:
        if key not in known:
            raise UnknownNameError(f"option of {scheme}", "..." if secret else key, known)


WITHOUT_EFFECT = ("batch", "budget", "deadline", "rate")
"""Options of retrievers that change no result."""
MAX_NUMBER = 1_000_000_000
"""Largest number in a URL, such as 32 years of seconds: clocks overflow soon after it."""


def number(options: dict[str, str], key: str, default: float, least: float) -> float:
    """Return the value of an option that is a number.

    Raises:
        ConfigurationError: the value is no number, below ``least``, or above ``MAX_NUMBER``.
    """
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = math.nan
    if not least <= value <= MAX_NUMBER:
        raise ConfigurationError(
            f"{key}={options.get(key)!r} must be a number of at least {least:g}, and at most "
            f"{MAX_NUMBER:,}"
        )
    return value


def is_host(name: str | None) -> bool:
    """Whether a text can be the name or address of a machine."""
    try:
        return bool(name and _HOST.fullmatch(name) and name.encode("idna"))
    except UnicodeError:
        return False


def check_address(url: str, example: str = "http://localhost:8000/retrieve") -> None:
    """Refuse a URL that is not ``http://HOST...`` or ``https://HOST...``, or holds a password.

    Args:
        url: the address of a server.
        example: one that would be taken, for the message.

    Raises:
        ConfigurationError: the message does not repeat what may be secret.
    """
    if "@" in url:  # anywhere in it: a password may hold any character
        raise ConfigurationError(
            "the address of a server holds an @: take user and password out; secrets come from the "
            "environment, never from the URL"
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and is_host(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not close
        usable = False
    if not usable:
        raise ConfigurationError(f"{url!r} is no address of a server; write it as in {example!r}")


def secret_of(variable: str) -> str:
    """Return the key or password that an environment variable holds, empty if it is not set.

    Raises:
        ConfigurationError: it holds characters that no header may have. The message does not
            repeat it.
    """
    secret = os.environ.get(variable, "").strip()
    if not secret.isascii() or not secret.isprintable():
        raise ConfigurationError(f"{variable} holds characters that no key has")
    return secret
