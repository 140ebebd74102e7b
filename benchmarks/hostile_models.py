"""Hostile weight files: the section ``models`` of :mod:`benchmarks.hostile`.

The models are tiny. Half of the random changes fall into the first bytes, where lengths, shapes and
offsets stand. An error must name the model.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.hostile_files import special
from benchmarks.hostile_trials import MUTATIONS, Case, mutated, sparse
from research_agent.errors import ModelError
from research_agent.models.policy import load_model
from research_agent.renderer import load_renderer
from tests.research_agent.conftest import byte_tokenizer, tiny_llama
from tests.research_agent.model_files import edit_json, save_adapter, save_gguf, save_model

_HEADER = 3_000  # bytes in which half of the random changes fall
_FILES = ("model.safetensors", "pytorch_model.bin", "old.bin", "model.gguf",
          "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip


def model_cases(folder: Path) -> Iterator[Case]:
    """Weights in safetensors, PyTorch's two formats and GGUF, and adapters."""
    good = _make(folder / "good")
    for name in _FILES:  # what libraries load and keep is loaded before memory is measured
        _open(good, name, lambda _: None, folder / f"first-{name}")
    for name in _FILES:
        data = _place(good, name).read_bytes()
        for seed in range(MUTATIONS // 4):
            head, rest = (data[:_HEADER], data[_HEADER:]) if seed % 2 else (data, b"")
            content = mutated(head, f"{name} {seed}") + rest
            yield _case(good, f"{name} changed ({seed})", name, _writes(content))
        for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
            yield _case(good, f"{name}: {length} bytes", name, _writes(data[:length]))
        yield _case(good, f"{name}: NUL", name, _writes(b"\0" * 1_000_000))
        yield _case(good, f"{name}: 3 GiB of NUL", name, sparse)
        for what, make in special():
            yield _case(good, f"{what} as {name}", name, _instead(make))
    for what, header in _HEADERS.items():
        name = "model.safetensors"
        yield _case(good, f"{name}: {what}", name, _writes(header + b"\0" * 64))
    yield _case(good, "pytorch_model.bin: code", "pytorch_model.bin", _writes(_Code.file()))
    yield _case(good, "pytorch_model.bin: a bomb", "pytorch_model.bin", _bomb)
    data = _place(good, "model.gguf").read_bytes()
    for what, content in _gguf_lies(data).items():
        yield _case(good, f"model.gguf: {what}", "model.gguf", _writes(content))
    for key, value in {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 2**40),
        "num_hidden_layers": 9_999,
        "max_position_embeddings": 2**60,
        "num_attention_heads": 2**40,
    }.items():
        change = partial(_configure, key, value)
        yield _case(good, f"config.json: {key} {value}", "model.safetensors", change)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        change = partial(_beside, name)
        yield _case(good, f"{name}: 3 GiB of NUL", "model.safetensors", change)


def _make(folder: Path) -> Path:
    """The same model in each format, in a folder of its own; made once."""
    if folder.exists():
        return folder
    base = save_model(folder / "model.safetensors", tiny_llama())
    weights = load_file(base / "model.safetensors")
    for name, new in (("pytorch_model.bin", True), ("old.bin", False)):
        shutil.copytree(base, folder / name)
        (folder / name / "model.safetensors").unlink()
        target = folder / name / "pytorch_model.bin"
        torch.save(weights, target, _use_new_zipfile_serialization=new)
    (folder / "model.gguf").mkdir()
    words = len(byte_tokenizer(merges=True))
    save_gguf(folder / "model.gguf" / "model.gguf", tiny_llama(words))
    adapter = save_adapter(folder / "adapter_model.safetensors", base)
    other = shutil.copytree(adapter, folder / "adapter_model.bin")
    torch.save(load_file(other / "adapter_model.safetensors"), other / "adapter_model.bin")
    (other / "adapter_model.safetensors").unlink()
    return folder


def _place(folder: Path, name: str) -> Path:
    """The weight file of one of the formats."""
    return folder / name / ("pytorch_model.bin" if name == "old.bin" else name)


