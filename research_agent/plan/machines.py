"""The machines that a plan is made for: ``8xH100``, or ``2x8xH100`` for two nodes of eight."""

from __future__ import annotations

import re
from dataclasses import dataclass

from research_agent.errors import ConfigError

NODE = 8
"""The most GPUs in a node."""
NETWORK = 50e9
"""Bytes per second between the GPUs of two nodes: 400 Gbit/s for each GPU."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: bytes that a program can take.
        flops: dense bfloat16 peak, in FLOP/s.
        bandwidth: bandwidth of the memory, in bytes per second.
        link: bytes per second to the other GPUs of a node, in one direction.

    References:
        The makers' data sheets; memory as CUDA reports it.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float


GPUS = {
    "H200": Gpu(150.0e9, 989e12, 4.8e12, 450e9),
    "H100": Gpu(84.9e9, 989e12, 3.35e12, 450e9),
    "A100-80": Gpu(84.9e9, 312e12, 2.04e12, 300e9),
    "L40S": Gpu(47.7e9, 362e12, 0.86e12, 32e9),
    "RTX4090": Gpu(25.3e9, 165e12, 1.01e12, 32e9),
}


@dataclass(frozen=True, slots=True)
class Machines:
    """Nodes with GPUs of one kind.

    Attributes:
        nodes: number of nodes.
        per_node: GPUs of each.
        name: the kind of GPU, a key of ``GPUS``.
    """

    nodes: int
    per_node: int
    name: str

    @property
    def gpu(self) -> Gpu:
        """The kind of GPU."""
        return GPUS[self.name]

    @property
    def count(self) -> int:
        """All GPUs: one rank of the learner each."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        """Return what ``parse_machines`` reads."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.name}"


def parse_machines(text: str) -> Machines:
    """Read ``8xH100``, or ``2x8xH100`` for two nodes.

    Raises:
        ConfigError: no number, more than ``NODE`` GPUs in a node, or a GPU that is not known.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([A-Z][\w-]+)", text)
    if not found or found[3] not in GPUS:
        raise ConfigError(
            f"--plan takes GPUS such as 8xH100, or 2x8xH100 for two nodes, not {text!r}; known: "
            + ", ".join(GPUS)
        )
    if int(found[2]) > NODE:
        raise ConfigError(
            f"--plan {text}: a node has at most {NODE} GPUs; give the nodes too, such as "
            f"2x{NODE}x{found[3]}"
        )
    return Machines(int(found[1] or 1), int(found[2]), found[3])
