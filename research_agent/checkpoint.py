"""Checkpoints: folders that transformers opens as a model and that continue a run to the same bits.

A checkpoint is written under a temporary name, flushed to the disk, and renamed. So a folder with a
checkpoint's name is complete, whenever the machine stopped. It holds::

    step-000123/
      model.safetensors config.json ...   the policy and its tokenizer, as transformers writes them
      state.safetensors                   other tensors: optimizer, random state
      state.json                          other values, the step, the configuration
      checksums.json                      SHA-256 of every other file
    best -> step-000080                   the best one by evaluation
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from research_agent.errors import CheckpointError, ResearchAgentError
from research_agent.files import sha256
from research_agent.formats import CheckpointFormat, read_object

VERSION = 2
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d{6,})")
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds besides the model."""

    folder: Path
    step: int  # training steps done
    config: Mapping[str, Any]  # of the run, as JSON values
    state: Mapping[str, Any]  # whatever was given to save


def save(
    root: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write the checkpoint of a step, then drop all but the ``keep`` newest and the best.

    Args:
        root: folder of the run's checkpoints; made when missing.
        step: training steps done.
        write_model: writes the model's and tokenizer's files into the folder that it is given.
        state: nested dicts and lists of tensors and plain values.
        config: of the run, as JSON values.
        keep: how many checkpoints to leave, this one included.
        best: the step whose checkpoint, where there is one, stays too, and is linked as ``best``.

    Raises:
        CheckpointError: when it cannot be written, a full disk for example. Nothing of it is left
            then, and the checkpoints before it are untouched.
        TypeError: when the state holds something else than tensors and plain values.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".{final.name}.tmp"
    if final.exists():  # saved before; the same run makes the same weights
        _link_best(root, best)
        return final
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(state, tensors)
    plain = {"version": VERSION, "step": step, "config": dict(config), "state": packed}
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_temporary(root)
        temporary.mkdir()
        write_model(temporary)
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        (temporary / CHECKSUMS).write_text(json.dumps(_checksums(temporary)), encoding="utf-8")
        _flush(temporary)
        temporary.rename(final)
        _flush_folder(root)
    except Exception as error:  # a full disk is an OSError here, a bare Exception of Rust's there
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        last = latest(root)
        kept = f"the last good one is {last}" if last else "there is none before it"
        cure = "free some space" if _is_full(error) else "see that the folder can be written"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {root}: {error}; {kept}; "
            f"{cure}, and start the same command again"
        ) from error
    _link_best(root, best)
    for old, folder in _complete(root)[:-keep]:
        if old != best:
            _remove(folder)
    return final


def rehearse(root: Path, write_model: Callable[[Path], None]) -> None:
    """Write a model's files as a checkpoint would, and remove them.

    Args:
        root: folder of the run's checkpoints; made when missing.
        write_model: as for ``save``.

    Raises:
        CheckpointError: when they cannot be written.
    """
    temporary = root / ".step-rehearsal.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_temporary(root)
        temporary.mkdir()
        write_model(temporary)
    except Exception as error:  # as in save
        cure = "free some space" if _is_full(error) else "mend that first"
        raise CheckpointError(
            f"no checkpoint of this model could be written to {root}: {error}; {cure}, as a run "
            "that cannot be saved is not started"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_best(root: Path, step: int | None) -> None:
    if step is None or not (root / f"step-{step:06d}").is_dir():
        return
    link, temporary = root / "best", root / ".best.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"step-{step:06d}")
    temporary.replace(link)


def latest(root: Path, up_to: int | None = None) -> Path | None:
    """Folder of the newest checkpoint, of those up to a step if one is given, or None."""
    complete = [(s, f) for s, f in _complete(root) if up_to is None or s <= up_to]
    return complete[-1][1] if complete else None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint, except the model's files, which transformers reads.

    Raises:
        CheckpointError: files are missing, changed since they were written (by their SHA-256), or
            of another version of this format.
    """
    try:
        plain = read_object(
            folder / "state.json", CheckpointError, _instead(folder), CheckpointFormat
        )
        if plain["version"] != VERSION:
            raise CheckpointError(
                f"{folder} has format {plain['version']}, this version reads {VERSION}; "
                "continue the run with the version that began it"
            )
        _require_unchanged(folder)
        tensors = load_file(folder / "state.safetensors")
        return Checkpoint(folder, plain["step"], plain["config"], _unpack(plain["state"], tensors))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: {error}; {_instead(folder)}"
        ) from error


@contextlib.contextmanager
def restoring(saved: Checkpoint) -> Iterator[None]:
    """Turn what a state of another shape causes into an error that names the checkpoint.

    Raises:
        CheckpointError: a key is missing, or a value has another type or size.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ResearchAgentError):
            raise
        raise CheckpointError(
            f"{saved.folder}/state.json and state.safetensors do not fit this run "
            f"({type(error).__name__}: {error}); {_instead(saved.folder)}"
        ) from error


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files if p.name != CHECKSUMS}


def _require_unchanged(folder: Path) -> None:
    written = read_object(folder / CHECKSUMS, CheckpointError, _instead(folder))
    found = _checksums(folder)
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name in written and written[name] != found[name]:
            raise ValueError(f"{name} is not what was written (its SHA-256 differs)")


def _instead(folder: Path) -> str:
    """What to do without a checkpoint: continue from the one before it, if there is one."""
    step = int(match[1]) if (match := _NAME.fullmatch(folder.name)) else 0
    before = latest(folder.parent, up_to=step - 1)
    start = f"continue from {before.name}" if before else "start anew"
    return f"delete {folder} and give the same command to {start}"


def _complete(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(folder.name), folder) for folder in root.iterdir())
    return sorted((int(match[1]), folder) for match, folder in named if match)


def _remove(folder: Path) -> None:
    """Rename first: a half-deleted folder must not look like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clear_temporary(root: Path) -> None:
    for folder in root.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; renames are durable enough
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: Exception) -> bool:
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    text = str(error).lower()
    return getattr(error, "errno", None) in full or "no space" in text or "too large" in text


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain JSON in which a tensor is the name of its entry in ``tensors``."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):  # as pairs: JSON would turn a number that is a key into text
        return {_PAIRS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
    return value
