"""HTTP for Elasticsearch's own client, over the standard library, with one deadline a request.

The client's other nodes give up a read that takes too long, so that a server which sends a byte now
and then is waited for without end; here the time is that of the whole request (but for the look-up
of the server's name, which the system limits). What is under way can be ended from another thread.
And a request costs less: half a millisecond of the five that 16 searches take.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

from elastic_transport import (
    ApiResponseMeta,
    BaseNode,
    ConnectionError,
    ConnectionTimeout,
    HttpHeaders,
    NodeConfig,
    TlsError,
)
from urllib3.util.wait import wait_for_read

from research_env.retrieval.retry import Deadline

_DEADLINE: ContextVar[Deadline] = ContextVar("deadline")
# What http.client raises besides its own errors: for lengths that no memory has, and for the names
# of hosts that cannot be.
_UNREADABLE = (OverflowError, MemoryError, UnicodeError)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give the calls of the client in this block so much time, for all of them together."""
    token = _DEADLINE.set(Deadline.after(seconds))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


class Answered(NamedTuple):
    """What the client reads of an answer."""

    meta: ApiResponseMeta
    body: bytes


class DeadlineNode(BaseNode):
    """A server, asked over connections that are kept; for the threads of one process."""

    def __init__(self, config: NodeConfig) -> None:
        """Connect to nothing yet."""
        super().__init__(config)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False

    def perform_request(  # type: ignore[override]
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: HttpHeaders | None = None,
        request_timeout: object = None,
    ) -> Answered:
        """Send a request and read all of its answer; see ``BaseNode``.

        Args:
            method: of the request.
            target: path and query.
            body: of the request.
            headers: besides those of the configuration.
            request_timeout: has no effect; :func:`within` gives the time.

        Raises:
            ConnectionError: there is none, it broke off, or it was closed.
            ConnectionTimeout: the time was spent.
            TlsError: the server speaks no TLS that can be used, or its certificate is not verified.
        """
        deadline, began = _DEADLINE.get(), time.monotonic()
        connection = self._free() or _Connection(self.config)
        self._busy.add(connection)
        try:
            if self._closed:  # from now on the one who closes finds it
                raise ConnectionAbortedError("it was closed")
            connection.connect(deadline)
            sent = {**self.headers, **(headers or {})}
            status, answered, data = connection.ask(
                method, self.path_prefix + target, body, sent, deadline
            )
        except TimeoutError as error:
            raise ConnectionTimeout("the time was spent", errors=(error,)) from error
        except (OSError, http.client.HTTPException, *_UNREADABLE) as error:
            broken_off = connection.connected or isinstance(error, ssl.SSLEOFError)
            if isinstance(error, ssl.SSLError) and not broken_off:
                raise TlsError(str(error), errors=(error,)) from error
            raise ConnectionError(str(error), errors=(error,)) from error
        finally:
            self._busy.discard(connection)
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
            if self._closed:  # meanwhile
                self.close()
        took = time.monotonic() - began
        meta = ApiResponseMeta(status, "1.1", HttpHeaders(answered), took, self.config)
        return Answered(meta, data)

    def close(self) -> None:
        """End what is under way, and the connections."""
        self._closed = True
        for connection in list(self._busy):
            connection.end()
        while self._idle:
            self._idle.pop().close()

    def _free(self) -> _Connection | None:
        """A connection that was used before and that the server has not closed since."""
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.open:
                    return connection
                connection.close()
        return None


class _Connection:
    """A connection, in the place of a socket to ``http.client``.

    Attributes:
        connected: whether it has been made, TLS included.
        usable: whether another request may follow.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.connected = self.usable = False
        self._config = config
        self._host = f"[{config.host}]" if ":" in config.host else config.host
        self._host += f":{config.port}"
        self._socket = socket.socket()  # until there is one of the server's family

    def connect(self, deadline: Deadline) -> None:
        """Connect, where it is not done yet; each address of the server has its share of time."""
        if self.connected:
            return
        host, port = self._config.host, self._config.port
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for place, (family, kind, protocol, _, address) in enumerate(found):
            self._socket.close()
            self._socket = socket.socket(family, kind, protocol)
            self._socket.settimeout(_left(deadline) / (len(found) - place))
            try:
                self._socket.connect(address)
                break
            except OSError:
                if place == len(found) - 1:
                    raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._config.ssl_context:
            context: ssl.SSLContext = self._config.ssl_context
            secured = context.wrap_socket(
                self._socket, server_hostname=host, do_handshake_on_connect=False
            )
            self._socket = secured  # before the handshake, so that this can be ended
            secured.settimeout(_left(deadline))
            secured.do_handshake()
        self.connected = True

    @property
    def open(self) -> bool:
        """Whether the server has neither closed it nor sent what nobody asked for."""
        return not wait_for_read(self._socket, timeout=0)

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        deadline: Deadline,
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of an answer.

        The names and values of headers are not checked: none may come from a stranger.
        """
        self.usable, self._deadline = False, deadline
        head = [f"{method} {target} HTTP/1.1", f"host: {self._host}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        head += [f"content-length: {len(body or b'')}", "", ""]
        self._socket.settimeout(_left(deadline))
        self._socket.sendall("\r\n".join(head).encode("latin-1") + (body or b""))
        as_socket: Any = self
        with http.client.HTTPResponse(as_socket, method=method) as response:
            response.begin()
            if response.status < 200:  # the answer itself is still to come
                raise http.client.HTTPException(f"status {response.status}")
            data = response.read()
            self.usable = not response.will_close
            return response.status, response.getheaders(), data

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self), 1 << 16)

    def receive_into(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        return self._socket.recv_into(buffer)

    def end(self) -> None:
        """Let who waits for it wait no longer; from another thread."""
        with suppress(OSError):  # not that of an SSLSocket, which would go on without TLS
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.usable = False
        self._socket.close()


class _Reader(io.RawIOBase):
    """The answers of a connection; closing one leaves the connection open."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._connection.receive_into(buffer)


def _left(deadline: Deadline) -> float:
    left = deadline.left()
    if not left:  # a socket takes 0 as not waiting at all
        raise TimeoutError
    return left
