"""The papers whose protocol, prompts and rewards are implemented, one module each.

A new paper is one module with a ``PAPER``, and its name in `_MODULES`.
"""

from __future__ import annotations

from research_env.errors import ConfigurationError, UnknownNameError
from research_env.papers import r1_searcher, recall, research, search_r1, tool_calls
from research_env.papers.base import Paper
from research_env.protocol import Protocol
from research_env.system.imports import import_named

_MODULES = (research, r1_searcher, search_r1, tool_calls, recall)

PAPERS: dict[str, Paper] = {module.PAPER.protocol.name: module.PAPER for module in _MODULES}
PROTOCOLS: dict[str, Protocol] = {name: paper.protocol for name, paper in PAPERS.items()}


def resolve_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name; a :class:`Protocol` is returned as it is.

    Args:
        name: one of `PROTOCOLS`; "module:NAME" for one of your own; or the protocol itself.

    Raises:
        UnknownNameError: there is no protocol of that name.
        ConfigurationError: "module:NAME" cannot be imported, or is no protocol.
    """
    if isinstance(name, str) and name in PROTOCOLS:
        return PROTOCOLS[name]
    found = import_named(name, "protocol") if isinstance(name, str) and ":" in name else name
    if isinstance(found, Protocol):
        return found
    if found is name:
        raise UnknownNameError("protocol", name, PROTOCOLS, "Name your own as 'module:NAME'.")
    raise ConfigurationError(f"the protocol {name!r} is {found!r:.80}, which is no Protocol")
