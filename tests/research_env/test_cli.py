from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from research_agent.settings import parse_settings
from research_env.cli import main
from research_env.commands.shared import parse_env_args
from research_env.retrieval.retry import Retry
from tests.research_env.fakes import Terminal


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    rows = [
        {"id": "c", "title": "Citibank", "text": "Citibank was founded in [red]1812[/red]."},
        {"id": "m", "title": "Madison", "text": "Madison was president from 1809 to 1817."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


@pytest.mark.parametrize("command", [[], ["index"], ["search"], ["play"], ["datasets"]])
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(*command, "--help") == 0
    shown = capsys.readouterr().out
    assert "For example" in shown
    assert f"research-env {' '.join(command)}".strip() in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["play", "ReSearch-MuSiQe-v0"], "Did you mean 'ReSearch-MuSiQue-v0'?"),
        (["play", "research_env:research-musique-v0"], "Did you mean 'ReSearch-MuSiQue-v0'?"),
        (["play", "no id"], "'no id' is no environment: Malformed"),
        (["play", "no_module:Env-v0"], "'no_module:Env-v0' is no environment: No module"),
        (["search", "x", "--dataset", "MuSiQeu"], "Did you mean 'musique'?"),
        (["search", "x", "--dataset", "musique+hotpotqua"], "Did you mean 'hotpotqa'?"),
        (["datasets", "prepare", "HOTPOT"], "Did you mean 'hotpotqa'?"),
        (["search", "x", "--retriever", "embeded:i"], "Did you mean 'embedded:...'?"),
    ],
)
def test_a_mistyped_name_suggests_the_near_one_and_asks_no_hub(
    command: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert refused(*command) == 2
    assert message in capsys.readouterr().err


def test_convert_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("datasets", "convert", "--output", "mine") == 2
    assert "give the files to convert, such as dev.parquet wiki.tsv" in capsys.readouterr().err


def test_a_search_says_once_that_it_waits_for_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Retry, "pause", lambda _, attempt, *rest: 0.0 if attempt < 2 else None)
    with socket.socket() as unused:  # bound, but it does not listen: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/retrieve"
        assert refused("search", "x", "--retriever", url) == 2
    said, *_ = lines = capsys.readouterr().err.splitlines()
    assert said.startswith(f"research-env: {url}: ConnectError")
    assert said.endswith(" s, in case the server is still starting")
    assert sum("trying again" in line for line in lines) == 1


