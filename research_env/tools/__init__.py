"""Tool calls: the tools, the calls that a policy writes, and the results that it reads.

- :mod:`research_env.tools.base`: tools, calls, and the turn that makes them.
- :mod:`research_env.tools.calls`: checks calls; a bad call gets an error as its result.
- :mod:`research_env.tools.builtin`: ``search`` and ``open``.
- :mod:`research_env.tools.formats`: how families of models write calls in text.
"""

from __future__ import annotations

from research_env.retrieval.requests import ToolResult
from research_env.tools.base import Call, Tool, ToolTurn, tool
from research_env.tools.builtin import OPEN, SEARCH, show_hits
from research_env.tools.calls import MAX_CALL_CHARACTERS, MAX_CALLS, CallRecord, shown
from research_env.tools.formats import FORMATS, ToolFormat, write_call

__all__ = [
    "FORMATS",
    "MAX_CALLS",
    "MAX_CALL_CHARACTERS",
    "OPEN",
    "SEARCH",
    "Call",
    "CallRecord",
    "Tool",
    "ToolFormat",
    "ToolResult",
    "ToolTurn",
    "show_hits",
    "shown",
    "tool",
    "write_call",
]
