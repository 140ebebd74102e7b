"""The sizes of a decoder, from its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_agent.errors import ConfigError
from research_agent.formats import DecoderFormat, read_object


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder-only transformer, in the words of its ``config.json``.

    Attributes:
        layers: number of layers.
        hidden: width of the residual stream.
        heads: heads of queries.
        kv_heads: heads of keys and values.
        intermediate: width inside the MLP.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
        biases: whether queries, keys and values have biases.
        positions: the longest context.
        head: width of a head; None divides ``hidden`` by ``heads``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    biases: bool = False
    positions: int = 32_768
    head: int | None = None

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
        """Numbers of keys and values that one token leaves in the cache."""
        return 2 * self.layers * self.kv

    def shard(self, ranks: int) -> int:
        """Numbers of the weights that a rank holds."""
        return self.layers * _dealt(self.layer_tensors, ranks) + _dealt(self.root_tensors, ranks)

    def adapter_shard(self, rank: int, ranks: int) -> int:
        """Numbers that a rank holds of LoRA adapters of all linear layers.

        Args:
            rank: inner width of the adapters.
            ranks: processes that they are spread over.
        """
        linear = [each for each in self.layer_tensors if len(each) == 2]
        pairs = [pair for out, into in linear for pair in ((rank, into), (out, rank))]
        return self.layers * _dealt(pairs, ranks)


def _dealt(tensors: Sequence[tuple[int, ...]], ranks: int) -> int:
    """Numbers of some tensors that a rank holds; FSDP2 deals the rows of each tensor."""
    return sum(-(-rows // ranks) * math.prod(rest) for rows, *rest in tensors)


# From the config.json that the authors publish.
SHAPES = {
    "Qwen/Qwen2.5-3B": Shape(36, 2048, 16, 2, 11008, 151936, True, True),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 28, 4, 18944, 152064, False, True, 131_072),
    "Qwen/Qwen2.5-32B": Shape(64, 5120, 40, 8, 27648, 152064, False, True, 131_072),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 32, 8, 14336, 128256, False, False, 131_072),
}


def read_shape(model: str) -> Shape:
    """The sizes of a model: of a folder that has a ``config.json``, or of one that is known.

    Raises:
        ConfigError: neither, or no dense decoder.
    """
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        cure = "--plan reads a decoder's sizes"
        return _read(file, read_object(file, ConfigError, cure, DecoderFormat))
    for name, shape in SHAPES.items():
        if model in (name, f"{name}-Instruct"):
            return shape
    raise ConfigError(
        f"the sizes of {model!r} are not known; give a folder with its config.json, or one of "
        + ", ".join(SHAPES)
    )


def _read(file: Path, held: Mapping[str, Any]) -> Shape:
    if any("experts" in name and number for name, number in held.items()):
        raise ConfigError(f"{file} is that of a mixture of experts; --plan reads dense decoders")
    return Shape(
        held["num_hidden_layers"],
        held["hidden_size"],
        held["num_attention_heads"],
        held.get("num_key_value_heads") or held["num_attention_heads"],
        held["intermediate_size"],
        held["vocab_size"],
        bool(held.get("tie_word_embeddings")),
        bool(held.get("attention_bias", held.get("model_type") == "qwen2")),
        held.get("max_position_embeddings") or 32_768,
        held.get("head_dim"),
    )
