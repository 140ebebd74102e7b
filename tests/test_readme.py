"""Every command and every Python block of the README and the documentation is run here.

The blocks of a page run in order in one empty folder, as for somebody who follows it for the first
time. A block that needs a GPU, the hub or hours is marked; of these only the flags are checked.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from benchmarks.paper_table import main as paper_table
from research_agent.algorithms import ALGORITHMS
from research_agent.cli import main as research_agent
from research_agent.config import TrainConfig
from research_agent.environments import make_environments
from research_agent.presets import PRESETS
from research_env import IDS
from research_env.cli import main as research_env
from research_env.papers import PROTOCOLS
from research_env.protocol import TEMPLATES
from research_env.rewards import REWARDS
from tests import forks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "research_agent/README.md", *PAGES)
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
    def is_ours(self) -> bool:
        """Whether all commands are our own, which can run in this process."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return all(re.match(r"(PYTHONPATH=\S+ )?research-(agent|env) ", line) for line in lines)

    @property
    def is_install(self) -> bool:
        return self.code.startswith("pip install")

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
        program = Path("block.py").resolve()
        program.write_text(block.code, encoding="utf-8")
        done = forks.run(str(program), cwd=Path.cwd(), env={"PYTHONPATH": str(ROOT)})
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, f"{block.where}\n{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_ours(block: Block) -> None:
    """Run a block of our own commands in this process: each alone would load torch again."""
    for line in commands(block):
        with pytest.MonkeyPatch.context() as patch:
            while "=" in line[0]:
                name, _, value = line.pop(0).partition("=")
                assert name == "PYTHONPATH"
                patch.syspath_prepend(Path(value).resolve())
            try:
                PROGRAMS[line[0]](line[1:])
            except SystemExit as ended:
                assert not ended.code, f"{block.where}: {line}"


def follow(document: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the blocks of a document in order; what they print."""
    output = []
    for block in blocks(document):
        if not block.is_run or block.is_make or block.needs_server or block.is_install:
            continue
        if block.is_ours:
            run_ours(block)
            output.append(capsys.readouterr().out)
        else:
            output.append(run(block))
    return "".join(output)


FOLLOWED = [d for d in DOCUMENTS if any(block.is_run for block in blocks(d))]


@pytest.mark.slow
@pytest.mark.parametrize("document", FOLLOWED)
def test_a_page_can_be_followed_from_top_to_bottom(
    document: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = follow(document, capsys)
    for text in EXPECTED.get(document, ()):
        assert re.search(text, output, re.M), f"{document} does not print {text}"
    for path in MADE.get(document, ()):
        assert (home / path).stat().st_size > 0
    for run_folder in (path.parent for path in home.glob("runs/*/metrics.jsonl")):
        assert undocumented(run_folder) == set()


EXPECTED = {  # what following a page prints, among other things
    "README.md": (r"^ ?<result>", r"^0\.\d+ \{'em': 0.0", r"runs/first-again is finished"),
    "docs/tutorials/train-on-your-corpus.md": ("Nordwind", r"^reward 1\b", "H200"),
    "docs/tutorials/plug-into-your-trainer.md": (
        r"^[01]\.\d+ \{'em': .*'searches': 0.0.*\} answer$",
        "<result>",
    ),
    "docs/how-to/own-reward.md": ("reward 0.95",),
    "docs/how-to/tool-calls.md": (r"^years: 57$", "<tool_response>", r"\(page 1 of 1\)"),
    "docs/reference/environments.md": (r"musique +│ train 1, .*dev 1",),
}
MADE = {  # files that following a page makes
    "README.md": ("runs/first/report.html", "runs/first/curve.png"),
    "docs/tutorials/train-on-your-corpus.md": (
        "runs/mine/checkpoints/step-000002/model.safetensors",
        "runs/mine/report.html",
    ),
    "docs/tutorials/evaluate.md": ("runs/page.html", "runs/sampled/summary.json"),
    "docs/how-to/stages.md": ("grades.jsonl", "demonstrations.jsonl", "runs/sft/model.safetensors"),
}


@pytest.mark.elasticsearch
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if any(block.needs_server for block in blocks(d))]
)
def test_the_commands_for_elasticsearch_work(document: str, home: Path, elasticsearch: str) -> None:
    wikipedia = home / "data/wiki18"
    wikipedia.mkdir()
    with gzip.open(wikipedia / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(PASSAGE) + "\n")
    address = elasticsearch.partition("://")[2]
    for block in blocks(document):
        if block.needs_server:
            run(block._replace(code=block.code.replace("localhost:9200", address)))


def undocumented(run_folder: Path) -> set[str]:
    """Numbers that a run has logged, and docs/reference/metrics.md does not define."""
    known = documented()
    lines = [
        json.loads(line)
        for file in ("metrics.jsonl", "timings.jsonl")
        for line in (run_folder / file).read_text().splitlines()
    ]
    names = {name for line in lines for name in line}
    assert {"reward", "learner/loss", "collect"} <= names
    components = {re.sub(r"^(env|eval)/((turn_)?reward)/.*", r"\2/NAME", name) for name in names}
    return {re.sub(r"^(env|eval)/(?!reward$)", "", name) for name in components} - known


def documented() -> set[str]:
    text = text_of("docs/reference/metrics.md")
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_not_run_is_understood(
    document: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own commands in blocks that are not run: the command line takes every word."""
    seen: list[TrainConfig] = []

    def remember(config: TrainConfig) -> Any:
        seen.append(config)
        return SimpleNamespace(message="", numbers={}, signal=0)

    trainer = ModuleType("research_agent.trainer")
    trainer.train = remember  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "research_agent.trainer", trainer)
    for block in blocks(document):
        if block.is_run and not block.needs_server:
            continue
        for words in commands(block):
            at = [i for i, word in enumerate(words) if word in PROGRAMS]
            if "research_agent.cli" in words:  # behind torchrun
                research_agent(words[words.index("research_agent.cli") + 1 :])
            elif words[:2] == ["research-agent", "train"]:
                research_agent(words[1:])
            elif at:
                program, arguments = words[at[0]], words[at[0] + 1 :]
                named = {word for word in arguments if word.startswith("--")}
                verbs = list(takewhile(lambda word: not word.startswith("-"), arguments))[:2]
                assert named <= flags(program, verbs, capsys), f"{block.where}: {words}"
    if document == "docs/tutorials/train-on-your-corpus.md":
        (config,) = seen
        paper = PRESETS["research-7b"]
        assert config.rollout.prompts_per_step == 32 < paper.rollout.prompts_per_step
        assert config.environment.env_args["template"] == "instruct"
        assert config.learner == paper.learner


