"""Texts to tokens and back, for frameworks whose rollouts are tokens."""

from __future__ import annotations

from typing import Any


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


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of what the policy sampled, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
