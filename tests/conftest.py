"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def research_data() -> Path:
    """The folder of real questions and passages, or a skip (a failure under CI)."""
    named = os.environ.get("RESEARCH_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(named) if named else beside
    if folder.is_dir():
        return folder
    message = f"no data folder at {folder}; set RESEARCH_DATA"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
