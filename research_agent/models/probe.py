"""Check a model before training: compare what engine and learner compute with transformers.

Two short sequences of different lengths suffice to find an architecture that carries a state from
token to token, or uses positions in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from research_agent.engines.base import SamplingParams

if TYPE_CHECKING:
    from research_agent.engines.base import Engine

LENGTHS = (24, 17)
"""Lengths of the sequences that are compared, in tokens."""

_EXACT = (torch.float64, torch.float32)
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.15


def probe_sequences(model: Any) -> list[list[int]]:
    """Two fixed sequences of token ids that are scattered over the model's vocabulary.

    Args:
        model: a causal language model of the transformers library.

    Returns:
        Token ids, of ``LENGTHS`` or as many as the model has positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS)
    vocabulary = len(model.get_output_embeddings().weight)
    return [
        [(7 + 7919 * (position + 101 * row)) % vocabulary for position in range(min(length, limit))]
        for row, length in enumerate(LENGTHS)
    ]


@torch.no_grad()
def plain_logits(model: Any, tokens: list[int]) -> Tensor:
    """Logits of one sequence as the transformers library computes them, [tokens, vocabulary]."""
    row = torch.tensor(tokens, device=model.device)[None]
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0]
    return logits


def logit_difference(found: Tensor, expected: Tensor) -> str:
    """Describe how far log-probabilities differ, if it is more than rounding.

    The measure is the root mean square of the differences, divided by the standard deviation of the
    expected log-probabilities. Rounding gives at most 0.001 in float32 and 0.15 in half precision;
    wrong positions, states or neighbors give 0.05 to 1.

    Args:
        found: logits, [tokens, vocabulary].
        expected: logits, [tokens, vocabulary].

    Returns:
        A description; empty if both are equal up to rounding.
    """
    ours, theirs = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    return _judge((ours - theirs).square().mean().sqrt(), expected)


def engine_difference(engine: Engine, plain: Callable[[list[int]], Tensor], vocabulary: int) -> str:
    """Let an engine play two short trajectories, and compare the log-probabilities it reports.

    Each trajectory has two turns with an observation between them. Both play at the same time if
    the engine has two slots.

    Args:
        engine: an idle engine; its slots are free afterwards.
        plain: returns the logits of one sequence, as ``plain_logits`` does.
        vocabulary: size of the model's vocabulary.

    Returns:
        A description of the difference; empty if both are equal up to rounding.
    """
    first, second = _turns(engine.max_context, vocabulary)
    contexts: dict[int, list[int]] = {}
    reported: dict[int, list[tuple[int, float]]] = {}
    for slots in ((0, 1),) if getattr(engine, "max_slots", 1) > 1 else ((0,),):
        for new in (first, second):
            for slot in slots if new else ():
                contexts[slot] = contexts.get(slot, []) + new[slot]
                engine.submit(slot, new[slot], SamplingParams(max_tokens=2, seed=slot))
            while engine.busy:
                for turn in engine.step():
                    at = len(contexts[turn.slot])
                    contexts[turn.slot] += turn.tokens
                    known = reported.setdefault(turn.slot, [])
                    known += [(at + i, value) for i, value in enumerate(turn.logprobs)]
        for slot in slots:
            engine.release(slot)
    errors, everything = [], []
    for slot, tokens in contexts.items():
        logits = plain(tokens)
        logprobs = logits.double().log_softmax(-1)
        everything.append(logits)
        errors += [logprobs[at - 1, tokens[at]] - value for at, value in reported[slot]]
    return _judge(torch.stack(errors).square().mean().sqrt(), torch.cat(everything))


def _turns(context: int, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens before the first and the second turn of two trajectories, if the context has room.

    The tokens are scattered over the vocabulary. A row of its first tokens, which are often special
    ones, makes activations so large that rounding alone exceeds the tolerance in half precision.
    """
    length = max(1, min(9, context - 2))
    lengths = ((9, 6), (5, 8)) if context >= 18 else ((length, length), ())
    at = iter(range(2, 100))

    def tokens(count: int) -> list[int]:
        return [7919 * next(at) % vocabulary for _ in range(count)]

    first, second = ([tokens(count) for count in turn] for turn in lengths)
    return first, second


def _judge(error: Tensor, expected: Tensor) -> str:
    """Compare an error with what rounding explains; describe it if it is larger."""
    logprobs = expected.double().log_softmax(-1)
    if not logprobs.isfinite().all():
        return ""  # broken weights are reported elsewhere
    spread = logprobs.std(dim=-1, correction=0).mean().clamp(min=1e-6)
    allowed = (_TOLERANCE if expected.dtype in _EXACT else _HALF_TOLERANCE) * spread
    if bool(error <= allowed):  # false for NaN
        return ""
    return (
        f"log-probabilities differ by {error.item():.2g} in the mean, where they spread by"
        f" {spread.item():.2g} and rounding would explain {allowed.item():.2g}"
    )
