"""The papers whose protocol, prompts and rewards are implemented, one module each.

A new paper is one module with a ``PAPER``, and its name in `_MODULES`.
"""

from __future__ import annotations

from research_env.errors import UnknownNameError
from research_env.papers import r1_searcher, recall, research, search_r1, tool_calls
from research_env.papers.base import Paper
from research_env.protocol import Protocol

_MODULES = (research, r1_searcher, search_r1, tool_calls, recall)

PAPERS: dict[str, Paper] = {module.PAPER.protocol.name: module.PAPER for module in _MODULES}
PROTOCOLS: dict[str, Protocol] = {name: paper.protocol for name, paper in PAPERS.items()}


def resolve_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name; a :class:`Protocol` is returned as it is.

    Raises:
        UnknownNameError: there is no protocol of that name.
    """
    if isinstance(name, Protocol):
        return name
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
