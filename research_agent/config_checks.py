"""Refuse settings that cannot be used before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research_agent.chat_template import require_date
from research_agent.config import EvalConfig, SamplingConfig, TrainConfig
from research_agent.curriculum import parse_stages
from research_agent.errors import ConfigError
from research_agent.system.torchrun import torchrun


def validate(config: TrainConfig) -> None:
    """Refuse numbers that no run can have, and stages that cannot be read.

    Raises:
        ConfigError: naming the flag, its value, and what it must be.
    """
    parse_stages(config.rollout.stages)
    policy = config.policy
    require_chat_template(
        policy.chat_template, policy.chat_template_args, policy.chat_template_date
    )
    sampling, rollout = config.sampling, config.rollout
    learner, run = config.learner, config.run
    at_least_one: dict[str, float | None] = {
        "--prompts-per-step": rollout.prompts_per_step,
        "--group-size": rollout.group_size,
        **_lengths(sampling),
        "--minibatches": learner.minibatches,
        "--micro-batch-tokens": learner.micro_batch_tokens,
        "--bucket-bytes": learner.bucket_bytes,
        "--shard-ranks": learner.shard_ranks,
        "--save-every": run.save_every,
        "--keep": run.keep,
        "--eval-limit": run.eval_limit,
    }
    _require_at_least_one(at_least_one)
    not_negative: dict[str, float] = {
        "--steps": run.steps,
        "--eval-every": run.eval_every or 0,
        "--max-staleness": rollout.max_staleness,
        "--log-episodes": run.log_episodes,
        "--learning-rate": learner.learning_rate,
        "--warmup-steps": learner.warmup_steps,
        "--weight-decay": learner.weight_decay,
        "--lora-rank": learner.lora_rank,
        "--eval-temperature": run.eval_temperature,
    }
    require_seed(run.seed)
    for beta in learner.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"--betas has {beta}; both are from 0 to below 1")
    for flag, value in not_negative.items():
        if not value >= 0:
            raise ConfigError(f"{flag} is {value}; it must not be negative")
    rollout.tree_plan.require_group(rollout.group_size)
    if not sampling.temperature > 0:
        raise ConfigError(f"--temperature is {sampling.temperature}; training draws: above 0")
    if not learner.max_grad_norm > 0:
        raise ConfigError(f"--max-grad-norm is {learner.max_grad_norm}; it must be above 0")
    if run.time_limit is not None and not run.time_limit > 0:
        raise ConfigError(f"--time-limit is {run.time_limit}; it must be above 0 seconds")
    if not run.collective_timeout > 0:
        message = f"--collective-timeout is {run.collective_timeout}; it must be above 0 minutes"
        raise ConfigError(message)
    if run.collapse is not None and not 0 < run.collapse < 1:
        raise ConfigError(f"--collapse is {run.collapse}; it is a share, between 0 and 1")
    if not 0 <= config.algorithm.max_void_fraction <= 1:
        share = config.algorithm.max_void_fraction
        raise ConfigError(f"--max-void-fraction is {share}; it is a share, from 0 to 1")
    uncorrected = learner.old_logprobs == "recomputed" and learner.importance_sampling_cap is None
    if rollout.max_staleness and uncorrected:
        raise ConfigError(
            f"--max-staleness {rollout.max_staleness} with --old-logprobs recomputed would learn "
            "from old tokens as if they were new; add --importance-sampling-cap 2, or take "
            "--old-logprobs sampler"
        )
    if learner.minibatches > rollout.prompts_per_step:
        raise ConfigError(
            f"--minibatches {learner.minibatches} is more than --prompts-per-step "
            f"{rollout.prompts_per_step}; each update needs a task of its own"
        )


def require_one_process(command: str) -> None:
    """Refuse to run a command under torchrun, where every rank would do all of its work.

    Raises:
        ConfigError: this is one of several ranks.
    """
    ranks = torchrun("WORLD_SIZE", 1)
    if ranks > 1:
        raise ConfigError(
            f"{command} runs in one process; torchrun started {ranks}. Start it without torchrun"
        )


def require_chat_template(used: bool, args: Mapping[str, Any], date: str | None) -> None:
    """Refuse settings of a chat template without --chat-template, and text that is no date.

    Raises:
        ConfigError: naming the flag.
    """
    if date is not None:
        require_date(date)
    for flag, value in (("--chat-template-args", args), ("--chat-template-date", date)):
        if value and not used:
            raise ConfigError(f"{flag} without --chat-template has no effect; add --chat-template")


def require_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        ConfigError: naming the flag and its value.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"--seed is {seed}; give a number from 0 to 2**64 - 1")


def _lengths(sampling: SamplingConfig) -> dict[str, float | None]:
    return {
        "--max-prompt": sampling.max_prompt,
        "--max-response": sampling.max_response,
        "--max-turn-tokens": sampling.max_turn_tokens,
        "--max-in-flight": sampling.max_in_flight,
    }


def _require_at_least_one(values: Mapping[str, float | None]) -> None:
    for flag, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1")


def validate_eval(config: EvalConfig) -> None:
    """Refuse numbers that no evaluation can have.

    Raises:
        ConfigError: naming the flag, its value, and what it must be.
    """
    require_one_process("eval")
    require_seed(config.seed)
    at_least_one: dict[str, float | None] = {
        "--limit": config.limit,
        "--samples-per-task": config.samples_per_task,
        **_lengths(config.sampling),
    }
    _require_at_least_one(at_least_one)
    policy = config.policy
    require_chat_template(
        policy.chat_template, policy.chat_template_args, policy.chat_template_date
    )
    if config.endpoint is not None and policy.chat_template_date is not None:
        raise ConfigError(
            "--chat-template-date with --endpoint: the endpoint renders the template; leave it off"
        )
    temperature = config.sampling.temperature
    if not temperature >= 0:
        raise ConfigError(f"--temperature is {temperature}; it must not be negative")
    if config.samples_per_task > 1 and temperature == 0:
        raise ConfigError(
            f"--samples-per-task {config.samples_per_task} at --temperature 0 plays the same "
            "episode again and again; give for example --temperature 1"
        )
    if config.endpoint is not None and config.log_tokens:
        raise ConfigError(
            "--log-tokens with --endpoint: an endpoint of text tells no tokens; leave it off"
        )
