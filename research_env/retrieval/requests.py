"""What waits for a result: the query of a search, or a call of another tool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from research_env.retrieval.base import Hit


class ToolRequest(NamedTuple):
    """A valid call of a tool other than a search; equal requests have equal results.

    Attributes:
        tool: its name.
        arguments: as JSON with sorted keys.
    """

    tool: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returns.

    Attributes:
        text: what the policy reads.
        hits: the passages in it, for the rewards that look at what was found.
    """

    text: str
    hits: tuple[Hit, ...] = ()


Request = str | ToolRequest
"""The query of a search, or a request of another tool."""
