"""A policy's weights, written where other processes can read them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import RequestError
from research_agent.engines.servers.server import RELOAD_TIMEOUT, Server
from research_agent.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

READ_FILES = {"overrides": {"load_config": {"load_format": "auto"}}}
"""Arguments of vLLM's ``update_config`` for a server that started without weights."""

_BUCKET = 1 << 30  # bytes of a file, and what is held in memory at a time


class WeightFolder:
    """A temporary folder with a folder of safetensors for each version of the weights.

    Args:
        names: names and shapes that the weights must have.
        dtype: number format of what is written.
    """

    def __init__(self, names: WeightNames, dtype: torch.dtype) -> None:
        self._names = names
        self._dtype = dtype
        self._folder = tempfile.TemporaryDirectory(
            prefix="research-agent-weights-", ignore_cleanup_errors=True
        )

    @property
    def root(self) -> str:
        """The temporary folder, in which weights are under their names."""
        return self._folder.name

    def write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        """Write weights to a new folder, which is there as soon as it is complete.

        The weights are always consumed to their end: to yield them may be work of all ranks.

        Args:
            weights: all of the model's, tied ones once or more often.
            name: of the folder.

        Raises:
            EngineError: no space, or no permission.
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        final = Path(self.root) / name
        making = final.with_name(f"{name}.tmp")
        left = self._names.checked(weights)
        try:
            making.mkdir()
            self._fill(making, left)
            making.rename(final)
        except BaseException as error:
            shutil.rmtree(making, ignore_errors=True)
            for _ in left:
                pass
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise EngineError(
                    f"the weights cannot be written to {making}: {error}; free some space, or set "
                    "TMPDIR to a folder that has it and that all servers can read; the last "
                    "checkpoint is intact"
                ) from error
            raise

    def prune(self, names: Collection[str]) -> None:
        """Delete all folders but those of these names."""
        for folder in Path(self.root).iterdir():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self._folder.cleanup()

    def _fill(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write bucket after bucket.

        Tied names come behind all others, for servers that read the files in order: on a CPU vLLM
        packs a head of its own, which must not stay old.
        """
        bucket: dict[str, Tensor] = {}
        written: set[str] = set()
        size = files = 0
        for name, weight in weights:
            tied = not written.isdisjoint(self._names.ties[name])
            if bucket and (tied or size + weight.nbytes > _BUCKET):
                save_file(bucket, folder / f"{files:05d}.safetensors", {"format": "pt"})
                bucket, size, files = {}, 0, files + 1
            dtype = self._dtype if weight.is_floating_point() else weight.dtype
            bucket[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
            size += bucket[name].nbytes
            written.add(name)
        save_file(bucket, folder / f"{files:05d}.safetensors", {"format": "pt"})


async def reload_from(server: Server, folder: Path) -> None:
    """Let a server read its weights from a folder.

    Raises:
        EngineError: it was started in another way.
        RequestError: it does not answer, or fails.
    """
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    try:
        if not server.current:
            config = {"method": "update_config", "kwargs": READ_FILES}
            await server.ask("POST", "collective_rpc", config)
        await server.ask("POST", "collective_rpc", rpc, RELOAD_TIMEOUT)
    except RequestError as error:
        cure = "Can it read that folder? Elsewhere, set TMPDIR to one that all share"
        raise RequestError(f"no new weights from {folder}: {error}. {cure}") from None
