"""A proxy before a server that causes faults: delays, cuts, wrong statuses, garbage, silence."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FORWARDED = {"content-type", "accept", "authorization"}


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes requests on, or does what ``fault`` says.

    Attributes:
        url: its address.
        fault: a name from ``FAULTS``, or empty: everything is passed on.
        times: how many requests the fault befalls; None: all of them.
        seen: path and body of every request, in the order in which they came.
        authorization: the header of the last request.
        wait: what the header Retry-After of the statuses says; empty: there is none.
    """

    def __init__(
        self, target: str, certificate: tuple[Path, Path] | None = None, prefix: str = ""
    ) -> None:
        """Start to listen.

        Args:
            target: The server's address.
            certificate: Files of a certificate and its key; with them the proxy speaks TLS.
            prefix: Beginning of the paths that are passed on, without it; others are not found.
        """
        proxy = self
        self.target = urlsplit(target).netloc
        self.prefix = prefix
        self.fault = ""
        self.times: int | None = None
        self.seen: list[tuple[str, bytes]] = []
        self.wait = ""
        self.authorization = ""
        self.released = threading.Event()  # ends what shall last until the proxy is closed

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        self.seen.append((handler.path, body))
        self.authorization = handler.headers.get("authorization", "")
        fault = self.fault
        if fault and self.times is not None:
            self.times -= 1
            self.fault = fault if self.times > 0 else ""
        with contextlib.suppress(OSError):  # the client has gone
            if fault:
                FAULTS[fault](self, handler, body)
            else:
                answer(handler, *self.forward(handler, body))

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        """Status and body of the server's answer; 502 when it cannot be reached."""
        if not handler.path.startswith(self.prefix):
            return 404, b"{}"
        path = handler.path.removeprefix(self.prefix)
        connection = http.client.HTTPConnection(self.target, timeout=60)
        headers = {key: value for key, value in handler.headers.items() if key.lower() in FORWARDED}
        try:
            connection.request(handler.command, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 502, b""
        finally:
            connection.close()


def answer(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """Send an answer as Elasticsearch does."""
    send_head(handler, status, len(body), headers)
    if handler.command != "HEAD":
        handler.wfile.write(body)


def send_head(
    handler: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str] | None = None
) -> None:
    """Send status and headers."""
    handler.send_response(status)
    known = {"content-type": "application/json", "x-elastic-product": "Elasticsearch"}
    for key, value in (known | (headers or {}) | {"content-length": str(length)}).items():
        handler.send_header(key, value)
    handler.end_headers()


def _status(status: int, body: bytes) -> Callable[[Proxy, BaseHTTPRequestHandler, bytes], None]:
    def respond(proxy: Proxy, handler: BaseHTTPRequestHandler, _: bytes) -> None:
        answer(handler, status, body, {"retry-after": proxy.wait} if proxy.wait else None)

    return respond


def _close(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.close_connection = True


def _cut(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    status, whole = proxy.forward(handler, body)
    send_head(handler, status, len(whole))
    handler.wfile.write(whole[: len(whole) // 2])
    handler.close_connection = True


def _short(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    status, whole = proxy.forward(handler, body)
    answer(handler, status, whole[: len(whole) // 2])


def _delay(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    proxy.released.wait(0.4)
    answer(handler, *proxy.forward(handler, body))


def _never(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    proxy.released.wait(120)
    handler.close_connection = True


def _drip(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    status, whole = proxy.forward(handler, body)
    send_head(handler, status, len(whole))
    for byte in whole:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if proxy.released.wait(0.1):
            return


def _garbage(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    answer(handler, 200, b"\x00\xff{]" * 500)


def _page(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    page = b"<html>please log in</html>"
    answer(handler, 200, page, {"content-type": "text/html", "x-elastic-product": ""})


def _every_other(
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[Proxy, BaseHTTPRequestHandler, bytes], None]:
    def respond(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        status, whole = proxy.forward(handler, body)
        found = json.loads(whole)
        responses = found.get("responses", [])
        responses[::2] = [change(response) for response in responses[::2]]
        answer(handler, status, json.dumps(found).encode())

    return respond


def _fewer(proxy: Proxy, handler: BaseHTTPRequestHandler, body: bytes) -> None:
    status, whole = proxy.forward(handler, body)
    found = json.loads(whole)
    found["responses"] = found.get("responses", [])[1:]
    answer(handler, status, json.dumps(found).encode())


def _shards(response: dict[str, Any]) -> dict[str, Any]:
    hits = response["hits"] | {"hits": response["hits"]["hits"][:1]}
    return response | {"_shards": {"total": 2, "successful": 1, "failed": 1}, "hits": hits}


def _timed_out(response: dict[str, Any]) -> dict[str, Any]:
    return response | {"timed_out": True, "hits": response["hits"] | {"hits": []}}


def _busy(response: dict[str, Any]) -> dict[str, Any]:
    return {"status": 429, "error": {"type": "es_rejected_execution_exception"}}


def _hollow(response: dict[str, Any]) -> dict[str, Any]:
    return {**response, "hits": {"hits": [{"_id": "0", "_score": 1.0}]}}


FAULTS: dict[str, Callable[[Proxy, BaseHTTPRequestHandler, bytes], None]] = {
    "429": _status(429, b'{"error": {"type": "es_rejected_execution_exception"}}'),
    "503": _status(503, b'{"error": {"type": "cluster_block_exception"}}'),
    "502 page": _status(502, b"<html>Bad gateway</html>"),
    "closed": _close,
    "cut": _cut,
    "shortened": _short,
    "delayed": _delay,
    "never": _never,
    "dripping": _drip,
    "garbage": _garbage,
    "another page": _page,
    "half busy": _every_other(_busy),
    "half timed out": _every_other(_timed_out),
    "half of the shards": _every_other(_shards),
    "half hollow": _every_other(_hollow),
    "one missing": _fewer,
}
"""What can befall a request, by name."""
