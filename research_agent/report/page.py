"""The page: one HTML file that holds its data, and shows every text as text.

Nothing in the data can become markup or code. It stands in ``<script type="application/json">``
elements, in which no character can close the element; the script makes text nodes of it and never
HTML; and a Content-Security-Policy lets nothing run, load or connect but that script and its style,
both named by their hashes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any


def render(title: str, index: Mapping[str, Any], details: Iterable[Sequence[str]]) -> str:
    """Make the page, with everything that it needs inside.

    Args:
        title: title of the page.
        index: what the page shows at once, as ``research_agent.report.index`` makes it.
        details: what it shows on a click: chunks of records, each as JSON. The n-th chunk is
            element ``chunk-n``, in gzip and base64: ten thousand trajectories are a hundred
            megabytes of text.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    folder = Path(__file__).parent
    style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    elements = [_element("index", as_json({**index, "title": title}))]
    for number, chunk in enumerate(details):
        packed = gzip.compress(f"[{','.join(chunk)}]".encode("ascii"), 6, mtime=0)
        elements.append(_element(f"chunk-{number}", f'"{base64.b64encode(packed).decode()}"'))
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        policy=policy,
        title=html.escape(title.encode("utf-8", "backslashreplace").decode("utf-8")),
        style=style,
        script=script,
        data="\n".join(elements),
    )


def as_json(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` and ``&``; a number that is not finite becomes null."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), separators=(",", ":"))
    for character in "<>&":  # they stand in strings only
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _element(name: str, text: str) -> str:
    return f'<script type="application/json" id="{name}">{text}</script>'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value
