"""States of recurrent layers for the slots of an engine: a cache per slot and layer.

The engine forwards a packed row: one token of each turn under way, and all new tokens of those that
begin. Attention tells the slots apart by itself. A recurrent layer is called once for all slots
that bring one token, with their states stacked, and once for each slot that brings several.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from research_agent.models.recurrent import recurrent_layers


@dataclass
class _View:
    """What a layer of the transformers library uses of a cache, for this layer alone."""

    state: LinearAttentionLayer
    layers: dict[int, LinearAttentionLayer]

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        return bool(self.state.has_previous_state[state_idx])

    def update_conv_state(self, new: Tensor, layer_idx: int, **options: Any) -> Tensor:
        states: Tensor = self.state.update_conv_state(new, **options)
        return states

    def update_recurrent_state(self, new: Tensor, layer_idx: int, **options: Any) -> Tensor:
        states: Tensor = self.state.update_recurrent_state(new, **options)
        return states


@dataclass
class RecurrentStates:
    """The states of all slots, and which slots the forward under way is about.

    Attributes:
        token_by_token: layers forget a state when they are given several tokens after it.
        held: states by slot and layer.
        slots: the slots in the packed row, in order; empty: layers are unchanged.
        ends: where the tokens of each slot end in the row.
    """

    token_by_token: bool = False
    held: dict[tuple[int, int], LinearAttentionLayer] = field(default_factory=dict)
    slots: Sequence[int] = ()
    ends: Sequence[int] = ()

    def forget(self, slot: int) -> None:
        """Drop what a slot holds."""
        for key in [key for key in self.held if key[0] == slot]:
            del self.held[key]

    def forward(
        self, layer: int, name: str, forward: Callable[..., Any], /, *args: Any, **options: Any
    ) -> Any:
        """Call a layer for the slots of the packed row.

        Args:
            layer: its number.
            name: name of its argument for the cache.
            forward: its own forward.
            args: its positional arguments; states are [1, tokens, size].
            options: its other arguments.

        Returns:
            What the layer returns, for the whole row.
        """
        if not self.slots:
            return forward(*args, **options)
        row: Tensor = args[0] if args else options["hidden_states"]
        starts = [0, *self.ends[:-1]]
        singles = [
            i
            for i, slot in enumerate(self.slots)
            if self.ends[i] - starts[i] == 1 and (slot, layer) in self.held
        ]
        parts: dict[int, Tensor] = {}
        if singles:
            states = [self.held[self.slots[i], layer] for i in singles]
            together = _stacked(states)
            tokens = row[0, [starts[i] for i in singles], None]  # [slots, 1, size]
            out = _first(forward(tokens, **{name: _View(together, {layer: together})}))
            _put_back(together, states)
            parts = dict(zip(singles, out, strict=True))
        for i, slot in enumerate(self.slots):
            if i not in parts:
                tokens = row[:, starts[i] : self.ends[i]]
                singly = self.token_by_token and (slot, layer) in self.held
                state = self.held.setdefault((slot, layer), LinearAttentionLayer())
                view = {name: _View(state, {layer: state})}
                pieces = torch.split(tokens, 1 if singly else tokens.shape[1], dim=1)
                outs = [_first(forward(piece, **view)) for piece in pieces]
                parts[i] = torch.cat(outs, dim=1)[0]
        return torch.cat([parts[i] for i in range(len(self.slots))])[None]


def keep_states_by_slot(model: Any, *, token_by_token: bool = False) -> RecurrentStates | None:
    """Let the recurrent layers of a model keep a state for each slot.

    Args:
        model: a causal language model of the transformers library; it is changed.
        token_by_token: as in ``RecurrentStates``.

    Returns:
        The states; None if the model has no recurrent layer.
    """
    layers = recurrent_layers(model)
    if not layers:
        return None
    states = RecurrentStates(token_by_token)
    for layer in layers:
        names = inspect.signature(layer.forward).parameters
        name = "cache_params" if "cache_params" in names else "past_key_values"
        layer.forward = partial(states.forward, layer.layer_idx, name, layer.forward)
    return states


def forget_states(model: Any) -> None:
    """Undo ``keep_states_by_slot``."""
    for layer in recurrent_layers(model):
        layer.__dict__.pop("forward", None)


def _first(found: Any) -> Tensor:
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _stacked(states: Sequence[LinearAttentionLayer]) -> LinearAttentionLayer:
    """The states of several slots as one batch."""
    first, together = states[0], LinearAttentionLayer()
    together.device, together.dtype = first.device, first.dtype
    for i in range(first.number_of_states):
        together.has_previous_state[i] = True
        together.conv_kernel_size[i] = first.conv_kernel_size[i]
        for name in ("conv_states", "recurrent_states"):
            if getattr(first, f"is_{name}_initialized")[i]:
                getattr(together, f"is_{name}_initialized")[i] = True
                getattr(together, name)[i] = torch.cat([getattr(s, name)[i] for s in states])
    return together


def _put_back(together: LinearAttentionLayer, states: Sequence[LinearAttentionLayer]) -> None:
    for i in range(together.number_of_states):
        for name in ("conv_states", "recurrent_states"):
            if getattr(together, f"is_{name}_initialized")[i]:
                rows = getattr(together, name)[i].split(1)
                for state, new in zip(states, rows, strict=True):
                    getattr(state, name)[i] = new
