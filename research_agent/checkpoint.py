"""Checkpoints: folders that transformers opens as a model, and that continue a run bit by bit.

A checkpoint is written under a temporary name, flushed to the disk, and renamed. A folder with a
checkpoint's name is therefore complete, even if the machine stopped at any moment. It holds::

    step-000123/
      model*.safetensors config.json ...  the policy and its tokenizer, as transformers reads them
      state/*.safetensors                 other tensors: optimizer, random state; a file per rank
      state.json                          other values, the step, the configuration
      checksums.json                      SHA-256 of every other file
    best -> step-000080                   the best one by evaluation

With several ranks every function here is a collective: all ranks must call it, and all see the
folder. Each rank writes and reads its shards. An error of one rank is raised on all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from research_agent.distributed import (
    broadcast_object,
    gather,
    lost_or_out_of_memory,
    rank_and_size,
    run_together,
    together,
)
from research_agent.errors import CheckpointError, ResearchAgentError
from research_agent.formats import CheckpointFormat, read_object
from research_agent.sharded import StoredTensor, read_tensors, stored_tensors, write_tensors
from research_agent.system.files import flush, sha256

VERSION = 4
CHECKSUMS = "checksums.json"
TENSORS = "state"
_NAME = re.compile(r"step-(\d{6,})")
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"
_FILE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    SafetensorError,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds in addition to the model."""

    folder: Path
    step: int  # training steps done
    config: Mapping[str, Any]  # the run's configuration, as JSON values
    state: Mapping[str, Any]  # the state that ``save`` was given

    def read(self, into: Mapping[str, torch.Tensor]) -> None:
        """Read tensors that ``load`` left in the files, in place; of a sharded tensor the shard.

        Args:
            into: the tensors to fill, by ``StoredTensor.name``.

        Raises:
            CheckpointError: the files cannot be read.
        """
        try:
            read_tensors(self.folder / TENSORS, into)
        except _FILE_ERRORS as error:
            if lost_or_out_of_memory(error):
                raise
            raise _no_checkpoint(self.folder, error) from error


