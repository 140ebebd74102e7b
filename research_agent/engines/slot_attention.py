"""Attention that reads the keys and values of each slot, for packed rows of several slots."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import Tensor
from transformers import AttentionInterface

from research_agent.errors import ModelError

SLOT_ATTENTION = "research_agent_slots"
"""The name of the attention in the transformers library."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighboring cache rows that attend together: ``[first, first + count)``."""

    first: int
    count: int
    start: int  # where their tokens begin in the packed row
    stop: int
    reach: int  # the longest of them, new tokens included
    mask: Tensor  # [count, 1, padded new tokens, reach], 0 where a query sees a key, else -inf
    pad: Tensor | None  # [count, padded new tokens] -> packed token; None where all have one
    unpad: Tensor | None  # [tokens] -> place in the padded ones, flat


@dataclass
class SlotCache:
    """Keys and values of all slots, and what the forward under way does with them."""

    slots: int
    context: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: Tensor | None = None  # [tokens] the cache row of each packed token
    places: Tensor | None = None  # [tokens] its position in the trajectory
    chunks: tuple[Chunk, ...] = ()

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [slots, key-value heads, context, head size]."""
        if index not in self.layers:
            self.layers[index] = (
                key.new_zeros(self.slots, key.shape[1], self.context, key.shape[3]),
                value.new_zeros(self.slots, value.shape[1], self.context, value.shape[3]),
            )
        return self.layers[index]

    def move(self, target: Tensor, source: Tensor, reach: int) -> None:
        """Copy rows ``source`` to rows ``target``, up to position ``reach``."""
        for keys_values in self.layers.values():
            for held in keys_values:
                held[target, :, :reach] = held[source, :, :reach]


# Not an argument of the model's forward, which some architectures do not hand on to their layers.
ACTIVE_CACHE: ContextVar[SlotCache] = ContextVar("the cache of the forward under way")


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head size]
    key: Tensor,  # [1, key-value heads, tokens, head size]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write new keys and values to their slots, then let each row attend to its own slot."""
    slot_cache = ACTIVE_CACHE.get()
    odd = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if odd or (sliding_window is not None and sliding_window < slot_cache.context):
        what = odd[0] if odd else f"a sliding window of {sliding_window} tokens"
        raise ModelError(
            f"its attention has {what}, which the transformers engine does not compute; "
            "use --engine vllm" + ("" if odd else ", or a shorter context")
        )
    keys, values = slot_cache.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
    keys[slot_cache.rows, :, slot_cache.places] = key[0].transpose(0, 1)
    values[slot_cache.rows, :, slot_cache.places] = value[0].transpose(0, 1)
    packed = query[0].transpose(0, 1)  # [tokens, heads, head size]
    out = packed.new_empty(*packed.shape[:2], value.shape[3])
    for chunk in slot_cache.chunks:
        held = slice(chunk.first, chunk.first + chunk.count)
        seen_keys = keys[held, :, : chunk.reach]
        seen_values = values[held, :, : chunk.reach]
        ours = packed[chunk.start : chunk.stop]
        if chunk.pad is None and query.dtype == torch.float32:
            out[chunk.start : chunk.stop] = _attend_once(
                ours, seen_keys, seen_values, chunk.mask, scaling
            )
            continue
        asked = ours[:, None] if chunk.pad is None else ours[chunk.pad]
        answer = F.scaled_dot_product_attention(
            asked.transpose(1, 2),
            seen_keys,
            seen_values,
            attn_mask=chunk.mask.to(query.dtype),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        answer = answer.transpose(1, 2).flatten(0, 1)  # [count * padded, heads, head size]
        out[chunk.start : chunk.stop] = answer if chunk.unpad is None else answer[chunk.unpad]
    return out[None], None


def _attend_once(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """Attention of one query a row, [rows, heads, head size]; faster on a CPU than the fused one.

    The query heads that share a key-value head are rows of one small matrix product.
    """
    rows, kv_heads, reach, size = keys.shape
    shape = (rows * kv_heads, -1, size)
    scale = size**-0.5 if scaling is None else scaling
    scores = torch.bmm((query * scale).reshape(shape), keys.flatten(0, 1).transpose(1, 2))
    scores = scores.view(rows, kv_heads, -1, reach).add_(mask)
    share = torch.softmax(scores, dim=-1).view(rows * kv_heads, -1, reach)
    return torch.bmm(share, values.flatten(0, 1)).view(*query.shape[:2], -1)


def restore_attention(model: Any, attention: str | None) -> None:
    """Give a model back the attention that it had."""
    if model.config._attn_implementation != attention and attention is not None:
        model.set_attn_implementation(attention)


AttentionInterface.register(SLOT_ATTENTION, _slot_attention)
