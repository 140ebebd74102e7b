"""The HTTP session of Elasticsearch's client: answers of bounded size, and no redirects."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiohttp
from elastic_transport import AiohttpHttpNode

from research_env.errors import RetrievalError

LARGEST_ANSWER = 256 << 20
"""Bytes of an answer, decompressed; one with more is refused."""
_CONNECTIONS = 10  # per client; more requests at a time wait for one another
_BUFFER = 1 << 20  # bytes that are read ahead


class AnswerError(RetrievalError, ValueError):
    """An answer that is refused while it is read; a ValueError, which the client passes on."""


class BoundedResponse(aiohttp.ClientResponse):
    """An answer whose body is read up to ``LARGEST_ANSWER`` bytes."""

    async def read(self) -> bytes:
        """Read and decompress the whole body.

        Returns:
            The body.

        Raises:
            AnswerError: It has more than one Content-Encoding, an unknown one, or too many bytes.
        """
        encodings = ", ".join(self.headers.getall("content-encoding", ())).strip().lower()
        if encodings not in ("", "identity", "gzip", "deflate"):
            self.close()
            raise AnswerError(
                f"{self.url.origin()} answers with the Content-Encoding {encodings!r:.80}; only "
                "one of gzip or deflate is supported"
            )
        parts: list[bytes] = []
        size = 0
        try:
            async for part in self.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise AnswerError(
                        f"{self.url.origin()} answers with over {LARGEST_ANSWER >> 20} MB; ask "
                        "for fewer passages, or index shorter ones (--chunk)"
                    )
        except BaseException:
            self.close()
            raise
        return b"".join(parts)


class BoundedNode(AiohttpHttpNode):
    """The client's own node, with another session: bounded answers, no cookies, no redirects."""

    def _create_aiohttp_session(self) -> None:  # the node calls it before its first request
        self._loop = asyncio.get_running_loop()
        session = aiohttp.ClientSession(
            headers={**self.headers, "accept-encoding": "identity"},
            skip_auto_headers=("accept", "user-agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(
                limit_per_host=_CONNECTIONS, ssl=self.config.ssl_context or True
            ),
            response_class=BoundedResponse,
            read_bufsize=_BUFFER,
        )
        # What the node uses of a session. A redirect is an answer like any other: it could lead to
        # any host.
        request = partial(session.request, allow_redirects=False)
        self.session: Any = SimpleNamespace(request=request, close=session.close)