def save(
    root: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    also_keep: Collection[int] = (),
    bucket_bytes: int = 2**30,
) -> Path:
    """Write the checkpoint of a step, then drop all but those that are to be kept.

    Args:
        root: folder of the run's checkpoints; made when missing.
        step: training steps done.
        write_model: writes the model's and tokenizer's files into the folder that it is given.
        state: nested dicts and lists of tensors and plain values, with the same tensors on all
            ranks; the plain values are the first rank's.
        config: the run's configuration, as JSON values.
        keep: how many checkpoints to leave, the newest ones, this one included.
        best: step whose checkpoint, if it exists, is kept too and linked as ``best``.
        also_keep: further steps whose checkpoints are kept.
        bucket_bytes: the most bytes that a rank holds in addition to the state.

    Raises:
        CheckpointError: when it cannot be written, a full disk for example, or an old one cannot
            be dropped. Nothing half-written is left then, and complete ones are untouched.
        TypeError: when the state holds anything but tensors and plain values.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".{final.name}.tmp"
    first = rank_and_size()[0] == 0
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(state, tensors)
    plain = {"version": VERSION, "step": step, "config": dict(config), "state": packed}
    try:
        # A continued run may find this step's checkpoint: the same weights, so it is kept.
        if not any(run_together(final.exists)):
            with together():
                if first:
                    root.mkdir(parents=True, exist_ok=True)
                    _clear_temporary(root)
                    temporary.mkdir()
            write_model(temporary)
            _write_state(temporary, tensors, bucket_bytes)
            sums = _checksums(temporary)
            with together():
                if first:
                    _finish(temporary, final, plain, sums)
        with together():
            if first:
                _link_best(root, best)
                for old, folder in _complete(root)[:-keep]:
                    if old != best and old not in also_keep:
                        remove(folder)
    except Exception as error:  # a full disk is an OSError, or a bare exception of safetensors
        if lost_or_out_of_memory(error):
            raise
        if first:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
        last = latest(root)
        kept = f"the last good one is {last}" if last else "there is none before it"
        cure = "free some space" if _is_full(error) else "see that the folder can be written"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {root}: {error}; {kept}; "
            f"{cure}, and start the same command again"
        ) from error
    return final


def _finish(
    temporary: Path, final: Path, plain: Mapping[str, Any], sums: Mapping[str, str]
) -> None:
    """Write the last files, flush all to the disk, and give the folder its name."""
    (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    sums = {**sums, "state.json": sha256(temporary / "state.json")}
    (temporary / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
    for path in sorted(temporary.rglob("*")):
        flush(path)
    flush(temporary)
    temporary.rename(final)
    flush(final.parent)


def _write_state(folder: Path, tensors: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    if rank_and_size()[1] > 1:
        write_tensors(folder / TENSORS, tensors, bucket_bytes)
        return
    one_by_one = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    (folder / TENSORS).mkdir()
    save_file(one_by_one, folder / TENSORS / "state.safetensors")


def rehearse(root: Path, write_model: Callable[[Path], None]) -> None:
    """Write a model's files as a checkpoint would, and remove them.

    Args:
        root: folder of the run's checkpoints; made when missing.
        write_model: as for ``save``.

    Raises:
        CheckpointError: when they cannot be written.
    """
    temporary = root / ".step-rehearsal.tmp"
    first = rank_and_size()[0] == 0
    try:
        with together():
            if first:
                root.mkdir(parents=True, exist_ok=True)
                _clear_temporary(root)
                temporary.mkdir()
        with together():
            if not temporary.is_dir():
                raise OSError("a rank does not see the folder that the first one made; share it")
        write_model(temporary)
    except Exception as error:  # as in save
        if lost_or_out_of_memory(error):
            raise
        cure = "free some space" if _is_full(error) else "fix that first"
        raise CheckpointError(
            f"no checkpoint of this model could be written to {root}: {error}; {cure}, as a run "
            "that cannot be saved is not started"
        ) from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _link_best(root: Path, step: int | None) -> None:
    if step is None or not (root / f"step-{step:06d}").is_dir():
        return
    link, temporary = root / "best", root / ".best.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"step-{step:06d}")
        temporary.replace(link)
    except OSError as error:  # a file system without links, or something else with this name
        temporary.unlink(missing_ok=True)
        message = (
            f"{link} cannot be a link to step-{step:06d}: {error}; the run continues without it"
        )
        warnings.warn(message, stacklevel=2)


def latest(root: Path, up_to: int | None = None) -> Path | None:
    """Folder of the newest checkpoint, not after the step ``up_to`` if given; None without one."""
    complete = [(s, f) for s, f in _complete(root) if up_to is None or s <= up_to]
    return complete[-1][1] if complete else None


def load(folder: Path, deferred: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint, except the model's files, which transformers reads.

    Args:
        folder: the checkpoint's folder.
        deferred: keys of the state whose tensors stay in the files, as ``StoredTensor``s, until
            ``Checkpoint.read`` reads them in place.

    Raises:
        CheckpointError: files are missing, changed since they were written (by their SHA-256), or
            of another version of this format.
    """
    try:
        with together():
            plain = read_object(
                folder / "state.json", CheckpointError, _instead(folder), CheckpointFormat
            )
            if plain["version"] != VERSION:
                raise CheckpointError(
                    f"{folder} has format {plain['version']}, this version reads {VERSION}; "
                    "continue the run with the version that began it"
                )
        _require_unchanged(folder)
        with together():
            stored = stored_tensors(folder / TENSORS)
            packed = dict(plain["state"][_PAIRS])
            late = {key: _unpack(packed.pop(key), stored) for key in deferred if key in packed}
            now = {key: _unpack(value, stored) for key, value in packed.items()}
            wanted: dict[str, torch.Tensor] = {}
            state = {key: _allocate(value, wanted) for key, value in now.items()}
        read_tensors(folder / TENSORS, wanted)
        return Checkpoint(folder, plain["step"], plain["config"], {**state, **late})
    except _FILE_ERRORS as error:
        if lost_or_out_of_memory(error):
            raise
        raise _no_checkpoint(folder, error) from error


