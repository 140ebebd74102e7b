"""Code blocks of the documentation, for tests in other environments than ``make test``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def block_of(heading: str, language: str, document: str = "docs/how-to/trainers.md") -> str:
    """The first block of a language under a heading of the second level."""
    text = (ROOT / document).read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{document} has no block of {language} under {heading!r}"
    return found[1]
