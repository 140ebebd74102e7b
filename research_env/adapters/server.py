"""Serve the applications of adapters (OpenEnv, MCP) with the access rules of the search server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from research_env.errors import ConfigurationError
from research_env.retrieval.serve_guard import Limits, check_access, check_body


def guard(app: ASGIApp, key: str, allowed_hosts: Collection[str]) -> ASGIApp:
    """Wrap an application: refuse web pages of other sites, and clients without the key.

    The rules are those of the search server, for HTTP and WebSocket. HTTP bodies have its limit.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            refusal = check_access(scope, headers, key, allowed_hosts)
            if scope["type"] == "http" and refusal is None:
                refusal = check_body(scope, headers, Limits().body)
        await (refusal or app)(scope, receive, send)

    return guarded


class AppServer:
    """An application behind a port, from construction to :meth:`stop`."""

    def __init__(
        self,
        app: ASGIApp,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        key: str = "",
        allowed_hosts: Collection[str] = (),
    ) -> None:
        """Open the port.

        Args:
            app: an ASGI application.
            host: address to listen on.
            port: 0 takes a free port; see ``url``.
            key: clients must send ``Authorization: Bearer KEY``; empty: no key is needed.
            allowed_hosts: names in ``Host`` to answer to, besides ``localhost`` and ``host``.

        Raises:
            ConfigurationError: the port is out of range, in use, or not allowed.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error}; name another --host or --port"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}"
        names = frozenset({"localhost", host.lower(), *map(str.lower, allowed_hosts)})
        config = uvicorn.Config(
            guard(app, key, names),
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            http="h11",
            ws_per_message_deflate=False,  # a fifth of the CPU time of a step
            timeout_graceful_shutdown=30,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT (Ctrl-C), then finish what is in flight."""
        self._server.run([self._listener])

    def start(self) -> AppServer:
        """Serve in a background thread, which has begun when this returns."""
        self._thread = threading.Thread(target=self.run, name="app-server", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the background thread. Calling it twice is harmless."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._listener.close()

    def __enter__(self) -> AppServer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
