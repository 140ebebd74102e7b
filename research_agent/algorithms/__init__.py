"""Algorithms by name: each is one file with its paper's equation.

A file shows the objective J of its paper and the three parts that the code makes of it: the
advantages A, the weights in front of the sum, and the objective of a token. The learner minimizes
``-(weights * objective).sum()``, which is -J.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import cast

from research_agent.algorithms.base import Algorithm, Tokens
from research_agent.errors import ConfigError
from research_agent.system.imports import import_setting

__all__ = ["ALGORITHMS", "Algorithm", "Tokens", "make_algorithm"]

ALGORITHMS = {
    "grpo": "research_agent.algorithms.grpo:GRPO",
    "dr_grpo": "research_agent.algorithms.dr_grpo:DrGRPO",
    "dapo": "research_agent.algorithms.dapo:DAPO",
    "gspo": "research_agent.algorithms.gspo:GSPO",
    "cispo": "research_agent.algorithms.cispo:CISPO",
    "rloo": "research_agent.algorithms.rloo:RLOO",
    "reinforce_pp": "research_agent.algorithms.reinforce_pp:ReinforcePP",
    "ppo": "research_agent.algorithms.ppo:PPO",
    "mt_grpo": "research_agent.algorithms.mt_grpo:MTGRPO",
    "mt_ppo": "research_agent.algorithms.mt_ppo:MTPPO",
    "gigpo": "research_agent.algorithms.gigpo:GiGPO",
    "tree_grpo": "research_agent.algorithms.tree_grpo:TreeGRPO",
    "arpo": "research_agent.algorithms.arpo:ARPO",
}


_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("a text", (str,)),
}


def make_algorithm(name: str, **settings: object) -> Algorithm:
    """Make an algorithm by name.

    Args:
        name: one of ``ALGORITHMS``, or ``"module:Class"`` for your own.
        settings: fields of its class.

    Raises:
        ConfigError: there is no such algorithm, or it has no such setting, or a setting has a
            value of another type.
    """
    module, colon, attribute = ALGORITHMS.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(ALGORITHMS))
        message = f"unknown algorithm {name!r}; known: {known}, or your own as 'module:Class'"
        raise ConfigError(message)
    try:
        found = import_setting(module)
    except (ImportError, AttributeError) as error:
        message = f"algorithm {name!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        raise ConfigError(message) from error
    make = getattr(found, attribute, None)
    if make is None:
        classes = [each for each, value in vars(found).items() if isinstance(value, type)]
        raise ConfigError(
            f"algorithm {name!r} cannot be imported: the module {module} has no class "
            f"{attribute!r}{_closest(attribute, classes)}"
        )
    if isinstance(make, type) and is_dataclass(make):
        names = [field.name for field in fields(make) if field.init]
        for unknown in sorted(settings.keys() - names):
            raise ConfigError(
                f"algorithm {name!r} does not take the setting {unknown!r}; known: "
                f"{', '.join(names)}{_closest(unknown, names)}"
            )
        for field in fields(make):
            if field.name not in settings or field.type not in _TYPES:
                continue
            wanted, types = _TYPES[str(field.type)]
            value = settings[field.name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigError(f"{name}: {field.name} is {value!r}; give {wanted}")
    try:
        return cast(Algorithm, make(**settings))
    except TypeError as error:
        raise ConfigError(f"algorithm {name!r} does not take {settings}: {error}") from error


def _closest(name: str, known: list[str]) -> str:
    """The end of a message that suggests the most similar name, if one is similar."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
