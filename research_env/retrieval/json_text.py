"""JSON and text from anywhere: NaN and lone halves of surrogate pairs are no reason to fail."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

_SURROGATES = re.compile("[\ud800-\udfff]")


def read_json(body: bytes | bytearray) -> Any:
    """Parse JSON, including what msgspec refuses and Python takes: NaN, half a surrogate pair.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        try:
            return json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def write_json(value: object) -> bytes:
    """Encode a value as JSON, including text with half a surrogate pair (as an escape)."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def replace_surrogates(text: str) -> str:
    """Put U+FFFD in the place of halves of surrogate pairs, which UTF-8 cannot encode."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
