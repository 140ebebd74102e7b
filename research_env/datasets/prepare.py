"""Fetch a published data set or corpus from its hub, and convert it: ``datasets prepare``.

For each set the folder ``OUTPUT/NAME`` gets ``questions.jsonl.gz`` and ``corpus.jsonl.gz`` (those
that it has), which :mod:`research_env.datasets.load` finds, and ``manifest.json``: which revision
of which files it was made of, and what came out, with SHA-256 sums. It appears whole or not at all.
What is fetched lies in ``OUTPUT/downloads/NAME``. A file there is checked against the sum that the
hub tells, an interrupted one is gone on with, and files that were put there by hand do without a
hub. Nothing is held in memory but the ids of passages that may repeat.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from research_env.datasets.hub import HUB_SOURCES, HubSource, Record, convert
from research_env.datasets.load import PUBLISHED
from research_env.errors import DataError, DataNotFoundError, UnknownNameError
from research_env.progress import progress

MANIFEST = "manifest.json"
_FORMAT = 1  # of the manifest and of what is written; another one is made again by hand
_BATCH = 500  # records of a Parquet file at once
_SHOWN_EVERY = 1000  # records
_DAMAGED = (ValueError, RecursionError, EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared set: its folder, what its manifest says, and whether it was made just now."""

    folder: Path
    manifest: Mapping[str, Any]
    made: bool
    downloads: Path


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file of the hub: its name, size, and sums as far as the hub tells them."""

    name: str
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None  # of a file that is in git itself: the SHA-1 of its git object


def prepare(name: str, output: Path) -> Prepared:
    """Make sure that a folder holds a published set, in this package's format.

    A set that is there is checked against its manifest, and left as it is. Of several processes
    one does the work.

    Args:
        name: a key of :data:`~research_env.datasets.hub.HUB_SOURCES`.
        output: gets the set's folder and the downloads.

    Raises:
        UnknownNameError: no such set.
        DataNotFoundError: the hub does not give the files; the message says what to put where.
        DataError: a file is not what its sum says, or not in the format known; or the folder holds
            something else.
    """
    if name not in HUB_SOURCES:
        raise UnknownNameError("published data set", name, HUB_SOURCES)
    source = HUB_SOURCES[name]
    folder = output / (PUBLISHED[name].folder if name in PUBLISHED else name)
    downloads = output / "downloads" / folder.name
    if (manifest := _finished(folder)) is not None:
        return Prepared(folder, manifest, False, downloads)
    revision, listed = _listing(source, downloads)
    output.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        if (manifest := _finished(folder)) is not None:  # another process was first
            return Prepared(folder, manifest, False, downloads)
        sources = {}
        for file in (file for files in listed.values() for file in files):
            path = downloads / file.name
            if revision is not None:
                _download(source, revision, file, path)
            sources[file.name] = _checked(source, file, path)
        unfinished = folder.with_name(f".{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            with progress(f"converting {name}", 1.0, counted=False) as report:
                rows = {
                    split: _records([downloads / file.name for file in files], report)
                    for split, files in listed.items()
                }
                counts = convert(source, rows, unfinished)
            manifest = {
                "format": _FORMAT,
                "name": name,
                "repository": source.repository,
                "revision": revision,
                "sources": sources,
                "outputs": {path.name: _sums(path) for path in sorted(unfinished.iterdir())},
                **counts._asdict(),
            }
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            (unfinished / MANIFEST).write_text(text, encoding="utf-8")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared(folder, manifest, True, downloads)


def _finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a set that is there, once all of its files are what it says."""
    path = folder / MANIFEST
    if not folder.exists():
        return None
    cure = f"move {folder} away, or give another output folder, and prepare it again"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known, outputs = manifest["format"], manifest["outputs"]
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds what was not prepared here (no {MANIFEST}); {cure}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error
    if known != _FORMAT:
        raise DataError(f"{path} is of format {known!r}, not {_FORMAT}; {cure}")
    for name, sums in outputs.items():
        found = _sums(folder / name) if (folder / name).is_file() else None
        if found != sums:
            raise DataError(
                f"{folder / name} is not what {MANIFEST} says: {found}, not {sums}; {cure}"
            )
    return manifest


# --- the hub -------------------------------------------------------------------------------------


def _listing(source: HubSource, downloads: Path) -> tuple[str | None, dict[str, list[_Listed]]]:
    """The revision and its files for each split; without a hub, None and the files put there.

    Raises:
        DataNotFoundError: neither the hub nor the folder has a file for every split.
        DataError: the hub has another file than the one that is known.
    """
    try:
        revision, files = _ask(source)
    except Exception as error:  # whatever the network and the hub's client come up with
        there = [path for path in downloads.rglob("*") if path.is_file()]
        files = [_Listed(path.relative_to(downloads).as_posix()) for path in there]
        if (listed := _by_split(source, files)) is not None:
            return None, listed
        raise DataNotFoundError(
            f"the hub did not give {source.repository!r}: {_said(error)}. "
            f"Without a hub, put its files {', '.join(source.files.values())} under these names "
            f"into {downloads}, and do the same again"
        ) from error
    listed = _by_split(source, files)
    if listed is None:
        raise DataNotFoundError(
            f"{source.repository!r} has no longer the files {', '.join(source.files.values())}; "
            f"it has {', '.join(file.name for file in files[:20])}. Put the former ones into "
            f"{downloads}, and do the same again with HF_HUB_OFFLINE=1"
        )
    for name, sha256 in source.sha256.items():
        for file in (file for files in listed.values() for file in files if file.name == name):
            if file.sha256 not in (None, sha256):
                raise DataError(
                    f"{name} of {source.repository!r} is another file than the one known: its "
                    f"sha256 is {file.sha256}, not {sha256}. Put the known one into {downloads}, "
                    "and do the same again with HF_HUB_OFFLINE=1"
                )
    return revision, listed


