"""Episodes as tokens, for frameworks whose rollouts are tokens (TRL and verl)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from research_env.core import StepOutput
from research_env.errors import ConfigurationError
from research_env.sessions import Session


@dataclass(slots=True)
class TokenEpisode:
    """An episode of a policy that samples tokens, within a budget of tokens.

    Attributes:
        session: the episode.
        tokenizer: the policy's tokenizer.
        budget: the most tokens of all turns and observations together.
        ends: the tokens that end a turn.
        chat: whether the chat template has rendered the prompt, and so frames tool results.
        ids: the tokens after the prompt.
        mask: per token, 1 if the policy sampled it, 0 in an observation.
        logprobs: per token, its log-probability when it was sampled, 0 in an observation; None: not
            known.
        end: the last output of the episode; None while it goes on.
    """

    session: Session
    tokenizer: Any
    budget: int
    ends: Collection[int]
    chat: bool = False
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    end: StepOutput | None = None

    @property
    def room(self) -> int:
        """How many tokens of the budget are left."""
        return self.budget - len(self.ids)

    def add_turn(
        self, turn: Sequence[int], logprobs: Sequence[float] | None, *, complete: bool = False
    ) -> str | None:
        """Append a turn of the policy.

        Args:
            turn: its tokens, as they were sampled.
            logprobs: log-probability of each token; None: not known.
            complete: whether the turn is known to have ended by itself. If not, only an end token
                or a terminator shows that it has.

        Returns:
            The text to step with, also of a turn that the budget cut: what it says is scored.
            None: the turn was interrupted before, which has ended the episode.
        """
        turn = list(turn[: self.room])
        self._append(turn, 1, logprobs)
        ended = bool(turn) and turn[-1] in self.ends
        text = decode(self.tokenizer, turn[:-1] if ended else turn)
        stopped = any(stop in text for stop in self.session.episode.protocol.terminators)
        if complete or ended or stopped or not self.room:
            return text
        self.end = self.session.truncate("length")
        return None

    def add_output(self, output: StepOutput) -> None:
        """Append the observation; one that leaves no room for a turn ends the episode instead."""
        if output.terminated or output.truncated:
            self.end = output
            return
        markup = output.info["chat_markup"] if self._is_framed else ()
        observed = encode_observation(self.tokenizer, output.observation, markup)
        if len(observed) >= self.room:
            self.end = self.session.truncate("length")
        else:
            self._append(observed, 0, [0.0] * len(observed))

    @property
    def _is_framed(self) -> bool:
        return self.chat and self.session.episode.protocol.tool_format is not None

    def _append(self, ids: Sequence[int], kind: int, logprobs: Sequence[float] | None) -> None:
        self.ids += ids
        self.mask += [kind] * len(ids)
        if logprobs is None:
            self.logprobs = None
        elif self.logprobs is not None:
            self.logprobs += logprobs[: len(ids)]


def encode_observation(tokenizer: Any, text: str, markup: Sequence[str]) -> list[int]:
    """The tokens of an observation, in which the chat template's own tokens are special tokens.

    Args:
        tokenizer: the policy's tokenizer.
        text: the observation.
        markup: the chat tokens in it, ``info["chat_markup"]``; empty: all of it is text.

    Raises:
        ConfigurationError: the tokenizer has no such chat token.
    """
    known = {each: tokenizer.convert_tokens_to_ids(each) for each in markup if each in text}
    if not known:
        return encode_text(tokenizer, text)
    for each, token in known.items():
        if token is None or token == tokenizer.unk_token_id:
            raise ConfigurationError(
                f"the environment frames its observations with {each!r}, which is no token of this "
                "tokenizer; set tool_format to the format of this model, or chat=False"
            )
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, known))})", text):
        if piece in known:
            ids.append(known[piece])
        elif piece:
            ids += encode_text(tokenizer, piece)
    return ids


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The special tokens; of Llama 3's chat tokens, most are marked as special there only."""
    added = tokenizer.added_tokens_decoder
    marked = {number for number, token in added.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *marked} - {tokenizer.unk_token_id})


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an observation; no passage can forge a special token."""
    ids: list[int] = []
    rest = [text]  # the next part is the last one
    while rest:
        part = rest.pop()
        found = tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for special_id in _special_ids(tokenizer):
            special = tokenizer.convert_ids_to_tokens(special_id)
            if special_id in found and len(special) > 1 and special in part:
                # Some tokenizers look up special tokens in spite of split_special_tokens. Parts of
                # such a token are not found.
                at = part.index(special) + 1
                rest += [part[at:], part[:at]]
                break
        else:
            ids += found
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of the policy's tokens, special ones included, as the model wrote it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
