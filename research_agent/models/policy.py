"""The policy: a causal language model, and the log-probabilities that it gives to action tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from research_agent.batch import Batch, MicroBatch, micro_batches
from research_agent.checkpoint import latest
from research_agent.distributed import all_reduce_sum, shard_batches
from research_agent.errors import ModelError

Precision = Literal["float32", "bfloat16"]

STARTERS = Path(__file__).parents[1] / "starters"

# The most logits that are held at once: 64 Mi of float32 are 256 MiB. A GPU likes larger products.
MAX_LOGITS = 2**26
MAX_LOGITS_GPU = 2**28


def resolve_model(name: str | Path) -> str:
    """Say where a model is: a starter of the package, the newest checkpoint of a run, or ``name``.

    Raises:
        ModelError: the name is plainly a path, and there is no such folder.
    """
    text, folder = str(name), Path(name).expanduser()
    starters = {p.name: p for p in STARTERS.iterdir()} if STARTERS.is_dir() else {}
    if text in starters:
        return str(starters[text])
    if newest := latest(folder / "checkpoints"):
        return str(newest)
    if not folder.is_dir() and (text[:1] in (".", "/", "~") or text.count("/") > 1):
        raise ModelError(f"there is no model folder {text}; give one, or a name on the hub")
    return str(folder) if folder.is_dir() else text


def load_model(
    name: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    device: str = "auto",
) -> Any:
    """Open a causal language model of the transformers library, for evaluation and training.

    Args:
        name: a starter of this package, a folder (a checkpoint is one), or a name on the hub.
        dtype: number format of the weights.
        device: "cpu", "cuda", or "auto", which is cuda where there is one.

    Returns:
        The model, in evaluation mode: dropout would make what is learned from differ from what was
        sampled.

    Raises:
        ModelError: no such model, no or not all of its weights, or one whose log-probabilities
            cannot be computed from its last hidden states and its head alone.
    """
    from safetensors import SafetensorError  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    place = resolve_model(name)
    if Path(place).is_dir():
        _check_folder(Path(place))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            place, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = (
            f"the model {str(name)!r} cannot be opened: {error}. Give a folder with config.json and"
            " model.safetensors, or a name on the Hugging Face hub"
        )
        raise ModelError(message) from error
    if missing := sorted(loaded["missing_keys"]):
        message = (
            f"the model {str(name)!r} lacks {len(missing)} of its weights, among them"
            f" {missing[0]!r}; get or save it again"
        )
        raise ModelError(message)
    model = model.to(device).eval()
    _check_head(model, str(name))
    return model


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model, as a reference policy that does not learn."""
    return deepcopy(model).eval().requires_grad_(False)


def prepare(
    model: Any, *, packed: bool = False, gradient_checkpointing: bool = False, compile: bool = False
) -> None:
    """Set up how a model runs in a learner.

    What it computes stays the same, if its dropouts are modules of their own, as in all models of
    today: a layer that is checkpointed is in training mode itself, and what is inside it is not.

    Args:
        model: a causal language model of the transformers library; it is changed.
        packed: several trajectories share a row; see ``research_agent.models.attention``.
        gradient_checkpointing: keep only what enters each layer, and compute the rest again for the
            gradient.
        compile: let torch.compile fuse the operations of each layer.

    Raises:
        ModelError: the architecture cannot do it.
    """
    layers = layers_of(model)
    if (gradient_checkpointing or compile) and not layers:
        message = f"{type(model).__name__} names no layers to checkpoint or compile; turn both off"
        raise ModelError(message)
    if packed:
        from research_agent.models.attention import PACKED  # noqa: PLC0415

        try:
            model.set_attn_implementation(PACKED)
        except (ValueError, AttributeError) as error:
            name = type(model).__name__
            raise ModelError(
                f"the attention of {name} cannot be replaced ({error}); use --packing off"
            ) from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:  # it checkpoints in training mode only; its dropouts are inside it
            layer.training = True
    if compile:
        for layer in layers:
            layer.compile(dynamic=True)


