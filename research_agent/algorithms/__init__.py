"""Algorithms by name: each is one file with its paper's equation.

A file shows the objective J of its paper and the three parts that the code makes of it: the
advantages A, the weights in front of the sum, and the objective of a token. The learner minimizes
``-(weights * objective).sum()``, which is -J.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from research_agent.algorithms.base import Algorithm, Tokens
from research_agent.errors import ConfigError

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


def make_algorithm(name: str, **settings: object) -> Algorithm:
    """Make an algorithm by name.

    Args:
        name: one of ``ALGORITHMS``, or ``"module:Class"`` for your own.
        settings: fields of its class.

    Raises:
        ConfigError: there is no such algorithm, or it has no such setting.
    """
    module, colon, attribute = ALGORITHMS.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(ALGORITHMS))
        message = f"unknown algorithm {name!r}; known: {known}, or your own as 'module:Class'"
        raise ConfigError(message)
    try:
        make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        message = f"algorithm {name!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        raise ConfigError(message) from error
    try:
        return cast(Algorithm, make(**settings))
    except TypeError as error:
        raise ConfigError(f"algorithm {name!r} does not take {settings}: {error}") from error
