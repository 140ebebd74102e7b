"""Text to tokens and back, once: nothing is ever retokenized.

Prompts, observations and actions are encoded or decoded when they are made, each on its own. Text
from the environment is encoded with special-token parsing off: ``<|im_end|>`` in it is text, and
never the token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from research_agent.chat_template import ChatTemplate, writes_date
from research_agent.errors import ModelError
from research_agent.models.source import (
    generation_settings,
    model_source,
    opening,
    resolve_model,
    tokenizer_source,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WHERE = "give a folder with tokenizer.json, or a name on the Hugging Face hub"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class ChatSettings(Protocol):
    """What the configuration of a command says about the chat template."""

    @property
    def chat_template(self) -> bool:
        """Whether prompts are chat messages in the tokenizer's template."""
        ...

    @property
    def chat_template_args(self) -> Mapping[str, Any]:
        """Variables of the template."""
        ...

    @property
    def chat_template_date(self) -> str | None:
        """The day that the template takes for today, YYYY-MM-DD; None: any."""
        ...


@dataclass(frozen=True)
class Renderer:
    """A Hugging Face tokenizer, used so that provenance is never lost.

    Attributes:
        tokenizer: any tokenizer of the ``transformers`` library.
        end_ids: the tokens that end a turn.
        chat_template: prompts are chat messages in the tokenizer's template, not plain text.
        chat_template_args: variables of the template, such as ``{"enable_thinking": False}``.
        chat_template_date: the day that the template takes for today, YYYY-MM-DD; "" takes the
            real day.
        special_ids: the special tokens, those that end a turn included.
    """

    tokenizer: Any
    end_ids: frozenset[int]
    chat_template: bool = False
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    chat_template_date: str = ""
    special_ids: frozenset[int] = field(init=False, repr=False)
    _plain: Any = field(init=False, repr=False, compare=False)  # a tokenizers.Tokenizer, or None
    _template: ChatTemplate | None = field(init=False, repr=False, compare=False)
    _stop_flags: dict[tuple[str, ...], NDArray[np.bool_]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _stop_tokens: dict[tuple[str, ...], frozenset[int]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.end_ids:
            raise ModelError("the renderer has no end token; give end_ids, or set eos_token")
        special = set(self.tokenizer.all_special_ids) | self.end_ids
        # Llama 3's files call most of its chat tokens special in this list only.
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special |= {number for number, token in added.items() if token.special}
        if self.tokenizer.unk_token_id not in self.end_ids:
            special.discard(self.tokenizer.unk_token_id)  # an unknown word is text
        object.__setattr__(self, "special_ids", frozenset(special))
        # A copy, because each call of the tokenizer sets how its own backend parses them.
        plain = copy.deepcopy(getattr(self.tokenizer, "backend_tokenizer", None))
        if plain is not None:
            plain.no_truncation()
            plain.no_padding()
            plain.encode_special_tokens = True
        object.__setattr__(self, "_plain", plain)
        template = None
        if self.chat_template:
            template = ChatTemplate(
                self.tokenizer, self.chat_template_args, self.chat_template_date, plain
            )
        object.__setattr__(self, "_template", template)

    def encode_text(self, text: str) -> list[int]:
        """Encode text on its own: no token is added before or after it, and none is special."""
        tokens: list[int] = []
        rest = [text]  # the next part is the last one
        while rest:
            part = rest.pop()
            found = self._encode_part(part)
            if self.special_ids.isdisjoint(found):
                tokens += found
            else:
                at = self._place_to_cut(part)
                rest += [part[at:], part[:at]]
        return tokens

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int]
        if self._plain is not None:  # as the call below, in less than half the time
            (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
            ids = encoding.ids
        else:
            ids = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        return ids

    def _place_to_cut(self, text: str) -> int:
        """Find the name of a special token in a text; the place is behind its first character.

        Some tokenizers look whole words up in a vocabulary that holds the special tokens too.
        """
        for special_id in self.special_ids:
            special = self.tokenizer.convert_ids_to_tokens(special_id)
            at = text.find(special)
            if at >= 0 and len(special) > 1:
                return at + 1
        raise ModelError(
            f"this tokenizer makes special tokens of the plain text {text[:80]!r}; "
            "use one whose special tokens are longer than one character"
        )

    def encode_observation(
        self,
        observation: str,
        markup: Sequence[str] = (),
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Encode what the environment answers.

        Args:
            observation: the text.
            markup: strings in it that are chat tokens.
            messages: not used, because the observation holds them; the renderer of an endpoint
                takes them instead of the text.

        Returns:
            The tokens, as ``encode_with_markup`` gives them.

        Raises:
            ModelError: the tokenizer has no such chat token.
        """
        return self.encode_with_markup(observation, markup)

    def encode_with_markup(self, text: str, markup: Sequence[str]) -> list[int]:
        """Encode text with chat tokens in it.

        Args:
            text: the text.
            markup: strings in it that are chat tokens, such as ``<|im_start|>``. They count only
                with ``chat_template``.

        Returns:
            The tokens; everything but the markup is encoded as text.

        Raises:
            ModelError: the tokenizer has no such chat token.
        """
        known = [each for each in markup if self.chat_template and each in text]
        if not known:
            return self.encode_text(text)
        for each in known:
            if self.tokenizer.convert_tokens_to_ids(each) not in self.special_ids:
                raise ModelError(
                    f"the environment frames its observations with {each!r}, which is no chat "
                    "token of this model's tokenizer; let the environment use the format of this "
                    "model, or turn the chat template off"
                )
        tokens: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, known))})", text):
            if piece in known:
                tokens.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                tokens += self.encode_text(piece)
        return tokens

    def encode_prompt(
        self,
        observation: str,
        messages: Sequence[Mapping[str, str]] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Encode an episode's first observation.

        Args:
            observation: the prompt as plain text; a begin token goes before it if the tokenizer
                adds one by itself.
            messages: the same as chat messages, used with ``chat_template``; without them the
                observation is the one user message.
            tools: schemas of what the policy may call, for the chat template.

        Returns:
            The tokens. With a chat template only the template's own markup yields special tokens;
            what the messages say is text.

        Raises:
            ModelError: the template changes what the messages say, or does not show the tools.
        """
        if not self.chat_template:
            begin = self.tokenizer("")["input_ids"][:1]
            is_begin = begin and begin[0] == self.tokenizer.bos_token_id
            return (begin if is_begin else []) + self.encode_text(observation)
        return self._encode_chat(messages or [{"role": "user", "content": observation}], tools)

    def _encode_chat(
        self, messages: Sequence[Mapping[str, str]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        assert self._template is not None
        pieces = self._template.pieces(messages, tools)
        encoded = self._template.encode(pieces, self.special_ids)
        if encoded is not None:
            return encoded
        # The tokenizer is written in Python, or has special tokens in its plain vocabulary.
        tokens: list[int] = []
        for kind, text in pieces:
            if kind == "content":
                tokens += self.encode_text(text)
            elif text:
                tokens += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens, special ones included, to the text as the model wrote it."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def stop_flags(self, stop: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which tokens may complete one of the stop strings. Shape [vocabulary], cached.

        A token may if its text has the last character of a stop string, or a part of a character.
        """
        if stop not in self._stop_flags:
            anchor = self.encode_text("a")[-1:]  # some tokenizers drop a leading space
            before = len(self.decode(anchor))
            ends = {s[-1] for s in stop} | {_REPLACEMENT}
            flags = np.zeros(len(self.tokenizer), dtype=np.bool_)
            if stop:
                for token in range(len(flags)):
                    flags[token] = not ends.isdisjoint(self.decode([*anchor, token])[before:])
            self._stop_flags[stop] = flags
        return self._stop_flags[stop]

    def stop_tokens(self, stop: tuple[str, ...]) -> frozenset[int]:
        """The tokens that ``stop_flags`` marks, cached."""
        if stop not in self._stop_tokens:
            self._stop_tokens[stop] = frozenset(np.flatnonzero(self.stop_flags(stop)).tolist())
        return self._stop_tokens[stop]

    def stops(self, tokens: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether a turn's tokens, of which only the last is new, hold one of the stop strings."""
        if not stop:
            return False
        reach = max(len(s.encode()) for s in stop) + 8  # a token has at least a byte, nearly always
        text = self.decode(tokens[-reach:])
        return any(s in text for s in stop)


def open_renderer(settings: ChatSettings, model: str | Path, date: str | None = None) -> Renderer:
    """Open the tokenizer of a model as ``load_renderer`` does, by the settings of a command.

    Args:
        settings: the command's settings of the chat template.
        model: as for ``load_renderer``; also a starter of the package, or the folder of a run.
        date: the template's day if the settings name none.
    """
    return load_renderer(
        resolve_model(model),
        chat_template=settings.chat_template,
        chat_template_args=settings.chat_template_args,
        chat_template_date=settings.chat_template_date or date,
    )


def load_renderer(
    model: str | Path,
    *,
    chat_template: bool = False,
    chat_template_args: Mapping[str, Any] | None = None,
    chat_template_date: str | None = None,
) -> Renderer:
    """Open the tokenizer of a model.

    Args:
        model: a folder, a GGUF file, or a name on the Hugging Face hub.
        chat_template: prompts are chat messages in the tokenizer's own template.
        chat_template_args: variables of the template, such as ``{"enable_thinking": False}``.
        chat_template_date: the day that a template which writes the date takes for today,
            YYYY-MM-DD. None takes the day of this call, for as long as the renderer lives.

    Raises:
        ModelError: there is no tokenizer, no end token, or not the chat template that is asked for.
        ConfigError: an argument that the template does not read.
    """
    from transformers import (  # noqa: PLC0415 - slow to import
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )
    from transformers.models.auto.tokenization_auto import get_tokenizer_config  # noqa: PLC0415

    source = tokenizer_source(model)
    place, options = source.place, {**source.options, "trust_remote_code": False}
    with opening(f"the tokenizer of {str(model)!r}", _WHERE):
        # For some architectures AutoTokenizer takes a class of its own instead of the folder's. It
        # silently misreads a tokenizer.json that another class wrote.
        declared = get_tokenizer_config(place).get("tokenizer_class")
        plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(
            place, **options
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made an empty one
        raise ModelError(f"{str(model)!r} holds no tokenizer; {_WHERE}")
    if chat_template and not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {str(model)!r} has no chat template; leave it off")
    end_ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    # An instruction-tuned model may end its turns with several tokens.
    more = generation_settings(place).get("eos_token_id")
    if more is None and (Path(place) / "adapter_config.json").is_file():  # the base says which
        more = generation_settings(model_source(model).place).get("eos_token_id")
    listed = more if isinstance(more, list) else [] if more is None else [more]
    if not all(isinstance(i, int) for i in listed):
        message = f"eos_token_id in the generation_config.json of {str(model)!r} is {more!r}"
        raise ModelError(f"{message[:1000]}; write a token's number there, or a list of them")
    end_ids |= set(listed)
    if not end_ids:
        raise ModelError(
            f"the tokenizer of {str(model)!r} has no end token, so that no turn could end; "
            "set eos_token in its tokenizer_config.json"
        )
    day = ""
    if chat_template and writes_date(tokenizer):
        day = chat_template_date or date.today().isoformat()
    return Renderer(tokenizer, frozenset(end_ids), chat_template, chat_template_args or {}, day)
