"""A server that answers every request at once with the bytes that it was given.

``python turn_server.py < ANSWER`` prints its port. It imports nothing else, so that it starts fast.
"""

from __future__ import annotations

import asyncio
import sys


class Answers(asyncio.Protocol):
    """Answers each request that is there whole."""

    def __init__(self, answer: bytes) -> None:
        self._answer, self._got = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to write."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Read, and answer."""
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            lines = self._got[:end].lower().split(b"\r\n")
            lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
            whole = end + 4 + (lengths[0] if lengths else 0)
            if len(self._got) < whole:
                return
            self._got = self._got[whole:]
            self._transport.write(self._answer)


async def serve(answer: bytes) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answers(answer), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.stdin.buffer.read()))
