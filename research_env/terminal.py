"""Text for a terminal, in which control characters of foreign text have no effect."""

from __future__ import annotations

import json
import re
import sys
from typing import TextIO

# C0 and C1 controls without tab and newline, and the characters that reorder a line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Show control characters as escapes: ESC becomes the four characters ``\x1b``.

    Args:
        text: may hold questions, passages, actions or names from files.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def show(text: object = "", *, file: TextIO | None = None) -> None:
    """Print a line at once, its control characters as escapes.

    Args:
        text: the line; ``str`` of anything else.
        file: standard output when None.
    """
    print(printable(str(text)), file=file or sys.stdout, flush=True)


def show_json(value: object) -> None:
    """Print a value as one line of JSON, which reads back as it was."""
    text = json.dumps(value, ensure_ascii=False)
    print(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)
