"""Data sets by name: splits, a user's own files, mixtures, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from research_env.datasets import load_dataset
from research_env.env import SearchQAEnv
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
    UnknownNameError,
)
from tests.research_env.datasets.records import PASSAGE, question, write
from tests.research_env.fakes import Engine


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", refuse)


def make_set(folder: Path, name: str, count: int, split: str = "train") -> None:
    rows = [question(f"{name}{i}", split=split, hops=2 + i % 2) for i in range(count)]
    write(folder / "data" / name / "questions.jsonl", *rows)
    write(folder / "data" / name / "corpus.jsonl.gz", PASSAGE | {"id": f"{name}-p"})


# --- data sets by name ----------------------------------------------------------------------------


def test_splits_choose_files_and_labels(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "musique"
    gold = [question("d1", split="dev"), question("t1", split="train")]
    write(folder / "questions.jsonl", *gold)
    write(folder / "qa_train.jsonl.gz", *(question(f"t{i}", split="train") for i in range(3)))
    write(folder / "corpus.jsonl", PASSAGE)

    def ids(split: str) -> list[str]:
        return [q.id for q in load_dataset("musique", split=split).questions]

    assert ids("train") == ["t0", "t1", "t2"]
    assert ids("train-gold") == ["t1"]
    assert ids("dev") == ["d1"]
    assert ids("dev-all") == ["d1"]  # there is no qa_dev
    assert ids("train[:50%]") == ["t0"] and ids("train[50%:]") == ["t1", "t2"]
    assert ids("train[1:2]") == ["t1"] and ids("train[:]") == ids("train[0:100]") == ids("train")
    with pytest.raises(ConfigurationError, match=r"'train\[3:\]' has no question; .* has 3 there"):
        ids("train[3:]")
    for wrong in ("train[-1:]", "train[:x]", "train[1]", "[:1]"):
        with pytest.raises(UnknownNameError, match="known: dev, dev-all, train"):
            ids(wrong)
    corpus = load_dataset("musique", split="dev").corpus
    assert corpus is not None
    assert [passage.id for passage in corpus] == ["p1"]


def test_a_set_that_no_hub_has_is_not_looked_for_there() -> None:
    with pytest.raises(
        DataNotFoundError, match=r"'r1-searcher' is not at hand.*data\.md says"
    ) as e:
        load_dataset("r1-searcher", split="stage-1")
    assert "Did you mean" not in str(e.value)


@pytest.mark.parametrize("wrong", ["train[-2:]", "train[:-20%]", "train[:80 %]", "train[8:", "x[]"])
def test_a_slice_that_is_none_does_not_mean_all_questions(tmp_path: Path, wrong: str) -> None:
    write(tmp_path / "mine.jsonl", *({**question(f"q{i}"), "split": None} for i in range(10)))
    mine = load_dataset("custom", split="train[8:]", questions=tmp_path / "mine.jsonl")
    assert [q.id for q in mine.questions] == ["q8", "q9"]
    with pytest.raises(UnknownNameError, match="split of"):
        load_dataset("custom", split=wrong, questions=tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("musique", "train", 19_938),
        ("musique", "train-gold", 100),
        ("musique", "dev", 459),
        ("musique", "dev-all", 2_417),
        ("hotpotqa", "train", 300),
        ("hotpotqa", "dev", 863),
        ("hotpotqa", "dev-all", 7_403),
        ("2wiki", "train", 500),
        ("2wiki", "dev", 264),
        ("2wikimultihopqa", "dev-all", 12_576),
        ("bamboogle", "test", 125),
    ],
)
def test_the_published_sets(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: str, count: int
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset(name, split=split)
    assert len(data.questions) == count
    assert (data.corpus is None) == (name == "bamboogle")


def test_golds_that_normalize_to_nothing_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        {"id": "a", "question": "Currency?", "answers": ["$", "US dollar"]},
        {"id": "b", "question": "Band?", "answers": ["!!!"]},
        {"id": "c", "question": "City?", "answers": ["Oslo"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_dataset("custom", split="train", questions=path)
    assert [(q.id, q.answers) for q in data.questions] == [("a", ("US dollar",)), ("c", ("Oslo",))]
    assert "dropped 2 gold answers" in caplog.text
    assert "left out 1 questions without another: 'b'" in caplog.text
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(DataError, match="no question is left"):
        load_dataset("custom", split="train", questions=path)


def test_golds_are_dropped_by_the_rules_of_their_own_language(tmp_path: Path) -> None:
    lines = [
        question("zh", answers=["A", "《》"], metric_language="zh"),
        question("en", answers=["A", "《》"]),
        question("ja", answers=["。"], metric_language="ja"),
    ]
    path = write(tmp_path / "questions.jsonl", *lines)
    data = load_dataset("custom", split="train", questions=path)
    assert [(q.id, q.answers) for q in data.questions] == [("zh", ("A",)), ("en", ("《》",))]


def test_golds_are_dropped_by_the_rules_of_the_environments_language(tmp_path: Path) -> None:
    lines = [question("a", answers=["A"]), question("b", answers=["《》"])]
    path = write(tmp_path / "questions.jsonl", *lines)
    for language, kept in (("zh", "a"), ("en", "b")):
        env = SearchQAEnv(
            dataset="custom", questions=str(path), metric_language=language, retriever=Engine()
        )
        assert env.num_tasks == 1
        assert env.reset(seed=0)[1]["question_id"] == kept
    with pytest.raises(UnknownNameError, match="unknown metric_language 'xx'"):
        load_dataset("custom", split="train", questions=path, metric_language="xx")


def test_dollar_signs_are_dropped_from_musiques_golds(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset("musique", split="train")
    assert not any("$" in question.answers for question in data.questions)
    assert "dropped 69 gold answers" in caplog.text


@pytest.mark.parametrize("name", ["musique", "hotpotqa", "2wiki"])
def test_gold_passages_are_in_the_corpus(
    research_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    data = load_dataset(name, split="dev")
    assert data.corpus is not None
    known = {passage.id for passage in data.corpus}
    for asked in data.questions:
        assert asked.supporting
        assert set(asked.supporting) <= known


def test_miniworld_is_loaded_by_name() -> None:
    data = load_dataset("miniworld", split="dev", world_seed=3, hops=2)
    assert data.questions
    assert all(q.hops == 2 for q in data.questions)
    assert data.corpus is not None
    other = load_dataset("miniworld", split="dev", world_seed=4).corpus
    assert other is not None
    assert data.corpus.fingerprint() != other.fingerprint()


def test_hops_filter(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 5)
    for hops, count in [(None, 5), (2, 3), (3, 2), ([2, 3], 5), ((3,), 2)]:
        assert len(load_dataset("musique", split="train", hops=hops).questions) == count
    with pytest.raises(ConfigurationError, match=r"hops=4.*2: 3, 3: 2"):
        load_dataset("musique", split="train", hops=4)
    with pytest.raises(ConfigurationError, match=r"hops is a number, .*, not \[\[2\]\]"):
        load_dataset("musique", split="train", hops=[[2]])  # type: ignore[list-item]


def test_a_users_own_files(tmp_path: Path) -> None:
    rows = [question("a", split="dev"), question("b"), question("c", split="train")]
    questions = write(tmp_path / "q.jsonl", *rows)
    corpus = write(tmp_path / "c.jsonl.gz", PASSAGE)
    data = load_dataset("custom", split="train", questions=questions, corpus=str(corpus))
    assert [q.id for q in data.questions] == ["b", "c"]
    assert data.corpus is not None
    assert [p.id for p in data.corpus] == ["p1"]
    assert load_dataset("custom", split="x", questions=str(questions)).corpus is None
    write(questions, question("a", split="dev"))
    with pytest.raises(UnknownNameError, match="'train'; known: dev"):
        load_dataset("custom", split="train", questions=questions)
    with pytest.raises(ConfigurationError, match="needs questions=PATH"):
        load_dataset("custom", split="train")
    with pytest.raises(DataNotFoundError, match="no corpus file"):
        load_dataset("custom", split="dev", questions=questions, corpus=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="goes with dataset='custom'"):
        load_dataset("miniworld", split="dev", questions=questions)


def test_another_corpus_for_a_published_set(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 2)
    other = write(tmp_path / "wiki.jsonl", PASSAGE | {"id": "w"})
    corpus = load_dataset("musique", split="train", corpus=other).corpus
    assert corpus is not None
    assert [p.id for p in corpus] == ["w"]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("musiqe", "dev", "data set 'musiqe'; known: .*Did you mean 'musique'"),
        ("musique+squad", "dev", "data set 'squad'"),
        ("", "dev", "data set ''"),
        ("musique", "validation", "split of musique 'validation'; known: dev, dev-all, train"),
        ("bamboogle", "train", "split of bamboogle 'train'; known: test"),
    ],
)
def test_unknown_names_are_refused(name: str, split: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_dataset(name, split=split)


@pytest.mark.usefixtures("no_hub")
def test_no_data_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataNotFoundError, match=r"RESEARCH_DATA.*data/musique.*no route to host"):
        load_dataset("musique", split="dev")
    monkeypatch.delenv("RESEARCH_DATA")
    with pytest.raises(DataNotFoundError, match=r"RESEARCH_DATA.*it is not set"):
        load_dataset("2wiki", split="dev")
    assert not (tmp_path / "cache/datasets").exists()


# --- mixtures -------------------------------------------------------------------------------------


def test_a_mixture_without_weights_has_every_question(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 2)
    data = load_dataset("musique+hotpotqa", split="train")
    # positions (j + 1/2)/n: musique .125 .375 .625 .875, hotpotqa .25 .75
    expected = "musique0 hotpotqa0 musique1 musique2 hotpotqa1 musique3"
    assert " ".join(q.id for q in data.questions) == expected
    assert data.corpus is not None
    assert [p.id for p in data.corpus] == ["musique-p", "hotpotqa-p"]


def test_weights_give_the_shares_and_repeat_nothing(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 7)
    make_set(tmp_path, "hotpotqa", 20)
    ids = [q.id for q in load_dataset("musique:2+hotpotqa:1", split="train").questions]
    assert len(set(ids)) == len(ids)
    assert Counter(id_.rstrip("0123456789") for id_ in ids) == {"musique": 6, "hotpotqa": 3}
    assert [id_ for id_ in ids if id_.startswith("h")] == ["hotpotqa0", "hotpotqa6", "hotpotqa13"]
    for start in range(0, 9, 3):  # two to one all along
        assert sum(id_.startswith("m") for id_ in ids[start : start + 3]) == 2


def test_a_mixture_is_filtered_before_it_is_mixed(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 4)
    data = load_dataset("musique:1+hotpotqa:1", split="train", hops=3)
    ids = sorted(q.id for q in data.questions)
    assert ids == ["hotpotqa1", "hotpotqa3", "musique1", "musique3"]


def test_the_union_has_a_fingerprint_of_its_parts(tmp_path: Path) -> None:
    for name in ("musique", "hotpotqa", "bamboogle"):
        make_set(tmp_path, name, 1)

    def fingerprint(name: str) -> str:
        corpus = load_dataset(name, split="train").corpus
        assert corpus is not None
        return corpus.fingerprint()

    both = fingerprint("musique+hotpotqa")
    assert both == fingerprint("musique:1+hotpotqa:1")
    assert len({both, fingerprint("musique"), fingerprint("hotpotqa+musique")}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("musique+musique", "twice"),
        ("musique:0+hotpotqa:1", "weight in 'musique:0'"),
        ("musique:1.5+hotpotqa:1", "weight in 'musique:1.5'"),
        ("musique:+hotpotqa:1", "weight in 'musique:'"),
        ("musique:9+hotpotqa:1", "needs more questions"),
    ],
)
def test_impossible_mixtures_are_refused(tmp_path: Path, name: str, message: str) -> None:
    make_set(tmp_path, "musique", 4)
    make_set(tmp_path, "hotpotqa", 4)
    with pytest.raises(ConfigurationError, match=message):
        load_dataset(name, split="train")


def test_parts_that_share_an_id_are_refused(tmp_path: Path) -> None:
    make_set(tmp_path, "musique", 1)
    write(tmp_path / "data/hotpotqa/questions.jsonl", question("musique0", split="train"))
    with pytest.raises(DataError, match="share the id 'musique0'"):
        load_dataset("musique+hotpotqa", split="train")
