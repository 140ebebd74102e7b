"""``datasets prepare`` with the real client of the hub, against a hub on this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gymnasium as gym
import pytest

import research_env  # noqa: F401  (registers the ids)
from research_env.cli import main
from research_env.datasets import load_dataset, read_questions
from research_env.datasets.catalog import HUB_SOURCES
from research_env.datasets.hub import prepare
from research_env.errors import DataError, DataNotFoundError, UnknownNameError
from tests.research_env.datasets.test_catalog import (
    BAMBOOGLE,
    HOTPOTQA_HUB,
    MUSIQUE,
    NQ,
    POPQA,
    TWO_WIKI_HUB,
)
from tests.research_env.fakes import Engine, Terminal
from tests.research_env.servers import Call, Reply, Server, as_json, serving

constants = pytest.importorskip("huggingface_hub.constants")
REVISION = "0123456789abcdef0123456789abcdef01234567"
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
WIKI18 = [
    {"id": "0", "contents": '"Evan Morris"\nEvan Morris was a lobbyist for Genentech.'},
    {"id": "1", "contents": '"Horatio Hale"\nconsisted of an Algonkin vocabulary, which he'},
    {"id": "2", "contents": '"Empty"\n'},
]


# --- a hub ---------------------------------------------------------------------------------------


def json_lines(*records: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(*records: Mapping[str, Any]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), file)
    return file.getvalue()


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name.replace("_jsonl", ".jsonl")), content)
    return file.getvalue()


def nq(split: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return NQ | {"id": f"{split}_{number}"} | more


def published() -> dict[str, dict[str, bytes]]:
    """Each repository with its files, named and written as they are on the hub."""
    splits = ("train", "dev", "test")
    return {
        "dgslibisey/MuSiQue": {
            "musique_ans_v1.0_train.jsonl": json_lines(MUSIQUE | {"id": "2hop__1"}),
            "musique_ans_v1.0_dev.jsonl": json_lines(MUSIQUE),
        },
        "hotpotqa/hotpot_qa": {
            "distractor/train-00000-of-00002.parquet": parquet(HOTPOTQA_HUB | {"id": "a"}),
            "distractor/train-00001-of-00002.parquet": parquet(HOTPOTQA_HUB | {"id": "b"}),
            "distractor/validation-00000-of-00001.parquet": parquet(HOTPOTQA_HUB | {"id": "c"}),
            "fullwiki/train-00000-of-00002.parquet": b"another configuration",
        },
        "framolfese/2WikiMultihopQA": {
            "data/train-00000-of-00001.parquet": parquet(TWO_WIKI_HUB | {"id": "x"}),
            "data/validation-00000-of-00001.parquet": parquet(TWO_WIKI_HUB),
        },
        "chiayewken/bamboogle": {
            "data/test-00000-of-00001-fd9def31e0acf72c.parquet": parquet(BAMBOOGLE)
        },
        FLASHRAG: {
            **{f"nq/{split}.jsonl": json_lines(nq(split), nq(split, 1)) for split in splits},
            **{f"triviaqa/{split}.jsonl": json_lines(nq(split)) for split in splits},
            "popqa/test.jsonl": json_lines(POPQA),
            "hotpotqa/train.jsonl": b"not asked for",
            "retrieval-corpus/wiki18_100w.zip": zipped(wiki18_100w_jsonl=json_lines(*WIKI18)),
        },
        "PeterJinGo/wiki-18-corpus": {
            "wiki-18.jsonl.gz": gzip.compress(json_lines(*WIKI18), mtime=0)
        },
    }


@dataclass
class Hub:
    """The routes of the hub that are needed: what a repository holds, and its files."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=published)
    fail: Callable[[Call], Reply | None] = lambda call: None

    def __call__(self, call: Call) -> Reply:
        parts = unquote(urlsplit(call.path).path).split("/")
        if parts[1] == "api":  # /api/datasets/OWNER/NAME/revision/main
            files = self.repositories.get("/".join(parts[3:5]))
            if files is None or parts[5:] != ["revision", "main"]:
                error = {"X-Error-Code": "RepoNotFound"}
                return as_json({"error": "Repository not found"}, 404, **error)
            siblings = [self.sibling(name, content) for name, content in files.items()]
            return as_json({"id": "/".join(parts[3:5]), "sha": REVISION, "siblings": siblings})
        assert parts[4:6] == ["resolve", REVISION]  # /datasets/OWNER/NAME/resolve/REVISION/FILE
        if (failure := self.fail(call)) is not None:
            return failure
        content = self.repositories["/".join(parts[2:4])]["/".join(parts[6:])]
        etag = hashlib.sha256(content).hexdigest()
        return Reply(200, content, {"X-Repo-Commit": REVISION, "ETag": f'"{etag}"'})

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        told = {"rfilename": name, "size": len(content), "blobId": git}
        if len(content) > 200:  # so that some are in git itself
            sha256 = hashlib.sha256(content).hexdigest()
            told["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return told


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RESEARCH_DATA", raising=False)
    use(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    wiki18 = published()[FLASHRAG]["retrieval-corpus/wiki18_100w.zip"]
    known = {"retrieval-corpus/wiki18_100w.zip": hashlib.sha256(wiki18).hexdigest()}
    ours = replace(HUB_SOURCES["wiki18"], sha256=known)
    monkeypatch.setitem(HUB_SOURCES, "wiki18", ours)


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does where it is set before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)


@contextmanager
def a_hub(monkeypatch: pytest.MonkeyPatch, answer: Hub | None = None) -> Iterator[Server]:
    with serving(answer or Hub()) as server:
        use(monkeypatch, server.url)
        yield server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with a_hub(monkeypatch) as server:
        yield server


def is_download(call: Call) -> bool:
    return call.method == "GET" and "resolve" in call.path


def passages(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


# --- what is prepared ----------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("name", "questions", "passages"),
    [
        ("musique", {"train": 1, "dev": 1}, 3),
        ("hotpotqa", {"train": 2, "dev": 1}, 2),
        ("2wiki", {"train": 1, "dev": 1}, 2),
        ("bamboogle", {"test": 1}, 0),
        ("nq", {"train": 2, "dev": 2, "test": 2}, 0),
        ("triviaqa", {"train": 1, "dev": 1, "test": 1}, 0),
        ("popqa", {"test": 1}, 0),
    ],
)
def test_every_set_is_prepared_and_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, questions: dict[str, int],
    passages: int,
) -> None:  # fmt: skip
    done = prepare(name, tmp_path / "data")
    assert (done.manifest["questions"], done.manifest["passages"]) == (questions, passages)
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    for split, count in questions.items():
        data = load_dataset(name, split=split)
        assert len(data.questions) == count
        assert (data.corpus is None) == (passages == 0)
    assert sorted(done.manifest["outputs"]) == sorted(
        path.name for path in done.folder.iterdir() if path.name != "manifest.json"
    )


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", ["wiki18", "wiki18-search-r1"])
def test_wikipedia_is_a_corpus(tmp_path: Path, name: str) -> None:
    done = prepare(name, tmp_path)
    assert (done.folder, done.manifest["questions"]) == (tmp_path / name, {})
    assert passages(done.folder / "corpus.jsonl.gz") == [
        {"id": "0", "title": "Evan Morris", "text": "Evan Morris was a lobbyist for Genentech."},
        {
            "id": "1",
            "title": "Horatio Hale",
            "text": "consisted of an Algonkin vocabulary, which he",
        },
    ]
    assert not (done.folder / "questions.jsonl.gz").exists()


