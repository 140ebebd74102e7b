"""Ask a model for one verdict on one prediction, as the papers do.

Two prompts, word for word those of the papers' code:

- ``research``: ReSearch (Chen et al. 2025), Agent-RL/ReCall, branch re-search, commit 4bdb872,
  ``scripts/evaluation/llm_judge.py``. The gold answers are written as a Python list. The verdict is
  a JSON object with a rationale and a judgement. Its code asks gpt-4o-mini at temperature 0, 1,024
  tokens, ``response_format`` json_object; a question whose five tries fail is not in its mean.
- ``r1-searcher``: R1-Searcher (Song et al. 2025), RUCAIBox/R1-Searcher, commit 631167c,
  ``evaluation/metric_calc_gpt_as_judge.py``. One gold answer, the verdict True or False. Its code
  asks gpt-4o-mini with 1,024 tokens and no temperature (so the server's, often 1); ours is 0. Where
  a question has several gold answers they are written as a Python list: its data have one each.

What counts as a verdict:

- ``research``: one JSON object and nothing else but white space or one Markdown code fence round
  it; no key twice; ``rationale`` a text; ``judgement`` exactly "correct" or "incorrect". (The
  paper's code takes every judgement but "correct" for "incorrect".)
- ``r1-searcher``: the word True or False in any case, perhaps with a full stop, and nothing else.

Anything else is answered once by what was wrong with it; then the verdict is missing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import httpx

from research_env.errors import ConfigurationError, ResearchEnvError
from research_env.retrieval.http import one_line
from research_env.retrieval.retry import AGAIN, Deadline, Retry, retry_after
from research_env.retrieval.url import check_address, secret_of, words_only

MAX_TOKENS = 1024  # of an answer, in both papers' codes
RETRY = Retry(deadline=120.0, first=0.5, longest=20.0)
"""Seconds that a question may take with all its attempts, and the pauses between them."""

_QUOTED = 1_000  # characters of a bad answer that the judge is shown again
_LARGEST_ANSWER = 8 << 20  # bytes of a response
_SHORTEST_SECRET = 8  # characters; "EMPTY" and the like are put where a server wants no key

Messages = Sequence[Mapping[str, str]]


class JudgeError(ResearchEnvError):
    """The judge cannot go on: wrong key, address or model, or an endpoint that has gone."""


class NoAnswerError(ResearchEnvError):
    """One question got no answer.

    Attributes:
        kind: a few words, the same for all failures of a kind.
        refused: the server answered, and would refuse the same question again.
    """

    def __init__(self, kind: str, detail: str = "", *, refused: bool = False) -> None:
        """``detail``: what the server said, or what went wrong on the way."""
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a judge is asked, and what its answer means."""

    template: str
    """With the fields question, gold, prediction, for ``str.format``."""
    gold: Callable[[Sequence[str]], str]
    """The gold answers as the template shows them."""
    verdict: Callable[[str], bool | None]
    """The model's text to its verdict; None: it is none."""
    repair: str
    """What is said to a text that is none."""
    formats: tuple[Mapping[str, Any] | None, ...] = (None,)
    """Values of ``response_format`` that hold the model to the form, the strictest first."""

    def text(self, question: str, answers: Sequence[str], prediction: str) -> str:
        """The whole prompt, one user message."""
        filled = self.template.format(
            question=question, gold=self.gold(answers), prediction=prediction
        )
        return words_only(filled)


