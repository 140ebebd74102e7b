"""Recurrent layers in packed rows: give each trajectory its own row inside such a layer.

A layer that carries a state from token to token (a gated delta net, a state-space model, a short
convolution) would carry it from one trajectory of a packed row to the next. So its input is split
into trajectories and padded on the right, which a causal layer does not see, and its output is
joined again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Class names in the transformers library. If one is missing here, the check of packed models
# (``prepare``) refuses the model.
_RECURRENT = re.compile(r".*(GatedDeltaNet|ShortConv|Mamba2?(Mixer|Layer))|(FalconH1|Bamba)Mixer")
_ROW_OPTIONS = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("seq_idx", "position_ids", "attention_mask"),
    }
)


@dataclass
class _Row:
    """Cumulative lengths of the trajectories in the packed row that a model computes."""

    cu_seqlens: Tensor | None = None

    def remember(self, model: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.cu_seqlens = options.get("cu_seq_lens_q")


def recurrent_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that carry a state from token to token."""
    return [m for m in model.modules() if _RECURRENT.fullmatch(type(m).__name__)]


def split_recurrent_layers(model: Any) -> Callable[[], None]:
    """Make the recurrent layers of a model compute each trajectory of a packed row separately.

    Args:
        model: a causal language model of the transformers library; it is changed. For packed rows
            its body must be called with ``cu_seq_lens_q``.

    Returns:
        A function that undoes the change.
    """
    # A copy of a changed model has changed layers already.
    layers = [layer for layer in recurrent_layers(model) if "forward" not in layer.__dict__]
    if not layers:
        return lambda: None
    row = _Row()
    hook = model.base_model.register_forward_pre_hook(row.remember, with_kwargs=True)
    for layer in layers:
        layer.forward = partial(_forward_apart, layer.forward, row)

    def undo() -> None:
        hook.remove()
        for layer in layers:
            del layer.forward

    return undo


def _forward_apart(forward: Callable[..., Any], row: _Row, /, *args: Any, **options: Any) -> Any:
    """Call a layer with one row per trajectory; states are [1, W, size] in and out."""
    states: Tensor = args[0] if args else options.pop("hidden_states")
    bounds = row.cu_seqlens
    if bounds is None or len(states) != 1 or len(bounds) == 2:
        return forward(states, *args[1:], **options)
    lengths = bounds.diff().tolist()
    rows = nn.utils.rnn.pad_sequence(list(torch.split(states[0], lengths)), batch_first=True)
    kept = {name: value for name, value in options.items() if name not in _ROW_OPTIONS}
    found = forward(rows, *(None for _ in args[1:]), **kept)
    out = found[0] if isinstance(found, tuple) else found
    joined = torch.cat([each[:length] for each, length in zip(out, lengths, strict=True)])[None]
    return (joined, *found[1:]) if isinstance(found, tuple) else joined
