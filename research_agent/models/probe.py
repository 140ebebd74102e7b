"""A model is proved before it is trained: what we compute is compared with plain transformers.

Two short sequences of unlike length suffice: an architecture that keeps a state between tokens, or
looks at positions in a way of its own, is wrong on the first of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTHS = (24, 17)
"""Tokens of the sequences that are compared."""

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


def probe_sequences(model: Any) -> list[list[int]]:
    """Two sequences of tokens that look random and are always the same.

    Args:
        model: a causal language model of the transformers library.

    Returns:
        Token ids below the size of the vocabulary; no more than the model has positions for.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS)
    vocabulary = len(model.get_output_embeddings().weight)
    return [
        [(7 + 7919 * (position + 101 * row)) % vocabulary for position in range(min(length, limit))]
        for row, length in enumerate(LENGTHS)
    ]


@torch.no_grad()
def plain_logits(model: Any, tokens: list[int]) -> Tensor:
    """Logits of one sequence alone, as the transformers library computes them: [tokens, words]."""
    row = torch.tensor(tokens, device=model.device)[None]
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0]
    return logits


def logit_difference(found: Tensor, expected: Tensor) -> str:
    """Say how far log-probabilities differ, where it is more than rounding.

    The measure is the root mean square of the differences over the spread of the expected
    logits: 0.001 of it in float32, 0.1 in half precision. Wrong positions, states or neighbours
    give 0.05 to 1.

    Args:
        found: logits, [tokens, words].
        expected: logits, [tokens, words].

    Returns:
        The difference in words; empty where both are the same but for rounding.
    """
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    ours, theirs = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    if not theirs.isfinite().all():
        return ""  # broken weights are said elsewhere
    spread = theirs.std(dim=-1, correction=0).mean().clamp(min=1e-6)
    error = (ours - theirs).square().mean().sqrt()
    if bool(error <= tolerance * spread):  # false for NaN
        return ""
    return (
        f"log-probabilities differ by {error.item():.2g} in the mean, where they spread by"
        f" {spread.item():.2g} and rounding would explain {(tolerance * spread).item():.2g}"
    )