def token_logprobs(
    model: Any,
    micro: MicroBatch,
    temperature: float = 1.0,
    max_logits: int | None = None,
    *,
    precision: Precision = "float32",
    compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of the action tokens, and the entropy where each was sampled.

    Logits are made only at positions whose next token is an action token. Where they would be more
    than ``max_logits``, they are made piece by piece, and once more for the gradient, so that
    [tokens, vocabulary] is never whole in memory.

    Args:
        model: a causal language model of the transformers library.
        micro: R rows of W tokens with ``a`` action tokens. If they are packed, the model must have
            been prepared for that.
        temperature: the sampler's; it divides the logits.
        max_logits: the most logits of a piece; none takes what suits the device.
        precision: of the matrix products; the softmax is float32 at least, whatever it is.
        compile: fuse the operations of the softmax.

    Returns:
        Log-probabilities [a] and entropies [a] in nats, in float32 (float64 if the model is), with
        gradient where gradients are enabled.
    """
    targets = micro.part.targets
    head = model.get_output_embeddings()
    most = max_logits or (MAX_LOGITS_GPU if targets.is_cuda else MAX_LOGITS)
    rows = max(1, most // len(head.weight))
    score = _compiled_score() if compile else _score
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        states = action_hidden_states(model, micro)
        if len(states) <= rows:
            return score(head(states), targets, temperature)
        pieces = [
            checkpoint(
                lambda states, targets: score(head(states), targets, temperature),
                *piece,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for piece in zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
        ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def action_hidden_states(model: Any, micro: MicroBatch) -> Tensor:
    """Run a model's body, and take its last hidden states where action tokens were sampled.

    Args:
        model: as for ``token_logprobs``.
        micro: as for ``token_logprobs``; ``a`` action tokens.

    Returns:
        The states, [a, hidden size].
    """
    packing: dict[str, Any] = {}
    if micro.cu_seqlens is not None:
        packing = {
            "position_ids": micro.position_ids,
            "cu_seq_lens_q": micro.cu_seqlens,
            "cu_seq_lens_k": micro.cu_seqlens,
            "max_length_q": micro.max_seqlen,
            "max_length_k": micro.max_seqlen,
        }
    # No attention mask: padding is on the right, so plain causal attention is right, and quick.
    output = model.base_model(input_ids=micro.tokens, use_cache=False, **packing)
    states: Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, micro.logit_index)
    return states


class TokenLogprobs(nn.Module):
    """``token_logprobs`` of a model as a module: what FSDP wraps and hooks into.

    Args:
        model: as for ``token_logprobs``; so are the rest.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 1.0,
        *,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._settings: dict[str, Any] = {"precision": precision, "compile": compile}
        self._temperature = temperature

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the action tokens of a pass."""
        return token_logprobs(self.model, micro, self._temperature, **self._settings)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of the transformers library, where it names them."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@torch.no_grad()
def batch_logprobs(
    score: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    batch: Batch,
    max_tokens: int,
    *,
    packed: bool = False,
) -> Tensor:
    """Compute the log-probabilities of all action tokens of a batch, without gradient.

    Args:
        score: what computes those of a pass, and something else: a ``TokenLogprobs``.
        batch: A action tokens.
        max_tokens: the most tokens of a pass, padding included.
        packed: as for ``micro_batches``.

    Returns:
        The log-probabilities, [A].
    """
    found: Tensor | None = None
    for micro, counts in shard_batches(micro_batches(batch, max_tokens, packed=packed)):
        logprobs = score(micro)[0]
        if found is None:
            found = logprobs.new_zeros(len(batch.targets))
        if counts:
            found[micro.token_index] = logprobs
    return batch.sampler_logprobs.new_zeros(0) if found is None else all_reduce_sum(found)


def _score(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, from logits [a, vocabulary]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


@cache
def _compiled_score() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(_score, dynamic=True)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        message = f"{folder} has a config.json but no weights; put its model.safetensors there"
        raise ModelError(message)


@torch.no_grad()
def _check_head(model: Any, name: str) -> None:
    """Some models scale or cap their logits after the head; ours would then be others."""
    words = min(16, len(model.get_output_embeddings().weight))
    tokens = torch.arange(words, device=model.device)[None]
    logits = model(input_ids=tokens, use_cache=False).logits
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(states)
    if not torch.allclose(ours.float(), logits.float(), equal_nan=True):
        message = f"the model {name!r} changes its logits after its head, which is not supported"
        raise ModelError(message)


def context_length(model: Any, wanted: int) -> int:
    """Tokens that an episode may have: those wanted, at most the positions that the model has."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return wanted if limit is None else min(wanted, limit)
