from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from research_agent.errors import ConfigError
from research_agent.run_folder import summarize
from research_agent.run_logger import RunLogger, read_lines, truncate_after, wandb_run
from tests.research_env.fakes import Terminal


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path)]


def tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_records_go_to_the_logs_and_to_tensorboard(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 0, 2, show=False, fresh=True) as logger:
        logger.record(1, {"reward": 0.5, "env/em": 0.25}, {"seconds": 1.5}, [{"reward": 1.0}])
        logger.record(2, {"reward": 0.75, "env/em": 0.5}, {"seconds": 3.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.5, "env/em": 0.25},
        {"step": 2, "reward": 0.75, "env/em": 0.5},
    ]
    assert read_lines(tmp_path / "timings.jsonl")[1] == {"step": 2, "seconds": 3.0}
    assert read_lines(tmp_path / "trajectories.jsonl") == [{"step": 1, "reward": 1.0}]
    assert tensorboard(tmp_path, "reward") == [(1, 0.5), (2, 0.75)]
    assert tensorboard(tmp_path, "time/seconds") == [(1, 1.5), (2, 3.0)]


def records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, pieces that say where they belong."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


def test_a_failed_run_is_a_failed_one_for_weights_and_biases(tmp_path: Path) -> None:
    ended: list[int] = []
    wandb = SimpleNamespace(finish=lambda *, exit_code: ended.append(exit_code))
    with RunLogger(tmp_path, 0, 2, show=False, wandb=wandb):
        pass
    with pytest.raises(OSError), RunLogger(tmp_path, 0, 2, show=False, wandb=wandb):
        raise OSError
    assert ended == [0, 1]


def logged(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Id of the run and the metrics of each step, from what Weights & Biases kept on disk."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: list[tuple[str, dict[str, float]]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                found.append((path.stem.removeprefix("run-"), values))
    return found


def test_the_same_metrics_go_to_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):  # the second is a run that was continued
        wandb = wandb_run("project", tmp_path, {"seed": 1})
        with RunLogger(tmp_path, step - 1, 2, show=False, wandb=wandb) as logger:
            logger.record(step, {"reward": step / 2, "env/em": 0.25}, {"seconds": 1.5})
        began = time.time()
        while int(time.time()) == int(began):  # its folders are named by the second
            time.sleep(0.01)
    sys.modules["wandb"].teardown()  # else its service lives as long as this process
    (first, one), (second, two) = logged(tmp_path)
    assert first == second
    wanted = ("step", "reward", "env/em", "time/seconds")
    assert [one[name] for name in wanted] == [1, 0.5, 0.25, 1.5]
    assert [two[name] for name in wanted] == [2, 1.0, 0.25, 1.5]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"research-env\[wandb\]"):
        wandb_run("project", tmp_path, {})


def test_a_continued_run_has_every_step_once(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 0, 4, show=False, fresh=True) as logger:
        for step in range(4):
            logger.record(step, {"reward": 0.0}, {}, [{"episode": step}])
    with RunLogger(tmp_path, 2, 4, show=False) as logger:  # the checkpoint was that of step 2
        for step in (3, 4):
            logger.record(step, {"reward": 1.0}, {}, [{"episode": step}])
    assert steps_of(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4]
    assert steps_of(tmp_path / "trajectories.jsonl") == [0, 1, 2, 3, 4]
    assert [r["reward"] for r in read_lines(tmp_path / "metrics.jsonl")] == [0, 0, 0, 1, 1]
    assert tensorboard(tmp_path, "reward") == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]


def test_a_run_from_the_start_drops_what_was_logged_before_the_first_checkpoint(
    tmp_path: Path,
) -> None:
    with RunLogger(tmp_path, 0, 4, show=False, fresh=True) as logger:
        logger.record(0, {"eval/reward": 0.0}, {})
    with RunLogger(tmp_path, 0, 4, show=False, fresh=True):
        pass
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_half_a_line_that_a_kill_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    truncate_after(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_summary_takes_the_last_time_that_is_logged(tmp_path: Path) -> None:
    (tmp_path / "timings.jsonl").write_text('{"step": 1, "seconds": 2.5}\n{"step": 2}\n')
    assert summarize(tmp_path, 2, "done").numbers["seconds of training"] == 2.5


def test_a_metric_that_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 0, 1, show=False, fresh=True) as logger:
        episode = {"reward": float("nan"), "info": {"scores": [0.5, float("-inf")]}}
        logger.record(1, {"reward": float("nan"), "kl": float("inf")}, {}, [episode])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "reward": None, "kl": None}
    line = (tmp_path / "trajectories.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "reward": None, "info": {"scores": [0.5, None]}}


def test_without_a_terminal_each_step_is_a_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, 0, 8, fresh=True) as logger:
        shares = {"void_fraction": 0.25, "skipped_fraction": 1.0}
        logger.record(3, {"reward": 0.5, "env/lookups": 1.5, **shares}, {})
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 3/8  reward 0.500  lookups 1.50  void 25%  skipped 100%" in err


def test_a_narrow_terminal_shows_step_and_time_left_and_cuts_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    metrics = {"reward": 0.5, **{f"env/metric_{i}": 0.25 for i in range(5)}}
    with RunLogger(tmp_path, 0, 8000, fresh=True) as logger:
        logger.record(1234, metrics, {"episodes_per_second": 1.5})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    [line, *_] = [each for each in text.splitlines() if "reward" in each]
    assert re.search(r"step 1234/8000 .* reward 0\.500 .*… --:-- left", line)
