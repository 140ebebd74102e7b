"""Small tokenizers of the kinds that Llama 2, Mistral and T5 have, where blanks are letters."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_BLANK = "▁"
_TEXT = ["Who founded it? [INST] Be brief. [/INST] <<SYS>>\nShip\n<</SYS>> in Oslo, user model"] * 9
_SPECIAL = ["<unk>", "<s>", "</s>"]


def llama2_tokenizer(*, normalized: bool = False) -> PreTrainedTokenizerFast:
    """BPE whose normalizer puts a blank in front of every stretch of text (legacy Llama 2)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]
    )
    return _trained(backend, normalized=normalized)


def mistral_tokenizer(scheme: str = "first") -> PreTrainedTokenizerFast:
    """BPE with a Metaspace that puts a blank in front of the first text, or of every one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme=scheme, split=False)
    return _trained(backend)


def _trained(backend: Tokenizer, *, normalized: bool = False) -> PreTrainedTokenizerFast:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*_SPECIAL, *bytes_], show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    # Bytes are words of the vocabulary, not added tokens.
    model = Tokenizer(backend.model)
    model.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if backend.normalizer is not None:
        model.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        model.pre_tokenizer = backend.pre_tokenizer
    model.add_special_tokens([AddedToken(t, normalized=normalized, special=True) for t in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
