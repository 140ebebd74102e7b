"""Texts to tokens and back, for frameworks whose rollouts are tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def encode_observation(tokenizer: Any, text: str, markup: Sequence[str]) -> list[int]:
    """Tokens of an observation that is framed as the chat template frames messages.

    Args:
        tokenizer: the policy's.
        text: the observation.
        markup: the chat tokens in it, ``info["chat_markup"]``; none: it is text.
    """
    known = [each for each in markup if tokenizer.convert_tokens_to_ids(each) is not None]
    if not known:
        return encode_text(tokenizer, text)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, known))})", text):
        if piece in known:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            ids += encode_text(tokenizer, piece)
    return ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of an observation; no passage can forge a special token."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    ids: list[int] = encoded["input_ids"]
    for special_id in {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}:
        special = tokenizer.convert_ids_to_tokens(special_id)
        if special_id in ids and len(special) > 1 and special in text:
            # Some tokenizers look whole words up whatever they are told; cut such a word.
            at = text.index(special) + 1
            return encode_text(tokenizer, text[:at]) + encode_text(tokenizer, text[at:])
    return ids


def decode(tokenizer: Any, ids: list[int], *, special: bool = False) -> str:
    """The text of what the policy sampled.

    Args:
        tokenizer: the policy's.
        ids: its tokens.
        special: keep special tokens, which some formats of tool calls consist of.
    """
    text: str = tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text
