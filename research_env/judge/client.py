"""Ask a model for one verdict, through openai's client.

Retries, their pauses and Retry-After are those of ``openai.AsyncOpenAI``. This module adds one
deadline per request, bounded answers, and errors without the key.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from research_env.errors import ConfigurationError
from research_env.judge.prompts import JudgePrompt
from research_env.judge.verdicts import JudgeError, JudgeReply, NoReplyError, Verdict
from research_env.retrieval.json_text import replace_surrogates
from research_env.system.redaction import one_line, redact

try:
    import httpx2
    import openai
except ImportError as error:
    raise ConfigurationError(
        f"a judge needs the package openai ({error}); pip install 'research-env[openai]'"
    ) from error

MAX_TOKENS = 1024
"""Most tokens of an answer, as in both papers' code."""

_MAX_RETRIES = 1_000  # in practice the deadline ends the retries
_LONGEST_QUOTE = 1_000  # characters of a bad answer that the judge is shown again
_LARGEST_ANSWER = 8 << 20  # bytes

Messages = Sequence[Mapping[str, str]]


class JudgeClient:
    """A model at an OpenAI-compatible endpoint; ``async with`` closes its connections.

    ``response_format`` is the first of ``formats`` that the server takes: if it answers 400 or 422,
    the client tries the next one, and keeps it for later questions if it works.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str,
        formats: Sequence[Mapping[str, Any] | None],
        connections: int,
        rate: float | None,
        deadline: float,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: such as ``http://localhost:8000/v1``; see ``run.check_endpoint``.
            model: the model's name at the endpoint.
            key: sent as a bearer token, and never shown; empty: none is sent.
            formats: values of ``response_format``, the best one first; None: none is sent.
            connections: most open connections.
            rate: most requests per second, retries not counted; None: no limit.
            deadline: seconds per request with all its retries; one attempt may take half of them.
        """
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        self._model = model
        # A closure rather than an attribute, so that printing this object cannot show the key.
        self._redact: Callable[[str], str] = lambda text: redact(text, key)
        self._formats = formats
        self._format = 0  # index of the best format that the server has not refused
        self._gap = 1 / rate if rate else 0.0
        self._free_at = 0.0  # earliest time of the next request, on the monotonic clock
        self._deadline = deadline
        self._transport = _WholeAnswers(connections)
        self._client = openai.AsyncOpenAI(
            base_url=self._url,
            api_key=key or "none",
            max_retries=_MAX_RETRIES,
            http_client=httpx2.AsyncClient(transport=self._transport, timeout=deadline / 2),
        )
        self._headers = {} if key else {"Authorization": openai.omit}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def ask(self, messages: Messages) -> JudgeReply:
        """Return the model's answer.

        Raises:
            NoReplyError: the server refuses this question, or the deadline has passed.
            JudgeError: it refuses every question, or nothing has ever answered at the address.
        """
        last = len(self._formats) - 1
        for index in range(self._format, last + 1):
            try:
                reply = await self._ask(messages, self._formats[index])
            except NoReplyError as error:
                if error.kind in ("status 400", "status 422") and index < last:
                    continue  # the server may not know the format
                raise
            self._format = max(self._format, index)
            return reply
        raise AssertionError  # the last format returned or raised

    async def _ask(self, messages: Messages, form: Mapping[str, Any] | None) -> JudgeReply:
        await self._wait_for_rate()
        create: Any = self._client.chat.completions.create
        try:
            async with asyncio.timeout(self._deadline):
                answer = await create(
                    model=self._model,
                    messages=messages,
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                    response_format=form or openai.omit,
                    extra_headers=self._headers,
                )
        except TimeoutError as timeout:
            raise self._no_reply(_last_failure(timeout)) from None
        except openai.APIStatusError as error:
            raise self._status_error(error.response) from None
        except openai.APIResponseValidationError as error:
            raise NoReplyError(error.message, refused=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, httpx2.ConnectError) and not self._transport.has_answered:
                raise JudgeError(
                    f"nothing answers at {self._url} ({self._shown(str(cause))}); is the server "
                    "up, and the address that of its /v1?"
                ) from None
            raise self._no_reply(cause) from None
        text = self._redact(replace_surrogates(answer.choices[0].message.content or ""))
        return JudgeReply(text, _tokens(answer.usage))

    async def _wait_for_rate(self) -> None:
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + self._gap
        await asyncio.sleep(start - now)

    def _no_reply(self, failure: BaseException | None) -> NoReplyError:
        """The error of a question whose last attempt failed with this exception."""
        if isinstance(failure, httpx2.HTTPStatusError):
            detail = self._shown(failure.response.text)
            return NoReplyError(f"status {failure.response.status_code}", detail)
        if isinstance(failure, _NoCompletionError):
            return NoReplyError("no chat completion", self._shown(str(failure)))
        if failure is None or isinstance(failure, httpx2.TimeoutException):
            return NoReplyError("no answer in time")
        return NoReplyError(
            "no connection", self._shown(f"{type(failure).__name__}: {failure}").rstrip(": ")
        )

    def _status_error(self, response: httpx2.Response) -> Exception:
        """The error of a response that openai does not retry."""
        status = response.status_code
        if status in (401, 403):  # not quoted: such an answer may hold parts of the key
            return JudgeError(
                f"{self._url} answered {status}: set OPENAI_API_KEY to a key that may use "
                f"{self._model!r}"
            )
        detail = self._shown(response.text)
        if status == 404:
            return JudgeError(
                f"{self._url} answered 404 ({detail}); check that the address is that of the "
                f"server's /v1, and that it knows the model {self._model!r}"
            )
        retryable = status in (408, 409, 429) or status >= 500
        return NoReplyError(f"status {status}", detail, refused=not retryable)

    def _shown(self, text: str) -> str:
        return one_line(self._redact(text[:10_000]))


