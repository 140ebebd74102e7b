"""Set up how a model runs in the learner, and check that it still computes the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from research_agent.batch import Packing
from research_agent.distributed import lost_or_out_of_memory
from research_agent.errors import ContextError, ModelError, ResearchAgentError
from research_agent.models.probe import logit_difference, plain_logits, probe_sequences
from research_agent.models.recurrent import split_recurrent_layers
from research_agent.prefixes import TreeLayout, lay_out, shared_lengths


def prepare(
    model: Any,
    *,
    packing: Packing = "off",
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> None:
    """Set up how a model runs in the learner, and check that its trajectories can share rows.

    The model computes the same as before. (Checkpointed layers are put in training mode, but not
    the modules inside them, such as dropouts.)

    Args:
        model: a causal language model of the transformers library; it is changed.
        packing: how trajectories share rows; see ``research_agent.models.attention``.
        gradient_checkpointing: keep only the inputs of each layer, and compute the rest again for
            the gradient.
        compile: let torch.compile fuse the operations of each layer.

    Raises:
        ModelError: the architecture cannot do this, or would compute something else.
    """
    if (gradient_checkpointing or compile) and not decoder_layers(model):
        message = f"{type(model).__name__} names no layers to checkpoint or compile; turn both off"
        raise ModelError(message)
    if packing != "off":
        _require_packable(model, packing)
    set_up(model, packing=packing, gradient_checkpointing=gradient_checkpointing, compile=compile)


def set_up(model: Any, *, packing: Packing, gradient_checkpointing: bool, compile: bool) -> None:
    """Set up how a model, or only its body, runs: ``prepare`` without the check."""
    from research_agent.models.attention import PACKED  # noqa: PLC0415

    if packing != "off":
        split_recurrent_layers(model)
        model.set_attn_implementation(PACKED)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(model):  # it checkpoints in training mode only
            layer.training = True
    if compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)


def _require_packable(model: Any, packing: Packing) -> None:
    """Check on short sequences that sequences in one row do not see each other.

    A sliding window is refused if it is shorter than the longest sequence that the model can read.
    """
    from research_agent.models.attention import MAX_CONTEXT, PACKED  # noqa: PLC0415

    name = type(model).__name__
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    join = split_recurrent_layers(model)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    max_context = MAX_CONTEXT.set(limit or sys.maxsize)
    try:
        sequences = probe_sequences(model)
        if packing == "tree":  # one more, which branches off the first in its middle
            first, second = sequences
            sequences.insert(1, (first[: len(first) // 2] + second)[: len(first)])
        expected = [plain_logits(model, tokens) for tokens in sequences]
        model.set_attn_implementation(PACKED)
        found = (_tree_logits if packing == "tree" else _packed_logits)(model, sequences)
        difference = next(filter(None, map(logit_difference, found, expected)), "")
    except (ResearchAgentError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if lost_or_out_of_memory(error):
            raise
        difference = str(error)
    finally:
        MAX_CONTEXT.reset(max_context)
    join()
    if difference:
        if before is not None and model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        message = f"trajectories of {name} cannot share a row: {difference}; use --packing off"
        raise ModelError(message)


@torch.no_grad()
def _packed_logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of sequences that are packed in one row, [tokens, vocabulary] each."""
    lengths, device = [len(s) for s in sequences], model.device
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    options = {"position_ids": positions, **packed_options(cu_seqlens, max(lengths))}
    row = torch.tensor([token for s in sequences for token in s], device=device)[None]
    states = model.base_model(input_ids=row, use_cache=False, **options).last_hidden_state
    return list(torch.split(output_logits(model)(states)[0], lengths))


@torch.no_grad()
def _tree_logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of sequences in one row that has shared beginnings once, [tokens, vocabulary] each."""
    rows = [torch.tensor(tokens, device=model.device) for tokens in sequences]
    tree = lay_out(rows, shared_lengths(sequences))
    options = {"position_ids": tree.position_ids[None], **tree_options(tree)}
    body = model.base_model(input_ids=tree.tokens[None], use_cache=False, **options)
    logits = output_logits(model)(body.last_hidden_state)[0]
    return [logits[path] for path in tree.paths]


def packed_options(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Arguments of ``packed_attention`` for a row of trajectories."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def tree_options(tree: TreeLayout) -> dict[str, Any]:
    """Arguments of ``packed_attention`` for a row of trees."""
    return {
        "cu_seq_lens_q": tree.cu_seqlens,
        "cu_seq_lens_k": tree.cu_keys,
        "max_length_q": tree.max_seqlen,
        "max_length_k": tree.max_keys,
        "key_index": tree.key_index,
    }


@torch.no_grad()
def require_learnable(model: Any, name: str) -> None:
    """Check on two short sequences that the learner computes the model's own logits.

    The learner pads rows on the right without a mask, and computes logits from the last hidden
    states with ``output_logits``. Models that change their logits in another way are refused.

    Args:
        model: a causal language model of the transformers library.
        name: name of the model, for the message.

    Raises:
        ModelError: the logits differ by more than rounding.
    """
    sequences = probe_sequences(model)
    head = output_logits(model)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    padded = padded.to(model.device)
    states = model.base_model(input_ids=padded, use_cache=False).last_hidden_state
    for row, tokens in zip(head(states), sequences, strict=True):
        expected = plain_logits(model, tokens)
        if difference := logit_difference(row[: len(tokens)], expected):
            raise ModelError(
                f"the model {name!r} changes its logits after its head, or sees padding:"
                f" {difference}; this is not supported"
            )


def require_same_positions(model: Any, length: int) -> None:
    """Check that sequences up to a length are read alike, whatever is read in the same pass.

    With "longrope" (Phi-3, Phi-4-mini) transformers has two sets of rotary frequencies. If one
    sequence of a pass is longer than the model's original context, it takes the second set for all
    of them; keys that a cache holds already have the first. vLLM takes one set for a whole run.

    Args:
        model: a causal language model of the transformers library.
        length: tokens of the longest sequence.

    Raises:
        ContextError: the model has longrope, and its original context is shorter.
    """
    rope: Mapping[str, Any] = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    by_layer_type = [each for each in rope.values() if isinstance(each, Mapping)]
    for each in by_layer_type or [rope]:
        if each.get("rope_type") != "longrope":
            continue
        if length > (original := each["original_max_position_embeddings"]):
            raise ContextError(
                f"sequences of up to {length} tokens are too long for the longrope positions of"
                f" {type(model).__name__}: one with more than {original} tokens would change the"
                " log-probabilities of all others; lower --max-prompt and --max-response"
                f" (max_context) to at most {original} tokens together. To evaluate with more,"
                " serve the model with vLLM and give --endpoint"
            )


def output_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from a model's last hidden states to its logits: head, scale and soft cap.

    Args:
        model: a causal language model of the transformers library. Its configuration may scale the
            logits (Granite, Cohere, Falcon-H1) or cap them (Gemma 2).

    Returns:
        A function from states [..., hidden size] to logits [..., vocabulary].
    """
    head, config = model.get_output_embeddings(), getattr(model, "config", None)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1
    scale /= getattr(config, "logits_scaling", None) or 1
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(states: Tensor) -> Tensor:
        out: Tensor = head(states)
        out = out if scale == 1 else out * scale
        return out if cap is None else (out / cap).tanh() * cap

    return logits


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model; empty if its library marks none."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
