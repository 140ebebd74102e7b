"""Records of questions and passages, and files of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

QUESTION = {"id": "q1", "question": "Who?", "answers": ["Ann"]}
PASSAGE = {"id": "p1", "title": "Ann", "text": "Ann is a person."}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def question(id_: str, **more: Any) -> dict[str, Any]:
    return QUESTION | {"id": id_} | more
