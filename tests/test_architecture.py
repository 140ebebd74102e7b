"""Which modules may import which, by their source; and what an import loads, in a new process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {".py", ".js", ".css", ".html"}
HEAVY = {"torch", "transformers", "vllm", "numba", "Stemmer", "datasets", "elasticsearch"}
HEAVY |= {"rich", "tyro", "matplotlib", "tensorboard", "hypothesis", "pytest"}
HEAVY |= {"openai", "huggingface_hub", "fastapi", "uvicorn", "prometheus_client"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of all imports in a file, at any depth."""
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


OTHERS_WORDS = {"search", "searches", "searched", "passage", "passages", "retriever", "retrieval"}
OTHERS_WORDS |= {"elasticsearch", "wikipedia", "hotpotqa", "musique", "supporting"}
NAMES_OF_OTHERS = re.compile(
    r"URLSearchParams|re\.search|[Rr]e[Ss]earch[\w-]*|Search-R1|search-r1|R1-Searcher|Tree Search"
)
"""Names with such a word that we cannot choose: of browsers, Python and papers."""


def words_of(text: str) -> set[str]:
    """Split names and prose into words, camel case and snake case too."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", NAMES_OF_OTHERS.sub(" ", text))
    return set(re.findall(r"[a-z]+", apart.lower()))


def test_the_trainer_has_no_word_for_what_an_environment_does() -> None:
    """Neither in names nor in strings and comments; in Python, JavaScript, HTML and CSS."""
    files = [p for p in (ROOT / "research_agent").rglob("*") if p.suffix in TEXTS]
    assert len(files) > 80
    found = {
        str(path.relative_to(ROOT)): sorted(OTHERS_WORDS & words_of(path.read_text("utf-8")))
        for path in files
    }
    assert {path: words for path, words in found.items() if words} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stateSearches = 1", {"state", "searches"}),
        ("run_search('x')", {"run", "search", "x"}),
        ("new URLSearchParams(); re.search(a, b)", {"new", "a", "b"}),
        ("ReSearch and research-7b", {"and"}),
    ],
)
def test_words_are_found_in_names(text: str, expected: set[str]) -> None:
    assert words_of(text) == expected


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
    "module", ["research_agent", "research_agent.config", "research_agent.cli"]
)
def test_importing_the_configuration_loads_no_models(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "research_agent" in loaded
    assert {"torch", "transformers", "vllm", "matplotlib"} & loaded == set()


# Modules and folders from the bottom to the top: each imports from its own layer and those below.
LAYERS = {
    "research_env": (
        "errors system spaces markup metrics",
        "retrieval",
        "tools",
        "datasets protocol judge",
        "episode templates",
        "papers",
        "rewards turn_rewards demonstrations wiki_demonstrations",
        "core info fingerprint",
        "env sessions",
        "vector_env testing footprint registration presets",
        "adapters",
        "commands",
        "cli",
    ),
    "research_agent": (
        "errors system",
        "settings formats trajectory tree_plan trees environments distributed phrase_tokenizer",
        "sharded optimizer muon",
        "chat_template curriculum run_logger checkpoint step_metrics",
        "config",
        "config_checks config_changes presets prefixes batch algorithms",
        "models engines renderer active_rollout rollout rollout_state trace weight_files",
        "learner evaluation demonstrations sft player player_process failures plan run_folder",
        "trainer report",
        "cli",
    ),
}


def import_graph(package: str, *, types: bool = False) -> dict[str, set[str]]:
    """What each module imports of its own package, deferred imports included."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in modules(package)
    }
    graph = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = node.body if types else []
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


@pytest.mark.parametrize("package", [*LAYERS, "benchmarks"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    """Types included: what a reader must know before the others."""
    TopologicalSorter(import_graph(package, types=True)).prepare()  # it names those of a cycle


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
