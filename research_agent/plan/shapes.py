"""The sizes of a decoder, from its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_agent.errors import ConfigError
from research_agent.formats import DecoderFormat, read_object
from research_agent.models.source import resolve_model


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder-only transformer."""

    layers: int
    hidden: int  # width of the residual stream
    heads: int  # heads of queries
    kv_heads: int  # heads of keys and values
    intermediate: int  # width inside the MLP
    vocabulary: int  # rows of the embedding
    tied: bool  # whether the head is the embedding
    biases: bool = False  # whether queries, keys and values have biases
    positions: int = 32_768  # longest context, in tokens
    head: int | None = None  # width of a head; None: hidden / heads

    @property
    def queries(self) -> int:
        """Width of the queries."""
        return self.heads * self.head if self.head else self.hidden

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.queries * self.kv_heads // self.heads

    @property
    def layer_tensors(self) -> list[tuple[int, ...]]:
        """The shapes of a layer's weights."""
        h, q, kv, i = self.hidden, self.queries, self.kv, self.intermediate
        biases = [(q,), (kv,), (kv,)] if self.biases else []
        return [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i), (h,), (h,), *biases]

    @property
    def root_tensors(self) -> list[tuple[int, ...]]:
        """The shapes of the weights outside of the layers: embedding, head and last norm."""
        embedding = (self.vocabulary, self.hidden)
        return [embedding, *([] if self.tied else [embedding]), (self.hidden,)]

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer."""
        return sum(map(math.prod, self.layer_tensors))

    @property
    def root_parameters(self) -> int:
        """Parameters outside of the layers."""
        return sum(map(math.prod, self.root_tensors))

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + self.root_parameters

    @property
    def kv_numbers(self) -> int:
        """Numbers in the cache per token."""
        return 2 * self.layers * self.kv

    def shard(self, ranks: int) -> int:
        """Numbers of the weights that each rank holds."""
        layer, root = _shard(self.layer_tensors, ranks), _shard(self.root_tensors, ranks)
        return self.layers * layer + root

    def adapter_shard(self, rank: int, ranks: int) -> int:
        """Numbers that each rank holds of LoRA adapters on all linear layers.

        Args:
            rank: rank of the adapters.
            ranks: processes over which they are sharded.
        """
        linear = [each for each in self.layer_tensors if len(each) == 2]
        pairs = [pair for out, into in linear for pair in ((rank, into), (out, rank))]
        return self.layers * _shard(pairs, ranks)


def _shard(tensors: Sequence[tuple[int, ...]], ranks: int) -> int:
    """Numbers of some tensors that the first rank holds; FSDP2 splits the rows of each tensor."""
    return sum(-(-rows // ranks) * math.prod(rest) for rows, *rest in tensors)


# From the config.json that the authors publish. Fields in the order of Shape.
SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(24, 896, 14, 2, 4864, 151936, True, True),
    "Qwen/Qwen2.5-1.5B": Shape(28, 1536, 12, 2, 8960, 151936, True, True),
    "Qwen/Qwen2.5-3B": Shape(36, 2048, 16, 2, 11008, 151936, True, True),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28, 4, 18944, 152064, False, True, 131_072),
    "Qwen/Qwen2.5-32B": Shape(64, 5120, 40, 8, 27648, 152064, False, True, 131_072),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 32, 8, 14336, 128256, False, False, 131_072),
}


def read_shape(model: str) -> Shape:
    """The sizes of a model.

    Args:
        model: what ``--model`` takes, if a folder with a ``config.json`` comes of it; or a name in
            ``SHAPES``.

    Raises:
        ConfigError: the sizes are not known, or the model is not a dense decoder.
        ModelError: there is no such folder.
    """
    for name, shape in SHAPES.items():
        if model in (name, f"{name}-Instruct"):
            return shape
    file = Path(resolve_model(model)) / "config.json"
    if file.is_file():
        cure = "--plan reads a decoder's sizes"
        return _read(file, read_object(file, ConfigError, cure, DecoderFormat))
    raise ConfigError(
        f"the sizes of {model!r} are not known; give a folder with its config.json, or one of "
        + ", ".join(SHAPES)
    )


def _read(file: Path, found: Mapping[str, Any]) -> Shape:
    if any("experts" in name and number for name, number in found.items()):
        raise ConfigError(f"{file} is that of a mixture of experts; --plan reads dense decoders")
    return Shape(
        found["num_hidden_layers"],
        found["hidden_size"],
        found["num_attention_heads"],
        found.get("num_key_value_heads") or found["num_attention_heads"],
        found["intermediate_size"],
        found["vocab_size"],
        bool(found.get("tie_word_embeddings")),
        bool(found.get("attention_bias", found.get("model_type") == "qwen2")),
        found.get("max_position_embeddings") or 32_768,
        found.get("head_dim"),
    )
