"""Whole runs on two ranks: what goes wrong is said once, and a run that is stopped continues."""

from __future__ import annotations

import json
import re
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from research_agent.cli import main
from research_agent.system.files import folder_lock
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.rank_worker import TIMEOUT
from tests.research_agent.test_trainer import flags, metrics
from tests.research_agent.torchrun import in_processes, torchrun

WORKER = "tests.research_agent.rank_worker"


def broken_checkpoints(saved: Path) -> None:
    """Copies of a run beside it, a file of whose checkpoint is gone or cut."""
    for name in ("gone", "short"):
        run = saved.with_name(name)
        shutil.copytree(saved, run)
        file = next((run / "checkpoints" / "step-000001" / "state").glob("*.safetensors"))
        if name == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])


def broken_models(letters: Path, place: Path) -> dict[str, Path]:
    """Copies of a model: in several files, one of them lost or cut; and with other shapes."""
    model = AutoModelForCausalLM.from_pretrained(letters)
    folders = {name: place / name for name in ("lost", "cut", "shapes")}
    for name, folder in folders.items():
        (model if name != "shapes" else tiny_qwen2(12, hidden=16)).save_pretrained(
            folder, max_shard_size="10KB"
        )
        AutoTokenizer.from_pretrained(letters).save_pretrained(folder)
        second = next(folder.glob("model-00002-of-*"))
        if name == "lost":
            second.unlink()
        elif name == "cut":
            second.write_bytes(second.read_bytes()[:-100])
        else:
            shutil.copy(letters / "config.json", folder)
    return folders


@pytest.fixture(scope="module")
def ended(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What both ranks say in each case, and the folder of the runs."""
    place = tmp_path_factory.mktemp("two")
    broken = broken_models(letters, place)
    main(flags(letters, place / "saved", "--steps", "1"))
    broken_checkpoints(place / "saved")

    def words(name: str, *more: str, model: Path = letters) -> list[str]:
        return flags(model, place / name, "--steps", "2", *more)

    ahead = ["--max-staleness", "1"]
    stages = ["--stages", "steps=1 turns=1", "turns=2"]
    back = ["--collapse", "0.4", "--on-collapse", "rollback", "--keep", "9", "--steps", "7"]
    cases: dict[str, dict[str, Any]] = {
        **{name: {"words": words(f"run-{name}", model=m)} for name, m in broken.items()},
        "divide": {"words": words("run-divide", "--shard-ranks", "3")},
        "eight": {"words": words("run-eight", "--optimizer", "adamw_8bit")},
        "apart": {"words": words("run-apart-RANK")},
        "other": {"words": words("saved", model=broken["shapes"])},
        "gone": {"words": words("gone")},
        "short": {"words": words("short")},
        "busy": {"words": words("run-busy")},
        "full": {"words": words("run-full"), "limit": 10_000},
        "eval": {"words": words("run-eval", "--eval-every", "1")},
        "prompt": {"words": words("run-prompt", "--max-prompt", "1")},
        "log": {"words": words("run-log")},
        "trace": {"words": words("run-trace", "--trace", str(letters / "config.json" / "trace"))},
        "args": {"words": words("run-args", "--algorithm-args", "temper=2")},
        "start": {"words": words("run-start")},
        "weights": {"words": words("run-weights")},
        "stage": {"words": words("run-stage", *stages)},
        "ahead": {"words": words("run-ahead", *ahead, "--steps", "1")},
        "restore": {"words": words("run-ahead", *ahead)},
        "hang": {"words": words("run-hang", "--collective-timeout", str(TIMEOUT / 60))},
        "back": {"words": words("run-back", *back), "collapse": True},
    }
    with ExitStack() as stack:
        for case in cases.values():
            free = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            case["port"] = free.getsockname()[1]
    (place / "run-log" / "metrics.jsonl").mkdir(parents=True)
    (place / "run-eval").mkdir()
    (place / "run-eval" / "evaluations").write_text("in the way")
    plan = place / "plan.json"
    plan.write_text(json.dumps(cases))
    with folder_lock(place / "run-busy"):
        ends, _, errors = in_processes(2, WORKER, str(plan))
    assert ends == [0, 0], errors[-4000:]
    found = {
        name: [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for name in cases
    }
    return place, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lost", "lost.*model-00002-of-.* is missing, which model.safetensors.index.json names"),
        ("cut", "the model .*cut.* cannot be opened"),
        ("shapes", "has a weight .* of shape .* and its config.json says"),
        ("divide", "shard_ranks is 3, which does not divide the 2 ranks"),
        ("eight", "'adamw_8bit' works in one process only"),
        ("apart", "a rank does not see the folder that the first one made"),
        ("other", "another configuration:\n.*policy.model"),
        ("gone", "step-000001 is no whole checkpoint: .*is missing; delete .* start anew"),
        ("short", "step-000001 is no whole checkpoint: .*SHA-256.*; delete .* start anew"),
        ("busy", "writes to .*run-busy; wait for it, or give another --output"),
        ("full", "cannot write the checkpoint of step 2 .*there is none before it; free some"),
        ("eval", "run-eval/evaluations"),
        ("prompt", "max-prompt"),
        ("log", "run-log/metrics.jsonl"),
        ("trace", "File exists: .*config.json"),
        ("args", "temper"),
        ("start", "start: out of order"),
        ("weights", "weights: out of order"),
        ("stage", "stage: out of order"),
        ("restore", "restore: out of order"),
    ],
)
def test_what_is_wrong_is_said_once_and_all_ranks_stop(
    ended: tuple[Path, dict[str, Any]], case: str, message: str
) -> None:
    (first, said), (second, also) = ended[1][case]
    assert (first, second) == (2, 2), (said, also)
    assert said.count("research-agent: error: ") == 1 and "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said
    assert "error" not in also, also


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_until_the_timeout(
    ended: tuple[Path, dict[str, Any]],
) -> None:
    (first, said), (second, _) = ended[1]["hang"]
    assert (first, second) == (2, 2)
    assert "another rank stopped or did not answer for 0.2 minutes" in said


@pytest.mark.slow
def test_ranks_go_back_together(ended: tuple[Path, dict[str, Any]], letters: Path) -> None:
    place, found = ended
    assert [status for status, _ in found["back"]] == [0, 0], found["back"]
    kept, again = (
        load_file(place / "run-back" / "checkpoints" / f"step-00000{step}" / "model.safetensors")
        for step in (2, 5)
    )
    assert all(torch.equal(again[name], weight) for name, weight in kept.items())
    assert [record["step"] for record in metrics(place / "run-back")] == list(range(1, 8))


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_is_the_same(
    letters: Path, tmp_path: Path
) -> None:
    def words(name: str, step: int) -> list[str]:
        run = flags(letters, tmp_path / name, "--steps", "5", "--save-every", "2")
        return ["die", str(tmp_path / f"{name}.marker"), str(step), *run]

    ends, _, errors = in_processes(2, WORKER, *words("whole", 99))
    assert ends == [0, 0], errors[-4000:]
    torchrun(WORKER, *words("killed", 4), restarts=1)
    assert (tmp_path / "killed.marker").exists()
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for name in ("metrics.jsonl", "trajectories.jsonl"):  # the same tasks, once each
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    last = [folder / "checkpoints" / "step-000005" for folder in (whole, killed)]
    names = [sorted(p.relative_to(f) for p in f.rglob("*.safetensors")) for f in last]
    assert names[0] == names[1] and len(names[0]) == 3
    # Which rank writes a tensor that several have differs from start to start.
    expected, found = (
        {name: tensor for file in names[0] for name, tensor in load_file(folder / file).items()}
        for folder in last
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
