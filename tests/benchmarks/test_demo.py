"""The demo: its two instruments, and the whole of it with a policy of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.blanked import BlankRetriever
from benchmarks.demo import GO_ON, PLAN, SearchAlways
from research_agent.cli import main as sft
from research_agent.config import SamplingConfig
from research_agent.engines.base import SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.evaluation.predictions import read_predictions
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.trajectory import Trajectory
from research_env import Hit, Passage
from research_env.datasets import Question, miniworld
from research_env.demonstrations import gold_queries
from research_env.errors import RetrievalError
from research_env.papers import PROTOCOLS
from research_env.retrieval import open_retriever
from tests import forks
from tests.research_agent.conftest import byte_tokenizer, make_renderer

ENV = "research_env:ReSearch-MiniWorld-v0"
ARGS = {"split": "dev", "template": "question", "top_k": 2}
EPISODES = 24


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "research-cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(folder))
    return folder


# --- results blanked ------------------------------------------------------------------------------


class Two:
    """Finds two passages, or fails."""

    closed = False

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        found = [Hit(Passage("a", "Ann", "Ann did."), 2.0), Hit(Passage("b", "", "Bob."), 1.0)]
        return [RetrievalError("down") if q == "trouble" else found[:top_k] for q in queries]

    def close(self) -> None:
        self.closed = True


def test_blanked_passages_say_nothing_and_all_else_stays() -> None:
    inner = Two()
    blank = BlankRetriever(inner)
    found, failed, one = blank.search(["x", "trouble", "y"], 2)
    assert found == [Hit(Passage("a", "", ""), 2.0), Hit(Passage("b", "", ""), 1.0)]
    assert isinstance(failed, RetrievalError)
    assert one == found
    assert [len(hits) for hits in blank.search(["x"], 1) if not isinstance(hits, Exception)] == [1]
    for rules in PROTOCOLS.values():
        assert not {"Ann", "Bob", "did"} & set(rules.render(found).split())
    assert not inner.closed
    blank.close()
    assert inner.closed


# --- a policy that is made to search --------------------------------------------------------------


class Obedient:
    """A policy that knows every gold query, and yet searches only where its turn begins so.

    Left alone it answers: with the gold answer if all its searches found their passages, which it
    tells by their titles.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.asked = {q.question: q for q in miniworld.load("dev").questions}

    def __call__(self, held: Sequence[int], params: SamplingParams) -> list[int]:
        text = self.renderer.decode(held)
        question = self.asked[text.split("\n", 1)[0]]
        return [*self.renderer.encode_text(self.says(question, text)), min(self.renderer.end_ids)]

    @staticmethod
    def says(question: Question, text: str) -> str:
        done = text.count("</search>")
        if text.endswith((PLAN, GO_ON)):
            return f" look </think> <search> {gold_queries(question)[done]} </search>"
        subjects = [query.rsplit(" ", 1)[0] for query in gold_queries(question)[:done]]
        read = done and all(f'"{subject}"\n' in text for subject in subjects)
        answer = question.answers[0] if read else "nothing"
        return f" <think> done </think> <answer> \\boxed{{ {answer}}} </answer>"


def play(*, always: bool, blank: bool = False) -> list[Trajectory]:
    renderer = make_renderer(byte_tokenizer())
    args: dict[str, Any] = dict(ARGS)
    if blank:
        args["retriever"] = BlankRetriever(open_retriever(None, miniworld.world(0)))
    environments: Any = make_environments(ENV, 7, args)
    if always:
        questions = miniworld.load("dev").questions
        environments = SearchAlways(environments, {q.id: len(q.decomposition) for q in questions})
    sampling = SamplingConfig(
        temperature=1.0, max_prompt=500, max_response=9_000, max_turn_tokens=500
    )
    engine = ScriptedEngine(Obedient(renderer), renderer, max_context=10_000)
    wanted = [(episode, 0) for episode in range(EPISODES)]
    try:
        return collect(engine, environments, renderer, wanted, sampling)
    finally:
        environments.close()


def test_made_to_search_a_policy_searches_once_for_each_hop_and_then_answers() -> None:
    hops = {q.id: len(q.decomposition) for q in miniworld.load("dev").questions}
    played = play(always=True)
    assert len(played) == EPISODES
    assert len({str(t.info["question_id"]) for t in played}) == EPISODES
    for trajectory in played:
        count = hops[str(trajectory.info["question_id"])]
        given = [s.text for s in trajectory.segments if s.provenance != "action"]
        assert len(given) == count + 1
        assert given[0].endswith(f"?\n{PLAN}") or given[0].endswith(f".\n{PLAN}")
        assert all(text.endswith(f"</result>{GO_ON}") for text in given[1:-1])
        assert given[-1].endswith("</result>")
        # what the policy went on from is put before what it wrote: the format holds
        assert trajectory.metrics["searches"] == count
        assert trajectory.metrics["format"] == trajectory.reward == 1.0


def test_left_alone_the_same_policy_guesses() -> None:
    for trajectory in play(always=False):
        assert trajectory.metrics["searches"] == trajectory.metrics["em"] == 0.0


def test_with_its_results_blanked_it_reads_nothing() -> None:
    for trajectory in play(always=True, blank=True):
        assert trajectory.metrics["searches"] >= 1.0
        assert trajectory.metrics["em"] == 0.0
        observations = [s.text for s in trajectory.segments if s.provenance == "observation"]
        assert {text.removesuffix(GO_ON) for text in observations} == {" <result>\n\n</result>"}


# --- the whole of it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, cache: Path) -> None:
    starter, output = str(tmp_path / "starter"), tmp_path / "demo"
    small = ["--count", "150", "--hidden-size", "16", "--layers", "1", "--heads", "2", "--quiet"]
    sft(["sft", "miniworld", *small, "--output", starter])
    words = ["--model", starter, "--steps", "2", "--limit", "8", "--seed", "5"]
    more = {"RESEARCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    told = forks.run("benchmarks.demo", "--json", *words, "--output", str(output), env=more)
    assert told.returncode == 0, told.stderr

    [line] = told.stdout.splitlines()
    results = json.loads(line)
    [folder] = output.iterdir()
    assert folder.name.startswith("seed-5-")
    assert json.loads((folder / "results.json").read_text()) == results
    measured = [
        *(results[when][how] for when in ("before", "after") for how in ("greedy", "T = 1")),
        *(results[name] for name in ("other_world", "blanked", "starter_made_to_search")),
    ]
    for numbers in measured:
        assert {"em", "f1", "searches", "reward", "void"} <= set(numbers)
        assert numbers["void"] == 0.0
    assert results["steps"] == 2
    assert results["seconds"] > 0
    assert set(results["paths"]) == {"curve", "trajectories", "tensorboard", "model"}
    for path in results["paths"].values():
        assert Path(path).exists()
        assert path in told.stderr  # whole, so that it can be copied
    evaluations = [path.name for path in (folder / "evaluations").iterdir()]
    befores = ["before-greedy", "before-sampled", "before-always"]
    afters = ["after-greedy", "after-sampled", "after-other-world", "after-blanked"]
    assert sorted(evaluations) == sorted(befores + afters)
    for name in evaluations:
        _, records = read_predictions(folder / "evaluations" / name)
        assert len(records) == 8
    for word in ("exact match", "starter", "trained, another world", "results blanked", "T = 1"):
        assert word in told.stderr
    assert "Loading weights" not in told.stderr  # the library's bars would break ours