def _no_checkpoint(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder} is no whole checkpoint: {error}; {_instead(folder)}")


@contextlib.contextmanager
def restoring(saved: Checkpoint, changed: str = "") -> Iterator[None]:
    """Turn errors from a state of another shape into one that names the checkpoint.

    Args:
        saved: the checkpoint.
        changed: the settings that differ from those of the checkpoint's run, a line each. If there
            are any, they are what does not fit, and the checkpoint is good.

    Raises:
        CheckpointError: a key is missing, or a value has another type or size.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ResearchAgentError) or lost_or_out_of_memory(error):
            raise
        cure = _instead(saved.folder)
        if changed:
            cure = f"give another --output, or the settings of that run:\n{changed}"
        raise CheckpointError(
            f"{saved.folder}/state.json and its tensors do not fit this run "
            f"({type(error).__name__}: {error}); {cure}"
        ) from error


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file; every rank reads its share of the files that the first one sees."""
    rank, size = rank_and_size()
    found: dict[str, str] = {}
    seen: list[str] = []
    with together():
        if rank == 0:
            files = (p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
            seen = sorted(path.relative_to(folder).as_posix() for path in files)
    names = broadcast_object(seen)
    with together():
        for name in names[rank::size]:
            found[name] = sha256(folder / name)
    return dict(sorted(item for part in gather([found]) for item in part.items()))


def _require_unchanged(folder: Path) -> None:
    found = _checksums(folder)
    with together():
        written = read_object(folder / CHECKSUMS, CheckpointError, _instead(folder))
        for name in sorted(written.keys() | found.keys()):
            if name not in found:
                raise ValueError(f"{name} is missing")
            if name in written and written[name] != found[name]:
                raise ValueError(f"{name} is not what was written (its SHA-256 differs)")


def _instead(folder: Path) -> str:
    """Say what to do about a broken checkpoint: continue from the one before it, if any."""
    step = int(match[1]) if (match := _NAME.fullmatch(folder.name)) else 0
    before = latest(folder.parent, up_to=step - 1)
    start = f"continue from {before.name}" if before else "start anew"
    return f"delete {folder} and give the same command to {start}"


def _complete(root: Path) -> list[tuple[int, Path]]:
    """The steps and folders of all checkpoints, oldest first."""
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(folder.name), folder) for folder in root.iterdir())
    return sorted((int(match[1]), folder) for match, folder in named if match)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: what is half removed must not look like one."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clear_temporary(root: Path) -> None:
    for folder in root.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    text = str(error).lower()
    return getattr(error, "errno", None) in full or "no space" in text or "too large" in text


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain JSON in which a tensor is the name of its entry in ``tensors``."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):  # as pairs: JSON would turn a number that is a key into text
        return {_PAIRS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, stored: Mapping[str, StoredTensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, stored) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return stored[value[_TENSOR]]
        return {key: _unpack(item, stored) for key, item in value[_PAIRS]}
    return value


def _allocate(value: Any, wanted: dict[str, torch.Tensor]) -> Any:
    """Put a new tensor in the place of each stored one, and into ``wanted`` by its name."""
    if isinstance(value, StoredTensor):
        wanted[value.name] = torch.empty(value.shape, dtype=value.dtype)
        return wanted[value.name]
    if isinstance(value, list):
        return [_allocate(item, wanted) for item in value]
    if isinstance(value, dict):
        return {key: _allocate(item, wanted) for key, item in value.items()}
    return value