@pytest.mark.usefixtures("server")
def test_the_manifest(tmp_path: Path) -> None:
    folder = prepare("nq", tmp_path).folder
    files = published()[FLASHRAG]
    made = (folder / "questions.jsonl.gz").read_bytes()
    assert json.loads((folder / "manifest.json").read_text()) == {
        "format": 1,
        "name": "nq",
        "repository": FLASHRAG,
        "revision": REVISION,
        "sources": {
            f"nq/{split}.jsonl": sha256(files[f"nq/{split}.jsonl"])
            for split in ("train", "dev", "test")
        },
        "outputs": {"questions.jsonl.gz": sha256(made)},
        "questions": {"train": 2, "dev": 2, "test": 2},
        "passages": 0,
    }
    first, *_ = read_questions(folder / "questions.jsonl.gz")
    assert (first.id, first.split, first.answers) == (
        "nq_train_0",
        "train",
        ("Wilhelm Conrad Röntgen",),
    )


@pytest.mark.usefixtures("server")
def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (prepare("musique", tmp_path / name).folder for name in ("one", "other"))
    names = ["corpus.jsonl.gz", "manifest.json", "questions.jsonl.gz"]
    assert sorted(path.name for path in one.iterdir()) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "corpus.jsonl.gz").read_bytes()[4:8] == bytes(4)  # gzip's place for the time


