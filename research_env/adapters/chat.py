"""Chat messages of the policy as the text that the environment takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research_env.protocol import Protocol


def policy_text(protocol: Protocol, message: Mapping[str, Any]) -> str:
    """The text of a message, with its reasoning between the protocol's marks.

    Args:
        protocol: has the marks.
        message: a message of the role ``assistant``. A server with a parser for reasoning moves it
            from ``content`` to ``reasoning_content`` or ``reasoning``.
    """
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content") or ""
    tag = protocol.think
    return f"{tag.open}{reasoning}{tag.close}{content}" if reasoning else content
