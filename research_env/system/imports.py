"""Import what a setting names as ``module:NAME``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from research_env.errors import ConfigurationError


def import_named(place: str, kind: str) -> Any:
    """The object at "module:NAME".

    Args:
        place: the module, and a name in it; dots reach into what has the name.
        kind: what it should be, for the message.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"cannot import the {kind} {place!r}: {error}; write 'module:NAME' with a module that "
            "Python finds (see PYTHONPATH)"
        ) from error
    return found
