"""Settings as ``KEY=VALUE`` words, on the command line and in stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from research_agent.errors import ConfigError

_WORDS = {"none": None, "null": None, "true": True, "false": False}


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` words: a value is JSON if it can be read as JSON, and text otherwise.

    ``top_k=3`` is a number, ``hops=[2,3]`` a list, ``split=dev`` text, ``limit=none`` None.

    Raises:
        ConfigError: a word has no ``=`` or no key.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected KEY=VALUE, got {word!r}; write for example top_k=5")
        if text.lower() in _WORDS:
            settings[key] = _WORDS[text.lower()]
            continue
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    return settings


def _show_settings(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


Settings = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE [KEY=VALUE ...]]",
        instance_from_str=parse_settings,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=_show_settings,
    ),
]
