"""Attention of packed rows: several trajectories behind one another, none sees its neighbours.

Registered with transformers by name, so every model whose attention can be replaced can pack. The
arguments ``cu_seq_lens_q`` and ``max_length_q`` are those that transformers gives FlashAttention.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from research_agent.errors import ModelError

PACKED = "research_agent_packed"

_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Let each token attend to those before it in its own trajectory.

    Variable-length FlashAttention in half precision on a GPU; elsewhere one call a trajectory.

    Args:
        module: the attention layer.
        query: [R, heads, W, head size]; R is 1 for packed rows.
        key: [R, key-value heads, W, head size].
        value: like ``key``.
        attention_mask: none: causality and bounds say it all.
        scaling: of the scores.
        cu_seq_lens_q: [n + 1] int32, where the n trajectories of the row begin, and the end; none
            makes each of the R rows one trajectory.
        max_length_q: tokens of the longest one.
        sliding_window: tokens that a token can look back, where the layer limits it.
        options: of other kinds of attention.

    Returns:
        [R, W, heads, head size], and no attention weights.

    Raises:
        ModelError: the layer does something that this function does not.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if odd or attention_mask is not None or (sliding_window or query.shape[2]) < query.shape[2]:
        what = odd[0] if odd else "a mask" if attention_mask is not None else "a sliding window"
        raise ModelError(f"its attention has {what}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may be wider
    grouped = query.shape[1] != key.shape[1]
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        if grouped and not _GROUPED:  # as in torch 2.11
            times = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        bounds, longest = cu_seq_lens_q, max_length_q
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        packed = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            **_GROUPED,
        )
        assert isinstance(packed, Tensor)  # a pair only if asked for
        return packed[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
