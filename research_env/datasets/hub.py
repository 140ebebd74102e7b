"""Fetch a published data set or corpus from the Hugging Face hub, and convert it.

``research-env datasets prepare`` writes the folder ``OUTPUT/NAME``: ``questions.jsonl.gz`` and
``corpus.jsonl.gz`` (a set may have only one of them), which :mod:`research_env.datasets.load`
finds, and ``manifest.json`` with the revision and the SHA-256 digests of the files that it was made
of, and of its own files. The folder appears whole or not at all. Downloads stay in
``OUTPUT/downloads/NAME``. Each is checked against the digest that the hub states; files that
somebody puts there are converted without a hub. Records are streamed: memory holds only the ids of
passages that may repeat.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO, cast

from research_env.datasets.catalog import HUB_SOURCES, PUBLISHED, HubSource, Record
from research_env.datasets.formats import MAX_LINE
from research_env.errors import DataError, DataNotFoundError, UnknownNameError
from research_env.system.locks import exclusive_lock
from research_env.system.paths import read_small_file
from research_env.system.progress import progress

MANIFEST = "manifest.json"
_FORMAT = 1  # version of the manifest and of the files
_SHOWN_EVERY = 1000  # records
_DAMAGED = (ValueError, RecursionError, EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: where it is.
        manifest: the content of ``manifest.json``.
        made: whether this call made the folder; False: it was there already.
        downloads: folder of the files it was made of.
    """

    folder: Path
    manifest: Mapping[str, Any]
    made: bool
    downloads: Path


class Counts(NamedTuple):
    """The numbers of questions per split, and the number of passages."""

    questions: dict[str, int]
    passages: int


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A file in a repository: its name, and its digest as far as the hub states one."""

    name: str
    sha256: str | None = None
    git_sha1: str | None = None  # SHA-1 of the git object, for a file that git itself holds


def prepare(name: str, output: Path) -> Prepared:
    """Make sure that a folder holds a published set, in this package's format.

    An existing set is checked against its manifest, and not changed. If several processes prepare
    the same set, one does the work.

    Args:
        name: a key of :data:`~research_env.datasets.catalog.HUB_SOURCES`.
        output: gets the set's folder and the downloads.

    Raises:
        UnknownNameError: no such set.
        DataNotFoundError: the hub does not give the files; the message says what to put where.
        DataError: a file does not have its digest or the expected format, or the folder holds
            something else.
    """
    if name not in HUB_SOURCES:
        raise UnknownNameError("published data set", name, HUB_SOURCES)
    source = HUB_SOURCES[name]
    folder = output / (PUBLISHED[name].folder if name in PUBLISHED else name)
    downloads = output / "downloads" / folder.name
    if (manifest := _read_finished(folder)) is not None:
        return Prepared(folder, manifest, False, downloads)
    revision, by_split = _find_files(source, downloads)
    output.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(output / f".{folder.name}.lock"):
        if (manifest := _read_finished(folder)) is not None:  # another process was first
            return Prepared(folder, manifest, False, downloads)
        sources = {}
        for file in (file for files in by_split.values() for file in files):
            path = downloads / file.name
            if revision is not None and not path.is_file():
                _download(source, revision, file, downloads)
            sources[file.name] = _check_download(source, file, path)
        unfinished = folder.with_name(f".{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            with progress(f"converting {name}", 1.0, counted=False) as report:
                rows = {
                    split: _read_records([downloads / file.name for file in files], report)
                    for split, files in by_split.items()
                }
                counts = convert(source, rows, unfinished)
            manifest = {
                "format": _FORMAT,
                "name": name,
                "repository": source.repository,
                "revision": revision,
                "sources": sources,
                "outputs": {path.name: _digest(path) for path in sorted(unfinished.iterdir())},
                **counts._asdict(),
            }
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            (unfinished / MANIFEST).write_text(text, encoding="utf-8")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared(folder, manifest, True, downloads)


def convert(source: HubSource, rows: Mapping[str, Iterable[Record]], folder: Path) -> Counts:
    """Write the records of each split to a folder in this package's format, as a stream.

    The same records give the same bytes. Records with ``answerable: false`` and passages without
    text are left out.

    Args:
        source: the format, and the name for messages.
        rows: the records of each split.
        folder: gets ``questions.jsonl.gz`` and ``corpus.jsonl.gz``, unless they would be empty.

    Returns:
        What was written.

    Raises:
        DataError: a record is not in the data set's format.
    """
    counts: Counter[str] = Counter()
    passages = 0
    seen: set[str] = set()
    paths = (folder / "questions.jsonl.gz", folder / "corpus.jsonl.gz")
    with _deterministic_gzip(paths[0]) as questions, _deterministic_gzip(paths[1]) as corpus:
        for split, records in rows.items():
            for number, record in enumerate(records, start=1):
                if not record.get("answerable", True):
                    continue
                try:
                    question, found = source.convert(record)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(
                        f"{source.repository}, split {split}, record {number}: not in the "
                        f"known format ({type(error).__name__}: {error}); put a converted data "
                        "set into a folder and set RESEARCH_DATA to it instead"
                    ) from error
                if question is not None:
                    counts[split] += 1
                    _write_line(questions, question | {"split": split})
                for passage in found:
                    if passage["text"] and passage["id"] not in seen:
                        passages += 1
                        _write_line(corpus, passage)
                        if source.repeats:
                            seen.add(passage["id"])
    for path, count in zip(paths, (counts.total(), passages), strict=True):
        if not count:
            path.unlink()
    return Counts(dict(counts), passages)


@contextmanager
def _deterministic_gzip(path: Path) -> Iterator[TextIO]:
    """Open a gzipped text file whose bytes depend on the text alone: no name, no time."""
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        yield text


def _write_line(file: TextIO, record: Record) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read_finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of an existing set, if all of its files have its digests; None: no such folder.

    Raises:
        DataError: the folder holds something else.
    """
    path = folder / MANIFEST
    if not folder.exists():
        return None
    suggestion = f"move {folder} away, or give another output folder, and prepare it again"
    try:
        manifest: dict[str, Any] = json.loads(read_small_file(path))
        known, outputs = manifest["format"], dict(manifest["outputs"])
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} was not prepared by this command (no {MANIFEST}); {suggestion}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {suggestion}") from error
    if known != _FORMAT:
        raise DataError(f"{path} has format {known!r}, not {_FORMAT}; {suggestion}")
    for name, expected in outputs.items():
        found = _digest(folder / name) if (folder / name).is_file() else None
        if found != expected:
            raise DataError(
                f"{folder / name} is {found}, but {MANIFEST} says {expected}; {suggestion}"
            )
    return manifest


