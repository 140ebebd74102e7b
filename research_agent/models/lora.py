"""LoRA: small matrices learn beside weights that stay as they are (Hu et al. 2021, through peft).

The policy with its adapters off is the policy before training, so no reference model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from research_agent.errors import ConfigError, ModelError

_NAME = "default"


def add_adapters(model: Any, rank: int) -> None:
    """Put adapters beside every linear layer but the head; nothing else learns from then on.

    They begin at a difference of zero: their second matrix is 0. The difference is multiplied by
    2, whatever the rank (alpha is twice the rank).

    Args:
        model: a causal language model of the transformers library; it is changed.
        rank: of the difference that a layer can learn.

    Raises:
        ConfigError: peft is not installed.
        ModelError: peft finds no linear layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("lora_rank needs the package peft; pip install peft") from error
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    try:
        inject_adapter_in_model(settings, model, adapter_name=_NAME)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} takes no adapters: {error}") from error


def adapters(model: Any) -> dict[str, Tensor]:
    """The adapters' weights by name; none where there are no adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Run the model as it was before its adapters learned anything."""
    layers = _layers(model)
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the same model without adapters: what they add is added in.

    Yields:
        Name and weight; the names are those of the model before it had adapters.
    """
    difference = {f"{name}.base_layer.weight": layer for name, layer in _layers(model)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if name in difference:
            weight = weight + difference[name].get_delta_weight(_NAME).detach().to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]
