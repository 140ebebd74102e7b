"""A policy's weights, written where other processes can read them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import RequestError
from research_agent.engines.servers.pool import RELOAD_TIMEOUT
from research_agent.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.engines.servers.pool import Server

_SHARD = 4 << 30  # bytes of a file: what is held in memory at a time


class WeightFolder:
    """A ``WeightTransfer``: a temporary folder with a folder of safetensors for each version.

    Args:
        model: whose names and shapes the weights must have, of the transformers library.
    """

    persistent = True

    def __init__(self, model: Any) -> None:
        self._names = WeightNames(model)
        self._folder = tempfile.TemporaryDirectory(
            prefix="research-agent-weights-", ignore_cleanup_errors=True
        )

    def publish(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        """Write weights to a new folder, which is there as soon as it is complete.

        Args:
            weights: all of the model's, tied ones once or more often.
            name: of the folder.

        Raises:
            EngineError: no space, or no permission.
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        final = Path(self._folder.name) / name
        making = final.with_name(f"{name}.tmp")
        try:
            making.mkdir()
            self._fill(making, weights)
            making.rename(final)
        except BaseException as error:
            shutil.rmtree(making, ignore_errors=True)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise EngineError(
                    f"the weights cannot be written to {making}: {error}; free some space, or set "
                    "TMPDIR to a folder that has it and that all servers can read; the last "
                    "checkpoint is intact"
                ) from error
            raise

    async def push(self, server: Server, name: str) -> None:
        """Let a server read the folder of this name.

        Raises:
            EngineError: it was started in another way.
            RequestError: it does not answer, or fails.
        """
        folder = Path(self._folder.name) / name
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            await server.need("POST", "collective_rpc", rpc, RELOAD_TIMEOUT)
        except RequestError as error:
            cure = "Can it read that folder? Elsewhere, set TMPDIR to one that all share"
            raise RequestError(f"no new weights from {folder}: {error}. {cure}") from None

    def prune(self, names: Collection[str]) -> None:
        """Delete all folders but those of these names."""
        for folder in Path(self._folder.name).iterdir():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self._folder.cleanup()

    def _fill(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        shard: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        given: set[str] = set()
        size = files = 0

        def save(tensors: dict[str, Tensor]) -> None:
            nonlocal files
            save_file(tensors, folder / f"{files:05d}.safetensors", {"format": "pt"})
            files += 1

        for name, weight in weights:
            self._names.require(name, weight)
            size += weight.nbytes
            if shard and size > _SHARD:
                save(shard)
                shard, size = {}, weight.nbytes
            shard[name] = weight.detach().to("cpu", copy=True).contiguous()
            last |= {tie: shard[name] for tie in self._names.ties[name] if tie != name}
            given.add(name)
        self._names.require_all(given)
        save(shard)
        for name, weight in last.items():
            # Tied names behind all others, for servers that read the files in order: on a CPU vLLM
            # packs a head of its own, which must not stay old.
            save({name: weight})
