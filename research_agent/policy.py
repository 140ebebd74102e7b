"""The policy: a causal language model, and the log-probabilities that it gives to action tokens."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from research_agent.batch import Batch, MicroBatch, micro_batches
from research_agent.checkpoint import latest
from research_agent.errors import ModelError

STARTERS = Path(__file__).parent / "starters"

# The most logits that are held at once: 64 Mi of float32 are 256 MiB.
MAX_LOGITS = 2**26


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


def token_logprobs(
    model: Any, micro: MicroBatch, temperature: float = 1.0, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of the action tokens, and the entropy where each was sampled.

    Logits are made only at positions whose next token is an action token. Where they would be more
    than ``max_logits``, they are made piece by piece, and once more for the gradient, so that
    [tokens, vocabulary] is never whole in memory.

    Args:
        model: a causal language model of the transformers library.
        micro: R rows of W tokens with ``a`` action tokens.
        temperature: the sampler's; it divides the logits.
        max_logits: the most logits of a piece.

    Returns:
        Log-probabilities [a] and entropies [a] in nats, in float32 (float64 if the model is), with
        gradient where gradients are enabled.
    """
    # No attention mask: the padding is on the right, so plain causal attention is right, and quick.
    states = model.base_model(input_ids=micro.tokens, use_cache=False).last_hidden_state
    states = states.flatten(0, 1).index_select(0, micro.predictors)
    head = model.get_output_embeddings()
    targets = micro.part.targets
    rows = max(1, max_logits // len(head.weight))
    if len(states) <= rows:
        return _logprobs_and_entropy(head, states, targets, temperature)
    pieces = [
        checkpoint(
            _logprobs_and_entropy,
            head,
            *piece,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for piece in zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


@torch.no_grad()
def batch_logprobs(model: Any, batch: Batch, temperature: float, max_tokens: int) -> Tensor:
    """Compute the log-probabilities of all action tokens of a batch, without gradient.

    Args:
        model: as for ``token_logprobs``.
        batch: A action tokens.
        temperature: the sampler's; it divides the logits.
        max_tokens: the most tokens of a pass, padding included.

    Returns:
        The log-probabilities, [A].
    """
    picked, logprobs = [], []
    for micro in micro_batches(batch, max_tokens):
        picked.append(micro.picked)
        logprobs.append(token_logprobs(model, micro, temperature)[0])
    found = torch.cat(logprobs)
    return torch.empty_like(found).index_copy(0, torch.cat(picked), found)


def _logprobs_and_entropy(
    head: nn.Module, states: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


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
