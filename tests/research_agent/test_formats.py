"""Files that a stranger changed: each is read, or refused by file and line. Nothing crashes."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.hostile_models import model_cases
from research_agent.checkpoint import CHECKSUMS, _checksums
from research_agent.cli import main
from research_agent.errors import LogError, PredictionsError, ResearchAgentError
from research_agent.evaluation.predictions import as_record, read_predictions
from research_agent.formats import ObjectFormat, parse
from research_agent.models.policy import load_model
from research_agent.renderer import load_renderer
from research_agent.run_logger import read_lines
from research_agent.trajectory import Segment, Trajectory
from tests.research_agent.conftest import byte_tokenizer, tiny_llama, tiny_qwen2
from tests.research_agent.model_files import edit_json, save_adapter, save_model
from tests.research_agent.test_trainer import flags

JUNK: list[Any] = [
    *(None, True, -1, 2**70, 10**400, 1e999, "x", "\ud800", [], {}, [[]], {"a": 1}),
    *([[[[[]]]]], 0.5, ""),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutants(value: Any, count: int, seed: int) -> Iterator[str]:
    """JSON texts with one value replaced, removed, or nested without end."""
    draw = random.Random(seed)
    every = list(places(value))
    for _ in range(count):
        copy = json.loads(json.dumps(value))
        path = draw.choice(every)
        kind = draw.randrange(4)
        if not path:
            yield json.dumps(draw.choice(JUNK))
            continue
        parent = copy
        for key in path[:-1]:
            parent = parent[key]
        if kind == 0:
            del parent[path[-1]]
            yield json.dumps(copy)
        elif kind == 1:
            parent[path[-1]] = "DEEP"
            yield json.dumps(copy).replace('"DEEP"', "[" * 5_000 + "]" * 5_000)
        else:
            parent[path[-1]] = draw.choice(JUNK)
            yield json.dumps(copy).replace("Infinity", "1e999")


def said(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What a command says that refuses, or nothing if it succeeds. A traceback fails the test."""
    try:
        main(words)
    except SystemExit as ended:
        message = capsys.readouterr().err
        assert ended.code == 2, message
        assert message.startswith("research-agent: error: ")
        return message
    capsys.readouterr()
    return ""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    segments = (
        Segment("prompt", (1, 2), text="Who?", info={"question_id": "q"}),
        Segment("action", (3,), (-0.5,), text="<search>a</search>"),
        Segment("observation", (4,), text="Ann", info={"hits": [{"id": "p"}]}),
        Segment("action", (5,), (-0.25,), text="Ann"),
    )
    info = {"question_id": "q", "prediction": "Ann", "strata": {"hops": "2"}, "answers": ["Ann"]}
    trajectory = Trajectory(
        *(0, 0, segments), reward=1.0, terminated=True, truncated=False, info=info
    )
    return as_record(trajectory, lambda tokens: ["x" for _ in tokens]) | {"metrics": {"em": 1.0}}


