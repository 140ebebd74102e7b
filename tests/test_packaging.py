"""The wheel, its metadata, and the files for GitHub and citation tools."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_ci_on_every_python_that_is_promised() -> None:
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    promised = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert versions == [version for version in promised if version != "3 :: Only"]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"


def test_a_release_is_built_and_checked_before_it_is_published() -> None:
    workflow = read_yaml(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key "on" as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = "\n".join(step.get("run", "") for step in build["steps"])
    assert commands.index("python -m build") < commands.index("twine check --strict")
    assert publish["needs"] == "build"


def test_the_commit_hooks_run_tools_that_make_setup_installs() -> None:
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]}
    assert tools == {"ruff", "mypy"}
    (lock, dev) = (
        (ROOT / "requirements.lock").read_text(),
        PROJECT["optional-dependencies"]["dev"],
    )
    for tool in tools:
        assert re.search(rf"^{tool}==", lock, re.M)
        assert any(requirement.startswith(tool) for requirement in dev)


def test_every_locked_package_has_hashes_and_an_install_checks_them() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[\w.-]+==)", lock, flags=re.M)[1:]
    assert len(entries) > 100
    assert not [entry for entry in entries if "--hash=sha256:" not in entry]
    installs = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if ".lock\n" in f"{line}\n"
    ]
    assert all("--require-hashes" in line for line in installs if " install " in line)


def test_the_citation_is_of_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert {paper["url"] for paper in citation["references"]} == set(PROJECT["urls"].values())


@pytest.mark.parametrize("template", ["bug", "question"])
def test_issue_templates_have_what_a_form_needs(template: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{template}.yml")
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert any(field["validations"]["required"] for field in form["body"] if "validations" in field)


@pytest.mark.parametrize("package", ["research_env", "research_agent"])
def test_both_packages_are_typed(package: str) -> None:
    """Hatch packs every file of a package that git does not ignore."""
    assert (ROOT / package / "py.typed").read_bytes() == b""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert package in wheel["targets"]["wheel"]["packages"]
