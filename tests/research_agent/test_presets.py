"""Presets come from installed packages, as plain data."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from research_agent import presets
from research_agent.errors import ConfigError


def test_a_preset_is_plain_data_over_the_defaults() -> None:
    data = {
        "description": "Mine.",
        "environment": {"env": "my_package:Mine-v0", "env_args": {"level": 3}},
        "rollout": {"group_size": 4},
    }
    made = presets.make_preset("mine", data)
    assert made.preset == "mine"
    assert made.environment.env_args == {"level": 3}
    assert made.rollout.group_size == 4
    assert made.rollout.prompts_per_step == 256
    assert made.run.output == Path("runs/mine")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sampler": {}}, "unknown section 'sampler'"),
        ({"sampling": {"samples": 4}}, "sampling has no setting 'samples'"),
    ],
)
def test_what_a_preset_misspells_is_named(data: dict[str, dict[str, int]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        presets.make_preset("mine", data)


def test_a_package_that_cannot_be_loaded_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        EntryPoint("broken", "no_such_module:PRESETS", presets.GROUP),
        EntryPoint("research-env", "research_env.presets:PRESETS", presets.GROUP),
    ]
    monkeypatch.setattr(presets, "entry_points", lambda group: found)
    with pytest.warns(UserWarning, match="no_such_module:PRESETS cannot be loaded"):
        names = [name for name, _ in presets.offered(presets.GROUP)]
    assert "miniworld" in names
