"""Find the files of a model from its name: a folder, a GGUF file, a LoRA adapter, or the hub.

Importing this module loads no torch, so tokenizers can be opened without it.
"""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from research_agent.errors import ModelError, ResearchAgentError

STARTERS = Path(__file__).parents[1] / "starters"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

MOST_LAYERS = 1_000
_LARGEST_JSON = 256 << 20  # bytes; the tokenizers of large vocabularies have some 30 MB
MODEL_CURE = (
    "give a folder with config.json and model.safetensors, a GGUF file, or a name on the Hugging"
    " Face hub"
)


@contextmanager
def opening(what: str, cure: str = MODEL_CURE) -> Iterator[None]:
    """Turn whatever a library raises inside the block into a ``ModelError``.

    Errors of this package, a lost rank and a lack of memory are raised as they are.

    Args:
        what: what the block opens, for the message.
        cure: what to do if it cannot be opened, for the message.

    Raises:
        ModelError: the block raised another error.
    """
    try:
        yield
    except ResearchAgentError:
        raise
    except ImportError as error:
        raise ModelError(f"{what} needs a package that is missing: {error}") from error
    except Exception as error:
        from research_agent.distributed import lost_or_out_of_memory  # noqa: PLC0415 - loads torch

        if lost_or_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:1000] or type(error).__name__
        raise ModelError(f"{what} cannot be opened: {cause}; {cure}") from error


@contextmanager
def reading_weights(place: str) -> Iterator[None]:
    """Check a folder's weight files before the block reads them, and name a damaged one after.

    Args:
        place: folder of the files. A name on the hub has no files to check.

    Raises:
        ModelError: a file is compressed, so that 2 MB could fill gigabytes of memory; or the block
            raised an error, and a file is damaged.
    """
    files = [path for path in sorted(Path(place).glob("*model*")) if path.is_file()]
    pickles = [path for path in files if path.suffix == ".bin"]
    for file in pickles:
        with _opening_file(file):
            if is_zipfile(file) and any(part.compress_type for part in ZipFile(file).infolist()):
                raise ModelError(f"{file} is compressed, as PyTorch never writes it")
    try:
        yield
    except Exception:
        from safetensors import safe_open  # noqa: PLC0415 - loads torch
        from torch import load  # noqa: PLC0415

        for file in (path for path in files if path.suffix == ".safetensors"):
            with _opening_file(file), safe_open(file, "pt"):
                pass
        for file in pickles:
            with _opening_file(file):
                load(file, map_location="meta", weights_only=True)
        raise


def _opening_file(file: Path) -> AbstractContextManager[None]:
    return opening(f"the file {str(file)!r}", "get it again, or give safetensors")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the parts of a model are."""

    place: str
    """Folder of the weights, or a name on the hub."""
    gguf_file: str | None = None
    """Name of the GGUF file in that folder, which holds weights, configuration and tokenizer."""
    adapter: str | None = None
    """Folder, or name on the hub, of a LoRA adapter over those weights."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained`` of the transformers library."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve_model(name: str | Path) -> str:
    """Resolve a name to a starter of this package, the newest checkpoint of a run, or itself.

    Raises:
        ModelError: the name is a path without a folder or GGUF file; it resembles the name of a
            starter or local folder; or it lies in a local folder, and the hub's cache has no such
            model.
    """
    from research_agent.checkpoint import latest  # noqa: PLC0415 - loads torch

    text, path = str(name), Path(name).expanduser()
    starters = {p.name: p for p in STARTERS.iterdir()} if STARTERS.is_dir() else {}
    if text in starters:
        return str(starters[text])
    if newest := latest(path / "checkpoints"):
        return str(newest)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return str(path)
    if path.is_file():
        raise ModelError(f"{text} is a file, and no GGUF file; give the folder of the model")
    is_path = text[:1] in (".", "/", "~") or text.count("/") > 1 or text.endswith((".gguf", "/"))
    near = _near_names(path, starters)
    in_folder = not is_path and "/" in text and path.parent.is_dir() and not _in_hub_cache(text)
    # Then a folder or a starter is meant, and not a name on the hub.
    if is_path or in_folder or (near and "/" not in text):
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        hub = f" (hf download {text} gets it first, because {path.parent} is a local folder)"
        raise ModelError(
            f"there is no model folder {text}{meant} Give a folder, a starter "
            f"({', '.join(sorted(starters))}), or a name on the hub{hub if in_folder else ''}"
        )
    return text


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def starting_model(model: str) -> str:
    """The model to start from: the newest checkpoint if ``model`` is the folder of a run."""
    from research_agent.checkpoint import latest  # noqa: PLC0415 - loads torch

    newest = latest(Path(model).expanduser() / "checkpoints")
    return str(newest) if newest else model


def _near_names(path: Path, starters: Iterable[str]) -> list[str]:
    """Starters, and models in the path's folder, with names similar to the path's."""
    is_model = ("config.json", _ADAPTER_CONFIG, "checkpoints")
    folder = path.parent
    local = [
        each.name
        for each in (folder.iterdir() if folder.is_dir() else ())
        if each.suffix == ".gguf" or any((each / name).exists() for name in is_model)
    ]
    own = [] if path.parent.name else list(starters)
    found = difflib.get_close_matches(path.name, [*own, *local], n=3, cutoff=0.75)
    return [name if name in own else str(folder / name) for name in found]


