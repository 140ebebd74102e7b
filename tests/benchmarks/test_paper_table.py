"""The table: cells that are played once, reused, and refused; and the forms it is printed in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from rich.console import Console

from benchmarks import paper_table
from benchmarks.baselines import miniature, rendering
from benchmarks.baselines.published import DATASETS, published
from benchmarks.baselines.rendering import Cell, Judged, Results, Row, read_judge
from benchmarks.baselines.sampler import Sampler
from research_agent.errors import ConfigError, PredictionsError
from research_env.cli import main as research_env
from research_env.errors import DataError
from tests.research_agent.conftest import byte_tokenizer, tiny_qwen2
from tests.research_env.servers import Call, Reply, as_json, serving
from tests.test_readme import blocks, commands

WHOLE = [f"q{i}" for i in range(3)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three questions of two data sets, and their passages."""
    folder = tmp_path / "data"
    for name in ("musique", "hotpotqa"):
        (folder / name).mkdir(parents=True)
        questions = [
            {"id": i, "question": f"Who is Ann {i}?", "answers": ["Ann"], "supporting": ["p1"],
             "hops": 2, "split": "dev"}
            for i in WHOLE
        ]  # fmt: skip
        passages = [{"id": f"p{i}", "title": f"Ann {i}", "text": "She is."} for i in range(3)]
        for file, records in (("questions", questions), ("corpus", passages)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / name / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("RESEARCH_DATA", str(folder))
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random model of a few thousand weights."""
    folder = tmp_path / "tiny"
    tiny_qwen2(context=4096).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def words(model: Path, output: Path, *more: str) -> list[str]:
    limits = "--max-prompt 3900 --max-response 60 --max-turn-tokens 12 --max-in-flight 4 --top-k 2"
    return [
        *("--models", f"tiny={model}", "--datasets", "musique", "hotpotqa"),
        *(*limits.split(), "--dtype", "float32", "--device", "cpu", "--quiet"),
        *("--output", str(output), *more),
    ]


def cell_files(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("predictions.jsonl"))
    }


def test_every_cell_is_played_once_and_then_found_without_loading_a_model(
    data: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "table"
    methods = ("--methods", "naive_generation", "iter_retgen", "search_agent")
    trained = ("--trained", f"ReSearch-Qwen-7B={model}")
    paper_table.main(words(model, output, *methods, *trained, "--format", "json"))
    table = json.loads(capsys.readouterr().out)
    assert json.loads((output / "table.json").read_text()) == table
    assert table["datasets"] == ["MuSiQue", "HotpotQA"]
    assert [row["label"] for row in table["rows"]] == [
        "Naive Generation", "Iter-RetGen", "Search agent, zero-shot", "ReSearch-Qwen-7B",
    ]  # fmt: skip
    assert [row["trained"] for row in table["rows"]] == [False, False, False, True]
    for row in table["rows"]:
        assert {cell["episodes"] for cell in row["cells"].values()} == {3}
        assert {cell["judged"] for cell in row["cells"].values()} == {None}
    searches = [row["cells"]["MuSiQue"]["searches"] for row in table["rows"]]
    assert searches[:2] == [0, 3]
    assert table["rows"][1]["cells"]["HotpotQA"]["published"] == [34.36, 52.22]
    assert table["rows"][2]["cells"]["HotpotQA"]["published"] is None
    assert table["rows"][3]["cells"]["MuSiQue"]["published"] == [21.68, 32.19]
    before = cell_files(output)
    assert list(before) == [
        *(f"ReSearch-Qwen-7B/search_agent/{name}/predictions.jsonl"
          for name in ("HotpotQA", "MuSiQue")),
        *(f"tiny/{method}/{name}/predictions.jsonl"
          for method in ("iter_retgen", "naive_generation", "search_agent")
          for name in ("HotpotQA", "MuSiQue")),
    ]  # fmt: skip
    header, *records = map(json.loads, before["tiny/iter_retgen/MuSiQue/predictions.jsonl"]
                           .decode().splitlines())  # fmt: skip
    assert header["header"]["method"] == "iter_retgen"
    assert header["header"]["environment"]["limits"].startswith("top_k 2,")
    assert {record["info"]["question_id"] for record in records} == set(WHOLE)
    found = [s for s in records[0]["segments"] if s["provenance"] == "observation"]
    assert [len(segment["info"]["passage_ids"]) for segment in found] == [2, 2, 2]

    def no_model(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("research_agent.models.policy.load_model", no_model)
    paper_table.main(words(model, output, *methods, *trained, "--format", "json"))
    assert json.loads(capsys.readouterr().out) == table
    assert cell_files(output) == before


def test_a_cell_that_was_cut_is_gone_on_with(data: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    paper_table.main(words(model, output, "--methods", "naive_rag"))
    (output / "tiny/naive_rag/MuSiQue/summary.json").unlink()
    path = output / "tiny/naive_rag/MuSiQue/predictions.jsonl"
    header, first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + first + second[:40])
    paper_table.main(words(model, output, "--methods", "naive_rag"))
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:2] == [header, first]
    assert sorted(again[2:]) == sorted([second, third])


def test_a_cell_of_other_settings_is_refused(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table"
    paper_table.main(words(model, output, "--methods", "naive_rag"))
    before = cell_files(output)
    with pytest.raises(SystemExit, match="2"):
        paper_table.main(words(model, output, "--methods", "naive_rag", "--top-k", "1"))
    error = capsys.readouterr().err
    assert "top_k 2" in error
    assert "top_k 1" in error
    assert cell_files(output) == before
    with pytest.raises(PredictionsError, match="method"):  # a folder moved to another method
        (output / "tiny/naive_rag").rename(output / "tiny/ircot")
        config = paper_table.TableConfig(
            models=(f"tiny={model}",), datasets=("musique",), methods=("ircot",), output=output,
            sampling=replace(
                paper_table.SAMPLING,
                max_prompt=3900, max_response=60, max_turn_tokens=12, max_in_flight=4,
            ),
            dtype="float32", device="cpu", top_k=2, quiet=True,
        )  # fmt: skip
        paper_table.run(config)


@pytest.mark.usefixtures("forks")
def test_cells_that_are_played_at_the_same_time_are_the_same(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for workers in ("1", "2"):
        chosen = ("--methods", "naive_rag", "search_agent", "--workers", workers)
        paper_table.main(words(model, tmp_path / workers, *chosen, "--format", "json"))
        tables.append(json.loads(capsys.readouterr().out.replace(str(tmp_path / workers), "")))
    assert tables[0] == tables[1]
    one, two = ({name: sorted(text.splitlines()[1:]) for name, text in cell_files(at).items()}
                for at in (tmp_path / "1", tmp_path / "2"))  # fmt: skip
    assert len(one) == 4
    assert one == two


def test_a_cell_that_fails_in_its_process_is_named(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def one_by_one(do: Any, jobs: Any, workers: int) -> list[str]:
        """As `run_all` does, without processes."""
        failed = []
        for label, arguments in jobs.items():
            try:
                do(*arguments)
            except DataError:
                failed.append(label)
        assert workers == 2
        return failed

    monkeypatch.setattr(paper_table, "run_all", one_by_one)
    (data / "hotpotqa" / "corpus.jsonl").write_text("no JSON\n")
    with pytest.raises(SystemExit, match="2"):
        paper_table.main(words(model, tmp_path / "t", "--methods", "naive_rag", "--workers", "2"))
    said = f"cells failed, as said above: tiny={model}, naive_rag, HotpotQA; the same command"
    assert said in capsys.readouterr().err
    assert list(cell_files(tmp_path / "t")) == ["tiny/naive_rag/MuSiQue/predictions.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--datasets", "squad"), "'squad' is not known here; there is hotpotqa, 2wiki"),
        (("--methods", "self_rag"), "'self_rag' is not known here; there is naive_generation"),
        (("--max-in-flight", "0"), "--max-in-flight is 0; it must be at least 1"),
        (("--models",), "there is nothing to play"),
        (("--retriever", "bogus://{dataset}"), "unknown retriever 'bogus://musique'"),
    ],
)
@pytest.mark.usefixtures("data")
def test_what_cannot_be_played_is_refused(
    more: Sequence[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper_table.main(words(model, tmp_path / "table", *more))
    assert message in capsys.readouterr().err


def test_the_judges_column_is_what_the_judge_wrote(tmp_path: Path) -> None:
    assert read_judge(tmp_path, 8) is None
    path = tmp_path / "judge.json"
    path.write_text('{"score": 0.625, "range": [0.625, 0.625], "model": "J", "n": 8}')
    assert read_judge(tmp_path, 8) == Judged(62.5, (62.5, 62.5), "J")
    with pytest.raises(
        ConfigError, match="json is of 8 episodes, and the cell has 9 now; run research-"
    ):
        read_judge(tmp_path, 9)
    path.write_text('{"score": null, "range": [0.5, 0.75], "model": "J", "n": 8}')
    assert read_judge(tmp_path, 8) == Judged(None, (50.0, 75.0), "J")
    path.write_text('{"score": null, "range": null, "model": "J", "n": 0}')
    assert read_judge(tmp_path, 0) is None  # every episode is void
    path.write_text('{"verdict": 1}')
    with pytest.raises(ConfigError, match=r"judge.json is no summary of a judge.*run research-env"):
        read_judge(tmp_path, 8)


def answer_ann(call: Call) -> Reply:
    """Answer every prompt of an OpenAI-compatible client with "Ann"."""
    text = "Ann" if call.path.endswith("/chat/completions") else " So the answer is: Ann"
    choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
    return as_json({"choices": [{**choice, "stop_reason": None}]})


@pytest.mark.usefixtures("data")
def test_an_endpoint_is_asked_in_chat_but_by_ircot(tmp_path: Path) -> None:
    with serving(answer_ann) as server:
        config = paper_table.TableConfig(
            models=(f"instruct=big@{server.url}/v1",), datasets=("musique",), top_k=2, quiet=True,
            sampling=replace(paper_table.SAMPLING, max_in_flight=4),
            methods=("naive_rag", "ircot"), output=tmp_path / "table",
        )  # fmt: skip
        results = paper_table.run(config)
    assert [row.model for row in results.rows] == ["big", "big"]
    assert [row.cells["MuSiQue"].em for row in results.rows] == [100.0, 100.0]
    chats = [c.json()["messages"] for c in server.calls if c.path == "/v1/chat/completions"]
    assert len(chats) == 3
    assert [message["role"] for message in chats[0]] == ["system", "user"]
    assert chats[0][0]["content"].count("\nDoc 2(Title: ") == 1
    assert {said[1]["content"] for said in chats} == {f"Question: Who is Ann {i}?" for i in WHOLE}
    thoughts = [c.json()["prompt"] for c in server.calls if c.path == "/v1/completions"]
    assert len(thoughts) == 3
    assert all(said.endswith("?\nThought:") for said in thoughts)


# --- forms ----------------------------------------------------------------------------------------


def cell(em: float, judged: Judged | None = None, paper: tuple[float, float] | None = None) -> Cell:
    return Cell(em, (em - 1, em + 1), 1.0, 100, 0, judged, paper, "folder")


RESULTS = Results(
    [
        Row("Naive RAG", "m", False, {
            "Hotpot_QA": cell(31.0, Judged(49.0, (49.0, 49.0), "J"), (31.9, 49.59)),
            "2Wiki": cell(20.5),
        }),
        Row("Re|Search", "t", True, {
            "Hotpot_QA": cell(40.125, Judged(None, (50.0, 60.5), "J")),
            "2Wiki": cell(44.0, None, (44.67, 50.06)),
        }),
    ],
    ["Hotpot_QA", "2Wiki"],
)  # fmt: skip


def test_markdown() -> None:
    assert rendering.markdown(RESULTS) == (
        "| method | Hotpot_QA EM | Hotpot_QA LJ | 2Wiki EM | 2Wiki LJ |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| Naive RAG | 31.00 (31.90) | 49.00 (49.59) | 20.50 | – |\n"
        "| Re\\|Search | 40.12 | 50.00 to 60.50 | 44.00 (44.67) | – (50.06) |\n"
        "\n"
        "EM: exact match, in percent. LJ: LLM as a judge. In brackets: the paper's.\n"
    )


def test_names_by_strangers_are_text_in_a_table() -> None:
    row = Row("[/nope]\x1b]52;c;\x07\n|b", "m", False, {"[/set]\x1b[2J": cell(31.0)})
    results = Results([row], ["[/set]\x1b[2J"])
    console = Console(file=io.StringIO(), width=200)
    console.print(rendering.terminal(results))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "[/nope]" in shown and "[/set]" in shown and "\x1b" not in shown
    lines = rendering.markdown(results).splitlines()
    assert lines[2].startswith("| [/nope]\\x1b]52;c;\\x07 \\|b | 31.00 |")
    assert "\x1b" not in "".join(lines)


def test_latex() -> None:
    assert rendering.latex(RESULTS).splitlines() == [
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{Hotpot\_QA} & \multicolumn{2}{c}{2Wiki} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}",
        r"Method & EM & LJ & EM & LJ \\",
        r"\midrule",
        r"Naive RAG & 31.00 \textcolor{gray}{(31.90)} & 49.00 \textcolor{gray}{(49.59)}"
        r" & 20.50 & -- \\",
        r"\midrule",
        r"Re|Search & 40.12 & 50.00 to 60.50 & 44.00 \textcolor{gray}{(44.67)}"
        r" & -- \textcolor{gray}{(50.06)} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip


def test_the_chart_shows_the_judge_where_all_cells_have_one(tmp_path: Path) -> None:
    assert rendering.chart(RESULTS, tmp_path / "a.png") == "Exact match (%)"
    judged = cell(31.0, Judged(49.0, (49.0, 49.0), "J"))
    one = Results([Row("r", "m", True, {"x": judged})], ["x"])
    assert rendering.chart(one, tmp_path / "b.png") == "LLM-as-a-Judge (%)"
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_published_numbers() -> None:
    assert published("7b", "Naive Generation", "hotpotqa") == (19.18, 30.64)
    assert published("7b", "IRCoT", "bamboogle") == (24.80, 36.80)
    assert published("32b", "Iter-RetGen", "2wiki") == (33.64, 38.22)
    assert published("32b", "ReSearch-Qwen-32B-Instruct", "musique") == (26.40, 38.56)
    assert published("7b", "ReSearch-Qwen-32B", "musique") is None
    assert published("7b", "IRCoT", "custom") is None
    rows = {"Naive Generation", "Naive RAG", "Iter-RetGen", "IRCoT"}
    assert rows < set(paper_table.LABELS.values())
    for size in ("7b", "32b"):
        for row in (*rows, f"ReSearch-Qwen-{size.upper()}"):
            scores = [published(size, row, dataset) for dataset in DATASETS]
            assert all(score and score[0] < score[1] for score in scores)  # the judge is milder


# --- the document ---------------------------------------------------------------------------------


def test_the_commands_of_the_document_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    found = [words for block in blocks("docs/how-to/reproduce.md") for words in commands(block)]
    tables = [words for words in found if words[:1] == ["python"]]
    assert [words[:3] for words in tables] == [["python", "-m", "benchmarks.paper_table"]]
    config = tyro.cli(paper_table.TableConfig, args=tables[0][3:])
    assert (config.methods, config.datasets) == (tuple(paper_table.LABELS), tuple(DATASETS))
    models = [
        Sampler(spec, config.sampling, slots=1, dtype="float32", device="cpu")
        for spec in (*config.models, *config.trained)
    ]
    assert [(model.label, model.chat) for model in models] == [
        ("Qwen2.5-7B-Instruct", True), ("ReSearch-Qwen-7B", False),
        ("ReSearch-Qwen-7B-Instruct", True),
    ]  # fmt: skip
    assert all(published("7b", model.label, "musique") for model in models[1:])
    served = [
        (words[words.index("serve") + 1], words[words.index("--port") + 1])
        for words in found
        if "serve" in words and "vllm" in words
    ]
    assert served == [(str(m.name), str(m.endpoint).split(":")[2][:4]) for m in models]
    calls = [words for words in found if words[:1] == ["research-env"]]
    assert len(calls) == 3
    for words in calls:
        with pytest.raises(SystemExit):
            research_env([words[1], *(["prepare"] if "prepare" in words else []), "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--"))


# --- the miniature --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_miniature_makes_worlds_policies_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    settings = miniature.Miniature(demonstrations=24, steps=1)
    config = paper_table.TableConfig(
        mini=True, limit=3, output=tmp_path / "mini", quiet=True, methods=("naive_rag", "ircot"),
        workers=1,
    )  # fmt: skip
    results = paper_table.run_miniature(config, settings)
    assert results.datasets == list(miniature.WORLDS)
    assert [row.label for row in results.rows] == ["Naive RAG", "IRCoT", "Trained search"]
    for row in results.rows:
        assert {cell.episodes for cell in row.cells.values()} == {3}
        assert not any(cell.published for cell in row.cells.values())
    assert {row.cells["MiniWorld"].searches for row in results.rows[:1]} == {1.0}
    records = [
        json.loads(line)
        for line in (Path(results.rows[1].cells["other world"].folder) / "predictions.jsonl")
        .read_text()
        .splitlines()[1:]
    ]
    prompt = next(s["text"] for s in records[0]["segments"] if s["tokens"])
    assert re.match(r" <result>\n\"\w+\"\nThe \w+ ", prompt)
    policies = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("mini/policies/*")}
    assert sorted(name.split("-")[0] for name in policies) == ["grpo", "warm"]
    assert paper_table.run_miniature(config, settings) == results
    warm = next(path for path in tmp_path.glob("mini/policies/warm-*"))
    assert warm.stat().st_mtime_ns == policies[warm.name]
