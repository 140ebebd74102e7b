"""The machines of a plan: ``8xH100``, or ``2x8xH100`` for two nodes of eight."""

from __future__ import annotations

import re
from dataclasses import dataclass

from research_agent.errors import ConfigError

NODE = 8
"""Most GPUs per node."""
NETWORK = 50e9
"""Bytes per second between GPUs of different nodes: 400 Gbit/s per GPU."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU, from the makers' data sheets; memory as CUDA reports it."""

    memory: float  # bytes
    flops: float  # dense bfloat16 peak, FLOP/s
    bandwidth: float  # memory bandwidth, bytes per second
    link: float  # to the other GPUs of the node, bytes per second in one direction


GPUS = {
    "H200": Gpu(150.0e9, 989e12, 4.8e12, 450e9),
    "H100": Gpu(84.9e9, 989e12, 3.35e12, 450e9),
    "A100-80": Gpu(84.9e9, 312e12, 2.04e12, 300e9),
    "L40S": Gpu(47.7e9, 362e12, 0.86e12, 32e9),
    "RTX4090": Gpu(25.3e9, 165e12, 1.01e12, 32e9),
}


@dataclass(frozen=True, slots=True)
class Machines:
    """Nodes with GPUs of one kind."""

    nodes: int
    per_node: int  # GPUs per node
    name: str  # kind of GPU, a key of GPUS

    @property
    def gpu(self) -> Gpu:
        """The kind of GPU."""
        return GPUS[self.name]

    @property
    def count(self) -> int:
        """Number of GPUs, which is the number of the learner's ranks."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        """Return the text that ``parse_machines`` reads."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.name}"


def parse_machines(text: str) -> Machines:
    """Read ``8xH100``, or ``2x8xH100`` for two nodes.

    Raises:
        ConfigError: the text has another form, more than ``NODE`` GPUs per node, or an unknown GPU.
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