def model_source(name: str | Path) -> ModelSource:
    """Find the parts of a model.

    Args:
        name: a starter, the folder of a run or of a model, a GGUF file, the folder of a LoRA
            adapter, or a name on the hub.

    Raises:
        ModelError: there is no such model, it lacks its files, or its adapter's base is unclear.
    """
    place = resolve_model(name)
    path = Path(place)
    _require_small(path)
    if path.is_file():
        return _gguf(path)
    if not path.is_dir():
        return _hub(place)
    if (path / _ADAPTER_CONFIG).is_file() and any((path / n).is_file() for n in _ADAPTER_WEIGHTS):
        return _over_base(place, path / _ADAPTER_CONFIG)
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            message = f"{path} has a config.json but no weights; put its model.safetensors there"
            raise ModelError(message)
        return ModelSource(place)
    if files := sorted(path.glob("*.gguf")):
        if len(files) > 1:
            raise ModelError(f"{path} holds {len(files)} GGUF files; name one, such as {files[0]}")
        return _gguf(files[0])
    raise ModelError(f"{path} holds no model: it has no config.json; {MODEL_CURE}")


def tokenizer_source(name: str | Path) -> ModelSource:
    """Find the tokenizer of a model. An adapter can have its own; otherwise it is the base's.

    Raises:
        ModelError: as for ``model_source``, if the folder has neither tokenizer nor config.json.
    """
    place = Path(name).expanduser()
    _require_small(place)
    if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
        return ModelSource(str(place))
    if (place / "config.json").is_file() and not (place / _ADAPTER_CONFIG).is_file():
        return ModelSource(str(place))
    source = model_source(name)
    has_its_own = source.adapter is not None and _cached(str(name), "tokenizer_config.json")
    return ModelSource(str(name)) if has_its_own else source


def _require_small(folder: Path) -> None:
    """Refuse JSON files that would fill the memory; libraries read them as a whole."""
    for file in folder.glob("*.json"):
        if file.is_file() and file.stat().st_size > _LARGEST_JSON:
            raise ModelError(f"{file} has more than {_LARGEST_JSON >> 20} MiB; get it again")


def read_config(source: ModelSource, name: str) -> Any:
    """Open the configuration of a model.

    Raises:
        ModelError: it has more than ``MOST_LAYERS`` layers.
        Exception: whatever the library raises.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - slow to import

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if "layer" in key:
                require_few_layers(value, name)
        return dict(pairs)

    if source.gguf_file is None and (file := _cached(source.place, "config.json")):
        # The check comes first, because the library makes lists with an entry per layer.
        json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=check)
    return AutoConfig.from_pretrained(source.place, **source.options, trust_remote_code=False)


def require_few_layers(layers: object, name: str) -> None:
    """Refuse a number of layers that would fill the memory before a weight is read."""
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(
            f"the configuration of {name!r} says more than {MOST_LAYERS} layers; get it again"
        )


def generation_settings(place: str) -> dict[str, Any]:
    """The unchecked generation_config.json of a folder or a name on the hub; {} if unreadable."""
    found = _cached(place, "generation_config.json")
    try:
        values = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _cached(place: str, file: str) -> str | None:
    """Local path of a file of a folder or of a name on the hub; None if there is none."""
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    try:
        found: str | None = cached_file(
            place,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):
        return None
    return found


def _gguf(path: Path) -> ModelSource:
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it begins with {head[:4]!r}; get it again")
    if "-00001-of-" in path.name or "-of-0" in path.name:
        raise ModelError(
            f"{path} is a part of a GGUF model; join the parts with llama-gguf-split --merge, "
            "or give the model in safetensors"
        )
    if len(head) < 8 or struct.unpack("<I", head[4:])[0] not in (2, 3):
        raise ModelError(f"{path} is a GGUF file of an unknown version; convert it to version 3")
    return ModelSource(str(path.parent), gguf_file=path.name)


def _hub(name: str) -> ModelSource:
    """The source for a name on the hub, which may be an adapter's."""
    from transformers.utils.peft_utils import find_adapter_config_file  # noqa: PLC0415

    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):  # no such name or no network: loading the model reports it
        found = None
    return ModelSource(name) if found is None else _over_base(name, Path(found))


def _over_base(adapter: str, config: Path) -> ModelSource:
    """The base that an adapter's configuration names, with the adapter."""
    try:
        named = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{config} names no base model ({error}); add it there") from error
    if not isinstance(named, str) or not named:
        message = f"{config} names the base model {named!r}; set base_model_name_or_path in it"
        raise ModelError(message)
    beside = config.parent / named
    base = model_source(beside if not Path(named).is_dir() and beside.is_dir() else named)
    if base.adapter is not None:
        raise ModelError(f"{adapter} is an adapter over the adapter {named}; merge that one first")
    return ModelSource(base.place, base.gguf_file, adapter)
