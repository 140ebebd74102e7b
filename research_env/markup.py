"""Spans between marks, and retrieved text without anything that could be a mark."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


class Tag(NamedTuple):
    """The marks that open and close a span of text."""

    open: str
    close: str


def last_before_end(text: str, tag: Tag) -> str | None:
    """The span between the last opening mark and the end of a text, or None.

    Args:
        text: ends with the closing mark.
        tag: the marks.
    """
    start = text.rfind(tag.open)
    return text[start + len(tag.open) : -len(tag.close)] if start >= 0 else None


def between(text: str, tag: Tag) -> str | None:
    """The first span between an opening and a closing mark, or None."""
    start = text.find(tag.open)
    end = text.find(tag.close, start + len(tag.open)) if start >= 0 else -1
    return text[start + len(tag.open) : end] if end >= 0 else None


# A text without any of these bytes in its UTF-8 needs no change: "<", the backslash, control
# characters, and the first bytes of two-byte controls (C2) and of surrogates (ED).
_SUSPECT = bytes((*range(9), *range(11, 32), 0x3C, 0x5C, 0x7F, 0xC2, 0xED))
_TAG = re.compile(r"<(?![\s\d=-]|\Z)")
_BOX = re.compile(r"\\(?=[bf]box|boxed)")
_NEWLINE = re.compile(r"\r\n?")
_MAX_CACHED = 2_000  # characters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace control characters and lone surrogates by U+FFFD, so that any engine takes the text.

    Tabs and line feeds stay; a carriage return becomes a line feed.
    """
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw.translate(None, _SUSPECT)) == len(raw):
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _NEWLINE.sub("\n", text))


def defuse(text: str) -> str:
    r"""Make a retrieved text harmless: no tag or chat token in angle brackets, no ``\boxed``.

    An angle bracket that could open a tag becomes ``‹`` (so ``</search>`` reads ``‹/search>``,
    ``<|im_end|>`` reads ``‹|im_end|>``, and ``a < b`` stays); the backslash of ``\boxed`` and
    ``\fbox`` becomes ``∖``; control characters become U+FFFD.
    """
    # The samples of a group read the same passages. Very long ones would fill the memory.
    return _defused(text) if len(text) <= _MAX_CACHED else _defused.__wrapped__(text)


@lru_cache(maxsize=4096)
def _defused(text: str) -> str:
    return _BOX.sub("∖", _TAG.sub("‹", clean(text)))