def _find_files(source: HubSource, downloads: Path) -> tuple[str | None, dict[str, list[_HubFile]]]:
    """The hub's revision and the files of each split; without a hub, None and the downloads.

    Raises:
        DataNotFoundError: neither the hub nor the folder has a file for every split.
        DataError: the hub has a file with another digest than the known one.
    """
    patterns = ", ".join(source.files.values())
    try:
        revision, files = _list_repository(source)
    except Exception as error:  # whatever the network and the hub's client raise
        present = [path for path in downloads.rglob("*") if path.is_file()]
        files = [_HubFile(path.relative_to(downloads).as_posix()) for path in present]
        if (by_split := _group_by_split(source, files)) is not None:
            return None, by_split
        raise DataNotFoundError(
            f"the hub did not give {source.repository!r}: {_describe(error)}. Without a hub, put "
            f"its files {patterns} under these names into {downloads}, and run the same again"
        ) from error
    by_split = _group_by_split(source, files)
    if by_split is None:
        raise DataNotFoundError(
            f"{source.repository!r} no longer has the files {patterns}; it has "
            f"{', '.join(file.name for file in files[:20])}. Put the former ones into {downloads}, "
            "and run the same again with HF_HUB_OFFLINE=1"
        )
    for file in (file for group in by_split.values() for file in group):
        known = source.sha256.get(file.name)
        if known is not None and file.sha256 not in (None, known):
            raise DataError(
                f"{file.name} of {source.repository!r} is not the known file: its sha256 is "
                f"{file.sha256}, not {known}. Put the known one into {downloads}, and run the same "
                "again with HF_HUB_OFFLINE=1"
            )
    return revision, by_split


