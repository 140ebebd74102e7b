"""Sample from any OpenAI-compatible endpoint: text goes out, text comes back. Not for training.

For evaluation and baselines: nobody knows which tokens the model sampled, nor how likely they were.
Pass ``evaluate`` the engine with its renderer::

    renderer = OpenAIRenderer(chat_template=config.chat_template)
    engine = OpenAIEngine(config.endpoint, config.model, renderer)

``/completions`` gets the prompt and everything said since as one text. With ``chat_template``,
``/chat/completions`` gets the prompt's messages, and everything said since as the beginning of the
assistant's answer, which the endpoint continues (``continue_final_message`` of vLLM and SGLang).
If an endpoint refuses that, the policy's turns become assistant messages and the environment's
become user messages: another conversation than the one a local model sees.

Where the environment lists tools (``info["tools"]``), a chat request sends them, the endpoint's
``tool_calls`` are the action, and their results go back as messages with the role ``tool``.

The key comes from ``OPENAI_API_KEY``. Retries, pauses and Retry-After are those of
``openai.AsyncOpenAI``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from research_agent.engines.base import Completion, Finish, SamplingParams
from research_agent.engines.checks import require_idle
from research_agent.engines.conversation import (
    Conversation,
    Message,
    assistant_message,
    message_text,
    sendable,
    thought,
)
from research_agent.engines.remote import Turns, check_address, read_key, turn_seed
from research_agent.errors import ConfigError, ContextError, EngineError
from research_agent.system.redaction import one_line, redact

try:
    import httpx2
    import openai
except ImportError as error:
    raise ConfigError(
        f"--endpoint needs the package openai ({error}); pip install 'research-env[openai]'"
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)

_CONTINUE = "What was played is kept, and the same command continues from there"
_STEP_SECONDS = 0.02  # how long a step waits for a turn; the rollout loop has other work too
_LARGEST_ANSWER = 8 << 20  # bytes
_PIECE = re.compile(r"\s?\w{1,5}|\s?[^\w\s]{1,3}|\s")
# A server fills in what a request leaves out by the model's generation_config.json.
_WHOLE_DISTRIBUTION = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_OLLAMA = "fp_ollama"  # system_fingerprint of its answers
_TOO_LONG = re.compile(r"context|max_model_len|max_tokens|too (long|many tokens|large)", re.I)
_SUGGESTIONS = {
    401: "Set OPENAI_API_KEY to its key",
    403: "Set OPENAI_API_KEY to its key",
    404: "Check the model's name. An endpoint that only chats needs --chat-template",
    405: "An endpoint that only chats needs --chat-template",
    429: "Send fewer requests at a time, with a smaller --max-in-flight",
}


@dataclass
class OpenAIRenderer:
    """A renderer whose tokens are words and parts of words, for text of unknown tokens.

    It offers what ``rollout`` and ``evaluate`` need of a renderer, and loses no character. A token
    is a piece of at most five letters, on average 3.8 characters in English prose,
    about as long as a model's token, so that limits in tokens mean nearly what they say.

    Attributes:
        chat_template: whether prompts are chat messages for the endpoint's template, not text.
        chat_template_args: variables of that template, sent as ``chat_template_kwargs``.
    """

    chat_template: bool = False
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    _pieces: list[str] = field(default_factory=list, repr=False)
    _numbers: dict[str, int] = field(default_factory=dict, repr=False)
    # Each message begins with a token of its own, which stands for all but its content.
    _heads: dict[int, Message] = field(default_factory=dict, repr=False)
    _tools: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict, repr=False)  # by token

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return [self._number(piece, piece) for piece in _PIECE.findall(text)]

    def encode_observation(
        self,
        observation: str,
        markup: Sequence[str] = (),
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return the tokens of what the environment answers.

        Args:
            observation: the text.
            markup: not used: it is text to an endpoint.
            messages: the same as chat messages, used where prompts have listed tools.
        """
        if self._tools and messages:
            return self._encode_messages(messages)
        return self.encode_text(observation)

    def encode_prompt(
        self,
        observation: str,
        messages: Sequence[Mapping[str, str]] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return the tokens of an episode's first observation.

        Args:
            observation: the prompt as plain text.
            messages: the prompt as chat messages, used with ``chat_template``; without them the
                observation is the only user message.
            tools: schemas of what the policy may call, used with ``chat_template``.
        """
        if not self.chat_template:
            return self.encode_text(observation)
        listed = []
        if tools:
            mark = self._number(f"tools {json.dumps(tools)}", "")
            self._tools[mark] = list(tools)
            listed = [mark]
        said = messages or [{"role": "user", "content": observation}]
        return [*listed, *self._encode_messages(said)]

    def _encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            head = {key: value for key, value in message.items() if key != "content"}
            # No piece of a text has a space in this place, so the name is free.
            mark = self._number(f"head {json.dumps(head)}", "")
            self._heads[mark] = head
            tokens += [mark, *self.encode_text(message["content"])]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; the mark that begins a message has none."""
        return "".join(self._pieces[token] for token in tokens)

    def messages(self, tokens: Sequence[int]) -> list[Message]:
        """Return the chat messages in tokens; none if they are plain text."""
        starts = [at for at, token in enumerate(tokens) if token in self._heads]
        return [
            {**self._heads[tokens[start]], "content": self.decode(tokens[start:end])}
            for start, end in pairwise([*starts, len(tokens)])
        ]

    def tools(self, tokens: Sequence[int]) -> list[Mapping[str, Any]]:
        """Return the tools that a prompt lists."""
        return next((self._tools[token] for token in tokens[:1] if token in self._tools), [])

    def _number(self, name: str, piece: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._pieces)
            self._pieces.append(piece)
        return self._numbers[name]


class OpenAIEngine:
    """An ``Engine`` in front of an OpenAI-compatible endpoint.

    Log-probabilities are NaN, since nobody knows them. A stop string that the endpoint cut off is
    put back if the endpoint says which one it was (vLLM does), or if exactly one is possible:
    closing tags are possible only if the turn left that tag open.

    Args:
        url: the endpoint's base address, such as ``http://localhost:8000/v1``.
        model: the model's name at the endpoint.
        renderer: the prompts' renderer; it says whether they are chat messages.
        concurrency: requests at a time.
        deadline: seconds per turn, with all retries.
        max_retries: retries per request. Their pauses double from 0.5 to 8 s.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        renderer: OpenAIRenderer,
        *,
        concurrency: int = 16,
        deadline: float = 600.0,
        max_retries: int = 10,
    ) -> None:
        if concurrency < 1 or max_retries < 0:
            raise ConfigError(
                f"concurrency is {concurrency} and max_retries {max_retries}; give at least 1 and 0"
            )
        self._url = url.strip().rstrip("/")
        key = read_key("OPENAI_API_KEY") or ""
        check_address(self._url, key)
        # A function, since no attribute shall hold the key.
        self._redact: Callable[[str], str] = lambda text: redact(text, key)
        self.max_context = 1 << 30  # the endpoint has its own, and refuses what is longer
        self._model = model
        self._renderer = renderer
        http = httpx2.AsyncClient(transport=_WholeAnswers(concurrency), timeout=deadline)
        self._client = openai.AsyncOpenAI(
            base_url=self._url,
            api_key=key or "none",
            max_retries=max_retries,
            http_client=http,
        )
        self._headers = {} if key else {"Authorization": openai.omit}
        self._in_flight = asyncio.Semaphore(concurrency)
        self._deadline = deadline
        self._limit_name = "max_tokens"
        self._whole_distribution = _WHOLE_DISTRIBUTION  # empty: the endpoint does not know them
        self._continues: bool | None = None  # whether it continues an answer; None: unknown
        self._conversations: dict[int, Conversation] = {}
        self._turns: Turns[_Answer] = Turns("openai", [http.aclose])
        self.close = self._turns.close

    @property
    def busy(self) -> int:
        """Number of slots that wait for an answer."""
        return len(self._turns)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to the slot's conversation, and request a turn.

        Raises:
            ContextError: there is nothing to continue from.
            ValueError: the slot waits for an answer already.
        """
        require_idle(slot, self._turns)
        text, messages = self._renderer.decode(tokens), self._renderer.messages(tokens)
        if slot in self._conversations and messages:
            self._conversations[slot].add_results(messages, len(tokens))
        elif slot in self._conversations:
            self._conversations[slot].add({"role": "user", "content": text}, len(tokens))
        elif tokens:
            tools = self._renderer.tools(tokens)
            self._conversations[slot] = Conversation(text, messages, len(tokens), tools)
        else:
            raise ContextError(f"slot {slot} holds nothing, and no tokens were submitted")
        self._turns.begin(slot, self._sample_turn(self._conversations[slot], params))

    def step(self) -> list[Completion]:
        """Wait a moment for answers, and return the finished turns.

        Raises:
            ContextError: a prompt is too long for the model.
            EngineError: the endpoint is down, too slow, refuses, or answers nonsense.
        """
        done = []
        for slot, answer in self._turns.finished(_STEP_SECONDS).items():
            text, message = answer.text, {"role": "assistant", "content": answer.text}
            if answer.message is not None:
                text, message = message_text(answer.message), sendable(answer.message)
            tokens = tuple(self._renderer.encode_text(text))
            self._conversations[slot].add(message, len(tokens))
            unknown = (math.nan,) * len(tokens)
            reason = answer.finish_reason
            done.append(Completion(slot, tokens, unknown, text, reason, 0, message=answer.message))
        return done

    def release(self, slot: int) -> None:
        """Forget the slot's conversation."""
        self._turns.cancel(slot)
        self._conversations.pop(slot, None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Refuse: an endpoint has weights of its own.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"{self._url} cannot take weights; train with --engine transformers, vllm or server"
        )

    async def _sample_turn(self, conversation: Conversation, params: SamplingParams) -> _Answer:
        """Request a turn, within the deadline."""
        async with self._in_flight:
            try:
                async with asyncio.timeout(self._deadline):
                    return await self._sample_parts(conversation, params)
            except TimeoutError:
                raise self._failure(f"no answer within {self._deadline:g} s") from None

    async def _sample_parts(self, conversation: Conversation, params: SamplingParams) -> _Answer:
        """Request a turn; in parts if the context has no room for ``max_tokens``."""
        seed = turn_seed(params.seed, conversation.length)
        text, left, size = "", params.max_tokens, params.max_tokens
        while True:
            try:
                part = await self._ask(conversation, params, seed, text, size)
            except _TooLongError as error:
                if size > 1:
                    size //= 2
                    continue
                if text or conversation.later:
                    return _Answer(text, "length")
                raise ContextError(
                    f"{self._url}: the prompt that ends in {conversation.prompt[-200:]!r} does not "
                    f"fit the model {self._model!r}: {error}. {_CONTINUE}"
                ) from None
            text += part.text
            left -= size
            size = min(size, left)
            continues = not conversation.messages or (self._continues and not conversation.tools)
            if part.finish_reason != "length" or not part.text or size < 1 or not continues:
                return _Answer(text, part.finish_reason, part.message)

    async def _ask(
        self,
        conversation: Conversation,
        params: SamplingParams,
        seed: int,
        text: str,
        size: int,
    ) -> _Answer:
        """Send one request, in the form that the endpoint takes.

        Args:
            conversation: what to continue.
            params: how to sample.
            seed: seed of the turn.
            text: the beginning of the turn that the endpoint wrote already.
            size: tokens to write at most.
        """
        chat = bool(conversation.messages)
        while True:
            continuing = chat and conversation.has_answer(text) and self._continues is not False
            limit_name, whole = self._limit_name, self._whole_distribution
            extra: dict[str, Any] = {limit_name: size, **whole}
            extra |= conversation.request(text, continuing=continuing)
            # The endpoint's form of the conversation is in extra_body; these fields are required.
            create: Any = self._client.completions.create
            required: dict[str, Any] = {"prompt": ""}
            if chat:
                create, required = self._client.chat.completions.create, {"messages": []}
                if arguments := self._renderer.chat_template_args:
                    extra["chat_template_kwargs"] = dict(arguments)
            try:
                answer = await create(
                    model=self._model,
                    temperature=params.temperature,
                    top_p=1,
                    seed=seed,
                    stop=list(params.stop) or openai.omit,
                    extra_body=extra,
                    extra_headers=self._headers,
                    **required,
                )
            except openai.APIStatusError as error:
                problem = self._problem(error)
                if error.status_code in (400, 413, 422):
                    if self._take_another_form(problem, limit_name, whole, continuing=continuing):
                        continue
                    if re.search(_TOO_LONG, problem):
                        raise _TooLongError(problem) from None
                raise self._failure(problem, error.status_code) from None
            except openai.APIError as error:
                raise self._failure(self._problem(error)) from None
            if continuing and answer.system_fingerprint == _OLLAMA:  # it begins another answer
                self._stop_continuing("it is Ollama")
                continue
            if continuing:
                self._continues = True
            self._require_faithful(answer, conversation)
            # Where tools are listed, turns are messages: a stop string would stand in them twice.
            stop = () if conversation.tools else params.stop
            return self._read(answer.choices[0], stop, text, chat=chat)

    def _take_another_form(
        self, problem: str, limit_name: str, whole: Mapping[str, float], *, continuing: bool
    ) -> bool:
        """Change the form of requests if the endpoint may take another; returns whether it may.

        Args:
            problem: why it refuses the request.
            limit_name: what the request called the limit of tokens.
            whole: the request's parameters that an endpoint may not know.
            continuing: whether the request asked it to continue an answer.
        """
        if "max_completion_tokens" in problem and limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # newer models of OpenAI
            return True
        if any(name in problem for name in whole):
            self._whole_distribution = {}  # such as OpenAI, which has no defaults
            return True
        if continuing and self._continues is not True and not re.search(_TOO_LONG, problem):
            self._stop_continuing(problem)
            return True
        return False

    def _require_faithful(self, answer: Any, conversation: Conversation) -> None:
        """Check that the endpoint changes neither what it is sent nor what the model says.

        Raises:
            EngineError: it does.
        """
        if not conversation.messages and answer.system_fingerprint == _OLLAMA:
            raise EngineError(
                f"{self._url} is Ollama, which puts the model's chat template around every text; "
                f"add --chat-template. {_CONTINUE}"
            )
        chat = conversation.messages and not conversation.tools
        if chat and thought(answer.choices[0].message):
            raise EngineError(
                f"{self._url} takes the reasoning out of the answers of {self._model!r}, so "
                "that the environment and later turns would not have it; start the server "
                f"without --reasoning-parser. {_CONTINUE}"
            )

    def _stop_continuing(self, problem: str) -> None:
        """Send observations as user messages from now on."""
        if self._continues is None:  # the first refusal of several in flight
            _LOG.warning(
                "%s does not continue an answer (%s): observations are sent as user messages",
                self._url,
                problem,
            )
        self._continues = False

    def _read(self, choice: Any, stop: tuple[str, ...], before: str, *, chat: bool) -> _Answer:
        """Read an answer's first choice, and put back the stop string that ended it."""
        text = (choice.message.content if chat else choice.text) or ""
        text = self._redact(text)
        message = assistant_message(choice.message, text) if chat else None
        if message is not None:
            return _Answer(text, "length" if choice.finish_reason == "length" else "end", message)
        if choice.finish_reason != "stop":
            return _Answer(text, "length")
        if any(text.endswith(mark) for mark in stop):
            return _Answer(text, "stop")
        extra = choice.model_extra or {}
        # vLLM says which stop string ended the turn; None or a token if the model ended it itself.
        known = "stop_reason" in extra
        mark = extra["stop_reason"] if known else _left_open(before + text, stop)
        if mark not in stop:
            return _Answer(text, "end")
        return _Answer(text + mark, "stop")

    def _problem(self, error: openai.APIError) -> str:
        """What went wrong, on one line and without the key."""
        if isinstance(error, openai.APIStatusError):
            if error.status_code == 401:  # such an answer may hold parts of the key
                return "status 401"
            said = error.message.partition(" - ")[2]
            return f"status {error.status_code}{': ' if said else ''}{self._shown(said)}"
        cause = error.__cause__
        return self._shown(f"{type(cause).__name__}: {cause}" if cause else error.message)

    def _shown(self, text: str) -> str:
        return one_line(self._redact(text[:10_000]))

    def _failure(self, problem: str, status: int | None = None) -> EngineError:
        suggestion = _SUGGESTIONS.get(status or 0, "Is it up, and its address right (up to /v1)?")
        return EngineError(
            f"{self._url} gives no answer for the model {self._model!r}: {problem}. {suggestion}. "
            f"{_CONTINUE}"
        )


class _WholeAnswers(httpx2.AsyncBaseTransport):
    """HTTP with bounded answers. What it raises as ``httpx2.RequestError`` is retried by openai.

    No compressed answer is accepted: a few bytes of it could fill the memory. An answer of status
    200 that is no completion counts as a broken connection.
    """

    def __init__(self, connections: int) -> None:
        # vLLM closes a connection that was idle for 5 s; a request could meet that and look lost.
        limits = httpx2.Limits(max_connections=connections, keepalive_expiry=2.0)
        # A client, since that honors the environment's proxies; the timeout is each request's.
        self._http = httpx2.AsyncClient(limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["Accept-Encoding"] = "identity"
        response = await self._http.send(request, stream=True)
        body, refusal = bytearray(), ""
        try:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                refusal = f"an answer in Content-Encoding {encoding!r}"
            async for block in response.aiter_raw():
                body += block
                if len(body) > _LARGEST_ANSWER:
                    refusal = f"an answer of over {_LARGEST_ANSWER >> 20} MB"
                if refusal:  # openai does not retry this error
                    raise openai.APIResponseValidationError(response, None, message=refusal)
        finally:
            await response.aclose()
        if response.status_code == 200 and (problem := _check_completion(body)):
            raise httpx2.RemoteProtocolError(problem, request=request)
        return httpx2.Response(
            response.status_code, headers=response.headers, content=bytes(body), request=request
        )

    async def aclose(self) -> None:
        await self._http.aclose()


def _check_completion(body: bytes | bytearray) -> str:
    """What is wrong with the body of a completion; nothing if it is empty."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
        reason = choice["finish_reason"]
    except (ValueError, RecursionError):
        return "its answer is no JSON"
    except (LookupError, TypeError, AttributeError):
        return "its answer has no choice with a text and a finish_reason"
    if not isinstance(text, str) or not isinstance(reason, str):
        return "its answer is incomplete: the text or the finish_reason is missing"
    return ""


class _TooLongError(Exception):
    """Prompt and answer do not fit the model's context."""


@dataclass(frozen=True)
class _Answer:
    text: str
    finish_reason: Finish
    message: Message | None = None  # with tool calls


def _left_open(text: str, stop: tuple[str, ...]) -> str:
    """The one stop string that can have ended a text; "" if none can, or several."""
    pairs = [(mark, mark.replace("</", "<").replace("|end_of", "|begin_of")) for mark in stop]
    possible = [
        mark for mark, opening in pairs if opening == mark or text.count(opening) > text.count(mark)
    ]
    return possible[0] if len(possible) == 1 else ""
