"""Read the records of data files: JSON Lines, CSV, TSV, Parquet and Arrow.

A file may come from a stranger: only regular files are opened, lines are bounded, and whatever is
wrong is a :class:`~research_env.errors.DataError` that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from research_env.errors import ConfigurationError, DataError, DataNotFoundError

MAX_LINE = 16 << 20
"""The longest line that is read, in bytes; some thousand pages of a book."""

_BOM = b"\xef\xbb\xbf"
_BATCH = 1_000  # most rows of a Parquet or Arrow file that are converted at a time
_HELD = 256 << 20  # most bytes of these rows as Python values
_LISTS = ("answers", "golden_answers", "answer", "supporting", "decomposition")
_TEXTS = ("id", "_id", "question", "title", "text", "contents")  # whatever they look like
_COMPRESSED = {  # first bytes
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}

Records = Iterator[tuple[str, dict[str, Any]]]
"""Where each record stands (``FILE:LINE``, or ``FILE: row N``), and its fields."""


def read_records(path: Path) -> Records:
    """Read a file by its name: ``.csv``, ``.tsv`` (also ``.gz``), ``.parquet``, ``.arrow``.

    Any other name is JSON Lines, gzipped if it ends with ``.gz``. A byte order mark and blank lines
    at the end are skipped.

    Args:
        path: the file.

    Raises:
        DataNotFoundError: no such file.
        DataError: the file is no regular file, is damaged, or has another format.
        ConfigurationError: the format needs pyarrow, which is not installed.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise missing(path) from error
    if not regular:
        if path.is_dir():
            raise missing(path)
        raise DataError(f"{path}: no regular file but a pipe or device; copy it into a file")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return _READERS.get(suffix, _json_records)(path)


