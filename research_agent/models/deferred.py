"""Open a model without its weights, so that each rank can read only its own shards later."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from research_agent.distributed import rank_and_size
from research_agent.errors import ModelError
from research_agent.models.generation import repair_generation, tokens_of_unreadable
from research_agent.models.policy import load_model, refuse_unusable
from research_agent.models.prepare import require_learnable
from research_agent.models.source import ModelSource, model_source, opening, read_config
from research_agent.sharded import (
    defer,
    deferred_folder,
    fill,
    meta_parameters,
    read_buffers,
    saved_tensors,
    stored_tensors,
)


def load_deferred(
    name: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    merge_adapter: bool = True,
) -> Any:
    """Open a causal language model with its parameters on the meta device.

    Configuration, buffers and generation settings are real. ``Learner`` reads the weights from the
    safetensors files, each rank its own shards. If this is not possible (a GGUF file, an adapter to
    merge, files with other names for the weights), every rank loads the whole model on the CPU, and
    a warning says so.

    Args:
        name: as for ``load_model``.
        dtype: number format of the weights.
        merge_adapter: as for ``load_model``.

    Raises:
        ModelError: as for ``load_model``; or a file is missing or incomplete.
    """
    source = model_source(name)
    cause = "it is a GGUF file" if source.gguf_file else ""
    if source.adapter is not None and merge_adapter:
        cause = "an adapter is added to its weights"
    if not cause:
        model, cause = _skeleton(source, str(name), getattr(torch, dtype))
        if not cause:
            return model
    if rank_and_size()[0] == 0:
        warnings.warn(
            f"every rank loads all weights of {str(name)!r} before it keeps its shard, as {cause};"
            " save it as safetensors with transformers to avoid this",
            stacklevel=2,
        )
    return load_model(name, dtype=dtype, device="cpu", merge_adapter=merge_adapter)


def _skeleton(source: ModelSource, name: str, dtype: torch.dtype) -> tuple[Any, str]:
    """The model on the meta device and "", or None and why it cannot be read shard by shard."""
    from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: PLC0415 - slow to import

    with opening(f"the model {name!r}"):
        config = read_config(source, name)
        refuse_unusable(config, name)
        config._attn_implementation = None
        folder = _local_folder(source.place)
        if not any(folder.glob("*.safetensors")):
            return None, "it has no safetensors"
        stored = stored_tensors(folder)
        with meta_parameters():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if (settings := tokens_of_unreadable(source.place, name)) is None:
            with suppress(OSError):  # there may be none
                settings = GenerationConfig.from_pretrained(source.place)
    for weight_name, weight in saved_tensors(model):
        if weight_name not in stored:
            return None, f"its files do not hold {weight_name!r}"
        if stored[weight_name].shape != tuple(weight.shape):
            raise ModelError(
                f"the model {name!r} has a weight {weight_name!r} of shape"
                f" {list(stored[weight_name].shape)}, and its config.json says"
                f" {list(weight.shape)}; get or save it again"
            )
    # Not with the shards: a critic is a copy of the model before these are read.
    with opening(f"the model {name!r}"):
        read_buffers(model, folder)
    if settings is not None:
        model.generation_config = settings
    repair_generation(model, name)
    defer(model, folder)
    return model, ""


def _local_folder(place: str) -> Path:
    """The folder of a model, fetched from the hub if ``place`` is a name there."""
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import

    return Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json"]))


def load_shards(policy: Any, device: torch.device) -> None:
    """Read this rank's shards of a model from ``load_deferred``, and check the model.

    Other models are left as they are.

    Args:
        policy: a sharded ``TokenLogprobs``.
        device: where the shards live.

    Raises:
        ModelError: the files cannot be read, or ``require_learnable`` refuses the model.
    """
    model = policy.model
    folder = deferred_folder(model)
    if folder is None:
        return
    with opening(f"the weights in {folder}", "get or save them again"):
        fill(policy, model, folder, device)
    policy(partial(require_learnable, name=str(folder)))
