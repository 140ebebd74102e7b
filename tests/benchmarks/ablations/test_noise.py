"""The search engine that misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest

from benchmarks.ablations.noise import MissingRetriever
from benchmarks.ablations.prepare import write_worlds
from benchmarks.ablations.registry import BY_NAME
from benchmarks.ablations.runs import AblationsConfig, training_of
from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit, Passage

CONFIG = AblationsConfig("all")


class _Two:
    """Finds two passages for every query, or fails."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        best = [Hit(Passage(name, name, ""), 1.0) for name in ("best", "next")][:top_k]
        return [RetrievalError("down") if query == "trouble" else best for query in queries]

    def close(self) -> None:
        pass


def test_an_engine_that_misses_gives_the_next_best() -> None:
    queries = [f"query {n}" for n in range(1000)]

    def found(miss: float, asked: Sequence[str], top_k: int = 1) -> list[list[str]]:
        answers = MissingRetriever(_Two(), miss).search(asked, top_k)
        return [[hit.passage.id for hit in a] for a in answers if not isinstance(a, RetrievalError)]

    assert found(0.0, queries) == [["best"]] * 1000
    assert found(1.0, queries) == [["next"]] * 1000
    assert found(1.0, queries, top_k=2) == [["next"]] * 1000
    some = found(0.2, queries)
    assert 150 < some.count(["next"]) < 250 and some.count(["best"]) + some.count(["next"]) == 1000
    assert found(0.2, queries[::-1]) == some[::-1]  # the same queries whenever they are asked
    assert found(0.2, [f"  QUERY  {n}" for n in range(1000)]) == some
    (error,) = MissingRetriever(_Two(), 0.2).search(["trouble"], 1)
    assert isinstance(error, RetrievalError)


def test_the_noisy_environment_is_searchqa_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    config = replace(CONFIG, output=tmp_path)
    write_worlds(config)
    (arm,) = BY_NAME["self-correction"].arms
    environment = training_of(config, arm, 0).environment
    for miss in (0.0, 1.0):
        args = {**environment.env_args, "miss": miss}
        single, many = gym.make(environment.env, **args), gym.make_vec(environment.env, 1, **args)
        single.reset(seed=0, options={"episode": 0})
        many.reset(seed=0, options={"episodes": [0]})
        question = single.unwrapped.episode.question  # type: ignore[attr-defined]
        action = f"<search> {question.decomposition[0].question} </search>"
        (found,) = single.step(action)[-1]["passage_ids"]
        (found_by_many,) = many.step([action])[-1]["passage_ids"][0]
        assert found == found_by_many
        assert (found == question.supporting[0]) == (miss == 0.0)
        single.close()
        many.close()
