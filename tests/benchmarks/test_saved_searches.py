"""The saved searches of a real training step are counted as the environment counts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.saved_searches import SavedConfig, run


@pytest.mark.slow
def test_every_search_of_a_step_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    result = run(SavedConfig(steps=1), cache_size=10)
    (step,) = result["curve"]
    assert result["asked"] == round(step["env/searches"] * step["episodes"]) > 0
    assert result["asked"] == result["searched"] + result["coalesced"] + result["cache_hits"]
    assert 0 < result["searched"] < result["asked"]  # a group of samples asks the same
    assert not {"seconds", "collect", "learn", "sync"} & step.keys()