def _list_repository(source: HubSource) -> tuple[str, list[_HubFile]]:
    try:
        from huggingface_hub import HfApi  # noqa: PLC0415  (an extra, and slow to load)
    except ImportError as error:
        raise DataNotFoundError(
            "the hub needs further packages: pip install 'research-env[hub]'"
        ) from error
    info = HfApi().dataset_info(source.repository, revision="main", timeout=10, files_metadata=True)
    files = [
        _HubFile(each.rfilename, each.lfs.sha256 if each.lfs else None, each.blob_id)
        for each in info.siblings or ()
        if ".." not in each.rfilename and not each.rfilename.startswith("/")
    ]
    return str(info.sha), files


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def _group_by_split(source: HubSource, files: list[_HubFile]) -> dict[str, list[_HubFile]] | None:
    """The files of each split, sorted by name; None if a split has no file."""
    files = sorted(files, key=lambda file: file.name)
    found = {
        split: [file for file in files if fnmatchcase(file.name, pattern)]
        for split, pattern in source.files.items()
    }
    return found if all(found.values()) else None


def _download(source: HubSource, revision: str, file: _HubFile, downloads: Path) -> None:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (an extra, and slow to load)

    try:
        hf_hub_download(
            source.repository,
            file.name,
            repo_type="dataset",
            revision=revision,
            local_dir=downloads,
        )
    except Exception as error:  # whatever the network and the hub's client raise
        raise DataNotFoundError(
            f"the hub did not give {file.name} of {source.repository!r}: {_describe(error)}. Run "
            f"the same again, or put the file into {downloads / file.name}"
        ) from error
    finally:  # also what a killed process left there
        shutil.rmtree(downloads / ".cache", ignore_errors=True)


def _check_download(source: HubSource, file: _HubFile, path: Path) -> dict[str, Any]:
    """The digest of a download; a file with another digest than the hub's is moved away.

    Raises:
        DataError: the file is damaged.
    """
    digest = _digest(path)
    expected = source.sha256.get(file.name, file.sha256)
    if expected is not None:
        found: object = digest["sha256"]
    elif file.git_sha1 is not None:
        expected, found = file.git_sha1, _git_sha1(path)
    else:
        return digest  # without a hub, and nothing is known of the file
    if found != expected:
        damaged = path.replace(path.with_name(f"{path.name}.damaged"))
        raise DataError(
            f"{path} is damaged: its digest is {found}, and the hub says {expected}. It is now "
            f"{damaged.name}; run the same again to fetch it"
        )
    return digest


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _git_sha1(path: Path) -> str:
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header)).hexdigest()


def _read_records(paths: list[Path], report: Callable[[float, str], None]) -> Iterator[Record]:
    """Read the records of one split's files, one after the other.

    Raises:
        DataError: a file is damaged; the message names the last good record.
    """
    for path in paths:
        read = _parquet if path.suffix == ".parquet" else _json_lines
        number = 0
        try:
            for number, (record, fraction) in enumerate(read(path), start=1):
                if number % _SHOWN_EVERY == 0:
                    report(fraction, f"{number:,} records")
                yield record
        except _DAMAGED as error:
            raise DataError(
                f"{path}: what follows record {number} cannot be read ({error}); remove the file "
                "and fetch it again"
            ) from error


def _json_lines(path: Path) -> Iterator[tuple[Record, float]]:
    """Records of a .jsonl, .jsonl.gz or zipped .jsonl, each with the fraction of the file read."""
    size = path.stat().st_size or 1
    with path.open("rb") as raw, _unpack(path, raw) as lines:
        while line := lines.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"a line of over {MAX_LINE >> 20} MiB")
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
            yield record, raw.tell() / size


def _unpack(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The lines of a plain, gzipped or zipped file that is open as ``raw``."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw))
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(raw)
        inside = [name for name in archive.namelist() if name.endswith(".jsonl")]
        if len(inside) != 1:
            raise ValueError(f"one .jsonl is needed in the archive, not {inside}")
        return archive.open(inside[0])
    return raw


def _parquet(path: Path) -> Iterator[tuple[Record, float]]:
    """Records of a Parquet file, each with the fraction of the file read."""
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataNotFoundError(
            f"{path.name} needs further packages: pip install 'research-env[hub]'"
        ) from error
    with pq.ParquetFile(path) as file:
        total, done = file.metadata.num_rows or 1, 0
        for batch in file.iter_batches(batch_size=500):
            for record in batch.to_pylist():
                done += 1
                yield record, done / total
