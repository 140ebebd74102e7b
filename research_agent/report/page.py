"""The page of a report: one HTML file that contains its data and loads nothing.

No data can become markup or code. The data is in ``<script type="application/json">`` elements, as
JSON without any character that could close the element. The page's script turns it into text nodes
and never into HTML. And a Content-Security-Policy allows nothing to run, load or connect except
that script and the style, both by their hashes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from research_agent.formats import finite

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("elements", "state", "overview", "list", "trajectory", "main")  # joined in this order


def render(title: str, index: Mapping[str, Any], details: Iterable[Sequence[str]]) -> str:
    """Make the HTML of a page.

    Args:
        title: title of the page.
        index: what the page shows at first; see ``research_agent.report.index``.
        details: what it shows on a click: chunks of records as JSON. Element ``chunk-n`` has the
            n-th chunk in gzip and base64, because ten thousand trajectories are a hundred
            megabytes of text.
    """
    style = (_STATIC / "page.css").read_text("utf-8")
    script = "\n".join((_STATIC / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    elements = [_element("index", as_json({**index, "title": title}))]
    for number, chunk in enumerate(details):
        packed = gzip.compress(f"[{','.join(chunk)}]".encode("ascii"), 6, mtime=0)
        elements.append(_element(f"chunk-{number}", f'"{base64.b64encode(packed).decode()}"'))
    return Template((_STATIC / "page.html").read_text("utf-8")).substitute(
        policy=policy,
        title=html.escape(title.encode("utf-8", "backslashreplace").decode("utf-8")),
        style=style,
        script=script,
        data="\n".join(elements),
    )


def as_json(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` and ``&``. Numbers that are not finite become null."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), separators=(",", ":"))
    for character in "<>&":  # in JSON they occur only inside strings
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _element(name: str, text: str) -> str:
    return f'<script type="application/json" id="{name}">{text}</script>'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
