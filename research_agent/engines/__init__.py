"""Samplers, by name. An engine is one file; ``base.py`` says what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from research_agent.engines.base import Engine
    from research_agent.renderer import Renderer

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


def make_engine(
    name: str,
    model: Any,
    renderer: Renderer,
    *,
    max_slots: int,
    max_context: int | None = None,
    dtype: str | None = None,
    share: bool = False,
) -> Engine:
    """Make an engine that samples from a model.

    Args:
        name: one of ``ENGINES``; settings or addresses follow the engine's name.
        model: the policy, whose weights the engine copies.
        renderer: its tokenizer.
        max_slots: how many trajectories may be held at once.
        max_context: tokens of a trajectory; the model's own limit by default.
        dtype: number format of the copied weights, such as bfloat16; the model's own by default.
            Servers must have the same.
        share: use the model object itself, where nobody else does (an evaluation) and the engine
            can.

    Raises:
        ConfigError: no engine of that name, or it is not installed, or the GPUs are too few.
        EngineError: it does not start.
        ModelError: a model that the engine cannot run, or would run wrongly.
    """
    spec = parse_engine(name)
    if spec.kind == "transformers":
        from research_agent.engines.proved import proved_engine  # noqa: PLC0415 - torch

        return proved_engine(model, renderer, max_slots, max_context, dtype=dtype, share=share)
    if spec.kind == "vllm":
        from research_agent.engines.vllm import VllmEngine  # noqa: PLC0415

        return VllmEngine(
            model,
            renderer,
            max_slots,
            max_context,
            dtype=dtype,
            tensor_parallel=spec.tp,
            memory_share=spec.memory,
        )
    from research_agent.engines.servers.engine import (  # noqa: PLC0415 - torch
        connect_servers,
        serve_engine,
    )

    if spec.kind == "serve":
        return serve_engine(spec, model, renderer, max_slots, max_context, dtype=dtype)
    return connect_servers(
        model, renderer, spec.urls, max_context, transfer=spec.transfer, dtype=dtype
    )
