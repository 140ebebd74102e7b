"""Frameworks that are missing or of another version are refused, and none is loaded unasked."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import research_env.adapters
from research_env.adapters import FrameworkError, require


@pytest.mark.parametrize(
    ("supported", "found"),
    [("0.4", "0.4"), ("0.4", "0.4.12"), ("0.4", "0.4rc1"), (("0.3", "0.4"), "0.3.1")],
)
def test_the_supported_versions_are_accepted(
    supported: str | tuple[str, ...], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(research_env.adapters, "version", lambda name: found)
    require("verifiers", supported, "verifiers")


@pytest.mark.parametrize("found", ["0.40.0", "0.5.0", "1.0.4", "0.3.9"])
def test_other_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(research_env.adapters, "version", lambda name: found)
    with pytest.raises(FrameworkError, match=rf"skyrl-gym {found} is not .*skyrl-gym==0\.4\.\*"):
        require("skyrl-gym", "0.4", "skyrl")


@pytest.mark.parametrize(
    ("module", "distribution", "extra"),
    [
        ("gem", "gem-llm", "gem"),
        ("mcp", "mcp", "mcp"),
        ("openenv", "openenv", "openenv"),
        ("skyrl", "skyrl-gym", "skyrl"),
        ("torchrl", "torchrl", "torchrl"),
        ("trl", "trl", "trl"),
        ("verifiers", "verifiers", "verifiers"),
        ("verl", "verl", "verl"),
    ],
)
def test_every_adapter_refuses_versions_that_it_was_not_tested_with(
    module: str, distribution: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(research_env.adapters, "version", lambda name: "99.1")
    monkeypatch.delitem(sys.modules, f"research_env.adapters.{module}", raising=False)
    with pytest.raises(FrameworkError, match=rf"{distribution} 99\.1 is not .*'\.\[{extra}\]'"):
        import_module(f"research_env.adapters.{module}")


def test_a_missing_framework_is_named_with_its_cure() -> None:
    with pytest.raises(ImportError, match=r"no-such-gym is not installed; .*'\.\[none\]'"):
        require("no-such-gym", "1.0", "none")


def test_importing_the_adapters_loads_no_framework() -> None:
    code = "import research_env.adapters, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frameworks = "gem mcp openenv skyrl_gym torch torchrl trl verifiers verl"
    assert set(frameworks.split()).isdisjoint(run.stdout.split())
