"""What the documents say is so: every command and every Python block of theirs is run here.

Those of README.md are run in its order in one empty folder, as by somebody who reads it for the
first time. Only what is long, or needs a GPU and the hub, is looked at in another way.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from benchmarks.paper_table import main as paper_table
from research_agent.cli import main as research_agent
from research_agent.environments import make_environments
from research_agent.presets import PRESETS
from research_env import IDS
from research_env.cli import main as research_env
from research_env.papers import PROTOCOLS
from research_env.protocol import TEMPLATES
from research_env.rewards import REWARDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "research_agent/README.md",
    "docs/algorithms.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/judge.md",
    "docs/metrics.md",
    "docs/papers.md",
    "docs/reproduce.md",
    "docs/rewards.md",
    "docs/rollouts.md",
)
NOT_RUN = "<!-- checked, not run"
NEEDS_SERVER = "<!-- run against a server -->"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

QUESTION: dict[str, object] = {
    "question": "Who?",
    "answers": ["Ann"],
    "supporting": ["p"],
    "hops": 2,
}
PASSAGE: dict[str, object] = {"id": "p", "title": "Ann", "text": "Ann did it."}


class Block(NamedTuple):
    """A fenced block: where it starts, its language, its text, and whether it is to be run."""

    where: str
    language: str
    code: str
    is_run: bool
    needs_server: bool

    @property
    def is_make(self) -> bool:
        return self.code.startswith("make ")

    @property
    def is_training(self) -> bool:
        return bool(re.match(r"(PYTHONPATH=\S+ )?research-agent ", self.code))

    @property
    def file(self) -> str:
        """The file that the block is, if it says so in its first line."""
        named = re.match(r"# (\w+\.py)\n", self.code)
        return named.group(1) if named else ""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    text = text_of(document)
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        mark = before.rstrip().rpartition("\n")[2]
        where = f"{document}:{before.count(chr(10)) + 1}"
        found.append(Block(where, match[1], match[2], NOT_RUN not in mark, mark == NEEDS_SERVER))
    return [block for block in found if block.language in ("bash", "python")]


def code_spans(text: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def first_column(text: str, heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    section = re.split(r"^##+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def commands(block: Block) -> list[list[str]]:
    """The commands of a block that has nothing but commands, as words."""
    return [shlex.split(line) for line in block.code.replace("\\\n", " ").splitlines()]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a cache and a home of its own and a small data folder."""
    folder = tmp_path / "work"
    musique = folder / "data" / "musique"
    musique.mkdir(parents=True)
    questions = [{**QUESTION, "id": split, "split": split} for split in ("train", "dev")]
    for file, records in (("questions", questions), ("corpus", [PASSAGE])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (musique / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    for name in ("RESEARCH_DATA", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    bin_folder = Path(sys.executable).parent
    for name, value in {
        "HOME": tmp_path,
        "RESEARCH_CACHE": tmp_path / "cache",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
        "COLUMNS": 200,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(folder)
    return folder


def run(block: Block) -> str:
    """Run a block in the current folder; its output. One that names a file makes it, too."""
    if block.file:
        Path(block.file).write_text(block.code, encoding="utf-8")
    if block.language == "python":
        command = [sys.executable, "-c", block.code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{block.where}\n{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def train(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block of the trainer's commands in this process: each alone would load torch again."""
    for line in commands(block):
        with monkeypatch.context() as patch:
            while "=" in line[0]:
                name, _, value = line.pop(0).partition("=")
                assert name == "PYTHONPATH"
                patch.syspath_prepend(value)
            assert line[0] == "research-agent"
            research_agent(line[1:])


@pytest.mark.slow
def test_the_readme_can_be_followed_from_top_to_bottom(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed = [b for b in blocks("README.md") if b.is_run and not (b.is_make or b.needs_server)]
    said = {}
    for block in followed:
        if block.is_training:
            train(block, monkeypatch)
            said[block.code] = capsys.readouterr().out
        else:
            said[block.code] = run(block)
    output = "".join(said.values())

    in_a_trainer, in_a_vector = (said[b.code] for b in followed if "gym.make" in b.code)
    assert re.search(r"^[01]\.\d+ \{'em': .*'searches': 0.0.*\} answer$", in_a_trainer, re.M)
    assert "<result>" in in_a_vector
    assert "reward 0.95" in output  # the own reward: a right answer after one search
    assert re.search(r"musique +│ train 1, .*dev 1", output)
    assert "Nordwind" in output
    assert (home / "runs/first/report.html").stat().st_size > 0
    assert (home / "runs/first/curve.png").stat().st_size > 0
    assert (home / "runs/mine/checkpoints/step-000002/model.safetensors").exists()
    predictions = (home / "runs/first-eval/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 1 + 20  # a header
    for run_folder in ("runs/first", "runs/mine"):
        assert undocumented(home / run_folder) == set()


@pytest.mark.elasticsearch
def test_the_commands_for_elasticsearch_work(home: Path, elasticsearch: str) -> None:
    (passages,) = [b for b in blocks("README.md") if "cat > passages.jsonl" in b.code]
    run(passages)
    (block,) = [b for b in blocks("README.md") if b.needs_server]
    address = elasticsearch.partition("://")[2]
    output = run(block._replace(code=block.code.replace("localhost:9200", address)))
    assert "Nordwind" in output


def undocumented(run_folder: Path) -> set[str]:
    """Numbers that a run has logged, and docs/metrics.md does not define."""
    known = documented()
    lines = [
        json.loads(line)
        for file in ("metrics.jsonl", "timings.jsonl")
        for line in (run_folder / file).read_text().splitlines()
    ]
    names = {name for line in lines for name in line}
    assert {"reward", "learner/loss", "collect"} <= names
    return {re.sub(r"^(env|eval)/(?!reward)", "", name) for name in names} - known


def documented() -> set[str]:
    text = text_of("docs/metrics.md")
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    return {name for heading in headings for name in first_column(text, heading)}


def test_every_metric_of_the_learner_is_defined_and_no_other() -> None:
    from research_agent.learner import METRICS
    from research_agent.models.critic import METRICS as CRITIC

    defined = {name for name in documented() if name.startswith("learner/")} - {"learner/NAME"}
    assert defined == {f"learner/{name}" for name in METRICS | CRITIC}


def test_make_does_what_it_says() -> None:
    (block,) = [b for b in blocks("README.md") if b.is_make]
    runs = {"make demo": "-m benchmarks.demo", "make test": "-m pytest"}
    assert block.code.splitlines() == list(runs)
    # this suite may itself be run by make, which tells the makes below it so
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    for command, what in runs.items():
        dry = [*command.split(), "--dry-run", "--always-make"]
        done = subprocess.run(
            dry, cwd=ROOT, env=outside, capture_output=True, text=True, check=True
        )
        assert "-m venv .venv" in done.stdout
        assert "pip install" in done.stdout
        assert what in done.stdout.rstrip().splitlines()[-1]
    spoken = [span for span in code_spans(text_of("README.md")) if "DEMO_ARGS" in span]
    assert spoken == ['make demo DEMO_ARGS="--help"']
    asked = ["make", "--dry-run", "demo", "DEMO_ARGS=--help"]
    done = subprocess.run(asked, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("-m benchmarks.demo --help")


def test_what_is_not_run_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes it, and would train what the text says."""
    (block,) = [b for b in blocks("README.md") if not b.is_run]
    ((program, *arguments),) = commands(block)
    assert program == "research-agent"
    seen: list[Any] = []

    def train(config: Any) -> Any:
        seen.append(config)
        return SimpleNamespace(message="", numbers={}, signal=0)

    trainer = ModuleType("research_agent.trainer")
    trainer.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "research_agent.trainer", trainer)
    research_agent(arguments)
    (config,) = seen
    paper = PRESETS["research-7b"]
    assert config.environment.env_args == {**paper.environment.env_args, "retriever": None}
    assert config.policy.model == "Qwen/Qwen2.5-1.5B"
    assert config.sampling.prompts_per_step == 32 < paper.sampling.prompts_per_step
    assert config.learner == paper.learner


def test_the_tables_name_all_there_is() -> None:
    text = text_of("README.md")
    assert first_column(text, "The environment in your own trainer") == set(IDS)
    assert first_column(text, "Protocols") == set(PROTOCOLS)
    assert first_column(text, "Rewards") == set(REWARDS)
    spans = set(code_spans(text))
    papers = {name for name in PRESETS if not name.endswith("-mini")}
    assert {*TEMPLATES, *papers} - {"miniworld"} <= spans


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    named = re.findall(r"pip install \.\[(\w+)\]", text_of("README.md"))
    assert named
    assert set(named) <= set(extras)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_that_are_named_exist(document: str) -> None:
    text = text_of(document)
    folder = (ROOT / document).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    paths = [s for s in code_spans(text) if re.fullmatch(r"(research_\w+|tests|docs)/[\w./]+", s)]
    names = [path for path in paths if "NAME" not in path]
    assert [path for path in names if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_are_named_exist(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    spans = code_spans(text_of(document))
    named = {flag for span in spans for flag in re.findall(r"--\w[\w-]+", span)}
    known = {"--help", "--nproc-per-node"}  # the latter is of torchrun
    known |= {"--model", "--reasoning-parser"}  # and these are of vLLM's server
    known |= {"--weight-transfer-config", "--gpu-memory-utilization"}  # as are these
    for program, commands in {
        research_agent: (
            "train miniworld",
            "eval",
            "compare",
            "grade",
            "sample",
            "report",
            "sft own",
        ),
        research_env: ("play", "index", "search", "serve", "judge", "datasets prepare"),
        paper_table: ("",),
    }.items():
        for command in commands:
            with pytest.raises(SystemExit):
                program([*command.split(), "--help"])
            known |= set(re.findall(r"--\w[\w-]+", capsys.readouterr().out))
    assert named - known == set()


def test_the_whole_environment_of_the_contract_can_be_played(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("research_agent/README.md")
    run(block)
    monkeypatch.syspath_prepend(home)
    monkeypatch.delitem(sys.modules, "echo_env", raising=False)
    importlib.invalidate_caches()
    environments = make_environments("echo_env:Echo-v0", 3)
    assert environments.num_tasks == 3
    begun = environments.reset({0: 0, 1: 1, 2: 4}, seed=5)
    assert [begun[i][0] for i in range(3)] == ["Say yes: ", "Say no: ", "Say no: "]
    environments.send([0, 1, 2], ["yes", "yes", " no "])
    results = {r.env_id: r for r in environments.recv(3)}
    assert [results[i].reward for i in range(3)] == [1.0, 0.0, 1.0]
    assert results[1].terminated
    assert results[1].info["metrics"] == {"right": 0.0}