@pytest.mark.usefixtures("server")
def test_the_mixture_of_search_r1_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nq", "hotpotqa", "wiki18"):
        prepare(name, tmp_path)
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path))
    settings = {"dataset": "nq+hotpotqa", "protocol": "search-r1"}
    env: Any = gym.make("SearchQA-v0", retriever=Engine(), **settings)  # type: ignore[arg-type]
    ids = {env.reset(seed=0, options={"episode": n})[1]["question_id"] for n in range(4)}
    assert ids == {"nq_train_0", "nq_train_1", "a", "b"}
    wikipedia = str(tmp_path / "wiki18/corpus.jsonl.gz")
    env = gym.make("SearchQA-v0", corpus=wikipedia, **settings)  # type: ignore[arg-type]
    env.reset(seed=0)
    *_, info = env.step("<search>lobbyist for Genentech</search>")
    assert info["passage_titles"] == ("Evan Morris",)


def test_a_set_is_fetched_where_it_is_first_used(server: Server) -> None:
    assert [q.id for q in load_dataset("popqa", split="test").questions] == ["popqa_test_0"]
    asked = len(server.calls)
    assert load_dataset("popqa", split="test").questions
    assert len(server.calls) == asked


# --- repeated and interrupted ---------------------------------------------------------------------


def test_the_second_call_does_nothing(tmp_path: Path, server: Server) -> None:
    first = prepare("nq", tmp_path)
    asked, made = len(server.calls), (first.folder / "manifest.json").stat().st_mtime_ns
    second = prepare("nq", tmp_path)
    assert (first.made, second.made) == (True, False)
    assert second.manifest == first.manifest
    assert len(server.calls) == asked
    assert (first.folder / "manifest.json").stat().st_mtime_ns == made


def test_one_of_several_calls_at_once_does_the_work(tmp_path: Path, server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: prepare("musique", tmp_path), range(4)))
    assert sorted(each.made for each in done) == [False, False, False, True]
    assert sum(is_download(call) for call in server.calls) == 2  # each file once