def _ask(source: HubSource) -> tuple[str, list[_Listed]]:
    try:
        from huggingface_hub import HfApi  # noqa: PLC0415  (an extra, and slow to load)
    except ImportError as error:
        raise DataNotFoundError(
            "the hub needs further packages: pip install 'research-env[hub]'"
        ) from error
    told = HfApi().dataset_info(source.repository, revision="main", timeout=10, files_metadata=True)
    files = [
        _Listed(each.rfilename, each.size, each.lfs.sha256 if each.lfs else None, each.blob_id)
        for each in told.siblings or ()
        if ".." not in each.rfilename and not each.rfilename.startswith("/")
    ]
    return str(told.sha), files


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def _by_split(source: HubSource, files: list[_Listed]) -> dict[str, list[_Listed]] | None:
    """The files of each split, in the order of their names; None where one has none."""
    files = sorted(files, key=lambda file: file.name)
    found = {
        split: [file for file in files if fnmatchcase(file.name, pattern)]
        for split, pattern in source.files.items()
    }
    return found if all(found.values()) else None


def _download(source: HubSource, revision: str, file: _Listed, path: Path) -> None:
    """Fetch a file, unless it is there; what an interrupted download left is gone on with."""
    from huggingface_hub import HfApi, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
        build_hf_headers,
    )

    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{revision[:12]}.part")
    if file.size is not None and part.exists() and part.stat().st_size > file.size:
        part.unlink()
    url = hf_hub_url(
        source.repository,
        file.name,
        repo_type="dataset",
        revision=revision,
        endpoint=HfApi().endpoint,
    )
    # hf_hub_download begins anew in every process; the function below it can go on
    try:
        with part.open("ab") as target:
            http_get(
                url,
                target,
                resume_size=part.stat().st_size,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
    except Exception as error:
        raise DataNotFoundError(
            f"the hub did not give {file.name} of {source.repository!r}: {_said(error)}. Do the "
            f"same again to go on, or put the file into {path}"
        ) from error
    part.rename(path)


def _checked(source: HubSource, file: _Listed, path: Path) -> dict[str, Any]:
    """The sums of a download; one that is not what it should be is moved out of the way."""
    sums = _sums(path)
    known = source.sha256.get(file.name, file.sha256)
    if known is not None:
        found: object = sums["sha256"]
    elif file.blob is not None:
        known, found = file.blob, _git_blob(path)
    else:
        return sums  # without a hub, and no sum is known
    if found != known:
        damaged = path.replace(path.with_name(f"{path.name}.damaged"))
        raise DataError(
            f"{path} is not what the hub says: its checksum is {found}, not {known}. It is now "
            f"{damaged.name}; do the same again to fetch it anew"
        )
    return sums


def _sums(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares this set; the lock ends with the process."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- the files -----------------------------------------------------------------------------------


def _records(paths: list[Path], report: Callable[[float, str], None]) -> Iterator[Record]:
    """The records of files of one split, one after the other, as they are read.

    Raises:
        DataError: a file is damaged; the message names the line.
    """
    for path in paths:
        read = _parquet if path.suffix == ".parquet" else _json_lines
        number = 0
        try:
            for number, (record, share) in enumerate(read(path), start=1):
                if number % _SHOWN_EVERY == 0:
                    report(share, f"{number:,} records")
                yield record
        except _DAMAGED as error:
            raise DataError(
                f"{path}: what follows record {number} cannot be read ({error}); remove the file "
                "and fetch it again"
            ) from error


def _json_lines(path: Path) -> Iterator[tuple[Record, float]]:
    """Records of a .jsonl, .jsonl.gz or zipped .jsonl, and the share of the file that is read."""
    size = path.stat().st_size or 1
    with path.open("rb") as raw, _unpacked(path, raw) as lines:
        for line in lines:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
            yield record, raw.tell() / size


@contextmanager
def _unpacked(path: Path, raw: IO[bytes]) -> Iterator[Iterable[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(raw) as lines:
            yield lines
    elif path.suffix == ".zip":
        with zipfile.ZipFile(raw) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".jsonl")]
            if len(inside) != 1:
                raise ValueError(f"one .jsonl is needed in the archive, not {inside}")
            with archive.open(inside[0]) as lines:
                yield lines
    else:
        yield raw


def _parquet(path: Path) -> Iterator[tuple[Record, float]]:
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataNotFoundError(
            f"{path.name} needs further packages: pip install 'research-env[hub]'"
        ) from error
    with pq.ParquetFile(path) as file:
        total, done = file.metadata.num_rows or 1, 0
        for batch in file.iter_batches(batch_size=_BATCH):
            for record in batch.to_pylist():
                done += 1
                yield record, done / total
