"""Reading the answers of search engines, which is most of a client's own time."""

from __future__ import annotations

import json
from typing import Any

import msgspec


def read_json(body: bytes | bytearray) -> Any:
    """Any JSON; what msgspec does not read, Python's json may: half of a surrogate pair, NaN.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        try:
            return json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