async def ask_verdict(client: JudgeClient, prompt: JudgePrompt, text: str) -> Verdict:
    """Ask once, and once more if the answer holds no verdict.

    Args:
        client: the model.
        prompt: how to read a verdict, and what to say after an answer without one.
        text: the whole prompt.

    Returns:
        The verdict; a missing one says why.

    Raises:
        JudgeError: see ``JudgeClient.ask``.
    """
    messages = [{"role": "user", "content": text}]
    replies: list[JudgeReply] = []
    while True:
        try:
            reply = await client.ask(messages)
        except NoReplyError as error:
            return Verdict(None, replies[-1].text if replies else None, error, tuple(replies))
        replies.append(reply)
        correct = prompt.parse(reply.text)
        if correct is not None:
            return Verdict(correct, reply.text, None, tuple(replies))
        if len(replies) == 2:
            return Verdict(None, reply.text, NoReplyError("no valid verdict"), tuple(replies))
        said = reply.text[:_LONGEST_QUOTE].strip() or "(nothing)"  # some refuse an empty message
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": prompt.repair})


class _NoCompletionError(httpx2.RemoteProtocolError):
    """An answer of status 200 that is no chat completion."""


class _WholeAnswers(httpx2.AsyncBaseTransport):
    """HTTP with bounded answers; openai retries each ``httpx2.RequestError`` that it raises.

    It refuses compressed answers: a few bytes of one could fill the memory. An answer of status 200
    that is not a completion counts as a broken connection. Until something has answered, a refused
    connection is an error that is not retried: the address is probably wrong.
    """

    def __init__(self, connections: int) -> None:
        # A client, unlike a transport, uses the environment's proxies. Each request has a timeout.
        self._http = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=connections))
        self.has_answered = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["Accept-Encoding"] = "identity"
        try:
            response = await self._http.send(request, stream=True)
        except httpx2.ConnectError as error:
            if self.has_answered:
                raise
            raise openai.APIConnectionError(request=request) from error
        self.has_answered = True
        body, refusal = bytearray(), ""
        try:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                refusal = f"an answer in Content-Encoding {one_line(encoding)!r}"
            async for block in response.aiter_raw():
                body += block
                if len(body) > _LARGEST_ANSWER:
                    refusal = f"an answer of over {_LARGEST_ANSWER >> 20} MB"
                if refusal:  # openai does not retry this error
                    raise openai.APIResponseValidationError(response, None, message=refusal)
        finally:
            await response.aclose()
        if response.status_code == 200 and not _is_completion(body):
            raise _NoCompletionError(body.decode("utf-8", "replace"), request=request)
        return httpx2.Response(
            response.status_code, headers=response.headers, content=bytes(body), request=request
        )

    async def aclose(self) -> None:
        await self._http.aclose()


def _is_completion(body: bytes | bytearray) -> bool:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(text, str | None)


def _last_failure(error: BaseException) -> httpx2.HTTPError | None:
    """The failure of the last attempt before the deadline, if there was one."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, httpx2.HTTPError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _tokens(usage: Any) -> tuple[int, int] | None:
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    match counts:
        case (int(tokens_in), int(tokens_out)) if tokens_in >= 0 and tokens_out >= 0:
            return int(tokens_in), int(tokens_out)
    return None
