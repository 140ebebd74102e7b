"""Text formats of tool calls, by the name that ``tool_format=`` takes. A new one is one module."""

from __future__ import annotations

from research_env.tools.formats.base import ToolFormat
from research_env.tools.formats.harmony import HARMONY
from research_env.tools.formats.hermes import HERMES, write_call
from research_env.tools.formats.llama3 import LLAMA3
from research_env.tools.formats.qwen3_5 import QWEN3_5, QWEN3_5_NOTHINK

__all__ = ["FORMATS", "ToolFormat", "write_call"]

FORMATS: dict[str, ToolFormat] = {
    each.name: each for each in (HERMES, QWEN3_5, QWEN3_5_NOTHINK, LLAMA3, HARMONY)
}
