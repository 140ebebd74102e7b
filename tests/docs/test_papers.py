"""docs/reference/papers.md against the presets that it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from research_agent.config import TrainConfig, as_json, flatten
from research_agent.presets import DESCRIPTIONS, PRESETS
from research_agent.settings import parse_settings

TEXT = (Path(__file__).resolve().parents[2] / "docs/reference/papers.md").read_text(
    encoding="utf-8"
)
SECTIONS = {
    tuple(re.findall(r"`([^`]+)`", heading)): body
    for heading, body in re.findall(r"^### (.*?)$(.*?)(?=^### |\Z)", TEXT, flags=re.M | re.S)
}


def _has(config: TrainConfig, name: str, value: object) -> bool:
    """Whether a preset has that flag, or that argument of its algorithm or environment."""
    leaves = {key.split(".")[-1]: found for key, found in flatten(as_json(config))}
    args = {**config.environment.env_args, **config.algorithm.algorithm_args}
    return {**leaves, **args}.get(name) == value


def test_every_paper_has_a_section() -> None:
    named = [name for names in SECTIONS for name in names]
    small = {"miniworld", "smollm2-wiki"}
    papers = [name for name in PRESETS if name not in small and not name.endswith("-mini")]
    assert sorted(named) == sorted(papers)
    assert set(PRESETS) - set(papers) == {*small, *(f"{name}-mini" for name in papers)}
    assert DESCRIPTIONS.keys() == PRESETS.keys()
    assert all(PRESETS[name].sampling.overlap for name in papers)  # Wikipedia is slow


@pytest.mark.parametrize("names", SECTIONS)
def test_what_the_tables_say_is_what_the_presets_have(names: tuple[str, ...]) -> None:
    rows = [line.split(" | ")[2:] for line in SECTIONS[names].splitlines() if " | " in line]
    checked = 0
    for cells in rows[1:]:
        for cell in cells:
            for span in re.findall(r"`([^`]+)`", cell):
                flags = re.findall(r"--([a-z-]+) (\S+)", span)
                said = {flag.replace("-", "_"): word for flag, word in flags}
                settings = parse_settings([f"{k}={v}" for k, v in said.items()])
                settings |= parse_settings([word for word in span.split() if "=" in word])
                for name, value in settings.items():
                    assert any(_has(PRESETS[p], name, value) for p in names), (name, value)
                    checked += 1
    assert checked >= 8, json.dumps(rows)
