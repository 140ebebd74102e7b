"""Comments and docstrings do not begin in the middle of a sentence."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("research_env", "research_agent", "benchmarks", "docs", "tests")
FRAGMENT = re.compile(r"(of|that|those|whose|in which|from which|likewise)\b", re.IGNORECASE)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each comment behind code, and of each string that is a statement."""
    before = tokenize.NEWLINE
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
                yield token.start[0], token.string.lstrip("# ")
            if token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT):
                yield token.start[0], token.string.strip("r\"'")
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.DEDENT):
                before = token.type


@pytest.mark.parametrize("folder", FOLDERS)
def test_comments_and_docstrings_begin_with_what_they_are_about(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]}"
        for path in files
        for line, text in prose(path)
        if FRAGMENT.match(text)
    ]
    assert found == []


def test_a_fragment_is_found(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    begins = "of the rest"
    file.write_text(f'"""{begins}."""\nx = 1  # {begins}\n# {begins}, above\ny = "{begins}"\n')
    assert [line for line, text in prose(file) if FRAGMENT.match(text)] == [1, 2]
