"""Show text in a terminal without letting its control characters take effect."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

# C0 and C1 controls without tab and newline, and the characters that reorder a line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    r"""Show control characters as escapes: ESC becomes the four characters ``\x1b``.

    Args:
        text: may contain questions, passages, actions or names of files.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def show(text: object = "", *, file: TextIO | None = None) -> None:
    """Print a line at once, its control characters as escapes.

    Args:
        text: the line; ``str`` of anything else.
        file: standard output when None.
    """
    print(printable(str(text)), file=file or sys.stdout, flush=True)


def show_json(value: object) -> None:
    """Print a value as one line of JSON, which reads back as it was."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    text = json.dumps(value, ensure_ascii=plain)
    print(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


def escape_unencodable() -> None:
    """Let standard output and error show characters that they cannot encode as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def escaped_logs() -> Iterator[None]:
    """Show control characters as escapes in log records and warnings.

    Libraries log texts from servers and files.
    """
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def make_escaped(*args: Any, **options: Any) -> logging.LogRecord:
        record = make(*args, **options)
        if record.exc_info and record.exc_info[0]:
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
        with suppress(TypeError, ValueError):  # wrong arguments, which the handler reports
            record.msg, record.args = printable(_COLOR.sub("", record.getMessage())), ()
        return record

    def form_escaped(*args: Any, **options: Any) -> str:
        return printable(form(*args, **options))

    logging.setLogRecordFactory(make_escaped)
    warnings.formatwarning = form_escaped
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = form
