"""Recurrent layers in packed rows: inside such a layer each trajectory has a row of its own.

A layer that carries a state from token to token (a gated delta net, a state-space model, a short
convolution) would carry it across the bounds of trajectories that share a row. Its input is cut at
the bounds and padded on the right, which a causal layer does not see, and its output is joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Names of classes of the transformers library. A layer that is missing here fails the check that
# every packed model undergoes.
_RECURRENT = re.compile(r".*(GatedDeltaNet|ShortConv|Mamba2?(Mixer|Layer))|(FalconH1|Bamba)Mixer")
_OF_ROWS = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("seq_idx", "position_ids", "attention_mask"),
    }
)


@dataclass
class _Row:
    """The packed row that a model computes: where its trajectories begin, and the end."""

    cu_seqlens: Tensor | None = None

    def remember(self, model: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.cu_seqlens = options.get("cu_seq_lens_q")


def recurrent_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that carry a state from token to token."""
    return [m for m in model.modules() if _RECURRENT.fullmatch(type(m).__name__)]


def split_recurrent_layers(model: Any) -> Callable[[], None]:
    """Let the recurrent layers of a model see each trajectory of a packed row on its own.

    Args:
        model: a causal language model of the transformers library; it is changed. Its body is
            called with ``cu_seq_lens_q`` when its row is packed.

    Returns:
        A function that undoes the change.
    """
    # Copies of a model that was changed before are changed already.
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
    """Call a layer with a row for each trajectory; states are [1, W, size] in and out."""
    states: Tensor = args[0] if args else options.pop("hidden_states")
    bounds = row.cu_seqlens
    if bounds is None or len(states) != 1 or len(bounds) == 2:
        return forward(states, *args[1:], **options)
    lengths = bounds.diff().tolist()
    rows = nn.utils.rnn.pad_sequence(list(torch.split(states[0], lengths)), batch_first=True)
    kept = {name: value for name, value in options.items() if name not in _OF_ROWS}
    found = forward(rows, *(None for _ in args[1:]), **kept)
    out = found[0] if isinstance(found, tuple) else found
    joined = torch.cat([each[:length] for each, length in zip(out, lengths, strict=True)])[None]
    return (joined, *found[1:]) if isinstance(found, tuple) else joined
