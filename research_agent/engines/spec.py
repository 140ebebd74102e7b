"""What the name of an engine says, such as ``serve:tp=2`` or ``server:URL,URL``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from research_agent.errors import ConfigError

ENGINES = (
    "transformers",
    "vllm[:tp=N,memory=SHARE]",
    "serve[:tp=N,dp=N,memory=SHARE]",
    "server:URL,URL,...",
    "server+nccl:URL,URL,...",
    "server+ipc:URL,URL,...",
)

WeightTransfer = Literal["folder", "nccl", "ipc"]
"""How weights get to servers."""

_SETTINGS = {"transformers": (), "vllm": ("tp", "memory"), "serve": ("tp", "dp", "memory")}
_TRANSFERS: dict[str, WeightTransfer] = {
    "server": "folder",
    "server+nccl": "nccl",
    "server+ipc": "ipc",
}


@dataclass(frozen=True)
class EngineSpec:
    """What the name of an engine says.

    Attributes:
        kind: "transformers", "vllm" (in this process), "serve" (servers that the run starts, one
            per node) or "server" (servers that run already).
        tp: GPUs that each copy of vLLM's weights is spread over.
        dp: copies per server.
        memory: share of each GPU's memory for vLLM's weights and cache; the rest is the learner's.
        urls: addresses of the servers.
        transfer: how weights get to them.
    """

    kind: Literal["transformers", "vllm", "serve", "server"]
    tp: int = 1
    dp: int = 1
    memory: float = 0.4
    urls: tuple[str, ...] = ()
    transfer: WeightTransfer = "folder"


def parse_engine(name: str) -> EngineSpec:
    """Read the name of an engine, one of ``ENGINES``.

    Raises:
        ConfigError: no engine has that name, or a setting has a value that cannot be used.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in _TRANSFERS:
        return EngineSpec("server", urls=tuple(rest.split(",")), transfer=_TRANSFERS[kind])
    if kind not in _SETTINGS or (colon and not rest):
        raise ConfigError(f"no engine is named {name!r}; there is {', '.join(ENGINES)}")
    given: dict[str, Any] = {}
    for setting in rest.split(",") if rest else ():
        key, _, text = setting.partition("=")
        try:
            value: float = float(text) if key == "memory" else int(text)
        except ValueError:
            value = 0
        if key not in _SETTINGS[kind] or not value > 0 or (key == "memory" and value >= 1):
            raise ConfigError(
                f"{setting!r} in --engine {name} is no setting of {kind}; write tp=N (GPUs per "
                "copy of the weights), dp=N (copies, for serve) or memory=SHARE (of each GPU, "
                "between 0 and 1)"
            )
        given[key] = value
    return EngineSpec(kind, **given)  # type: ignore[arg-type]


def has_servers(name: str) -> bool:
    """Whether the engine of that name samples on servers."""
    return name.partition(":")[0] in {"serve", *_TRANSFERS}