COMMAND = [sys.executable, "-m", "research_env.cli", "datasets", "prepare"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def test_a_killed_download_leaves_finished_files_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, stop = threading.Event(), threading.Event()

    def half(call: Call) -> Reply | None:
        if not (is_download(call) and "nq/dev" in call.path):
            return None
        waiting.set()
        stop.wait(60)
        return Reply(200, b"", cut=0)

    with serving(Hub(fail=half)) as server:
        command = [*COMMAND, "nq", "--output", str(tmp_path)]
        process = subprocess.Popen(command, env=environment(HF_ENDPOINT=server.url))
        try:
            assert waiting.wait(60)
        finally:
            process.kill()
            process.wait()
            stop.set()
    assert not (tmp_path / "nq").exists()
    downloads = tmp_path / "downloads/nq"
    finished = {path.name for path in (downloads / "nq").iterdir()}
    with a_hub(monkeypatch) as server:
        assert prepare("nq", tmp_path).made
    fetched = [call.path for call in server.calls if is_download(call)]
    names = {f"{split}.jsonl" for split in ("train", "dev", "test")}
    assert "dev.jsonl" not in finished
    assert {Path(path).name for path in fetched} == names - finished
    assert [path.name for path in downloads.iterdir()] == ["nq"]  # nothing of the killed one


def test_an_interrupted_conversion_leaves_nothing_half(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("research_env.datasets.hub.convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("nq", tmp_path)
    assert not [path for path in tmp_path.iterdir() if "nq" in path.name and path.is_dir()]
    fetched = len(server.calls)
    assert prepare("nq", tmp_path).made
    assert not any(map(is_download, server.calls[fetched:]))


# --- checksums -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "digits"),
    [("popqa", "popqa/test.jsonl", 40), ("nq", "nq/train.jsonl", 64)],
    ids=["a file in git", "a file in LFS"],
)
def test_a_file_with_another_digest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, digits: int
) -> None:
    content = published()[FLASHRAG][file]
    wrong = content[:-2] + b" " + content[-1:]  # as long as it should be

    def other(call: Call) -> Reply | None:
        return Reply(200, wrong) if is_download(call) and call.path.endswith(file) else None

    told = rf"{file} is damaged: its digest is \w{{{digits}}}, and the hub says \w{{{digits}}}"
    with a_hub(monkeypatch, Hub(fail=other)), pytest.raises(DataError, match=told):
        prepare(name, tmp_path)
    assert not (tmp_path / name).exists()
    with a_hub(monkeypatch):  # the next run fetches the file again
        assert prepare(name, tmp_path).manifest["sources"][file] == sha256(content)


def test_another_wikipedia_than_the_known_one_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Hub()
    changed.repositories[FLASHRAG]["retrieval-corpus/wiki18_100w.zip"] += b"more"
    with a_hub(monkeypatch, changed) as server:
        with pytest.raises(DataError, match="is not the known file: its sha256 is"):
            prepare("wiki18", tmp_path)
        assert not any(map(is_download, server.calls))


@pytest.mark.usefixtures("server")
def test_a_prepared_set_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = prepare("nq", tmp_path).folder
    questions = folder / "questions.jsonl.gz"
    questions.write_bytes(questions.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"questions.jsonl.gz is .*, but manifest.json says"):
        prepare("nq", tmp_path)
    questions.unlink()
    with pytest.raises(DataError, match=r"questions.jsonl.gz is None, but manifest.json says"):
        prepare("nq", tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "was not prepared by this command"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": 9, "outputs": {}}', "has format 9, not 1"),
    ],
)
def test_a_folder_that_prepare_did_not_make_is_left_alone(
    tmp_path: Path, server: Server, manifest: str | None, message: str
) -> None:
    mine = tmp_path / "nq/questions.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    if manifest is not None:
        (tmp_path / "nq/manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=f"{message}.*move .*/nq away"):
        prepare("nq", tmp_path)
    assert mine.read_text() == "mine"
    assert not server.calls


# --- without a hub -------------------------------------------------------------------------------


def test_offline_the_command_says_what_to_put_where(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*COMMAND, "nq", "--output", str(tmp_path)],
        env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "the hub did not give 'RUC-NLPIR/FlashRAG_datasets': OfflineModeIsEnabled" in ran.stderr
    where = tmp_path / "downloads/nq"
    names = "nq/train.jsonl, nq/dev.jsonl, nq/test.jsonl"
    assert f"put its files {names} under these names into {where}" in ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hotpotqa", "nq", "wiki18"])
def test_files_put_there_by_hand_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(DataNotFoundError, match=r"the hub did not give .*Connect"):
        prepare(name, tmp_path)
    source = HUB_SOURCES[name]
    for file, content in published()[source.repository].items():
        path = tmp_path / "downloads" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    done = prepare(name, tmp_path)
    assert done.manifest["revision"] is None
    with a_hub(monkeypatch):
        fetched = prepare(name, tmp_path / "fetched")
    assert fetched.manifest == {**done.manifest, "revision": REVISION}


def test_the_known_sum_holds_without_a_hub_too(tmp_path: Path) -> None:
    path = tmp_path / "downloads/wiki18/retrieval-corpus/wiki18_100w.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(zipped(wiki18_100w_jsonl=json_lines(WIKI18[0])))
    with pytest.raises(DataError, match="is damaged"):
        prepare("wiki18", tmp_path)
    assert not (tmp_path / "wiki18").exists()


def test_a_repository_without_the_known_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = Hub({FLASHRAG: {"nq/all.jsonl": b"{}"}})
    with a_hub(monkeypatch, renamed):
        with pytest.raises(
            DataNotFoundError, match=r"no longer has the files nq/train.*nq/all\.jsonl"
        ):
            prepare("nq", tmp_path)
        with pytest.raises(DataNotFoundError, match="RepositoryNotFound"):
            prepare("musique", tmp_path)


def test_names_that_leave_the_folder_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("../../train.parquet", "/tmp/train.parquet", "validation.parquet")
    hostile = Hub({"framolfese/2WikiMultihopQA": dict.fromkeys(names, parquet(TWO_WIKI_HUB))})
    with (
        a_hub(monkeypatch, hostile),
        pytest.raises(DataNotFoundError, match="no longer has the files"),
    ):
        prepare("2wiki", tmp_path)


def test_the_documented_tables_name_every_set() -> None:
    text = (Path(__file__).parents[3] / "docs/how-to/data.md").read_text(encoding="utf-8")
    table, _, licenses = text.partition("## Licenses")
    rows = re.findall(r"^\| `([^`]+)` \|.*?\| `([^`]+)`", table, flags=re.MULTILINE)
    assert dict(rows) == {name: source.repository for name, source in HUB_SOURCES.items()}
    named = " ".join(re.findall(r"^\| (`.*?) \|", licenses, flags=re.MULTILINE))
    assert dict(rows).keys() <= set(re.findall(r"`([^`]+)`", named))


def test_an_unknown_set_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'wiki2018'; known: .*Did you mean 'wiki18'"):
        prepare("wiki2018", tmp_path)


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nq/train.jsonl", json_lines(nq("train")) + b'{"id": ', "what follows record 1 cannot"),
        ("nq/train.jsonl", json_lines(nq("train")) + b"\xff\n", "what follows record 1 cannot"),
        ("nq/train.jsonl", json_lines(nq("train")) + b"[1]\n", "record 1 .*needed, not list"),
        ("nq/train.jsonl", b"[" * 100_000, "what follows record 0 cannot"),
        ("wiki18-search-r1", gzip.compress(b" " * (17 << 20), 1), "a line of over 16 MiB"),
        ("nq/train.jsonl", json_lines({"id": "1"}), "record 1: not in the known format"),
        ("nq/train.jsonl", json_lines(nq("x", question=None)), "record 1: not in the known format"),
        ("wiki18", b"PK no archive", "what follows record 0 cannot"),
        ("wiki18", zipped(one_jsonl=b"", two_jsonl=b""), "one .jsonl is needed in the archive"),
        ("wiki18", zipped(one_jsonl=json_lines(*WIKI18))[:-9], "what follows record 0 cannot"),
        ("wiki18-search-r1", gzip.compress(json_lines(*WIKI18))[:-9], "cannot be read"),
        ("bamboogle", b"PAR1 no table", "what follows record 0 cannot"),
        ("bamboogle", parquet({"Question": "Who?"}), "record 1: not in the known format"),
    ],
)
def test_a_damaged_file_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    damaged = Hub()
    name, _, file = name.partition("/")
    source = HUB_SOURCES[name]
    files = damaged.repositories[source.repository]
    held = [path for path in files if path.startswith(("retrieval", "wiki-18", "data"))]
    files[f"{name}/{file}" if file else held[0]] = content
    monkeypatch.setitem(HUB_SOURCES, name, replace(source, sha256={}))
    with a_hub(monkeypatch, damaged), pytest.raises(DataError, match=message):
        prepare(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [
        "downloads"
    ]


MEASURE = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from research_env.datasets.catalog import HUB_SOURCES
from research_env.datasets.hub import prepare
HUB_SOURCES["wiki18"] = replace(HUB_SOURCES["wiki18"], sha256={})
import huggingface_hub
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(prepare("wiki18", Path(sys.argv[1])).manifest["passages"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_corpus_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "downloads/wiki18/retrieval-corpus/wiki18_100w.zip"
    path.parent.mkdir(parents=True)
    text = "word " * 2_000
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("wiki18_100w.jsonl", "w") as file,
    ):
        for number in range(6_000):
            file.write(json_lines({"id": str(number), "contents": f'"T"\n{text}'}))
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, kilobytes = map(int, told.stdout.split())
    assert count == 6_000  # 60 MB
    assert kilobytes < 20_000


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path))
    main(["datasets", "prepare", "nq", "wiki18"])
    shown = capsys.readouterr()
    assert f"nq in {tmp_path}/nq: questions 2 train, 2 dev, 2 test; 0 passages\n" in shown.out
    corpus = f"{tmp_path}/wiki18/corpus.jsonl.gz"
    assert f"research-env index --corpus {corpus} --to elasticsearch://" in shown.out
    assert "RESEARCH_DATA" not in shown.err
    main(["datasets", "prepare", "nq"])
    assert "it was there already, its checksums hold" in capsys.readouterr().out
    main(["datasets", "prepare", "popqa", "--json", "--output", str(tmp_path / "other")])
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["folder"], told["made"]) == (str(tmp_path / "other/popqa"), True)
    assert f"export RESEARCH_DATA={tmp_path / 'other'}" in shown.err
    main(["datasets", "--json"])
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["nq"]["splits"] == {"train": 2, "dev": 2, "test": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "give the names of data sets: musique"), (["nq", "nqq"], "Did you mean 'nq'")],
)
def test_the_command_refuses_names_before_it_fetches(
    server: Server, capsys: pytest.CaptureFixture[str], names: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["datasets", "prepare", *names])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not server.calls


def test_in_a_terminal_a_bar_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Hub()
    many.repositories[FLASHRAG]["popqa/test.jsonl"] = json_lines(
        *(POPQA | {"id": f"test_{n}"} for n in range(2_500))
    )
    with a_hub(monkeypatch, many):
        monkeypatch.setattr("sys.stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        prepare("popqa", tmp_path)
        assert isinstance(sys.stderr, Terminal)
        assert "converting popqa" in (shown := sys.stderr.getvalue())
        assert "2,000 records" in shown