def research_verdict(text: str) -> bool | None:
    """The verdict of a ReSearch judge; see the head of this module for what counts as one."""
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)```", text.strip(), re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError):
        return None
    match value:
        case {"rationale": str(), "judgement": "correct" | "incorrect" as judgement}:
            return bool(judgement == "correct")
    return None


def r1_searcher_verdict(text: str) -> bool | None:
    """The verdict of an R1-Searcher judge; see the head of this module for what counts as one."""
    return {"true": True, "false": False}.get(text.strip().removesuffix(".").lower())


_RESEARCH = """You will be given a question and its ground truth answer list where each item can \
be a ground truth answer. Provided a pred_answer, you need to judge if the pred_answer correctly \
answers the question based on the ground truth answer list. You should first give your rationale \
for the judgement, and then give your judgement result (i.e., correct or incorrect).

Here is the criteria for the judgement:
1. The pred_answer doesn't need to be exactly the same as any of the ground truth answers, but \
should be semantically same for the question.
2. Each item in the ground truth answer list can be viewed as a ground truth answer for the \
question, and the pred_answer should be semantically same to at least one of them.

question: {question}
ground truth answers: {gold}
pred_answer: {prediction}

The output should in the following json format:
```json\x20
{{
    "rationale": "your rationale for the judgement, as a text",
    "judgement": "your judgement result, can only be 'correct' or 'incorrect'"
}}
```

Your output:"""

_R1_SEARCHER = (
    "Given a Question and its Golden Answer, verify whether the Predicted Answer is correct. The "
    "prediction is correct if it fully aligns with the meaning and key information of the Golden "
    "Answer. Respond with True if the prediction is correct and False otherwise.\n"
    "\n"
    "Question: {question}\n"
    "Golden Answer: {gold}\n"
    "Predicted Answer: {prediction}\n"
    "    "
)

_SCHEMA = {
    "type": "object",
    "properties": {
        "rationale": {"type": "string"},
        "judgement": {"type": "string", "enum": ["correct", "incorrect"]},
    },
    "required": ["rationale", "judgement"],
    "additionalProperties": False,
}

PROMPTS: dict[str, Prompt] = {
    "research": Prompt(
        _RESEARCH,
        lambda answers: str(list(answers)),
        research_verdict,
        "That is not the JSON object asked for. Answer again with nothing but one JSON object: "
        'the key "rationale" with a text, and the key "judgement" with "correct" or "incorrect".',
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": _SCHEMA},
            },
            {"type": "json_object"},  # what the paper's code sends
            None,
        ),
    ),
    "r1-searcher": Prompt(
        _R1_SEARCHER,
        lambda answers: answers[0] if len(answers) == 1 else str(list(answers)),
        r1_searcher_verdict,
        "That is not the answer asked for. Answer again with one word only: True or False.",
    ),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote, and the tokens in and out, where the server counted them."""

    text: str
    tokens: tuple[int, int] | None


def check_endpoint(url: str) -> None:
    """Refuse what is no address of a server, or may hold a secret.

    Raises:
        ConfigurationError: it does not repeat what may be secret.
    """
    check_address(url)
    if "?" in url or "#" in url:
        raise ConfigurationError(
            "the address of an endpoint ends before its '?'; a key goes into OPENAI_API_KEY"
        )
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url!r} is no address of a server: {error}") from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What asking for one verdict came to; ``problem`` says why there is none."""

    verdict: bool | None
    raw: str | None = None
    problem: NoAnswerError | None = None
    answers: tuple[Answer, ...] = ()


class Endpoint:
    """An endpoint and its model; ``async with`` opens and closes the connections.

    A failure that may pass (no connection, no answer in time, an answer that is cut or none at all,
    a status of :data:`research_env.retrieval.retry.AGAIN`) is tried again after a pause, until the
    deadline of the question; an attempt may take half of that. Waiting for the turn that the rate
    gives is not counted. The pause that a Retry-After asks for holds up all questions.

    The answers' form (``response_format``) is the first of ``formats`` that the server takes: where
    it answers 400 or 422, the next one is tried, and kept for the rest if that is answered.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        formats: Sequence[Mapping[str, Any] | None] = (None,),
        rate: float | None = None,
        retry: Retry | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: such as ``http://localhost:8000/v1``.
            model: the name that the server knows.
            key: sent as a bearer token, and never repeated; empty: none is sent.
            formats: values of ``response_format``, the best one first; None: none is sent.
            rate: requests a second; None: any number.
            retry: deadline of a question and pauses between attempts; None: ``RETRY``.

        Raises:
            ConfigurationError: the address cannot be used, or may hold a secret.
        """
        check_endpoint(url)
        path = "/chat/completions"
        self._url = url if url.endswith(path) else url.rstrip("/") + path
        self._model = model
        self._key = key
        self._formats = formats
        self._format = 0  # the best one that the server has not refused
        self._gap = 1 / rate if rate else 0.0
        self._free_at = 0.0  # monotonic seconds: no request before
        self._retry = retry or RETRY
        self._answered = False
        self._client = httpx.AsyncClient(
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=None,  # ours is one of the whole attempt
            limits=httpx.Limits(max_connections=None),
        )

    def __repr__(self) -> str:
        return f"Endpoint({self._url!r}, {self._model!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def ask(self, messages: Messages) -> Answer:
        """The model's answer.

        Raises:
            NoAnswerError: the server refuses this question, or the deadline has passed.
            JudgeError: it refuses every question, or nothing has ever answered at the address.
        """
        for form in range(self._format, len(self._formats)):
            try:
                answer = await self._ask(messages, self._formats[form])
            except NoAnswerError as error:
                if error.kind in ("status 400", "status 422") and form + 1 < len(self._formats):
                    continue  # perhaps it does not know the form
                raise
            self._format = max(self._format, form)
            return answer
        raise AssertionError  # the last form returned or raised

    async def _ask(self, messages: Messages, form: Mapping[str, Any] | None) -> Answer:
        payload: dict[str, Any] = {
            "model": self._model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if form is not None:
            payload["response_format"] = form
        body = json.dumps(payload).encode()
        await self._turn()
        deadline = Deadline.after(self._retry.deadline)
        for attempt in itertools.count():
            try:
                return await self._once(body, min(deadline.left(), self._retry.deadline / 2))
            except _AttemptError as failure:
                error, again, asked = failure.error, failure.again, failure.wait
            pause = self._retry.pause(attempt, deadline.left(), asked) if again else None
            if pause is None:
                raise error
            if asked:
                self._free_at = max(self._free_at, time.monotonic() + asked)
            await asyncio.sleep(pause)
            deadline = replace(deadline, at=deadline.at + await self._turn())
        raise AssertionError  # count() does not end

    async def _turn(self) -> float:
        """Wait until the rate lets a request go; the seconds waited."""
        now = time.monotonic()
        wait = max(0.0, self._free_at - now)
        self._free_at = now + wait + self._gap
        await asyncio.sleep(wait)
        return wait

    async def _once(self, body: bytes, seconds: float) -> Answer:
        said = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream("POST", self._url, content=body) as response,
            ):
                async for part in response.aiter_bytes():
                    said += part
                    if len(said) > _LARGEST_ANSWER:
                        raise _AttemptError(NoAnswerError("an answer of over 8 MB", refused=True))
        except TimeoutError:
            raise _AttemptError(NoAnswerError("no answer in time"), again=True) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            detail = f"{type(error).__name__}: {self._safe(str(error))}"
            if isinstance(error, httpx.ConnectError) and not self._answered:
                raise JudgeError(
                    f"nothing answers at {self._url} ({detail}); is the server up, and the address "
                    "that of its /v1?"
                ) from None
            raise _AttemptError(NoAnswerError("no connection", detail), again=True) from None
        self._answered = True
        if response.status_code != 200:
            raise self._failure(response, said.decode("utf-8", "replace"))
        try:
            answer = json.loads(said)
            content = answer["choices"][0]["message"]["content"]
            if not isinstance(content, str | None):
                raise TypeError("content is no text")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            shown = self._safe(said.decode("utf-8", "replace"))
            raise _AttemptError(NoAnswerError("no chat completion", shown), again=True) from None
        return Answer(self._hidden(words_only(content or "")), _tokens(answer.get("usage")))

    def _failure(self, response: httpx.Response, said: str) -> Exception:
        status = response.status_code
        if status in (401, 403):  # not quoted: it may repeat the key, or parts of it
            raise JudgeError(
                f"{self._url} answered {status}: set OPENAI_API_KEY to a key that may use "
                f"{self._model!r}"
            )
        shown = self._safe(said)
        if status == 404:
            raise JudgeError(
                f"{self._url} answered 404 ({shown}); the address is that of the server's /v1, and "
                f"the model {self._model!r} one that it knows"
            )
        again = status in AGAIN
        wait = retry_after(response.headers.get("Retry-After"))
        return _AttemptError(
            NoAnswerError(f"status {status}", shown, refused=not again), again, wait
        )

    def _safe(self, said: str) -> str:
        return one_line(self._hidden(said))

    def _hidden(self, said: str) -> str:
        """The text without the key, should a server repeat it."""
        return said.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else said


async def ask_verdict(endpoint: Endpoint, prompt: Prompt, text: str) -> Outcome:
    """Ask once, and once more where the answer is no verdict.

    Args:
        endpoint: the model.
        prompt: says what counts as a verdict, and what is said to a text that is none.
        text: the whole prompt.

    Raises:
        JudgeError: see ``Endpoint.ask``.
    """
    messages = [{"role": "user", "content": text}]
    answers: list[Answer] = []
    while True:
        try:
            answer = await endpoint.ask(messages)
        except NoAnswerError as error:
            return Outcome(None, answers[-1].text if answers else None, error, tuple(answers))
        answers.append(answer)
        verdict = prompt.verdict(answer.text)
        if verdict is not None:
            return Outcome(verdict, answer.text, None, tuple(answers))
        if len(answers) == 2:
            return Outcome(None, answer.text, NoAnswerError("no valid verdict"), tuple(answers))
        said = answer.text[:_QUOTED].strip() or "(nothing)"  # some servers refuse an empty message
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": prompt.repair})


def read_key() -> str:
    """The key in the environment variable ``OPENAI_API_KEY``; empty where there is none.

    Raises:
        ConfigurationError: it holds characters that no key has; it is not repeated.
    """
    return secret_of("OPENAI_API_KEY")


class _AttemptError(Exception):
    """``again``: the next attempt may not fail; ``wait``: seconds that the server asks for."""

    def __init__(
        self, error: NoAnswerError, again: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.wait = wait


def _tokens(usage: Any) -> tuple[int, int] | None:
    match usage:
        case {"prompt_tokens": int(asked), "completion_tokens": int(written)}:
            return asked, written
    return None


def _unrepeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made
