"""Samplers, by name. An engine is one file; ``base.py`` says what it must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from research_agent.engines.base import Engine
    from research_agent.renderer import Renderer

ENGINES = (
    "transformers",
    "vllm",
    "server:URL,URL,...",
    "server+nccl:URL,URL,...",
    "server+ipc:URL,URL,...",
)

_CARRIERS: dict[str, Literal["folder", "nccl", "ipc"]] = {
    "server": "folder",
    "server+nccl": "nccl",
    "server+ipc": "ipc",
}


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
        name: one of ``ENGINES``; the servers' addresses follow their engine's name.
        model: the policy, whose weights the engine copies.
        renderer: its tokenizer.
        max_slots: how many trajectories may be held at once.
        max_context: tokens of a trajectory; the model's own limit by default.
        dtype: number format of the copied weights, such as bfloat16; the model's own by default.
            Servers have their own.
        share: use the model object itself, where nobody else does (an evaluation) and the engine
            can.

    Raises:
        ConfigError: no engine of that name, or it is not installed.
        EngineError: it does not start.
        ModelError: a model that the engine cannot run, or would run wrongly.
    """
    if name == "transformers":
        from research_agent.engines.transformers import proved_engine  # noqa: PLC0415 - torch

        return proved_engine(model, renderer, max_slots, max_context, dtype=dtype, share=share)
    if name == "vllm":
        from research_agent.engines.vllm import VllmEngine  # noqa: PLC0415

        return VllmEngine(model, renderer, max_slots, max_context, dtype=dtype)
    kind, colon, urls = name.partition(":")
    if colon and kind in _CARRIERS:
        from research_agent.engines.servers.engine import ServerEngine  # noqa: PLC0415 - torch

        return ServerEngine(model, renderer, urls.split(","), max_context, by=_CARRIERS[kind])
    raise ConfigError(f"no engine is named {name!r}; there is {', '.join(ENGINES)}")
