from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from research_agent import checkpoint
from research_agent.errors import CheckpointError
from research_agent.models.source import opening
from tests.research_agent.disks import small_disk

Nested = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_") | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def write_model(folder: Path, size: int = 64) -> None:
    (folder / "model.safetensors").write_bytes(b"m" * size)
    (folder / "config.json").write_text("{}")


def save(root: Path, step: int, keep: int = 2, size: int = 64, **state: Any) -> Path:
    return checkpoint.save(
        root,
        step,
        write_model=lambda folder: write_model(folder, size),
        state={"tensor": torch.full((3,), float(step)), **state},
        config={"run": {"seed": 1}},
        keep=keep,
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {"avg": torch.ones(2, 2)}}},
        "random": torch.arange(5, dtype=torch.uint8),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "seconds": 12.25,
        "groups": [{"params": [0, 7], "lr": 1e-6, "fused": None, "foreach": True}],
    }
    folder = save(tmp_path, 12, **state)
    loaded = checkpoint.load(folder)
    assert folder.name == "step-000012"
    assert (loaded.step, loaded.config) == (12, {"run": {"seed": 1}})
    assert loaded.state["optimizer"]["state"][0]["step"].item() == 3.0
    assert torch.equal(loaded.state["optimizer"]["state"][7]["avg"], torch.ones(2, 2))
    assert torch.equal(loaded.state["random"], state["random"])
    assert loaded.state["half"].dtype == torch.bfloat16
    assert loaded.state["seconds"] == 12.25
    assert loaded.state["groups"] == state["groups"]
    assert (folder / "model.safetensors").read_bytes() == b"m" * 64


@given(Nested)
def test_any_plain_state_survives(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    root = tmp_path_factory.mktemp("any")
    assert checkpoint.load(save(root, 1, value=value)).state["value"] == value


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    loaded = checkpoint.load(save(tmp_path, 1, left=base[:3], whole=base, turned=base.view(2, 3).T))
    assert loaded.state["left"].tolist() == [0, 1, 2]
    assert loaded.state["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_state_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        save(tmp_path, 1, thing=object())


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (5, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_half_written_folders_are_never_picked_and_are_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / ".step-000002.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-9.copy").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-9.copy"]
    assert (tmp_path / "step-000002" / "model.safetensors").read_bytes() == b"m" * 64


@pytest.mark.parametrize("name", ["state.json", "state/state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "rubbish"])
def test_a_damaged_checkpoint_says_which_and_what_to_do(
    tmp_path: Path, name: str, damage: str
) -> None:
    folder = save(tmp_path, 3)
    path = folder / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\x00rubbish" * 9)
    with pytest.raises(CheckpointError, match=r"step-000003.*delete .* start anew"):
        checkpoint.load(folder)


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    plain = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(plain | {"version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        checkpoint.load(folder)


def _killed_while_saving(root: Path, pipe: Any) -> None:
    def write_and_wait(folder: Path) -> None:
        write_model(folder)
        pipe.send("written")
        signal.pause()

    checkpoint.save(root, 2, write_model=write_and_wait, state={}, config={}, keep=2)


def test_a_process_killed_while_it_saves_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_killed_while_saving, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() == "written"
    process.kill()
    process.join()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    assert checkpoint.load(tmp_path / "step-000001").step == 1


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1000) as root:
        save(root, 1, size=300_000)
        with pytest.raises(CheckpointError, match=r"step 2 .*last good one is .*step-000001.*free"):
            save(root, 2, size=900_000)
        assert names(root) == ["step-000001"]
        assert checkpoint.load(root / "step-000001").state["tensor"].tolist() == [1, 1, 1]
        assert (root / "step-000001" / "model.safetensors").stat().st_size == 300_000


@pytest.mark.parametrize("which", ["model", "state"])
def test_a_limit_on_the_size_of_files_leaves_the_last_good_checkpoint(
    tmp_path: Path, which: str
) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last good one is .*step-000001.*free"):
            if which == "model":
                save(tmp_path, 2, size=200_000)
            else:
                save(tmp_path, 2, large=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["step-000001"]
    assert checkpoint.load(tmp_path / "step-000001").step == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="there is none before it"):
        save(tmp_path / "file", 1)


def test_names_in_subfolders_reach_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    open_path = os.open

    def watched(path: Any, *how: int) -> int:
        flushed.append(Path(path).name)
        return open_path(path, *how)

    monkeypatch.setattr(os, "open", watched)
    save(tmp_path, 1)
    assert {"state", "state.safetensors", ".step-000001.tmp", tmp_path.name} <= set(flushed)


def test_an_old_one_that_cannot_be_dropped_is_an_error_and_the_new_one_is_kept(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-000001.old").write_text("")  # the name that it gets before it is removed
    with pytest.raises(CheckpointError, match=r"step 2 .*last good one is .*step-000002"):
        checkpoint.save(tmp_path, 2, write_model=write_model, state={}, config={}, keep=1)
    assert checkpoint.load(tmp_path / "step-000002").step == 2


def test_a_file_system_without_links_costs_the_link_to_the_best_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    save(tmp_path, 1)
    with pytest.warns(UserWarning, match="best cannot be a link to step-000001: .*not permitted"):
        checkpoint.save(tmp_path, 2, write_model=write_model, state={}, config={}, keep=1, best=1)
    assert names(tmp_path) == ["step-000001", "step-000002"]


LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(LOST),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_lost_rank_or_a_lack_of_memory_is_no_broken_checkpoint(
    tmp_path: Path, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    saved = checkpoint.load(save(tmp_path, 1))
    monkeypatch.setattr(checkpoint, "read_tensors", fail)
    for attempt in (
        lambda: checkpoint.rehearse(tmp_path, fail),
        lambda: checkpoint.save(tmp_path, 2, write_model=fail, state={}, config={}, keep=1),
        lambda: checkpoint.load(tmp_path / "step-000001"),
        lambda: saved.read({}),
    ):
        with pytest.raises(type(error)) as caught:
            attempt()
        assert caught.value is error
    for reading in (checkpoint.restoring(saved), opening("the model")):
        with pytest.raises(type(error)), reading:
            fail()
    with pytest.raises(CheckpointError, match="in its middle"), checkpoint.restoring(saved):
        raise RuntimeError("the tensor ends in its middle")
