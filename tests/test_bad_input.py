"""Bad input where users meet it: in ``gymnasium.make`` and on the command lines.

The tests of each module show what it refuses. These show that the errors reach the user, with
their type, file, line and advice, and that no passage changes what is learned.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.config import SamplingConfig
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.trajectory import Group, Trajectory
from research_env import RESEARCH, SEARCH_R1
from research_env.datasets import miniworld
from research_env.errors import (
    ConfigurationError,
    DataError,
    DataNotFoundError,
    ResearchEnvError,
    StaleIndexError,
    UnknownNameError,
)
from research_env.papers import PROTOCOLS
from research_env.retrieval import index_corpus, open_retriever
from research_env.tools import write_call
from research_env.vector_env import SearchQAVectorEnv
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_qwen2
from tests.research_agent.disks import small_disk
from tests.research_env.fakes import DATASET
from tests.research_env.test_hostile import PASSAGE, Library

QUESTION = {"id": "q1", "question": "Who?", "answers": ["Ann"]}
PAGE = {"id": "p1", "title": "Ann", "text": "Ann is a person."}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(folder))
    monkeypatch.delenv("RESEARCH_DATA", raising=False)
    return folder


def write(path: Path, *records: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# --- settings of any kind -------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], type[ResearchEnvError], str]] = [
    ({"dataset": "miniwrld"}, UnknownNameError, "known: .*miniworld.*Did you mean 'miniworld'"),
    ({"dataset": None}, UnknownNameError, "data set None; known: .*miniworld"),
    ({"dataset": 7}, UnknownNameError, "data set 7; known"),
    ({"split": "test"}, UnknownNameError, "'test'; known: dev, train"),
    ({"split": ["dev"]}, ConfigurationError, r"a name such as 'dev', not \['dev'\]"),
    ({"protocol": "reserch"}, UnknownNameError, "known: r1-searcher, recall, research, search-r1"),
    ({"protocol": []}, UnknownNameError, r"protocol \[\]; known"),
    ({"reward": "f2"}, UnknownNameError, "known: answer_length, cem, em, f1"),
    ({"reward": 7}, UnknownNameError, "known: answer_length, cem, em, f1"),
    ({"template": 7}, UnknownNameError, "known: base, instruct, question"),
    ({"retriever": "solr:x"}, UnknownNameError, "'solr:x'; known: .*embedded"),
    ({"retriever": 7}, ConfigurationError, "'embedded:DIR', or an object with search.*not 7"),
    ({"hops": 2.5}, ConfigurationError, r"a number, or a list of numbers, not 2\.5"),
    ({"hops": "two"}, ConfigurationError, "a list of numbers, not 'two'"),
    ({"hops": True}, ConfigurationError, "a list of numbers, not True"),
    ({"hops": 9}, ConfigurationError, "by number of hops: 1: .* 4: "),
    ({"world_seed": -1}, ConfigurationError, "world_seed must be a whole number .* not -1"),
    ({"top_k": 0}, ConfigurationError, "top_k is an integer from 1 on, not 0"),
    ({"corpus": 7}, ConfigurationError, "corpus is the path of a file, not 7"),
    ({"corpus": "none.jsonl"}, DataNotFoundError, r"'none\.jsonl'; give a \.jsonl"),
    ({"questions": "q.jsonl"}, ConfigurationError, "goes with dataset='custom'"),
    ({"topk": 5}, UnknownNameError, "argument 'topk'; known: .*Did you mean 'top_k'"),
]


@pytest.mark.parametrize(("given", "kind", "message"), WRONG)
def test_a_setting_that_cannot_be_used_is_refused_by_both_environments(
    given: dict[str, Any], kind: type[ResearchEnvError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        gym.make("ReSearch-MiniWorld-v0", **given)
    with pytest.raises(kind, match=message):
        gym.make_vec("ReSearch-MiniWorld-v0", num_envs=2, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 5}, "a number for each of the 2 sub-environments; 5 has 0"),
        ({"episodes": [1]}, r"for each of the 2 sub-environments; \[1\] has 1"),
        ({"episodes": ["a", "b"]}, "an integer from 0 on, not a"),
        ({"episodes": [1.5, 0]}, r"an integer from 0 on, not 1\.5"),
        ({"episodes": [None, 0]}, "an integer from 0 on, not None"),
        ({"episodes": [0, -1]}, "an integer from 0 on, not -1"),
        ({"reset_mask": [True]}, r"of the 2 sub-environments; \[True\] has 1"),
        ({"reset_mask": 3}, "a boolean for each of the 2 sub-environments; 3 has 0"),
        ({"episode": 3}, r"takes the options 'episodes' and 'reset_mask', not \['episode'\]"),
    ],
)
def test_options_of_the_vector_environment(options: dict[str, Any], message: str) -> None:
    env = SearchQAVectorEnv(2, dataset=DATASET, retriever=Library([("", "")]))
    with pytest.raises(ConfigurationError, match=message):
        env.reset(seed=0, options=options)


# --- files ----------------------------------------------------------------------------------------


def test_a_users_files_that_are_not_in_order(tmp_path: Path, cache: Path) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTION)
    corpus = write(tmp_path / "c.jsonl", PAGE)

    def make(**files: Any) -> Any:
        given: dict[str, Any] = {"questions": questions, "corpus": corpus, **files}
        return gym.make("SearchQA-v0", **given)

    make().close()
    bad = write(tmp_path / "bad.jsonl", QUESTION, {"id": "q2", "question": "Who?"})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the field 'answers' must be a list"):
        make(questions=bad)
    before = sorted((cache / "indexes").iterdir())
    for name, page, message in [
        ("empty", {"id": "p2", "title": "B", "text": ""}, "'text' must be .* or remove the line"),
        ("twice", PAGE, "'p1' is that of line 1; every id must be unique"),
    ]:
        with pytest.raises(DataError, match=rf"{name}\.jsonl:2: .*{message}"):
            make(corpus=write(tmp_path / f"{name}.jsonl", PAGE, page))
    assert sorted((cache / "indexes").iterdir()) == before  # what is refused leaves nothing
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(PAGE).encode())[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d: the gzip data are damaged.*again"):
        make(corpus=str(cut))
    with pytest.raises(ConfigurationError, match="no corpus of its own; give corpus=PATH, or a"):
        gym.make("SearchQA-v0", questions=questions)
    with pytest.raises(ConfigurationError, match="needs questions=PATH"):
        gym.make("SearchQA-v0", corpus=corpus)


def test_an_index_for_another_corpus_or_cut_off(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "questions": write(tmp_path / "q.jsonl", QUESTION),
        "corpus": write(tmp_path / "c.jsonl", PAGE),
    }
    folder = tmp_path / "index"
    gym.make("SearchQA-v0", retriever=f"embedded:{folder}", **files).close()
    write(tmp_path / "c.jsonl", PAGE, {"id": "p2", "title": "B", "text": "Bob."})
    with pytest.raises(StaleIndexError, match=r"another corpus.*research-env index --corpus FILE"):
        gym.make("SearchQA-v0", retriever=f"embedded:{folder}", **files)
    write(tmp_path / "c.jsonl", PAGE)
    passages = folder / "passages.bin"
    passages.write_bytes(passages.read_bytes()[:-1])
    with pytest.raises(StaleIndexError, match=r"passages\.bin .*cut off.*research-env index"):
        gym.make("SearchQA-v0", retriever=f"embedded:{folder}", **files)


@pytest.mark.parametrize("kilobytes", [64, 260])  # in the passages, and in the engine's own files
def test_a_disk_too_small_for_an_index(tmp_path: Path, kilobytes: int) -> None:
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        with pytest.raises(ConfigurationError, match=r"disk/index .*No space left.*RESEARCH_CACHE"):
            index_corpus(miniworld.world(0), disk / "index")
        assert [path.name for path in disk.iterdir()] == [".index.lock"]


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match=r"file/indexes.*be written.*RESEARCH_CACHE"):
        open_retriever(None, miniworld.world(0))


def test_a_mixture_of_sets_is_an_environment_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path))
    for name in ("musique", "hotpotqa"):
        rows = [QUESTION | {"id": f"{name}{i}", "split": "train"} for i in range(4)]
        write(tmp_path / name / "questions.jsonl", *rows)
        write(tmp_path / name / "corpus.jsonl", PAGE | {"id": f"{name}-p"})
    env = gym.make("SearchQA-v0", dataset="musique:2+hotpotqa:1")
    asked = [env.reset(options={"episode": n})[1]["question_id"] for n in range(6)]
    assert sorted(id_.rstrip("0123456789") for id_ in asked) == ["hotpotqa"] * 2 + ["musique"] * 4
    _, _, _, _, info = env.step("<search>Ann</search>")
    assert info["passage_ids"] == ("musique-p", "hotpotqa-p")
    with pytest.raises(UnknownNameError, match="data set 'squad'; known"):
        gym.make("SearchQA-v0", dataset="musique+squad")


# --- the trainer's command line -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tiny_qwen2(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2_000])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def without_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink(missing_ok=True)


EVAL = ("eval", "--env", "research_env:SearchQA-v0", "--limit", "1", "--quiet")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("research-agent: error: ") == 1
    return error


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without_weights, "has a config.json but no weights; put its model.safetensors there"),
        (cut_weights, "cannot be opened"),
        (without_tokenizer, "holds no tokenizer; give a folder with tokenizer.json, or a name"),
        (without_end, "has no end token, so that no turn could end; set eos_token"),
        (shutil.rmtree, "there is no model folder"),
    ],
)
def test_a_model_that_cannot_be_used_is_named_with_a_cure(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    said: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    harm(broken)
    files = [f"questions={write(tmp_path / 'q.jsonl', QUESTION)}"]
    files.append(f"corpus={write(tmp_path / 'c.jsonl', PAGE)}")
    words = ["--model", str(broken), "--output", str(tmp_path / "out"), "--env-args", *files]
    error = refusal(capsys, *EVAL, *words)
    assert said in error
    assert str(broken) in error


def test_a_prompt_longer_than_the_context_and_a_bad_line_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write(tmp_path / "c.jsonl", PAGE)
    long = write(tmp_path / "long.jsonl", QUESTION | {"question": "Who? " * 100})
    words = [*EVAL, "--model", str(model), "--output", str(tmp_path / "out"), "--env-args"]
    error = refusal(capsys, *words, f"questions={long}", f"corpus={corpus}", "template=question")
    assert "the prompt of episode 0 (question q1) has 501 tokens, not 1 to 255" in error
    assert "context 256); give a model with a longer context, or --overlong-prompts skip " in error
    assert "(training only) to leave such tasks out" in error
    train = ["train", "miniworld", *EVAL[1:3], *words[6:], "template=question"]
    files = (f"questions={long}", f"corpus={corpus}")
    error = refusal(capsys, *train, *files, "--max-response", "100", "--quiet")
    assert "501 tokens, not 1 to 96" in error
    assert "give a higher --max-prompt, or --overlong-prompts skip" in error
    assert "(--max-prompt 96 is the preset miniworld's)" in error
    bad = write(tmp_path / "bad.jsonl", QUESTION, QUESTION)
    error = refusal(capsys, *words, f"questions={bad}", f"corpus={corpus}")
    assert f"{bad}:2: the id 'q1' is that of line 1; every id must be unique" in error


# --- what a passage says --------------------------------------------------------------------------


SAID = {
    "research": ("<think>look", "<search>a</search>", "</think><answer>\\boxed{F. 0}</answer>"),
    "r1-searcher": ("look", "<|begin_of_query|>a<|end_of_query|>", "</think><answer>F. 0</answer>"),
    "search-r1": ("look", "<search>a</search>", "<answer>F. 0</answer>"),
    "tool-calls": ("look", write_call("search", {"query": "a"}), "\\boxed{F. 0}"),
    "recall": ("look</think>", write_call("wikipedia_search", {"query": "a"}), "\\boxed{F. 0}"),
}


def played(renderer: Renderer, rules: str, engine: Library) -> Trajectory:
    """Two searches and an answer, said whatever the passages say."""
    before, searching, answering = SAID[rules]
    turns = [before + searching, searching, answering]
    end = min(renderer.end_ids)
    script = iter([renderer.encode_text(turn) for turn in turns])
    environments = make_environments(
        "research_env:SearchQA-v0",
        1,
        {"dataset": DATASET, "retriever": engine, "protocol": rules, "template": "question"},
    )
    scripted = ScriptedEngine(lambda *_: [*next(script), end], renderer, max_context=10**6)
    sampling = SamplingConfig(
        temperature=1.0, max_prompt=1_000, max_response=900_000, max_turn_tokens=200
    )
    [trajectory] = collect(scripted, environments, renderer, [(0, 0)], sampling)
    environments.close()
    return trajectory


@settings(deadline=None, max_examples=60)
@given(
    pages=st.lists(st.tuples(PASSAGE, PASSAGE), max_size=3),
    rules=st.sampled_from(sorted(PROTOCOLS)),
    merges=st.booleans(),
    chat=st.booleans(),
)
def test_no_passage_changes_what_is_learned_from_or_what_it_earns(
    pages: list[tuple[str, str]], rules: str, merges: bool, chat: bool
) -> None:
    renderer = make_renderer(byte_tokenizer(merges=merges), chat_template=chat)
    hostile = played(renderer, rules, Library(pages))
    blank = played(renderer, rules, Library([("", "")] * len(pages)))
    assert hostile.reward == blank.reward
    assert hostile.stop_reason == blank.stop_reason
    told, expected = (make_batch([Group(0, [t])]).targets.tolist() for t in (hostile, blank))
    assert told == expected  # the tokens that are learned: those that the policy wrote
    assert renderer.decode(told).count(SAID[rules][1]) == 2
    special_names = set(renderer.tokenizer.all_special_tokens)
    for segment in hostile.segments:
        if segment.provenance == "observation":
            assert renderer.decode(segment.tokens) == segment.text
            names = renderer.tokenizer.convert_ids_to_tokens(list(segment.tokens))
            frame = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
            framed = chat and PROTOCOLS[rules].tool_format is not None
            assert [n for n in names if n in special_names] == (frame if framed else [])


def test_the_hint_after_an_invalid_action_is_no_action_either() -> None:
    renderer = make_renderer(byte_tokenizer())
    script = iter(["nonsense", "<answer>x</answer>"])
    environments = make_environments(
        "research_env:SearchQA-v0",
        1,
        {"dataset": DATASET, "retriever": Library([("", "")]), "protocol": "search-r1"},
    )
    scripted = ScriptedEngine(
        lambda *_: [*renderer.encode_text(next(script)), min(renderer.end_ids)], renderer, 10**5
    )
    sampling = SamplingConfig(temperature=1.0, max_prompt=9_000, max_response=9_000)
    [trajectory] = collect(scripted, environments, renderer, [(0, 0)], sampling)
    provenances = [segment.provenance for segment in trajectory.segments]
    assert provenances == ["prompt", "action", "observation", "action"]
    assert trajectory.segments[2].text == SEARCH_R1.hint
    assert RESEARCH.hint is None
