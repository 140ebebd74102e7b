"""Repair generation settings that could not be saved again; only their special tokens are used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from research_agent.models.source import generation_settings


def repair_generation(model: Any, name: str) -> None:
    """Reduce a model's generation_config to its special tokens, if it could not be saved again.

    Args:
        model: a causal language model of the transformers library; it is changed.
        name: name of the model, for the warning.
    """
    given = getattr(model, "generation_config", None)
    if given is None:
        return
    pad = getattr(given, "pad_token_id", None)
    try:
        given.validate(strict=True)
        if pad is None or _is_token(pad):
            return
        cause: object = f"pad_token_id is {pad!r}"
    except (ValueError, TypeError) as error:
        cause = error
    model.generation_config = _tokens_only(given.to_dict())
    if not _is_token(getattr(model.config, "pad_token_id", None)):
        model.config.pad_token_id = None
    _warn(name, cause)


def tokens_of_unreadable(place: str, name: str) -> Any:
    """The special tokens of a generation_config that transformers cannot read, else None.

    Args:
        place: folder of the model, or its name on the hub.
        name: name of the model, for the warning.

    Returns:
        A GenerationConfig with the special tokens; None if transformers can read the file, or if
        there is none.
    """
    from transformers import GenerationConfig  # noqa: PLC0415

    try:
        GenerationConfig.from_pretrained(place)
    except OSError:  # there is none
        return None
    except (ValueError, TypeError) as error:
        _warn(name, error)
        return _tokens_only(generation_settings(place))
    return None


def _tokens_only(values: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig  # noqa: PLC0415

    ids = {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    pad = ids["pad_token_id"]
    return GenerationConfig(**{**ids, "pad_token_id": pad if _is_token(pad) else None})


def _is_token(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _warn(name: str, cause: object) -> None:
    words = " ".join(str(cause).split())[:300]
    warnings.warn(
        f"the generation_config of {name!r} cannot be saved ({words}); of it only the end tokens"
        " are kept, as sampling is set by this package",
        stacklevel=4,
    )
