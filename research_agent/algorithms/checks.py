"""Checks of an algorithm's settings."""

from __future__ import annotations

import math
from collections.abc import Collection

from research_agent.errors import ConfigError


def require(
    name: str,
    algorithm: object,
    *fields: str,
    above: float | None = None,
    at_most: float = math.inf,
) -> None:
    """Refuse settings that are not finite, too small or too large.

    Args:
        name: name of the algorithm, for the message.
        algorithm: has the settings as attributes.
        fields: names of the settings.
        above: a bound that they must exceed; None: they must be 0 or more.
        at_most: a bound that they must not exceed.

    Raises:
        ConfigError: names algorithm, setting and value.
    """
    wanted = "0 or more" if above is None else f"above {above:g}"
    wanted += "" if at_most == math.inf else f" and at most {at_most:g}"
    for field in fields:
        value = getattr(algorithm, field)
        small = value < 0 if above is None else value <= above
        if small or value > at_most or not math.isfinite(value):
            raise ConfigError(f"{name}: {field} is {value}; give a finite number, {wanted}")


def require_one_of(name: str, algorithm: object, field: str, known: Collection[object]) -> None:
    """Refuse a setting whose value is not among the known ones.

    Raises:
        ConfigError: names algorithm, setting, value and the known values.
    """
    value = getattr(algorithm, field)
    if value not in known:
        words = ", ".join(map(repr, known))
        raise ConfigError(f"{name}: {field} is {value!r}; known: {words}")
