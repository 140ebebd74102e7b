from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import research_env
from research_env.datasets import FileCorpus
from research_env.retrieval import open_retriever
from research_env.retrieval.serve import RetrievalServer

assert research_env.IDS


def fingerprints(**settings: Any) -> dict[str, str]:
    env: Any = gym.make("SearchQA-v0", **settings)
    said: dict[str, str] = env.unwrapped.fingerprints()
    env.close()
    return said


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    question = {"id": "q", "question": "Who?", "answers": ["Ann"], "hops": 2}
    passage = {"id": "p", "title": "Ann", "text": "Ann did it."}
    return {
        "questions": write(tmp_path / "questions.jsonl", question),
        "corpus": write(tmp_path / "corpus.jsonl", passage),
    }


def test_the_same_settings_have_the_same_provenance_in_both_environments(
    files: dict[str, Any],
) -> None:
    said = fingerprints(**files)
    assert said == fingerprints(**files)
    vector: Any = gym.make_vec("SearchQA-v0", num_envs=2, **files)
    assert vector.unwrapped.fingerprints() == said
    vector.close()
    assert said["questions"].startswith("1, sha256 ")
    assert said["template"].startswith("base, sha256 ")
    assert (said["protocol"], said["reward"]) == ("research", "research")
    assert said["limits"] == "top_k 5, max_searches None, max_turns None"
    assert said["retriever"] == "the corpus of the data set"
    assert said["index"]


@pytest.mark.parametrize(
    ("changed", "record"),
    [
        ("questions", {"id": "q", "question": "Who?", "answers": ["Bob"]}),
        ("questions", {"id": "q", "question": "Whom?", "answers": ["Ann"]}),
        ("questions", {"id": "r", "question": "Who?", "answers": ["Ann"]}),
        ("questions", {"id": "q", "question": "Who?", "answers": ["Ann"], "difficulty": "hard"}),
        ("index", {"id": "p", "title": "Ann", "text": "Ann did it again."}),
    ],
)
def test_a_change_shows_in_its_entry_alone(
    files: dict[str, Any], tmp_path: Path, changed: str, record: dict[str, Any]
) -> None:
    before = fingerprints(**files)
    file = {"questions": "questions", "index": "corpus"}[changed]
    after = fingerprints(**{**files, file: write(tmp_path / "other.jsonl", record)})
    assert {key for key in before if before[key] != after[key]} == {changed}


def test_settings_show_in_their_entries(files: dict[str, Any]) -> None:
    before = fingerprints(**files)
    after = fingerprints(**files, template="instruct", top_k=3, reward="em")
    differing = {key for key in before if before[key] != after[key]}
    assert differing == {"template", "limits", "reward"}


def test_a_sum_of_rewards_shows_its_weights(files: dict[str, str]) -> None:
    said = fingerprints(**files, reward="research + .1*support_recall - 2e-2*searches")
    assert said["reward"] == "1*research+0.1*support_recall-0.02*searches"
    assert fingerprints(**files, reward=said["reward"]) == said


def test_an_index_without_its_corpus_is_known_by_its_fingerprint(
    files: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    made = fingerprints(**files, retriever=f"embedded:{folder}")
    alone = fingerprints(questions=files["questions"], retriever=f"embedded:{folder}?corpus=any")
    assert made["index"] == alone["index"] != ""
    assert alone["retriever"] == "embedded?corpus=any"
    assert alone["place: retriever"] == f"embedded:{folder}?corpus=any"


def test_the_place_of_an_index_changes_nothing_else(files: dict[str, Any], tmp_path: Path) -> None:
    here = fingerprints(**files, retriever=f"embedded:{tmp_path / 'here'}")
    there = fingerprints(**files, retriever=f"embedded:{tmp_path / 'there'}")
    assert {key for key in here if here[key] != there[key]} == {"place: retriever"}


def test_how_an_engine_is_asked_changes_no_results(files: dict[str, Any], tmp_path: Path) -> None:
    engine = open_retriever(f"embedded:{tmp_path / 'i'}", FileCorpus("c", Path(files["corpus"])))
    server = RetrievalServer(engine, port=0)
    said = fingerprints(**files, retriever=f"{server.url}?batch=64&deadline=9")
    assert said["retriever"] == "http"
    assert said["index"]
    server.stop()
    engine.close()


def test_a_password_is_not_shown(files: dict[str, Any], tmp_path: Path) -> None:
    recorded = f"localhost:9/retrieve?cache={tmp_path / 'searches.sqlite'}"
    said = fingerprints(**files, retriever=f"http://ann:secret@{recorded}")
    assert said["retriever"] == f"http://[redacted]@{recorded}"
    assert "secret" not in str(said)
    assert said["index"] == ""


def test_a_retriever_of_ones_own_is_its_class(files: dict[str, Any], tmp_path: Path) -> None:
    fingerprints(**files, retriever=f"embedded:{tmp_path / 'index'}")
    own = open_retriever(f"embedded:{tmp_path / 'index'}?corpus=any", None)
    said = fingerprints(**files, retriever=own)
    assert "EmbeddedRetriever" in said["retriever"]
    assert said["index"]
    own.close()


def test_the_strata_of_a_question_are_in_every_info(files: dict[str, Any]) -> None:
    env = gym.make("SearchQA-v0", **files)
    _, info = env.reset(seed=0)
    assert info["strata"] == {"hops": "2", "type": ""}
    *_, info = env.step("<think>x</think><search>Ann</search>")
    assert info["strata"] == {"hops": "2", "type": ""}
    env.close()