def missing(path: Path) -> DataNotFoundError:
    """The error for a file that is not there."""
    return DataNotFoundError(
        f"no file {path}; give the path of a .jsonl or .jsonl.gz file (or .csv, .tsv, .parquet, "
        ".arrow)"
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the lines, without a byte order mark."""
    number = 0
    try:
        zipped = path.suffix.lower() == ".gz"
        with cast(BinaryIO, gzip.open(path) if zipped else path.open("rb")) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if number == 1 and line.startswith(tuple(_COMPRESSED)):
                    raise _compressed(path, line)
                if len(line) > MAX_LINE:
                    raise DataError(
                        f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB; write one "
                        "record per line, and split long documents"
                    )
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the gzip data are damaged or cut off ({error}); "
            "get the file again, or name a plain file .jsonl"
        ) from error
    except OSError as error:  # no permission, a disk that fails
        raise DataError(f"{path}:{number + 1}: cannot be read ({error})") from error


def _compressed(path: Path, line: bytes) -> DataError:
    kind = next(kind for start, kind in _COMPRESSED.items() if line.startswith(start))
    return DataError(
        f"{path}: compressed with {kind}; decompress it, or compress it with gzip and end its "
        "name with .gz"
    )


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        ) from error


def _json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # JSON can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _json_records(path: Path) -> Records:
    blank = 0  # number of the first blank line; only blank lines may follow it
    for number, line in _lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise DataError(f"{path}:{blank}: the line is empty; remove it")
        where = f"{path}:{number}"
        text = _decoded(line, where)
        try:
            record = _json(text)
        except ValueError as error:
            raise DataError(
                f"{where}: not a JSON object ({error}): {text.strip()[:60]!r}; write one object "
                "per line, complete on that line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON object is needed, not {type(record).__name__} {record!r:.60}; "
                'write {"id": ..., ...} on each line'
            )
        yield where, record


def _csv_records(path: Path) -> Records:
    """Read a table whose first line names the columns; an empty cell is an absent field."""
    number = 0
    # The limit holds for the whole process, so it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path):
            yield _decoded(line, f"{path}:{number}")

    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    rows = csv.reader(lines(), delimiter="\t" if tabs else ",", strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{number + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{where}: not a row of a table ({error}); mend its quotes, or convert the file to "
                ".jsonl with the program that wrote it"
            ) from error
        if not header:
            header = [name.strip() for name in row]
            if twice := [name for name in (*_TEXTS, *_LISTS, "hops") if header.count(name) > 1]:
                raise DataError(f"{where}: two columns have the name {twice[0]!r}; rename one")
        elif row and len(row) != len(header):
            raise DataError(
                f"{where}: {len(row)} cells, but the first line names {len(header)} columns "
                f"({', '.join(header)[:80]}); quote cells that hold a separator"
            )
        elif row:
            cells = zip(header, row, strict=True)
            yield where, {name: _cell(name, cell, where) for name, cell in cells if cell.strip()}


def _cell(name: str, cell: str, where: str) -> Any:
    """The value of a cell: text, a number in ``hops``, or a list or object if it is JSON.

    Raises:
        DataError: the cell holds a list in another notation, such as Python's.
    """
    if name in _TEXTS or (name != "hops" and cell.lstrip()[0] not in "[{"):
        return cell
    try:
        return _json(cell)
    except ValueError:
        if name in _LISTS and cell.rstrip().endswith(("]", "}")):
            raise DataError(
                f"{where}: the cell {name!r} is a list or an object, but not JSON: {cell!r:.80}; "
                "write it with json.dumps"
            ) from None
        return cell


def _arrow_records(path: Path) -> Records:
    try:
        import pyarrow as pa  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ConfigurationError(
            f"{path} needs pyarrow: pip install 'research-env[hub]'; or convert it to .jsonl "
            "where it is installed: research-env datasets convert"
        ) from error
    row = 0
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    try:
        with pa.OSFile(str(path)) as source:
            for batch in (_parquet_batches if kind == "Parquet" else _arrow_batches)(source):
                batch.validate(full=True)  # a stranger's offsets may point outside the buffers
                for record in _rows(batch):
                    row += 1
                    yield f"{path}: row {row}", record
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{path}: row {row + 1}: not a readable {kind} file ({error!s:.120}); get it again"
        ) from error


def _parquet_batches(source: Any) -> Iterator[Any]:
    """The batches of a Parquet file, with texts as dictionaries.

    A file of 2 kB can repeat a text of 8 MB in each row; a dictionary holds it once.

    Raises:
        ValueError: the values of a column are too large.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415

    file = pq.ParquetFile(source)
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.total_uncompressed_size > MAX_LINE * max(1, group.num_rows):
                raise ValueError(f"values of {column.path_in_schema} over {MAX_LINE >> 20} MiB")
    columns = map(file.schema.column, range(len(file.schema)))
    texts = [each.path for each in columns if each.physical_type == "BYTE_ARRAY"]
    yield from pq.ParquetFile(source, read_dictionary=texts).iter_batches(_BATCH)


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Convert a batch to Python values, a few rows at a time, so that `_HELD` bytes are enough.

    Raises:
        ValueError: a single row may need more.
    """
    import pyarrow as pa  # noqa: PLC0415

    size = sum(map(_largest, batch.columns))
    if size > _HELD:
        raise ValueError(f"a row may have {size} bytes, more than {_HELD >> 20} MiB")
    rows = min(_BATCH, _HELD // max(1, size))
    for first in range(0, batch.num_rows, rows):
        columns = [
            each.dictionary_decode() if isinstance(each, pa.DictionaryArray) else each
            for each in batch.slice(first, rows).columns  # to_pylist is slow on dictionaries
        ]
        yield from pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _largest(array: Any) -> int:
    """The most bytes that a value of an array may have."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _largest(array.dictionary)
    if pa.types.is_struct(kind):
        return sum(map(_largest, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pc.max(pc.list_value_length(array)).as_py() or 0) * _largest(array.flatten())
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], "<i4").reshape(-1, 4)[array.offset :, 0]
        return int(views[: len(array)].max(initial=0))  # a view begins with the length
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pc.max(pc.binary_length(array)).as_py() or 0
    return 8


def _arrow_batches(source: Any) -> Iterator[Any]:
    """The batches of an Arrow file, or of an Arrow stream, as the library datasets writes it."""
    import pyarrow as pa  # noqa: PLC0415

    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


_READERS: dict[str, Callable[[Path], Records]] = {
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _arrow_records,
    ".arrow": _arrow_records,
    ".feather": _arrow_records,
}