def test_an_index_is_checked_on_request(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "index"
    main(["index", "--corpus", str(corpus), "--to", str(folder)])
    capsys.readouterr()
    main(["index", "--check", "--to", str(folder)])
    assert capsys.readouterr().out == f"2 passages in {folder}: all checksums hold\n"
    main(["index", "--check", "--to", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "index": str(folder),
        "passages": 2,
        "checked": True,
    }
    data = bytearray((folder / "passages.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "passages.bin").write_bytes(data)
    assert refused("index", "--check", "--to", f"embedded:{folder}") == 2
    assert "passages.bin has changed" in capsys.readouterr().err
    assert refused("index", "--check") == 2
    assert "--check needs --to DIR" in capsys.readouterr().err


def test_index_then_search(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "index"
    main(["index", "--corpus", str(corpus), "--to", str(folder)])
    assert f"2 passages of passages.jsonl in {folder}" in capsys.readouterr().out
    main(["index", "--corpus", str(corpus), "--to", f"embedded:{folder}", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["passages"], summary["built"], summary["index"]) == (2, False, str(folder))
    main(["search", "founded Citibank", "--retriever", f"embedded:{folder}"])
    shown = capsys.readouterr().out
    assert "Citibank was founded in [red]1812[/red]." in shown
    assert "Madison" not in shown


def test_in_a_terminal_a_progress_bar_tells_the_rate(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    main(["index", "--corpus", str(corpus), "--to", str(tmp_path / "index")])
    assert isinstance(sys.stderr, Terminal)
    shown = sys.stderr.getvalue()
    assert "indexing passages.jsonl" in shown
    assert "2/2" in shown
    assert "passages/s" in shown


def test_search_as_json_a_line_a_query(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", "citibank", "president 1812", "the", "--corpus", str(corpus), "--json"])
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert [hit["id"] for hit in first["hits"]] == ["c"]
    assert {hit["id"] for hit in second["hits"]} == {"c", "m"}
    assert third == {"query": "the", "hits": []}
    assert set(first["hits"][0]) == {"score", "id", "title", "text"}


def test_an_index_of_the_command_is_the_one_that_an_environment_uses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["index", "--dataset", "miniworld", "--json"])
    index = Path(json.loads(capsys.readouterr().out)["index"])
    made = (index / "meta.json").stat().st_mtime_ns
    main(["search", "anything", "--dataset", "miniworld", "--json"])
    assert [path.name for path in index.parent.iterdir() if path.is_dir()] == [index.name]
    assert (index / "meta.json").stat().st_mtime_ns == made


def test_datasets_lists_what_is_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "bamboogle"
    folder.mkdir(parents=True)
    row = {"id": "b", "question": "Who?", "answers": ["Ann"], "split": "test"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    main(["datasets", "list", "--json"])
    listed = capsys.readouterr().out
    main(["datasets", "--json"])
    shown = capsys.readouterr().out
    assert shown == listed
    told = {row["name"]: row for row in json.loads(shown)}
    assert told["bamboogle"]["found"] == str(folder)
    assert told["bamboogle"]["splits"] == {"test": 1}
    assert told["musique"] == {"name": "musique", "found": None, "splits": {}, "passages": None}
    assert told["miniworld"]["passages"] >= 1_000
    main(["datasets"])
    assert "RESEARCH_DATA" in capsys.readouterr().out


def test_a_damaged_set_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = '{"id": "b", "question": "Who?", "answers": ["Ann"], "split": "test"}\n'
    for name, text in (("musique", "{"), ("bamboogle", row)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    main(["datasets", "--json"])
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert "questions.jsonl:1" in told["musique"]["problem"]
    assert told["bamboogle"]["splits"] == {"test": 1}
    monkeypatch.setenv("COLUMNS", "400")
    main(["datasets"])
    assert told["musique"]["problem"] in " ".join(capsys.readouterr().out.split())


def test_a_conversion_says_what_it_wrote_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "b", "question": "Who?", "answers": ["Ann"], "split": "dev"}
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps(row) + "\n", encoding="utf-8")
    main(["datasets", "convert", str(source), "--output", str(tmp_path / "made"), "--json"])
    told = json.loads(capsys.readouterr().out)
    wrote = {"questions": {"dev": 1}, "passages": 0, "left_out": 0}
    assert told == {"source": str(source), **wrote}


def test_datasets_says_that_research_data_names_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    main(["datasets"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"RESEARCH_DATA is {tmp_path / 'data'}, which is no folder" in shown
    assert "not in RESEARCH_DATA; the hub is asked" in shown
    (tmp_path / "data").mkdir()
    main(["datasets"])
    assert "which is no folder" not in capsys.readouterr().out
    monkeypatch.delenv("RESEARCH_DATA")
    main(["datasets"])
    shown = capsys.readouterr().out
    assert "RESEARCH_DATA is not set" in shown
    assert "not here: set RESEARCH_DATA" in shown


def test_play_with_piped_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (
        "<think>\nI look it up.\n</think>\n<search>city</search>\n\n"
        "<think>x</think>\n<answer>\\boxed{1}</answer>"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(written))
    main(["play", "ReSearch-MiniWorld-v0", "--env-args", "split=dev", "top_k=2", "--seed", "3"])
    shown = capsys.readouterr().out
    assert "<result>" in shown
    assert "reward 0.1" in shown  # the format holds, the answer is wrong
    assert "'searches': 1.0" in shown
    assert "stop_reason: answer" in shown


def test_arguments_of_the_environment_are_read_as_research_agent_reads_them() -> None:
    words = ["split=none", "max_turns=None", "flag=TRUE", "top_k=3", "hops=[2, 3]", "text=x=y"]
    settings = {"split": None, "max_turns": None, "flag": True, "top_k": 3, "hops": [2, 3]}
    assert parse_env_args(words) == parse_settings(words) == {**settings, "text": "x=y"}


def test_play_when_the_input_ends_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("<search>city</search>\n"))
    main(["play", "ReSearch-MiniWorld-v0"])
    assert "the input ended before the episode did" in capsys.readouterr().out


def test_play_refuses_what_is_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"<search>caf\xe9</search>\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stream)
    with pytest.raises(SystemExit):
        main(["play", "ReSearch-MiniWorld-v0"])
    assert "the input is no utf-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "x"], "either --dataset NAME or --corpus FILE"),
        (["search", "--dataset", "miniworld"], "give a query"),
        (["search", "x", "--dataset", "minworld"], "unknown data set 'minworld'"),
        (["search", "x", "--corpus", "none.jsonl"], "no file none.jsonl"),
        (["search", "x", "--retriever", "embedded:none"], "is no index"),
        (["search", "x", "--retriever", "solr:x"], "unknown retriever 'solr:x'"),
        (["search", "x", "--dataset", "miniworld", "--top-k", "0"], "top_k=0"),
        (["index"], "either --dataset NAME or --corpus FILE"),
        (["index", "--dataset", "miniworld", "--to", "solr:x"], "place for an index 'solr:x'"),
        (["index", "--dataset", "miniworld", "--to", "/dev/null/x"], "File exists: '/dev/null'"),
        (["play", "CartPole-v9"], "unknown environment 'CartPole-v9'; known: ReSearch"),
        (["play", "ReSearch-MiniWorld-v0", "--env-args", "split"], "KEY=VALUE, not 'split'"),
        (["play", "ReSearch-MiniWorld-v0", "--env-args", "split=x"], "'x'; known: dev, train"),
        (["play", "SearchQA-v0"], "needs questions=PATH"),
        (
            ["play", "ReSearch-MiniWorld-v0", "--seed", "-1"],
            "a seed is an integer from 0 on, not -1",
        ),
        *(
            (
                ["serve", "--dataset", "miniworld", "--port", "99999", "--top-k", str(top_k)],
                f"--top-k is a number from 1 to 1000, not {top_k}",
            )
            for top_k in (0, -1, 1001)
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("research-env: ")
    assert message in line


@pytest.mark.parametrize("content", [b"[" * 200_000, b"{", b"\xff", b"[1]", None])
def test_an_invalid_mapping_file_is_refused_by_name(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mapping.json"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    place = "elasticsearch://localhost:1/x"
    assert refused("index", "--dataset", "miniworld", "--to", place, "--mapping", str(file)) == 2
    assert f"{file}" in capsys.readouterr().err


def test_ctrl_c_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "research_env.cli", "play", "ReSearch-MiniWorld-v0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "research-env: interrupted\n"