@pytest.mark.filterwarnings("ignore")  # numpy warns of means that are not finite
def test_mutated_predictions(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.dumps(record | {"episode": 7, "info": {"question_id": "r"}}) + "\n"
    refused = 0
    for number, text in enumerate(mutants(record, 150, seed=0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "predictions.jsonl"
        path.write_text(other + text + "\n")
        commands = [
            ["report", str(folder)],
            ["compare", str(path), str(path)],
            ["grade", str(path), "--output", str(folder / "grades")],
            ["sample", str(path), "--output", str(folder / "samples")],
        ]
        for words in commands[number % 4 : number % 4 + 1]:
            message = said(capsys, words)
            refused += bool(message)
            assert not message or str(path) in message or "predictions" in message, message
    assert refused > 40


def test_mutated_logs(tmp_path: Path) -> None:
    line = {"step": 2, "reward": 0.5, "env/em": None, "learner/kl": 1e-9}
    path = tmp_path / "metrics.jsonl"
    refused = 0
    for text in mutants(line, 150, seed=1):
        path.write_text(json.dumps({"step": 1}) + "\n" + text + "\n")
        try:
            records = read_lines(path)
        except LogError as error:
            assert f"{path}:2: this line is no record of a step" in str(error)
            refused += 1
            continue
        assert [type(each["step"]) for each in records] == [int, int]
    assert refused > 60


@pytest.mark.parametrize("content", [b"\0" * 40 + b"\n", b"\xff\xfe\n", b"[1]\n", b"{}\n"])
def test_lines_that_are_no_records(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + content)
    with pytest.raises(LogError, match=r"metrics\.jsonl:2: "):
        read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "predictions.jsonl").write_bytes(content)
    with pytest.raises(PredictionsError, match=r"predictions\.jsonl:1: "):
        read_predictions(tmp_path)


def test_an_environments_large_numbers_are_read_and_endless_ones_refused() -> None:
    def read(number: str) -> Any:
        return parse(f'{{"id": {number}}}'.encode(), ObjectFormat, "file", LogError, "mend it")

    for number in (2**64, -(2**64), 10**299):
        assert read(str(number)) == {"id": number}
    with pytest.raises(LogError, match=r"file: the number 1000000.* is too large; mend it"):
        read(str(10**400))


def test_logs_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(LogError, match="no regular file"):
        read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "predictions.jsonl").symlink_to("/dev/zero")
    with pytest.raises(PredictionsError, match="no regular file"):
        read_predictions(tmp_path)


@pytest.fixture(scope="module")
def run(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two steps and one checkpoint."""
    folder = tmp_path_factory.mktemp("formats") / "run"
    main(flags(letters, folder, "--steps", "2", "--collapse", "0.01"))
    return folder


def continued(letters: Path, run: Path) -> list[str]:
    return flags(letters, run, "--steps", "2", "--collapse", "0.01", "--time-limit", "9999")


def test_a_mutated_state_with_its_checksum(
    letters: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = 0
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    # The tensors' names in the learner's part are left as they are: the optimizer trusts its own.
    learner = next(pair for pair in state["state"]["__pairs__"] if pair[0] == "learner")
    whole, learner[1] = json.dumps(learner[1]), "LEARNER"
    for number, text in enumerate(mutants(state, 30, seed=2)):
        copy = shutil.copytree(run, tmp_path / str(number))
        newest = copy / "checkpoints" / "step-000002"
        (newest / "state.json").write_text(text.replace('"LEARNER"', whole))
        (newest / CHECKSUMS).write_text(json.dumps(_checksums(newest)))
        words = flags(letters, copy, "--steps", "3", "--collapse", "0.01")
        message = said(capsys, words)
        assert not message or str(copy) in message or "no checkpoint" in message, message
        refused += bool(message)
    assert refused > 10


@pytest.mark.parametrize("file", ["metrics.jsonl", "timings.jsonl", "config.json"])
def test_a_mutated_log_or_configuration_of_a_run(
    letters: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    lines = (run / file).read_text().splitlines()
    value = json.loads("".join(lines) if file == "config.json" else lines[0])
    rest = [] if file == "config.json" else lines[1:]
    refused = 0
    for number, text in enumerate(mutants(value, 12, seed=3)):
        copy = shutil.copytree(run, tmp_path / str(number))
        (copy / file).write_text("\n".join([text, *rest]) + "\n")
        for words in (["report", str(copy)], continued(letters, copy)):
            message = said(capsys, words)
            assert not message or str(copy / file) in message or "no run" in message, message
            refused += bool(message)
    assert refused > 2


@pytest.mark.filterwarnings("ignore")  # the library's, of what it ignores
@pytest.mark.parametrize(
    ("file", "count"),
    [("config.json", 15), ("generation_config.json", 10), ("tokenizer_config.json", 10),
     ("tokenizer.json", 10)],
)  # fmt: skip
def test_a_mutated_model_is_opened_or_refused(tmp_path: Path, file: str, count: int) -> None:
    model = save_model(tmp_path / "model", tiny_qwen2(len(byte_tokenizer())))
    value = json.loads((model / file).read_text())
    refused = 0
    for text in mutants(value, count, seed=5):
        (model / file).write_text(text)
        try:
            load_renderer(model)
            if not file.startswith("tokenizer"):
                load_model(model, device="cpu")
        except ResearchAgentError as error:
            assert str(model) in str(error)
            refused += 1
    assert refused > 1


@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_opened_or_refused_by_their_file(tmp_path: Path) -> None:
    refused = 0
    for number, case in enumerate(islice(model_cases(tmp_path), 0, None, 7)):
        (place := tmp_path / str(number)).mkdir()
        try:
            case.try_it(place)  # anything but an error of ours fails this test
        except ResearchAgentError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", ["model", "shard", "adapter"])
def test_a_file_of_weights_that_is_cut_is_named(tmp_path: Path, kind: str, pickled: bool) -> None:
    size = "20KB" if kind == "shard" else "1GB"
    folder = save_model(tmp_path / "model", tiny_llama(), max_shard_size=size)
    if kind == "adapter":
        folder = save_adapter(tmp_path / "adapter", folder)
    if pickled:
        for each in folder.glob("*.safetensors"):
            name = each.name.replace("model", "pytorch_model") if kind != "adapter" else each.name
            torch.save(load_file(each), folder / name.replace(".safetensors", ".bin"))
            each.unlink()
        if kind == "shard":
            index = (folder / "model.safetensors.index.json").read_text()
            index = index.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(index)
            (folder / "model.safetensors.index.json").unlink()
    load_model(folder, device="cpu")
    file = sorted(folder.glob("*.bin" if pickled else "*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ResearchAgentError, match=f"{file.name}' cannot be opened: .*get it again"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_compressed_pickle_is_not_unpacked(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path / "model", tiny_llama())
    folder = model if kind == "model" else save_adapter(tmp_path / "adapter", model)
    next(folder.glob("*model.safetensors")).unlink()
    file = folder / ("pytorch_model.bin" if kind == "model" else "adapter_model.bin")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * 10_000)
    with pytest.raises(ResearchAgentError, match=f"{file.name} is compressed"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_settings_of_gigabytes_are_not_read(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model", tiny_llama())
    os.truncate(model / name, 3 << 30)
    for load in (load_model, load_renderer):
        with pytest.raises(ResearchAgentError, match=f"{name} has more than 256 MiB"):
            load(model)


def test_more_layers_than_memory_holds_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_qwen2(len(byte_tokenizer())))
    edit_json(model / "config.json", num_hidden_layers=10**6, layer_types=None)
    with pytest.raises(ResearchAgentError, match="says more than 1000 layers"):
        load_model(model, device="cpu")
