"""Evaluate a model from a configuration: open model and environments, play, close them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from research_agent.config import EvalConfig
from research_agent.config_checks import validate_eval
from research_agent.environments import make_environments
from research_agent.evaluation.evaluate import evaluate
from research_agent.evaluation.fingerprint import header, model_fingerprint
from research_agent.evaluation.predictions import read_header
from research_agent.evaluation.summary import Summary


def evaluate_model(config: EvalConfig) -> Summary:
    """Play every task with a model; ``research-agent eval`` is this function.

    A folder that holds predictions of the same model and settings is continued: only missing, void
    and incomplete episodes are played.

    Args:
        config: environment, model, sampling and output folder.

    Returns:
        The means with their intervals, as in ``summary.json``.

    Raises:
        ConfigError: a setting cannot be used.
        PredictionsError: the output folder holds predictions of another model or other settings.
        ContextError: a prompt does not fit; the episodes that were played are kept.
    """
    validate_eval(config)
    split = {} if config.split is None else {"split": config.split}
    env_args = {**config.environment.env_args, **split}
    slots = config.sampling.max_in_flight or 128
    environments = make_environments(config.environment.env, slots, env_args)
    try:
        engine, renderer, fingerprint = _sampler(config, slots)
        written = getattr(renderer, "chat_template_date", "") or None
        policy = replace(config.policy, chat_template_date=written)
        config = replace(config, policy=policy)
        try:
            return evaluate(
                engine,
                environments,
                renderer,
                config.sampling,
                config.output,
                limit=config.limit,
                samples_per_task=config.samples_per_task,
                seed=config.seed,
                header=header(config, environments, fingerprint),
                log_tokens=config.log_tokens,
                show=not config.quiet,
            )
        finally:
            if hasattr(engine, "close"):
                engine.close()
    finally:
        environments.close()


def _sampler(config: EvalConfig, slots: int) -> tuple[Any, Any, str]:
    """Make engine and renderer of the model, and its fingerprint."""
    policy, sampling = config.policy, config.sampling
    if config.endpoint is not None:
        from research_agent.engines.openai import OpenAIEngine, OpenAIRenderer  # noqa: PLC0415

        words = OpenAIRenderer(policy.chat_template, policy.chat_template_args)
        endpoint = OpenAIEngine(config.endpoint, policy.model, words, concurrency=slots)
        return endpoint, words, f"{policy.model} at {config.endpoint.rstrip('/')}"
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.models.policy import (  # noqa: PLC0415
        episode_context,
        load_model,
        require_ends,
    )
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import open_renderer  # noqa: PLC0415  (these load torch)

    place = resolve_model(policy.model)  # once: a run that saves meanwhile has a newer checkpoint
    before = read_header(config.output).get("settings", {}).get("chat_template_date")
    renderer = open_renderer(policy, place, before)
    model = load_model(place, dtype=config.dtype, device=policy.device)
    require_ends(model, renderer)
    context = episode_context(model, sampling)
    engine = make_engine(
        sampling.engine,
        model,
        renderer,
        max_slots=slots,
        max_context=context,
        share=True,
    )
    return engine, renderer, model_fingerprint(place, getattr(model.config, "_commit_hash", None))
