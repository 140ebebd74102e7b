"""Attention for packed rows: a row holds several trajectories, and none sees its neighbors.

Trajectories that begin alike can share one copy of their beginning. Such a row is made of runs, and
each run attends to its path, as ``research_agent.prefixes`` lays them out.

The function is registered with transformers by name, so every model whose attention can be replaced
can pack. Its arguments ``cu_seq_lens_*`` and ``max_length_*`` are those of transformers'
FlashAttention.
"""

from __future__ import annotations

from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from research_agent.errors import ModelError

PACKED = "research_agent_packed"

# Not an argument of the model's forward, which some architectures do not hand on to their layers.
MAX_CONTEXT: ContextVar[int] = ContextVar("tokens that later trajectories may have", default=0)

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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    key_index: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Let each token attend to the tokens up to itself in its own trajectory.

    On a GPU in half precision this is variable-length FlashAttention; elsewhere it is one call per
    trajectory.

    Args:
        module: the attention layer.
        query: [R, heads, W, head size]; R is 1 for packed rows.
        key: [R, key-value heads, W, head size].
        value: like ``key``.
        attention_mask: must be None.
        scaling: factor of the scores.
        cu_seq_lens_q: cumulative lengths of the row's n trajectories (or runs), [n + 1] int32;
            None: each of the R rows is one trajectory.
        cu_seq_lens_k: cumulative lengths of the paths in ``key_index``, [n + 1] int32.
        max_length_q: tokens of the longest trajectory or run.
        max_length_k: tokens of the longest path.
        key_index: for rows of trees, the positions in the row of each run's path, end to end, [K]
            int64; None: each run is its own path.
        sliding_window: how many tokens a token can see, itself among them, if the layer limits it.
            It must be no less than the longest trajectory, and no less than ``MAX_CONTEXT``.
        options: options of other kinds of attention.

    Returns:
        [R, W, heads, head size], and no attention weights.

    Raises:
        ModelError: the layer needs something that this function does not do.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    length = query.shape[2] if cu_seq_lens_q is None else max_length_k
    short = sliding_window and sliding_window < max(length, MAX_CONTEXT.get())
    if odd or attention_mask is not None or short:
        window = f"a sliding window of {sliding_window} tokens, and sequences may be longer"
        what = odd[0] if odd else "a mask" if attention_mask is not None else window
        raise ModelError(f"its attention has {what}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may be wider
    grouped = query.shape[1] != key.shape[1]
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    bounds, key_bounds, longest, longest_path = cu_seq_lens_q, cu_seq_lens_q, *(max_length_q,) * 2
    if key_index is not None:
        assert cu_seq_lens_k is not None
        key, value = key[:, :, key_index], value[:, :, key_index]
        key_bounds, longest_path = cu_seq_lens_k, max_length_k
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        if grouped and not _GROUPED:  # torch 2.11 cannot group heads
            times = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        packed = varlen_attn(
            query,
            key,
            value,
            bounds,
            key_bounds,
            longest,
            longest_path,
            scale=scaling,
            window_size=(-1, 0),
            **_GROUPED,
        )
        assert isinstance(packed, Tensor)
        return packed[None], None
    lengths, path_lengths = bounds.diff().tolist(), key_bounds.diff().tolist()
    runs = zip(
        torch.split(query, lengths, dim=2),
        torch.split(key, path_lengths, dim=2),
        torch.split(value, path_lengths, dim=2),
        strict=True,
    )
    outs = [_attend(*run, scaling, grouped) for run in runs]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, grouped: bool
) -> Tensor:
    """Attention of a run: the last query sees all keys, the one before it one less, and so on."""
    asked, path = query.shape[2], key.shape[2]
    if asked == path:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    seen = torch.ones(asked, path, dtype=torch.bool, device=query.device).tril(path - asked)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=grouped
    )


AttentionInterface.register(PACKED, packed_attention)
