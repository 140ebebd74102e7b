"""Who may import whom, read from the source; and what importing loads, seen in a new process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "vllm", "numba", "Stemmer", "datasets", "elasticsearch"}
HEAVY |= {"rich", "tyro", "matplotlib", "tensorboard", "hypothesis", "pytest"}
HEAVY |= {"openai", "huggingface_hub", "fastapi", "uvicorn", "prometheus_client"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, node.module or ""])


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if name.split(".")[0] in forbidden
    ]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a new process has after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_the_environment_knows_neither_trainer_nor_models() -> None:
    forbidden = {"research_agent", "benchmarks", "tests", "torch", "transformers", "vllm"}
    assert modules("research_env")
    assert offenders("research_env", forbidden) == []


def test_the_trainer_does_not_know_this_environment() -> None:
    assert modules("research_agent")
    assert offenders("research_agent", {"research_env", "benchmarks", "tests"}) == []


@pytest.mark.parametrize("word", ["search", "passage", "retriever"])
def test_the_trainer_has_no_word_for_what_an_environment_does(word: str) -> None:
    """Names in its code."""
    found = []
    for path in modules("research_agent"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (getattr(node, field, None) for field in ("id", "arg", "name"))
            parts = [p for n in names if isinstance(n, str) for p in n.lower().split("_")]
            if {word, word + "s"} & set(parts):
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    assert found == []


def test_the_rules_are_pure() -> None:
    """The transition function and the rewards do no input or output and draw no numbers."""
    impure = {"os", "io", "time", "random", "numpy", "threading", "socket", "pathlib", "gymnasium"}
    paths = [
        ROOT / "research_env" / f"{name}.py"
        for name in ("episode", "protocol", "metrics", "markup")
    ]
    for path in [*paths, *(ROOT / "research_env/papers").glob("*.py")]:
        assert impure.isdisjoint(each.split(".")[0] for each in imported(path))


@pytest.mark.parametrize(
    "statement",
    [
        "import research_env",
        "import research_env.env, research_env.vector_env",
        "import research_env; import gymnasium; gymnasium.spec('ReSearch-MuSiQue-v0')",
    ],
)
def test_importing_the_environment_is_light(statement: str) -> None:
    loaded = loaded_by(statement)
    assert "research_env" in loaded
    assert HEAVY & loaded == set()


@pytest.mark.parametrize(
    "module", ["research_agent", "research_agent.config", "research_agent.presets"]
)
def test_importing_the_configuration_loads_no_models(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "research_agent" in loaded
    assert {"torch", "transformers", "vllm"} & loaded == set()


# Modules and folders from the bottom to the top: each imports from its own layer and those below.
LAYERS = {
    "research_env": (
        "errors redaction paths progress locks spaces markup metrics",
        "retrieval",
        "tools",
        "datasets protocol judge",
        "episode templates",
        "papers",
        "rewards turn_rewards demonstrations wiki_demonstrations",
        "core",
        "env sessions",
        "vector_env testing footprint registration presets",
        "adapters",
        "cli",
    ),
    "research_agent": (
        "errors redaction terminal",
        "settings files trajectory trees environments distributed phrase_tokenizer",
        "curriculum run_logger checkpoint step_metrics",
        "config",
        "presets plan batch algorithms",
        "models engines renderer rollout rollout_state trace",
        "learner evaluation sft",
        "trainer report",
        "cli",
    ),
}


def import_graph(package: str) -> dict[str, set[str]]:
    """What each module imports of its own package, deferred imports included, types left out."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in modules(package)
    }
    graph = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    member = f"{node.module}.{alias.name}"
                    found.add(member if member in names else node.module)
        graph[name] = {each for each in found if each in names} - {name, package}
    return graph


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_no_module_imports_itself_through_others(package: str) -> None:
    TopologicalSorter(import_graph(package)).prepare()  # it names the modules of a cycle


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_imports_do_not_climb(package: str) -> None:
    layer = {name: i for i, names in enumerate(LAYERS[package]) for name in names.split()}
    climbing = []
    for name, needs in import_graph(package).items():
        if name == package:
            continue  # the public names, which are loaded lazily
        own = name.split(".")[1]
        climbing += [
            f"{name} imports {each}"
            for each in sorted(needs)
            if layer[each.split(".")[1]] > layer[own]
        ]
    assert climbing == []
