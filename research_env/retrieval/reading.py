"""Bytes to values and back, for everything that speaks HTTP: JSON, and bodies of bounded size."""

from __future__ import annotations

import json
import zlib
from typing import Any

import msgspec


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


class BodyError(ValueError):
    """A body that cannot be read.

    ``retryable`` says whether another attempt might succeed, ``too_large`` whether the body is over
    the limit.
    """

    def __init__(self, message: str, *, retryable: bool = False, too_large: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.too_large = too_large


class BoundedBody:
    """Collects the body of an HTTP answer part by part, decodes it, and stops at a limit.

    A few hundred bytes that are compressed twice decode to gigabytes, and HTTP libraries decode as
    often as a server says. Feed this class the bytes as they came (``iter_raw`` in httpx)::

        body = BoundedBody(response.headers.get("Content-Encoding"), limit=64 << 20)
        for part in response.iter_raw():
            body.add(part)
        value = read_json(body.finish())
    """

    ACCEPTED = "gzip"
    """What a request should send as ``Accept-Encoding``."""

    def __init__(self, encoding: str | None, limit: int) -> None:
        """Start with an empty body.

        Args:
            encoding: the header ``Content-Encoding``; None if there is none.
            limit: the most decoded bytes.

        Raises:
            BodyError: it is encoded more than once, or in another way than gzip.
        """
        name = (encoding or "identity").strip().lower()
        if name not in ("identity", "gzip"):
            raise BodyError(f"an answer with Content-Encoding {name[:40]!r}, not gzip or none")
        self._decoder = zlib.decompressobj(16 + zlib.MAX_WBITS) if name == "gzip" else None
        self._limit = limit
        self._body = bytearray()

    def add(self, part: bytes) -> None:
        """Add bytes as they came.

        Raises:
            BodyError: the body is larger than the limit, or is not gzip although it should be.
        """
        if self._decoder is None:
            self._body += part
        else:
            try:
                # One byte more than the limit is enough to see that there is more.
                room = self._limit - len(self._body) + 1
                self._body += self._decoder.decompress(part, room)
            except zlib.error as error:
                raise BodyError(f"the answer is not gzip: {error}", retryable=True) from None
        if len(self._body) > self._limit:
            raise BodyError(f"an answer of more than {self._limit} bytes", too_large=True)

    def finish(self) -> bytearray:
        """Return the decoded body.

        Raises:
            BodyError: the compressed body is cut.
        """
        if self._decoder is not None and not self._decoder.eof:
            raise BodyError("the compressed answer is cut", retryable=True)
        return self._body
