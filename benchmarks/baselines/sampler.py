"""A model of the table, as it is named on the command line."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from research_agent.config import SamplingConfig


class Sampler:
    """A model that answers prompts; its weights are loaded when it is asked for the first time.

    Args:
        spec: [LABEL=]MODEL, or [LABEL=]NAME@URL for an OpenAI-compatible endpoint.
        sampling: temperature and limits.
        slots: prompts at the same time.
        dtype: number format of the weights.
        device: where they live.

    Attributes:
        label: what the table calls the model.
        name: folder or name of the model.
        endpoint: address of its endpoint, if it has one.
        chat: whether it is prompted through its chat template.
        fingerprint: what tells its weights apart from others.
    """

    def __init__(
        self, spec: str, sampling: SamplingConfig, *, slots: int, dtype: Any, device: str
    ) -> None:
        from research_agent.engines.remote import check_address, read_key  # noqa: PLC0415
        from research_agent.evaluation.fingerprint import model_fingerprint  # noqa: PLC0415
        from research_agent.models.source import resolve_model  # noqa: PLC0415 - loads torch

        self.spec = spec
        label, named, place = spec.partition("=")
        label, place = (label, place) if named else ("", spec)
        self.name, at, rest = place.partition("@http")
        self.endpoint = f"http{rest}".rstrip("/") if at else None
        if self.endpoint:  # it is part of the fingerprint, which is written into records
            check_address(self.endpoint, read_key("OPENAI_API_KEY") or "")
        self.label = label or Path(self.name).name
        self.chat = any(word in f"{label}/{self.name}".lower() for word in ("instruct", "chat"))
        self._sampling, self._slots = sampling, slots
        self._dtype, self._device = dtype, device
        self._place = self.name if self.endpoint else resolve_model(self.name)
        self.fingerprint = (
            f"{self.name} at {self.endpoint}" if self.endpoint else model_fingerprint(self._place)
        )

    @cached_property
    def renderer(self) -> Any:
        """The policy's tokenizer."""
        from research_agent.engines.openai import OpenAIRenderer  # noqa: PLC0415
        from research_agent.renderer import load_renderer  # noqa: PLC0415

        if self.endpoint:
            return OpenAIRenderer(chat_template=self.chat)
        return load_renderer(self._place, chat_template=self.chat)

    @cached_property
    def engine(self) -> Any:
        """An engine with its weights, or in front of its endpoint."""
        from research_agent.engines import make_engine  # noqa: PLC0415
        from research_agent.engines.openai import OpenAIEngine  # noqa: PLC0415
        from research_agent.models.policy import episode_context, load_model  # noqa: PLC0415

        sampling, slots = self._sampling, self._slots
        if self.endpoint:
            return OpenAIEngine(self.endpoint, self.name, self.renderer, concurrency=slots)
        model = load_model(self.name, dtype=self._dtype, device=self._device)
        context = episode_context(model, sampling)
        return make_engine(
            sampling.engine, model, self.renderer, max_slots=slots, max_context=context, share=True
        )

    def close(self) -> None:
        """Let go of the engine, where there is one."""
        engine = self.__dict__.pop("engine", None)
        if hasattr(engine, "close"):
            engine.close()
