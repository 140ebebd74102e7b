"""A tokenizer for small worlds: whole phrases are tokens, and all other text is spelled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def phrase_tokenizer(phrases: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer that cuts text into as few of the phrases as it can.

    It is a unigram model (Kudo 2018) in which all phrases are equally probable, so the most
    probable cut is the shortest one. A phrase may hold spaces. What no phrase covers is
    spelled in characters (ASCII) or bytes, so that decoding gives every text back.

    Args:
        phrases: the tokens; repeated ones count once.
    """
    from tokenizers import Tokenizer, decoders, models  # noqa: PLC0415 - slow to import
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    # Scores are log-probabilities: a phrase beats spelling, and spelling beats the names of bytes
    # and special tokens, so that the text "<0x41>" does not become an A.
    scores = {"<unk>": -1e4, END: -1e4, **{f"<0x{byte:02X}>": -1e4 for byte in range(256)}}
    scores |= {chr(code): -15.0 for code in range(32, 127)}
    scores |= dict.fromkeys(phrases, -1.0)
    vocabulary = list(scores.items())
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token="<unk>"
    )
