"""Any OpenAI-compatible endpoint as an engine: text goes out, text comes back. Never for training.

For evaluation and baselines: of a text nobody knows which tokens the model sampled, nor how likely
they were. Wire it to ``evaluate`` with the renderer that belongs to it::

    renderer = EndpointRenderer(chat_template=config.chat_template)
    engine = EndpointEngine(config.endpoint, config.model, renderer)

``/completions`` gets the prompt and all that was said since as one text. With ``chat_template``
``/chat/completions`` gets the prompt's messages, and what was said since as the beginning of the
assistant's answer, to be gone on with (``continue_final_message``, which vLLM and SGLang know).
Where an endpoint refuses that, what the policy said goes as the assistant's messages and what the
environment said as the user's: another conversation than the one a local model has.

The key of an endpoint that asks for one is read from ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from research_agent.engines.base import Completion, Finish, SamplingParams
from research_agent.engines.remote import RequestError, Turns, ask, make_client, read_key, turn_seed
from research_agent.errors import ConfigError, ContextError, EngineError

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)

_CONTINUE = "What was played is kept, and the same command goes on from there"
_STEP = 0.02  # seconds that a step waits for a turn; a collector has searches to look after
_LONGEST_PAUSE = 30.0  # seconds between attempts, where the endpoint asks for no more
_PIECE = re.compile(r"\s?\w{1,5}|\s?[^\w\s]{1,3}|\s")
_TOO_LONG = re.compile(r"context|max_model_len|max_tokens|too (long|many tokens|large)", re.I)


@dataclass
class EndpointRenderer:
    """A renderer of words and parts of words, for text whose tokens nobody knows.

    It does what ``collect`` and ``evaluate`` ask of a renderer, and loses no character. Its tokens
    are pieces of at most five letters, and in English of 3.8 characters (MuSiQue's passages), about
    as long as a model's: so limits of tokens mean nearly what they say.

    Attributes:
        chat_template: prompts are chat messages, for the endpoint's template; not plain text.
    """

    chat_template: bool = False
    _pieces: list[str] = field(default_factory=list, repr=False)
    _numbers: dict[str, int] = field(default_factory=dict, repr=False)
    _roles: dict[int, str] = field(default_factory=dict, repr=False)  # token -> whose turn begins

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text."""
        return [self._number(piece, piece) for piece in _PIECE.findall(text)]

    def encode_prompt(
        self, observation: str, messages: Sequence[Mapping[str, str]] | None = None
    ) -> list[int]:
        """Tokens of an episode's first observation.

        Args:
            observation: the prompt as plain text.
            messages: the same as chat messages, used with ``chat_template``; without them the
                observation is the one user message.
        """
        if not self.chat_template:
            return self.encode_text(observation)
        tokens: list[int] = []
        for message in messages or [{"role": "user", "content": observation}]:
            mark = self._number(
                f"role {message['role']}", ""
            )  # no piece of a text has a space there
            self._roles[mark] = message["role"]
            tokens += [mark, *self.encode_text(message["content"])]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; that of a role's mark is empty."""
        return "".join(self._pieces[token] for token in tokens)

    def messages(self, tokens: Sequence[int]) -> list[dict[str, str]]:
        """The chat messages of a prompt; none where it is plain text."""
        starts = [at for at, token in enumerate(tokens) if token in self._roles]
        return [
            {"role": self._roles[tokens[start]], "content": self.decode(tokens[start:end])}
            for start, end in pairwise([*starts, len(tokens)])
        ]

    def _number(self, name: str, piece: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._pieces)
            self._pieces.append(piece)
        return self._numbers[name]


class EndpointEngine:
    """An ``Engine`` over an endpoint that speaks text.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1``.
        model: the name that the endpoint knows the model by.
        renderer: that of the prompts; it says whether they are chat messages.
        concurrency: requests at a time.
        deadline: seconds for a turn, with all its attempts.
        attempts: how often a turn is asked for while the endpoint fails.
        pause: seconds before the second attempt; each further one waits twice as long, and none
            less than the endpoint asks for (Retry-After).

    Raises:
        ConfigError: an address that cannot be used.

    Log-probabilities are NaN: nothing knows them. The stop string that an endpoint cuts off is put
    back where it says which one it was (vLLM does), or where exactly one can have been: of
    ``</search>`` and the like only one that the turn has left open can.
    """

    def __init__(
        self,
        url: str,
        model: str,
        renderer: EndpointRenderer,
        *,
        concurrency: int = 16,
        deadline: float = 600.0,
        attempts: int = 8,
        pause: float = 0.5,
    ) -> None:
        if concurrency < 1 or attempts < 1:
            raise ConfigError(f"concurrency is {concurrency}, attempts {attempts}; give 1 or more")
        self.max_context = 1 << 30  # the endpoint has its own, and refuses what is longer
        self._url = url.strip().rstrip("/")
        self._model = model
        self._renderer = renderer
        self._client = make_client(self._url, read_key("OPENAI_API_KEY"))
        self._places = asyncio.Semaphore(concurrency)
        self._deadline = deadline
        self._attempts = attempts
        self._pause = pause
        self._silence = 0.0  # the loop's time until which the endpoint wants to be left alone
        self._limit = "max_tokens"  # the field's name
        self._continues: bool | None = None  # whether it goes on with an answer; None: not known
        self._held: dict[int, _Held] = {}
        self._turns: Turns[_Said] = Turns("endpoint", [self._client])
        self.close = self._turns.close

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return len(self._turns)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and ask for a turn from there.

        Raises:
            ContextError: nothing to continue from.
            ValueError: the slot's turn is under way.
        """
        if slot in self._turns:
            raise ValueError(f"slot {slot} has a turn under way; wait for it or release it")
        if slot in self._held:
            self._held[slot].add("user", self._renderer.decode(tokens), len(tokens))
        elif tokens:
            text, messages = self._renderer.decode(tokens), self._renderer.messages(tokens)
            self._held[slot] = _Held(text, messages, len(tokens))
        else:
            raise ContextError(f"slot {slot} holds nothing, and no tokens were submitted")
        self._turns.begin(slot, self._play(self._held[slot], params))

    def step(self) -> list[Completion]:
        """Wait a moment for turns to be finished; return those that are.

        Raises:
            ContextError: a prompt too long for the model.
            EngineError: the endpoint is down, too slow, refuses, or talks rubbish.
        """
        done = []
        for slot, said in self._turns.finished(_STEP).items():
            tokens = self._renderer.encode_text(said.text)
            self._held[slot].add("assistant", said.text, len(tokens))
            unknown = (math.nan,) * len(tokens)
            done.append(Completion(slot, tuple(tokens), unknown, said.text, said.finish_reason, 0))
        return done

    def release(self, slot: int) -> None:
        """Forget what the slot holds."""
        self._turns.cancel(slot)
        self._held.pop(slot, None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Refuse: an endpoint has weights of its own.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"{self._url} cannot take weights; train with --engine transformers, vllm or server"
        )

    async def _play(self, held: _Held, params: SamplingParams) -> _Said:
        """Ask for a turn; in parts where the context has no room for ``max_tokens``."""
        async with self._places:
            deadline = asyncio.get_running_loop().time() + self._deadline
            turn = _Turn(held, params, turn_seed(params.seed, held.length), deadline)
            said, left, size = "", params.max_tokens, params.max_tokens
            while True:
                try:
                    part = await self._ask(turn, said, size)
                except _TooLongError as error:
                    if size > 1:
                        size //= 2
                        continue
                    if said or held.later:
                        return _Said(said, "length")
                    raise ContextError(
                        f"{self._url}: the prompt that ends in {held.prompt[-200:]!r} does not fit "
                        f"the model {self._model!r}: {error}. {_CONTINUE}"
                    ) from None
                said += part.text
                left -= size
                size = min(size, left)
                goes_on = not held.messages or self._continues
                if part.finish_reason != "length" or size < 1 or not part.text or not goes_on:
                    return _Said(said, part.finish_reason)

    async def _ask(self, turn: _Turn, said: str, size: int) -> _Said:
        """Ask until there is an answer, or it is clear that there will be none.

        Args:
            turn: what to ask for.
            said: what the turn has already.
            size: tokens of the answer.
        """
        loop = asyncio.get_running_loop()
        chat = bool(turn.held.messages)
        failures = 0
        while True:
            continuing = chat and turn.held.begun(said) and self._continues is not False
            payload = {
                "model": self._model,
                self._limit: size,
                "temperature": turn.params.temperature,
                "seed": turn.seed,
                **({"stop": list(turn.params.stop)} if turn.params.stop else {}),
                **turn.held.request(said, continuing=continuing),
            }
            path = "chat/completions" if chat else "completions"
            try:
                await asyncio.sleep(max(0.0, min(self._silence, turn.deadline) - loop.time()))
                left = max(0.001, turn.deadline - loop.time())
                answer = await ask(self._client, "POST", path, payload, timeout=left)
                part = _read(answer, turn.params.stop, said, chat=chat)
            except RequestError as error:
                if error.status in (400, 413, 422):
                    if "max_completion_tokens" in str(error) and self._limit == "max_tokens":
                        self._limit = "max_completion_tokens"  # OpenAI's newer models
                        continue
                    if _TOO_LONG.search(str(error)):
                        raise _TooLongError(str(error)) from None
                    if continuing and self._continues is None:
                        self._continues = False
                        _LOG.warning(
                            "%s does not go on with an answer (%s): observations are sent as the "
                            "user's messages",
                            self._url,
                            error,
                        )
                        continue
                wait = min(_LONGEST_PAUSE, self._pause * 2**failures) * random.uniform(0.5, 1)
                failures += 1
                if error.wait is not None:
                    self._silence = max(self._silence, loop.time() + error.wait)
                again = max(loop.time() + wait, self._silence)
                if not error.retryable or failures >= self._attempts or again >= turn.deadline:
                    raise self._failure(error, failures) from None
                await asyncio.sleep(wait)
            else:
                if continuing:
                    self._continues = True
                return part

    def _failure(self, error: RequestError, attempts: int) -> EngineError:
        cures = {
            401: "Put its key into OPENAI_API_KEY",
            403: "Put its key into OPENAI_API_KEY",
            404: "Is the model's name right? One that only chats needs --chat-template",
            405: "One that only chats needs --chat-template",
            429: "Ask for less at a time, with fewer --max-in-flight",
        }
        cure = cures.get(error.status or 0, "Is it up, and its address right (up to /v1)?")
        return EngineError(
            f"{self._url} gives no answer for the model {self._model!r}: {error} "
            f"(attempt {attempts}). {cure}. {_CONTINUE}"
        )


class _TooLongError(Exception):
    """Prompt and answer do not fit the model's context."""


@dataclass(frozen=True)
class _Turn:
    held: _Held
    params: SamplingParams
    seed: int
    deadline: float  # the loop's time


@dataclass(frozen=True)
class _Said:
    text: str
    finish_reason: Finish


@dataclass
class _Held:
    """A trajectory as text."""

    prompt: str
    messages: list[dict[str, str]]  # the same as chat messages; none: it is plain text
    length: int  # tokens of the renderer
    later: list[tuple[str, str]] = field(default_factory=list)  # whose, and the text

    def add(self, role: str, text: str, length: int) -> None:
        self.later.append((role, text))
        self.length += length

    def begun(self, said: str) -> bool:
        """Whether the assistant's answer has begun."""
        return bool(said or self.later or self.messages[-1]["role"] == "assistant")

    def request(self, said: str, *, continuing: bool) -> dict[str, Any]:
        """What an endpoint is told of it, and of the part of the turn that it has said already."""
        rest = "".join(text for _, text in self.later) + said
        if not self.messages:
            return {"prompt": self.prompt + rest}
        later = [("assistant", rest)] if continuing else [each for each in self.later if each[1]]
        messages = [{"role": role, "content": text} for role, text in later]
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        return {
            "messages": [*self.messages[:-1], *_merged([self.messages[-1], *messages])],
            **(going_on if continuing else {}),
        }


def _merged(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Messages, those of one role that follow each other as one."""
    return [
        {"role": role, "content": "".join(message["content"] for message in group)}
        for role, group in groupby(messages, key=lambda message: message["role"])
    ]


def _read(answer: Any, stop: tuple[str, ...], before: str, *, chat: bool) -> _Said:
    """What an answer says.

    Raises:
        RequestError: it is not one of an OpenAI-compatible endpoint, or not whole.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        reason = choice["finish_reason"]
    except (LookupError, TypeError):
        raise RequestError("its answer has no choice with a text and a finish_reason") from None
    text = "" if text is None and chat else text
    if not isinstance(text, str) or not isinstance(reason, str):
        raise RequestError("its answer is not whole: a text or a finish_reason is missing")
    if reason != "stop":
        return _Said(text, "length")
    if any(text.endswith(mark) for mark in stop):
        return _Said(text, "stop")
    known = "stop_reason" in choice  # of vLLM; none, or a token, where the model ended by itself
    mark = choice["stop_reason"] if known else _left_open(before + text, stop)
    if mark not in stop:
        return _Said(text, "end")
    return _Said(text + mark, "stop")


def _left_open(text: str, stop: tuple[str, ...]) -> str:
    """The one stop string that can have ended a text; "" where none can, or several."""
    pairs = [(mark, mark.replace("</", "<").replace("|end_of", "|begin_of")) for mark in stop]
    possible = [
        mark for mark, opening in pairs if opening == mark or text.count(opening) > text.count(mark)
    ]
    return possible[0] if len(possible) == 1 else ""
