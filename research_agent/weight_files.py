"""Weights as files in a temporary folder, for samplers in other processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from research_agent.distributed import rank_and_size, run_together
from research_agent.engines.checks import CONTINUE, WeightNames
from research_agent.errors import EngineError
from research_agent.system.torchrun import torchrun

if TYPE_CHECKING:
    from torch import Tensor


class WeightFolder:
    """A temporary folder with a subfolder of safetensors for each version of the weights.

    Args:
        names: names and shapes that the weights must have; None takes any.
        dtype: number format to write; None keeps that of each weight.

    Attributes:
        root: the temporary folder.
    """

    def __init__(self, names: WeightNames | None = None, dtype: torch.dtype | None = None) -> None:
        self._names = names
        self._dtype = dtype
        self._folder = tempfile.TemporaryDirectory(
            prefix="research-agent-weights-", ignore_cleanup_errors=True
        )
        self.root = Path(self._folder.name)

    def write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Path:
        """Write weights to a new folder that appears when it is complete.

        Each weight has a file of its own, so that only one at a time is copied. The weights are
        always consumed to their end, because yielding them may be a collective.

        Args:
            weights: all weights of the model, tied ones once or more often.
            name: name of the folder in ``root``.

        Raises:
            EngineError: no space, or no permission.
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        final = self.root / name
        making = final.with_name(f"{name}.tmp")
        left = iter(self._names.checked(weights) if self._names else weights)
        try:
            making.mkdir()
            # Files are numbered, for servers that read them in order. Tied names come last: on a
            # CPU vLLM packs a head of its own, which must not stay old.
            for number, (weight_name, weight) in enumerate(left):
                dtype = self._dtype if self._dtype and weight.is_floating_point() else weight.dtype
                tensor = weight.detach().to("cpu", dtype).contiguous()
                save_file(
                    {weight_name: tensor}, making / f"{number:05d}.safetensors", {"format": "pt"}
                )
            making.rename(final)
        except BaseException as error:
            shutil.rmtree(making, ignore_errors=True)
            for _ in left:
                pass
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise EngineError(
                    f"the weights cannot be written to {making}: {error}; free some space, or set "
                    "TMPDIR to a folder that has it and that all servers can read. "
                    f"{CONTINUE}"
                ) from error
            raise
        return final

    def share(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Path:
        """Write weights once per machine; a collective, in which all ranks consume the weights.

        Args:
            weights: as for ``write``.
            name: name of the folder.

        Returns:
            The folder of this machine's first rank.

        Raises:
            EngineError, ModelError: as ``write``, on rank 0; ``StoppedError`` on the others.
        """
        local_rank = torchrun("LOCAL_RANK", 0)

        def work() -> Path | None:
            if local_rank == 0:
                return self.write(weights, name)
            for _ in weights:
                pass
            return None

        folder = run_together(work)[rank_and_size()[0] - local_rank]
        assert folder
        return folder

    def clear(self) -> None:
        """Delete all versions."""
        for folder in self.root.iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self._folder.cleanup()


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder, one at a time in memory."""
    for path in sorted(folder.iterdir()):
        yield from load_file(path).items()
