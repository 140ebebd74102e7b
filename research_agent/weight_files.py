"""Weights as files in the temporary directory, for the players of a machine.

All ranks gather the weights together, tensor by tensor; the first rank of each machine writes them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from research_agent.distributed import gather, rank_and_size
from research_agent.engines.checks import CONTINUE
from research_agent.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_FILE_BYTES = 1 << 30  # per file; the writing rank holds that much in memory


class WeightFiles:
    """A folder of weights. All ranks of a machine read the folder of its first rank."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="research-agent-player-"))
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def give(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Path:
        """Write weights; returns the folder to read them from.

        Raises:
            EngineError: they cannot be written.
        """
        folder = self.root / str(version)
        if self._local_rank:
            for _ in weights:  # all ranks gather them together
                pass
        else:
            try:
                folder.mkdir()
                _write(weights, folder)
            except Exception as error:
                if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                    raise
                raise EngineError(
                    f"the weights cannot be written to {folder}: {error}; free some space, or set "
                    f"TMPDIR to a folder that has it. {CONTINUE}"
                ) from error
        return gather([folder])[rank_and_size()[0] - self._local_rank]

    def drop(self, version: int) -> None:
        """Delete the files of a version, once the players of all ranks have read them."""
        gather([version])
        shutil.rmtree(self.root / str(version), ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.root, ignore_errors=True)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder, a file at a time in memory."""
    for path in sorted(folder.iterdir()):
        yield from load_file(path).items()


def _write(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    held: dict[str, Tensor] = {}
    size = files = 0
    for name, weight in weights:
        if held and size + weight.nbytes > _FILE_BYTES:
            save_file(held, folder / f"{files:05d}.safetensors")
            held.clear()
            size, files = 0, files + 1
        held[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += weight.nbytes
    save_file(held, folder / f"{files:05d}.safetensors")