def _case(good: Path, what: str, name: str, change: Callable[[Path], object]) -> Case:
    return Case(what, partial(_open, good, name, change))


def _open(good: Path, name: str, change: Callable[[Path], object], place: Path) -> bool:
    """Change a copy's weight file, and open it as a training run does."""
    copy = shutil.copytree(good / name, place / "m")
    file = copy / _place(good, name).name
    change(file)
    model = file if file.suffix == ".gguf" else copy
    try:
        load_model(model, device="cpu")
        if file.suffix == ".gguf":
            load_renderer(model, chat_template=True).encode_prompt("Who?")
    except ModelError as error:
        if str(copy) not in str(error):
            raise RuntimeError(f"the message does not name the model: {error}") from error
        raise
    return False


def _writes(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(file: Path) -> None:
        file.unlink()
        make(file)

    return replace


def _configure(key: str, value: int, file: Path) -> None:
    edit_json(file.parent / "config.json", **{key: value})


def _beside(name: str, file: Path) -> None:
    sparse(file.with_name(name))


def _header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def _tensor(**changes: Any) -> str:
    entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}
    return json.dumps({"model.norm.weight": entry})


_HEADERS = {
    "a header of 2**63 bytes": _header(_tensor(), 2**63),
    "a header beyond the file": _header(_tensor(), 10**6),
    "a deep header": _header("[" * 200_000),
    "no JSON": _header("{"),
    "a list": _header("[1]"),
    "an unknown type": _header(_tensor(dtype="F7")),
    "a huge shape": _header(_tensor(shape=[2**40, 2**40])),
    "a negative shape": _header(_tensor(shape=[-4, -4])),
    "offsets beyond the file": _header(_tensor(data_offsets=[0, 2**62], shape=[2**60])),
    "offsets backwards": _header(_tensor(data_offsets=[64, 0])),
    "an empty name": _header(_tensor().replace("model.norm.weight", "")),
    "a control sequence as name": _header(_tensor().replace("model", "\\u001b]52;c;\\u0007")),
}


class _Code:
    """A pickle that would write a file when it is read as ordinary pickles are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/hostile-code-was-run",)

    @classmethod
    def file(cls) -> bytes:
        return pickle.dumps({"model.norm.weight": cls()})


def _bomb(file: Path) -> None:
    """A pickle of 1 GiB in a zip file of 1 MB."""
    zeros = b"\0" * (1 << 20)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("m/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(1 << 10):
                entry.write(zeros)
        archive.writestr("m/version", "3\n")


def _gguf_lies(data: bytes) -> dict[str, bytes]:
    """Absurd counts and lengths in a GGUF file."""

    def set_at(at: int, value: bytes) -> bytes:
        return data[:at] + value + data[at + len(value) :]

    def after(key: bytes) -> int:
        return data.index(key) + len(key)

    huge = struct.pack("<Q", 2**60)
    types, layers = after(b"tokenizer.ggml.token_type"), after(b"llama.block_count") + 4
    name = after(b"token_embd.weight")
    return {
        "2**60 tensors": set_at(8, huge),
        "2**60 entries": set_at(16, huge),
        "2**60 numbers in an array": set_at(types + 8, huge),
        "2**60 texts in an array": set_at(after(b"tokenizer.ggml.tokens") + 8, huge),
        "an array of arrays": set_at(types + 4, struct.pack("<I", 9)),
        "a key of 2**60 bytes": set_at(24, huge),
        "2**31 layers": set_at(layers, struct.pack("<I", 2**31)),
        "9,999 layers": set_at(layers, struct.pack("<I", 9_999)),
        "2**31 numbers in a state": set_at(
            after(b"llama.embedding_length") + 4, struct.pack("<I", 2**31)
        ),
        "2**31 dimensions": set_at(name, struct.pack("<I", 2**31)),
        "dimensions of 2**60": set_at(name + 4, huge + huge),
        "an unknown type": set_at(name + 20, struct.pack("<I", 999)),
        "an offset of 2**60": set_at(name + 24, huge),
    }
