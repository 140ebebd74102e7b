"""Chat messages to text and tokens, as a tokenizer's own chat template and encoder make them.

The template's markup may hold special tokens. What the messages say is text: a special token's
name in a message is never parsed as that token.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

from research_agent.errors import ConfigError, ModelError

Message = Mapping[str, Any]
Piece = tuple[Literal["markup", "content"], str]

_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "return_dict",
        "strftime_now",
        "tokenize",
        "tools",
    }
)


def writes_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template writes the day on which it is rendered."""
    return bool(tokenizer.chat_template) and "strftime_now" in tokenizer.get_chat_template()


def require_date(text: str) -> None:
    """Check that a text is a date of the form YYYY-MM-DD.

    Raises:
        ConfigError: it is not.
    """
    with suppress(ValueError):
        if date.fromisoformat(text).isoformat() == text:
            return
    raise ConfigError(f"--chat-template-date {text!r} is no date; write YYYY-MM-DD")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with fixed settings.

    Attributes:
        tokenizer: any tokenizer of the ``transformers`` library that has a chat template.
        args: variables of the template, such as ``{"enable_thinking": False}``.
        date: the day that the template takes for today, YYYY-MM-DD; "" takes the real day.
        encoder: the tokenizer's backend with parsing of special tokens off, if it has a backend.

    Raises:
        ConfigError: an argument that the template does not read, or that is not the user's to set.
    """

    tokenizer: Any
    args: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    encoder: Any = None
    _marks: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)
    _ids: Mapping[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        source = str(self.tokenizer.get_chat_template())
        for name in self.args:
            if name in _RESERVED:
                raise ConfigError(
                    f"--chat-template-args {name} is set by the trainer; leave it out"
                )
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ConfigError(
                    f"--chat-template-args {name}: this model's chat template reads no {name!r}; "
                    "see the chat_template of its tokenizer for the names that it reads"
                )
        if self.encoder is not None:
            self._make_encoder()

    def _make_encoder(self) -> None:
        """Give each special token a secret second name, which the encoder parses instead."""
        encoder = copy.deepcopy(self.encoder)
        special = {i: t for i, t in encoder.get_added_tokens_decoder().items() if t.special}
        marks: dict[str, str] = {}
        for token in special.values():
            marks[token.content] = f"mark{secrets.token_hex(16)}e"
        renamed = [
            type(token)(
                marks[token.content],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=False,
            )
            for token in special.values()
        ]
        encoder.add_tokens(renamed)
        ids = {encoder.token_to_id(marks[t.content]): i for i, t in special.items()}
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "_marks", marks)
        object.__setattr__(self, "_ids", ids)

    def pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Piece]:
        """Render messages, and separate the template's markup from what the messages say.

        For a template that has no system role, the system message goes in front of the first user
        message, with an empty line between them. An assistant message at the end is the beginning
        of the answer, which the policy continues.

        Args:
            messages: the chat.
            tools: schemas of what the policy may call.

        Raises:
            ModelError: the template refuses the messages, changes what they say, or does not show
                the tools.
        """
        try:
            return self._pieces(messages, tools)
        except ModelError:
            roles = [message["role"] for message in messages[:2]]
            if roles != ["system", "user"]:
                raise
            system, user = (message["content"] for message in messages[:2])
            merged = {**messages[1], "content": f"{system}\n\n{user}"}
            return self._pieces([merged, *messages[2:]], tools)

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[Piece]:
        # The template is rendered with marks in place of the contents: all else is its markup.
        nonce = secrets.token_hex(8)
        marks = [f"content{nonce}n{i}e" for i in range(len(messages))]
        contents = [message["content"] for message in messages]
        marked = self._render(messages, marks, tools)
        for name in (str(tool["function"]["name"]) for tool in tools):
            if name not in marked:
                raise ModelError(
                    f"this chat template does not show the tool {name!r}; use a model whose "
                    "template takes tools, or turn the chat template off and let the "
                    "environment's prompt list them"
                )
        found = _align(marked, marks, self._render(messages, contents, tools), contents)
        if found is None:
            raise ModelError(
                "this chat template changes what the messages say or leaves one out, so that its "
                "markup cannot be told from them; turn the chat template off, or give another one"
            )
        return found

    def _render(
        self,
        messages: Sequence[Message],
        contents: Iterable[str],
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        from jinja2 import TemplateError  # noqa: PLC0415 - only templates need it

        chat = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        continues = messages[-1]["role"] == "assistant"
        pinned = {"strftime_now": self._today} if self.date else {}
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self.args,
                **pinned,
            )
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ModelError(
                f"this chat template refuses messages of the roles {roles}: {error}; turn the chat "
                "template off, or give another one"
            ) from error
        return text

    def _today(self, form: str) -> str:
        return datetime.fromisoformat(self.date).strftime(form)

    def encode(self, pieces: Sequence[Piece], special_ids: Set[int]) -> list[int] | None:
        """Encode a rendered chat as ``apply_chat_template`` does.

        The text is encoded as a whole, so that blanks and merges at the edges of messages are those
        that the model was trained with.

        Args:
            pieces: the rendered chat.
            special_ids: tokens that only the markup may yield.

        Returns:
            The tokens. None if the tokenizer has no backend, or makes special tokens of plain text.
        """
        if self.encoder is None:
            return None
        text = "".join(self._marked(each) if kind == "markup" else each for kind, each in pieces)
        ids = self.encoder.encode(text, add_special_tokens=False).ids
        if not special_ids.isdisjoint(ids):
            return None
        return [self._ids.get(i, i) for i in ids]

    def _marked(self, markup: str) -> str:
        """Replace the special tokens in markup by their secret names."""
        names = sorted(self._marks, key=len, reverse=True)
        pattern = "|".join(map(re.escape, names))
        return re.sub(pattern, lambda match: self._marks[match[0]], markup) if names else markup


def _align(
    marked: str, marks: Sequence[str], rendered: str, contents: Sequence[str]
) -> list[Piece] | None:
    """Cut a rendered chat into markup and contents; None if a content was changed or left out.

    Templates may strip contents on one side or on both.

    Args:
        marked: the chat rendered with ``marks`` in place of the contents.
        marks: one per message.
        rendered: the chat rendered with the contents.
        contents: one per message.
    """
    markups = []
    for mark in marks:
        markup, found, marked = marked.partition(mark)
        if not found:
            return None
        markups.append(markup)
    markups.append(marked)
    if not rendered.startswith(markups[0]):
        return None
    pieces: list[Piece] = [("markup", markups[0])]
    rest = rendered[len(markups[0]) :]
    for content, markup in zip(contents, markups[1:], strict=True):
        for kept in (content, content.strip(), content.rstrip(), content.lstrip()):
            if rest.startswith(kept + markup):
                break
        else:
            return None
        pieces += [("content", kept), ("markup", markup)]
        rest = rest[len(kept) + len(markup) :]
    return pieces if not rest else None
