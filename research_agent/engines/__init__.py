"""Samplers, by name. An engine is one file; ``base.py`` says what it must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from research_agent.engines.spec import parse_engine

if TYPE_CHECKING:
    import torch

    from research_agent.engines.base import Engine
    from research_agent.renderer import Renderer


def make_engine(
    name: str,
    model: Any,
    renderer: Renderer,
    *,
    max_slots: int,
    max_context: int | None = None,
    dtype: str | None = None,
    share: bool = False,
    device: torch.device | None = None,
) -> Engine:
    """Make an engine that samples from a model.

    Args:
        name: one of ``spec.ENGINES``; settings or addresses follow the engine's name.
        model: the policy, whose weights the engine copies.
        renderer: its tokenizer.
        max_slots: how many trajectories may be held at once.
        max_context: tokens of a trajectory; the model's own limit by default.
        dtype: number format of the copied weights, such as bfloat16; the model's own by default.
            Servers must have the same.
        share: use the model object itself, where nobody else does (an evaluation) and the engine
            can.
        device: where the learner's weights are or will be, for servers, which get them from there;
            None: where the model is.

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
        return serve_engine(
            spec, model, renderer, max_slots, max_context, dtype=dtype, device=device
        )
    return connect_servers(
        model,
        renderer,
        spec.urls,
        max_context,
        transfer=spec.transfer,
        dtype=dtype,
        device=device,
    )
