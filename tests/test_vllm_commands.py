"""Each vLLM command in code and docs binds to 127.0.0.1 and sends no usage statistics."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(
    r"vllm serve [A-Z$]\w|vllm serve [\w-]+/|-m vllm\.entrypoints\.openai\.api_server"
)


def places() -> list[tuple[str, str]]:
    """File and line of each command, and the text around it."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "*.yml", "*.yaml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found = []
    for name in listed:
        if name == f"tests/{Path(__file__).name}":
            continue
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        for at, line in enumerate(lines):
            if COMMAND.search(line) and "`vllm serve`" not in line:
                found.append((f"{name}:{at + 1}", "\n".join(lines[max(0, at - 12) : at + 12])))
    return found


@pytest.mark.parametrize(("where", "text"), places(), ids=lambda value: value[:40])
def test_a_command_binds_to_this_machine_and_reports_nothing(where: str, text: str) -> None:
    assert re.search(r"--host\W+127\.0\.0\.1", text), where
    assert "VLLM_NO_USAGE_STATS" in text, where


def test_the_commands_are_found() -> None:
    files = {where.partition(":")[0] for where, _ in places()}
    assert {"docs/how-to/rollouts.md", "docs/how-to/reproduce.md"} <= files
