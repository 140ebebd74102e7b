"""LoRA: small matrices learn beside frozen weights (Hu et al. 2021; the library is peft).

The policy with its adapters off is the policy before training, so no reference model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from research_agent.errors import ConfigError, ModelError
from research_agent.models.source import opening, reading_weights
from research_agent.sharded import saved_tensors

_NAME = "default"
_BEYOND_LORA = (
    "modules_to_save",
    "use_dora",
    "trainable_token_indices",
    "lora_bias",
    "target_parameters",
)


def add_adapters(model: Any, rank: int) -> None:
    """Add adapters to every linear layer except the head, and freeze all other weights.

    The second matrix of an adapter begins at 0, so the model computes what it did before. Alpha is
    twice the rank, so the scale is 2 for every rank.

    Args:
        model: a causal language model of the transformers library; it is changed.
        rank: rank of the adapters.

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


def load_adapters(model: Any, adapter: str) -> int:
    """Add a saved LoRA adapter to the model that it was made for, and freeze all other weights.

    Args:
        model: the adapter's base, a causal language model of the transformers library; it is
            changed.
        adapter: folder, or name on the hub, of an adapter that peft saved.

    Returns:
        The adapter's rank.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the adapter is damaged, was made for another model, or has more than LoRA's two
            matrices per layer.
    """
    config, weights = _read_adapter(adapter)
    _refuse_more_than_lora(config, adapter)
    from peft import inject_adapter_in_model, set_peft_model_state_dict  # noqa: PLC0415

    config.inference_mode = False
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
        loaded: Any = set_peft_model_state_dict(model, weights, adapter_name=_NAME)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(adapter, model, str(error)) from error
    lost = [name for name in loaded.missing_keys if ".lora_" in name]
    if odd := [*loaded.unexpected_keys, *lost]:
        raise _misfit(adapter, model, f"{len(odd)} of its weights, such as {odd[0]!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return int(config.r)


def merge_adapter(model: Any, adapter: str) -> Any:
    """Merge a saved adapter, of any kind that peft can merge, into the weights of its base.

    Args:
        model: the adapter's base; its weights are changed.
        adapter: folder, or name on the hub, of an adapter that peft saved.

    Returns:
        The same model, without adapters.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the adapter is damaged, made for another model, or cannot be merged.
    """
    config, weights = _read_adapter(adapter)
    from peft import get_peft_model, set_peft_model_state_dict  # noqa: PLC0415

    config.inference_mode = True
    try:
        beside = get_peft_model(model, config, adapter_name=_NAME)
        loaded: Any = set_peft_model_state_dict(beside, weights, adapter_name=_NAME)
        if odd := loaded.unexpected_keys:
            raise ValueError(f"{len(odd)} of its weights, such as {odd[0]!r}, have no place")
        return beside.merge_and_unload().requires_grad_(True)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise _misfit(adapter, model, str(error)) from error


def _read_adapter(adapter: str) -> tuple[Any, Any]:
    """Read configuration and weights of an adapter that peft saved."""
    try:
        from peft import PeftConfig, load_peft_weights  # noqa: PLC0415
    except ImportError as error:
        message = f"{adapter} is an adapter, which needs the package peft; pip install peft"
        raise ConfigError(message) from error
    with opening(f"the adapter {adapter}", "get it again"), reading_weights(adapter):
        return PeftConfig.from_pretrained(adapter), load_peft_weights(adapter, device="cpu")


def _refuse_more_than_lora(config: Any, adapter: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    more = [name for name in _BEYOND_LORA if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        more.append("bias")
    if kind == "LORA" and not more:
        return
    what = f"sets {more[0]}" if kind == "LORA" else f"is of the kind {kind}"
    raise ModelError(
        f"the adapter {adapter} {what}, and only plain LoRA is trained on; give --merge-adapter to"
        " add it to the weights and train those, or --lora-rank beside it for a new adapter"
    )


def _misfit(adapter: str, model: Any, cause: str) -> ModelError:
    return ModelError(
        f"the adapter {adapter} does not fit {type(model).__name__}: {cause}; see that"
        " base_model_name_or_path in its adapter_config.json is the model that it was made for"
    )


def adapters(model: Any) -> dict[str, Tensor]:
    """The adapters' weights by name; empty if there are no adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Run the model without its adapters inside the block."""
    layers = _layers(model)
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what the files of the model with its adapters merged hold; the model keeps them.

    These are its weights, and then its persistent buffers. The names are those of the model before
    it had adapters.
    """
    adapted = {f"{name}.weight": layer for name, layer in _layers(model)}
    for name, tensor in saved_tensors(model):
        weight = tensor.detach()
        if name in adapted:
            weight = weight + adapted[name].get_delta_weight(_NAME).detach().to(weight.dtype)
        yield name, weight


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]