PROGRAMS = {"research-agent": research_agent, "research-env": research_env}


def flags(program: str, verbs: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags of a command; its verbs may be two words, such as ``datasets prepare``."""
    for count in (2, 1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            PROGRAMS[program]([*verbs[:count], "--help"])
        if exited.value.code in (0, None):
            return set(re.findall(r"--\w[\w-]+", capsys.readouterr().out))
    raise AssertionError(f"{program} {verbs} has no --help")


def test_the_tables_name_all_there_is() -> None:
    environments = text_of("docs/reference/environments.md")
    assert first_column(environments, "Ids") == set(IDS)
    assert first_column(environments, "Protocols") == set(PROTOCOLS)
    assert set(TEMPLATES) - {"miniworld"} <= set(code_spans(environments))
    assert first_column(text_of("docs/how-to/rewards.md"), "Rewards") >= set(REWARDS)
    papers = {name for name in PRESETS if not name.endswith("-mini")}
    assert papers - {"miniworld", "smollm2-wiki"} <= set(
        code_spans(text_of("docs/reference/papers.md"))
    )
    assert set(ALGORITHMS) <= first_column(text_of("docs/reference/algorithms.md"), "Algorithms")


def test_the_names_of_other_trainers_are_ours_and_theirs() -> None:
    """docs/coming-from.md: our metrics are documented, and TRL's settings are fields of its config.

    The names of verl, prime-rl and SkyRL cannot be checked here; the page says where they are from.
    """
    GRPOConfig = importlib.import_module("trl").GRPOConfig  # noqa: N806

    text = text_of("docs/coming-from.md")
    settings, metrics = (
        [row.split("|")[1:-1] for row in re.findall(r"^\| [`o].*\|$", section, re.M)]
        for section in re.findall(r"^## (?:Settings|Metrics)\n(.*?)(?=^## )", text, re.M | re.S)
    )
    theirs = {name for row in settings for name in re.findall(r"`(\w+)[`=]", row[1])}
    assert len(theirs) > 25
    assert theirs - {"peft_config", "reward_funcs"} <= GRPOConfig.__dataclass_fields__.keys()
    ours = {name for row in metrics for name in re.findall(r"`([\w/]+)`", row[0])}
    assert ours - {"env/searches", "pass_at"} <= documented()


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 1000


def test_pictures_are_what_their_scripts_draw() -> None:
    folder = ROOT / "docs/pictures"
    curves = runpy.run_path(str(folder / "curves.py"))
    drawn = {"loop": runpy.run_path(str(folder / "loop.py"))["draw"]()}
    for name, picture in curves["PICTURES"].items():
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        drawn[name] = curves["draw"](picture, [json.loads(line) for line in lines])
    for name, text in drawn.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == text
        assert "prefers-color-scheme: dark" in text


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    texts = "\n".join(map(text_of, DOCUMENTS))
    named = {
        extra
        for extras in re.findall(r"pip install '\.\[([\w,-]+)\]'", texts)
        for extra in extras.split(",")
    }
    assert {"agent", "hub", "elasticsearch"} <= named
    assert set(named) <= set(extras)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_that_are_named_exist(document: str) -> None:
    text = text_of(document)
    folder = (ROOT / document).parent
    links = [
        link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    assert [link for link in links if not (folder / link).exists()] == []
    paths = [s for s in code_spans(text) if re.fullmatch(r"(research_\w+|tests|docs)/[\w./]+", s)]
    names = [path for path in paths if "NAME" not in path]
    assert [path for path in names if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_are_named_exist(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    spans = code_spans(text_of(document))
    named = {flag for span in spans for flag in re.findall(r"--\w[\w-]+", span)}
    known = {"--help", "--nproc-per-node", "--max-restarts"}  # the latter two are torchrun's
    known |= {"--model", "--reasoning-parser", "--host", "--generation-config"}  # vLLM
    known |= {"--weight-transfer-config", "--gpu-memory-utilization"}  # as are these
    known |= {"--data-parallel-size", "--api-server-count"}  # and these
    known |= {"--env", "--no-push"}  # flags of verifiers' command
    known |= {"--all", "--tiny", "--gpu", "--write", "--plans"}  # flags of modules in benchmarks/
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
    (block,) = [b for b in blocks("research_agent/README.md") if b.file == "echo_env.py"]
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
