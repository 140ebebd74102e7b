"""HTTP requests to a vLLM server, with clear errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from research_agent.engines.remote import check_address
from research_agent.system.redaction import one_line, redact

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that are worth a retry; a server answers any other the same way again."""

LOOK_TIMEOUT = 30.0
"""Seconds for the answer to a request that costs a server next to nothing."""

_LARGEST_ANSWER = 64 << 20  # bytes


class _WeightInfo(msgspec.Struct):
    weight_version: str


class RequestError(Exception):
    """A request without a usable answer.

    Attributes:
        status: the answer's HTTP status; None if there was no answer, or none that is JSON.
    """

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed at another time or at another server."""
        return self.status is None or self.status in RETRYABLE_STATUSES


class Client:
    """HTTP client of one server, for one event loop. It may be made before the loop runs.

    Args:
        url: the server's base address.
        key: sent as a bearer token; no attribute and no error shows it.
        keep_alive: use connections again. It is faster, but uvicorn ends a connection without a
            word after an error, and the next request may meet that and be lost.

    Raises:
        ConfigError: see ``check_address``.

    The environment's proxies are not used: samplers stand beside the trainer. A client that is
    pickled loses its key and its connections.
    """

    def __init__(self, url: str, key: str | None = None, *, keep_alive: bool = False) -> None:
        check_address(url, key or "")
        self._base = url.rstrip("/") + "/"
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None
        # Functions, since no attribute shall hold the key.
        self._headers: Callable[[], dict[str, str]] = lambda: {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }
        self._shown: Callable[[str], str] = lambda text: one_line(redact(text[:10_000], key or ""))

    async def ask(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        timeout: float = LOOK_TIMEOUT,
        form: Any = Any,
    ) -> Any:
        """Send a request once.

        Args:
            method: such as "POST".
            path: relative to the client's address.
            payload: sent as JSON.
            timeout: seconds until the last byte of the answer.
            form: the type that the answer must have, such as a ``msgspec.Struct``.

        Returns:
            The answer, of that type; None if it is empty and any is good.

        Raises:
            RequestError: no answer, a status other than 200, a too large answer, or one of
                another form. The message quotes the server without the key.
        """
        data = None if payload is None else msgspec.json.encode(payload)
        try:
            async with asyncio.timeout(timeout):
                status, body = await self._send(method, path, data)
        except TimeoutError:
            raise RequestError(f"no answer within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {self._shown(str(error))}"
            raise RequestError(problem.removesuffix(": ")) from None
        if status != 200:
            problem = f"/{path} gives status {status}: {self._shown(_message(body))}"
            raise RequestError(problem.removesuffix(": "), status)
        try:
            return msgspec.json.decode(body or b"null", type=form)
        except msgspec.ValidationError as error:
            raise RequestError(
                f"/{path} gives an answer of another form: {error}", status
            ) from None
        except (msgspec.DecodeError, RecursionError):
            raise RequestError(f"the answer of /{path} is no JSON") from None

    async def weight_name(self) -> str:
        """Ask for the name of the weights that the server has; raises as ``ask`` does."""
        info: _WeightInfo = await self.ask("GET", "weight_info", form=_WeightInfo)
        return info.weight_version

    async def _send(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        if self._session is None:  # it belongs to the loop that runs now
            self._session = aiohttp.ClientSession(
                headers=self._headers(),
                auto_decompress=False,  # a few compressed bytes could fill the memory
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(
                    limit=0,
                    force_close=not self._keep_alive,
                    # vLLM closes after 5 s; a request could meet that and look lost.
                    keepalive_timeout=2.0 if self._keep_alive else None,
                ),
            )
        async with self._session.request(
            method, self._base + path, data=data, allow_redirects=False
        ) as response:
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > _LARGEST_ANSWER:
                    raise RequestError(f"an answer of over {_LARGEST_ANSWER >> 20} MB", status=413)
            return response.status, bytes(body)

    def __reduce__(self) -> tuple[type[Client], tuple[str]]:
        return Client, (self._base,)

    async def aclose(self) -> None:
        """Close all connections, in the event loop that used them."""
        if self._session is not None:
            await self._session.close()


def _message(body: bytes) -> str:
    """The message in an error's body; OpenAI's format has a field for it."""
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return text
